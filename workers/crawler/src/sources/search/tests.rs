#![allow(clippy::unwrap_used)]

use super::adapter::Page;
use super::*;
use capfilt_schemas::TextSource;
use proptest::prelude::*;
use serde_json::json;

fn config(toml: &str) -> Result<SearchConfig, String> {
    let config: SearchConfig = toml::from_str(toml).map_err(|e| e.to_string())?;
    config.check("source").map_err(|e| e.to_string())?;
    Ok(config)
}

fn ready(name: &str) -> Adapter {
    config(&format!("adapter = '{name}'")).unwrap().adapter
}

fn read(adapter: &Adapter, answer: &serde_json::Value) -> Page {
    adapter.read(answer.to_string().as_bytes(), &Position::default()).unwrap()
}

#[test]
fn reads_openverse() {
    let adapter = ready("openverse");
    let key = Key::default();
    let url = adapter.address("red {page}&fox", &Position::default(), &key).unwrap();
    assert_eq!(url.as_str(), "https://api.openverse.org/v1/images/?q=red%20%7Bpage%7D%26fox&page=1&page_size=20");
    let answer = json!({"result_count": 41, "page_count": 3, "page_size": 20, "page": 1, "results": [
        {"id": "9d", "title": "Red fox", "url": "https://live.example/1.jpg", "foreign_landing_url": "https://p.example/1", "description": null,
         "license": "by", "tags": [{"name": "fox", "accuracy": null}, {"name": "snow"}]},
        {"id": "9e", "title": null, "url": null, "tags": null},
    ]});
    let page = read(&adapter, &answer);
    assert_eq!(page.results, 2);
    let texts = vec![(TextSource::Title, "Red fox".to_owned()), (TextSource::Tags, "fox, snow".to_owned())];
    let image = Image { url: "https://live.example/1.jpg".to_owned(), page: Some("https://p.example/1".to_owned()), texts };
    assert_eq!(page.images, [image]);
    let second = adapter.after(&Position::default(), &page).unwrap();
    assert!(adapter.address("fox", &second, &key).unwrap().as_str().ends_with("&page=2&page_size=20"));
    let third = adapter.after(&second, &page).unwrap();
    let page = adapter.read(answer.to_string().as_bytes(), &third).unwrap();
    assert!(adapter.after(&third, &page).is_none(), "page_count is 3");
}

#[test]
fn reads_commons() {
    let adapter = ready("wikimedia_commons");
    let answer = json!({"continue": {"gsroffset": 50, "continue": "gsroffset||"}, "query": {"pages": [
        {"pageid": 1, "ns": 6, "title": "File:Fox.jpg", "index": 1, "imagerepository": "local", "imageinfo": [{
            "thumburl": "https://upload.example/1024px-Fox.jpg", "url": "https://upload.example/Fox.jpg",
            "descriptionurl": "https://commons.example/wiki/File:Fox.jpg",
            "extmetadata": {"ObjectName": {"value": "Fox"}, "ImageDescription": {"value": "A <b>red</b>&nbsp;fox"}}}]},
        {"pageid": 2, "ns": 6, "title": "File:None.jpg"},
    ]}});
    let page = read(&adapter, &answer);
    assert_eq!(page.images[0].url, "https://upload.example/1024px-Fox.jpg");
    assert_eq!(page.images[0].texts[0], (TextSource::Description, "A <b>red</b>&nbsp;fox".to_owned()));
    assert_eq!((page.results, page.images.len()), (2, 1));
    let next = adapter.after(&Position::default(), &page).unwrap();
    let url = adapter.address("fox", &next, &Key::default()).unwrap();
    let has = |name: &str, value: &str| url.query_pairs().any(|(n, v)| n == name && v == value);
    assert!(has("gsroffset", "50") && has("continue", "gsroffset||") && has("gsrsearch", "filetype:bitmap fox"), "{url}");
    assert!(adapter.after(&next, &read(&adapter, &json!({"batchcomplete": true}))).is_none());
    let error = json!({"error": {"code": "maxlag", "info": "Waiting"}});
    assert_eq!(adapter.read(error.to_string().as_bytes(), &next).unwrap_err(), "error");
    assert_eq!(adapter.read(b"<html>", &next).unwrap_err(), "not_json");
}

const OWN: &str = "[adapter]\nname = 'own'\nurl = 'http://api.test/s?q={query}'\nper_page = 2\nitems = '/hits/*'\nimage = ['/src']\nrate = 1\n\
                   texts = { title = '/t' }\n";

#[test]
fn next_pages_are_cursors_or_addresses_of_the_same_site() {
    let cursor = config(&OWN.replace("{query}'", "{query}&c={cursor}'\nnext = '/next'")).unwrap().adapter;
    let page = read(&cursor, &json!({"hits": [], "next": "a b"}));
    let next = cursor.after(&Position::default(), &page).unwrap();
    assert_eq!(cursor.address("x", &next, &Key::default()).unwrap().as_str(), "http://api.test/s?q=x&c=a%20b");
    let link = config(&OWN.replace("{query}'", "{query}'\nnext = '/next'")).unwrap().adapter;
    let to = |next: &str| {
        let page = read(&link, &json!({"hits": [], "next": next}));
        let address = link.address("x", &link.after(&Position::default(), &page)?, &Key::default())?;
        Some(address.to_string())
    };
    assert_eq!(to("/s?q=x&from=2").as_deref(), Some("http://api.test/s?q=x&from=2"));
    assert_eq!(to("http://elsewhere.test/s"), None);
    assert!(link.after(&Position::default(), &read(&link, &json!({"next": null}))).is_none());
}

#[test]
fn settings_that_cannot_be_are_named() {
    let wrong = |from: &str, to: &str| config(&OWN.replace(from, to)).unwrap_err();
    assert!(config("adapter = 'google'").unwrap_err().contains("no adapter `google`: write one of openverse, wikimedia_commons"));
    assert!(wrong("{query}", "cat").contains("`source.adapter.url` cannot be used: it has no `{query}`"));
    assert!(wrong("{query}", "{query}{size}").contains("in braces, nothing else"));
    assert!(wrong("http:", "ftp:").contains("not an absolute http or https address"));
    assert!(wrong("{query}", "{query}{cursor}").contains("adapter.next"));
    assert!(wrong("/t'", "t'").contains("no JSON pointer"));
    assert!(wrong("rate = 1", "rate = 0").contains("above 0"));
    assert!(wrong("rate = 1", "rate = 1\nfoo = 1").contains("unknown field `foo`"));
    assert!(wrong("rate = 1", "rate = 1\nkey = { env = 'K' }").contains("either `header` or `parameter`"));
    assert!(wrong("[adapter]", "per_query = 0\n[adapter]").contains("`source.per_query`"));
}

#[test]
fn tasks_are_parts_of_the_list() {
    let config = config(&format!("queries = 250\nchunk = 100\n{OWN}")).unwrap();
    let parts = |queries| config.tasks(queries).1.map(|part| (part.first, part.count)).collect::<Vec<_>>();
    assert_eq!(parts(1000), [(0, 100), (100, 100), (200, 50)]);
    assert_eq!(parts(130), [(0, 100), (100, 30)]);
    assert_eq!(parts(0), []);
    let task = config.tasks(1000).0;
    assert_eq!(toml::from_str::<SearchConfig>(&toml::to_string(&task).unwrap()).unwrap(), task, "it reads back");
}

#[test]
fn html_is_left_out() {
    assert_eq!(
        clean(&plain("A <b>red</b>&nbsp;fox<br>in <a href='x>y'>snow</a><script>x<y</script> &amp; ice"), 99),
        "A red fox in snow & ice"
    );
    assert_eq!(plain("2 > 1"), "2 > 1");
    assert_eq!(clean(&plain("5 < 6 & 7"), 99), "5 < 6 & 7");
}

proptest! {
    #[test]
    fn any_answer_is_read(answer in "\\PC{0,60}", text in "[<>&a-z/!\"'; -]{0,60}") {
        let adapter = ready("openverse");
        let _ = adapter.read(answer.as_bytes(), &Position::default());
        plain(&text);
        let answer = json!({"results": [{"url": text.as_str(), "title": [text.as_str()], "tags": {"a": {"name": text.as_str()}}}]});
        prop_assert_eq!(read(&adapter, &answer).results, 1);
    }
}

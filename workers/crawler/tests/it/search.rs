//! Search APIs, by their own shapes and by shapes that they should not have.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use capfilt_crawler::{DiscoverConfig, QueryList, SearchConfig, SourceConfig};
use capfilt_runtime::StageError;
use capfilt_store::Store;
use serde_json::{Value, json};
use url::Url;

use crate::server::{Reply, Request, Server, ok, redirect, status, with};
use crate::support::{discover_stage, matched_lines, run_in, texts, web, worker};

/// A ready adapter, as it is but for TLS and its patience.
fn ready(adapter: &str, change: impl FnOnce(&mut SearchConfig)) -> DiscoverConfig {
    let mut search: SearchConfig = toml::from_str(&format!("adapter = '{adapter}'")).unwrap();
    search.adapter.url = search.adapter.url.replace("https://", "http://");
    search.adapter.rate = 1000.0;
    change(&mut search);
    DiscoverConfig { sources: vec![SourceConfig::Search(Box::new(search))], web: web(), ..DiscoverConfig::default() }
}

fn queries() -> QueryList {
    QueryList::from_texts(["cat", "Red Cat", "dog"])
}

async fn search(server: &Server, config: &DiscoverConfig, task: usize) -> Result<(RecordBatch, Value), StageError> {
    search_in(tempfile::tempdir().unwrap().path(), server, config, task).await
}

async fn search_in(
    folder: &Path,
    server: &Server,
    config: &DiscoverConfig,
    task: usize,
) -> Result<(RecordBatch, Value), StageError> {
    config.check().unwrap();
    let list = queries();
    let params = config.params(&list, "now").unwrap();
    let stage = discover_stage(&worker(server.address), list);
    run_in(folder, &Store::open("memory:").await.unwrap(), &stage, &params[task], vec![]).await
}

/// A parameter of the address that was asked for.
fn parameter(r: &Request, name: &str) -> String {
    let url = Url::parse(&format!("http://{}{}", r.host, r.path)).unwrap();
    url.query_pairs().find(|(n, _)| n == name).map(|(_, value)| value.into_owned()).unwrap_or_default()
}

fn answer(body: &Value) -> Reply {
    ok("application/json", body.to_string())
}

/// A result of Openverse.
fn image(n: u32, title: &str) -> Value {
    json!({
        "id": format!("{n}"), "title": title, "indexed_on": "2023-01-01T00:00:00Z", "url": format!("http://img.test/{n}.jpg"),
        "foreign_landing_url": format!("http://site.test/{n}"), "creator": "someone", "license": "by", "license_version": "2.0",
        "provider": "flickr", "source": "flickr", "category": null, "tags": [{"name": "pet", "accuracy": null}, {"name": "red cat"}],
        "fields_matched": ["title"], "mature": false, "height": 10, "width": 10,
    })
}

fn openverse(r: &Request) -> Reply {
    let page =
        |images: Vec<Value>| answer(&json!({"result_count": 3, "page_count": 2, "page_size": 20, "page": 1, "results": images}));
    match (parameter(r, "q").as_str(), parameter(r, "page").as_str()) {
        ("cat", "1") => page(vec![image(1, "A cat"), image(2, "Something else")]),
        // Once too fast: the same again, a little later.
        ("cat", "2") if r.before == 0 => with(status(429), "Retry-After", "1"),
        ("cat", "2") => page(vec![image(2, "Something else"), image(3, "Dog and <i>cat</i>")]),
        ("Red Cat", _) => ok("application/json", "{\"results\": [{\"url\": "),
        ("dog", "1") => page(vec![]),
        _ => status(500),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openverse_is_searched_page_by_page() {
    let server = Server::start(openverse).await;
    let mut config = ready("openverse", |_| {});
    config.web.max_retry_after = Duration::from_secs(2);
    let (rows, facts) = search(&server, &config, 0).await.unwrap();
    let tags = "pet, red cat | tags";
    let wanted = [
        "http://img.test/1.jpg | A cat | title | http://site.test/1 | [0]".to_owned(),
        format!("http://img.test/1.jpg | {tags} | http://site.test/1 | [0, 1]"),
        format!("http://img.test/2.jpg | {tags} | http://site.test/2 | [0, 1]"),
        "http://img.test/3.jpg | Dog and cat | title | http://site.test/3 | [0, 2]".to_owned(),
        format!("http://img.test/3.jpg | {tags} | http://site.test/3 | [0, 1]"),
    ];
    assert_eq!(matched_lines(&rows), wanted);
    assert_eq!(texts(&rows, "source")[0], "openverse");
    let fact = |name: &str| facts[name].as_u64().unwrap_or(0);
    assert_eq!((fact("queries_asked"), fact("queries_not_json"), fact("search_pages")), (3, 1, 3), "{facts}");
    assert_eq!((fact("texts_seen"), fact("texts_without_query")), (6, 1), "{facts}");
    let asked = server.asked();
    assert_eq!(asked.len(), 5, "{asked:?}");
    assert!(asked.iter().all(|address| address.starts_with("api.openverse.org/v1/images/?q=")), "no robots.txt: {asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commons_goes_on_as_it_is_told_to() {
    let page = |n: u32, description: &str| {
        json!({"pageid": n, "ns": 6, "title": format!("File:{n}.jpg"), "index": n, "imagerepository": "local", "imageinfo": [{
            "thumburl": format!("http://up.test/1024px-{n}.jpg"), "thumbwidth": 1024, "url": format!("http://up.test/{n}.jpg"),
            "descriptionurl": format!("http://commons.test/wiki/File:{n}.jpg"),
            "extmetadata": {"ImageDescription": {"value": description, "source": "commons-desc-page"}}}]})
    };
    let server = Server::start(move |r| match (parameter(r, "gsrsearch").as_str(), parameter(r, "gsroffset").as_str()) {
        ("filetype:bitmap cat", "") => {
            answer(&json!({"continue": {"gsroffset": 50, "continue": "gsroffset||"}, "query": {"pages": [
            page(1, "<p>A <a href=\"/wiki/Cat\">cat</a> &amp; its <b>bowl</b></p><p>Français : chat</p>"), page(2, "Nothing")]}}))
        }
        ("filetype:bitmap cat", "50") if parameter(r, "continue") == "gsroffset||" => {
            answer(&json!({"batchcomplete": true, "query": {"pages": [page(3, "A DOG")]}}))
        }
        ("filetype:bitmap dog", _) => answer(&json!({"error": {"code": "maxlag", "info": "Waiting for a database server"}})),
        // Nothing was found: there is no `query`.
        _ => answer(&json!({"batchcomplete": true})),
    })
    .await;
    let (rows, facts) = search(&server, &ready("wikimedia_commons", |_| {}), 0).await.unwrap();
    let wanted = [
        "http://up.test/1024px-1.jpg | A cat & its bowl Français : chat | description | http://commons.test/wiki/File:1.jpg | [0]",
        "http://up.test/1024px-3.jpg | A DOG | description | http://commons.test/wiki/File:3.jpg | [2]",
    ];
    assert_eq!(matched_lines(&rows), wanted);
    assert_eq!((facts["queries_asked"].as_u64(), facts["queries_error"].as_u64()), (Some(3), Some(1)), "{facts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_and_huge_answers_end() {
    let server = Server::start(|r| {
        let n: u32 = parameter(r, "page").parse().unwrap();
        match parameter(r, "q").as_str() {
            "cat" => answer(&json!({"results": (0..20).map(|i| image(n * 100 + i, "cat")).collect::<Vec<_>>()})),
            "Red Cat" => answer(&json!({"results": [image(1, "the same red cat")]})),
            _ => Reply::Endless(b"HTTP/1.1 200 OK\r\n\r\n{\"results\": [".to_vec(), vec![b'0'; 1 << 16], Duration::ZERO),
        }
    })
    .await;
    let begin = Instant::now();
    let config = ready("openverse", |search| (search.per_query, search.adapter.max_body) = (70, 1 << 20));
    let (rows, facts) = search(&server, &config, 0).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    let fact = |name: &str| facts[name].as_u64().unwrap_or(0);
    // Four pages are enough for 70 images; one page and three that bring nothing new for the other query.
    assert_eq!((fact("search_pages"), fact("queries_too_large")), (4 + 4, 1), "{facts}");
    let urls: std::collections::BTreeSet<String> = texts(&rows, "url").into_iter().collect();
    assert_eq!(urls.len(), 71);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_answers_nothing_fails_the_task() {
    let server = Server::start(|r| if parameter(r, "q") == "cat" { status(403) } else { ok("text/html", "<html>") }).await;
    let error = search(&server, &ready("openverse", |_| {}), 0).await.unwrap_err();
    let said = error.to_string();
    let why = "openverse left 3 of the task's 3 queries without a whole answer (http_4xx 1, not_json 2)";
    assert!(error.is_retryable() && said.contains(why), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_that_may_be_answered_later_are_not_given_up() {
    // What is wrong with the second page of one query and with the other one: nothing at last.
    let trouble: [fn() -> Reply; 3] = [
        || with(status(429), "Retry-After", "86400"),
        || status(503),
        || Reply::Late(Duration::from_secs(600), Box::new(status(200))),
    ];
    for trouble in trouble {
        let broken = Arc::new(AtomicBool::new(true));
        let server = {
            let broken = Arc::clone(&broken);
            Server::start(move |r| {
                let page = |n: u32, pages: u32| answer(&json!({"page_count": pages, "results": [image(n, "cat and dog")]}));
                match (parameter(r, "q").as_str(), parameter(r, "page").as_str()) {
                    ("cat", "1") => page(1, 2),
                    ("cat", _) | ("dog", _) if broken.load(Ordering::SeqCst) => trouble(),
                    ("cat", _) => page(2, 2),
                    ("dog", _) => page(3, 1),
                    // An answer that stays wrong does not hold up the others.
                    _ => status(403),
                }
            })
            .await
        };
        let folder = tempfile::tempdir().unwrap();
        let mut config = ready("openverse", |_| {});
        config.web.retries = 0;
        let error = search_in(folder.path(), &server, &config, 0).await.unwrap_err();
        let said = error.to_string();
        assert!(error.is_retryable() && said.contains("left 3 of the task's 3 queries without a whole answer (http_4"), "{said}");

        broken.store(false, Ordering::SeqCst);
        let (rows, facts) = search_in(folder.path(), &server, &config, 0).await.unwrap();
        let fact = |name: &str| facts[name].as_u64().unwrap_or(0);
        assert_eq!((fact("queries_asked"), fact("queries_http_4xx"), fact("search_pages")), (3, 1, 3), "{facts}");
        let urls: Vec<String> = texts(&rows, "url").into_iter().step_by(2).collect();
        assert_eq!(urls, ["http://img.test/1.jpg", "http://img.test/2.jpg", "http://img.test/3.jpg"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_further_attempt_asks_only_for_what_is_missing() {
    let broken = Arc::new(AtomicBool::new(true));
    let server = {
        let broken = Arc::clone(&broken);
        Server::start(move |r| match parameter(r, "q").as_str() {
            "dog" if broken.load(Ordering::SeqCst) => status(503),
            query => answer(&json!({"page_count": 1, "results": [image(query.len() as u32, "a cat"), {"title": "a cat", "url": "ftp://a.test/1.jpg"}]})),
        })
        .await
    };
    let (folder, config) = (tempfile::tempdir().unwrap(), ready("openverse", |_| {}));
    let error = search_in(folder.path(), &server, &config, 0).await.unwrap_err();
    assert!(error.to_string().contains("left 1 of the task's 3 queries without a whole answer (http_5xx 1)"), "{error}");
    broken.store(false, Ordering::SeqCst);
    let asked = server.asked().len();
    let (rows, facts) = search_in(folder.path(), &server, &config, 0).await.unwrap();
    assert_eq!(server.asked().len() - asked, 1, "{:?}", server.asked());
    let (undisturbed, same) = search(&server, &config, 0).await.unwrap();
    assert_eq!((rows, &facts), (undisturbed, &same));
    assert_eq!((facts["search_pages"].as_u64(), facts["search_results_unusable"].as_u64()), (Some(3), Some(3)), "{facts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_that_always_fails_does_not_cost_the_others() {
    let server = Server::start(move |r| match parameter(r, "q").as_str() {
        "dog" => status(503),
        _ => answer(&json!({"page_count": 1, "results": [image(1, "a cat")]})),
    })
    .await;
    let (folder, config) = (tempfile::tempdir().unwrap(), ready("openverse", |_| {}));
    assert!(search_in(folder.path(), &server, &config, 0).await.unwrap_err().is_retryable());
    let (rows, facts) = search_in(folder.path(), &server, &config, 0).await.unwrap();
    assert!(rows.num_rows() > 0 && facts["queries_http_5xx"] == 1, "{facts}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_are_parts_and_together_the_whole() {
    let server = Server::start(openverse).await;
    let whole = ready("openverse", |search| search.queries = Some(3));
    let (all, _) = search(&server, &whole, 0).await.unwrap();
    let parts = ready("openverse", |search| search.chunk = 1);
    assert_eq!(parts.params(&queries(), "now").unwrap().len(), 3);
    let (first, _) = search(&server, &parts, 0).await.unwrap();
    let (third, _) = search(&server, &parts, 2).await.unwrap();
    assert_eq!(matched_lines(&all), [matched_lines(&first), matched_lines(&third)].concat());
    assert!(search(&server, &parts, 1).await.is_err(), "its only query is answered with rubbish");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_comes_from_the_environment_and_goes_to_its_host_only() {
    // Cargo sets this one for every test.
    const SET: &str = "CARGO_PKG_NAME";
    let secret = std::env::var(SET).unwrap();
    let (bearer, key) = (format!("authorization: bearer {secret}"), secret.clone());
    let server = Server::start(move |r| {
        let told = r.head.to_ascii_lowercase().contains(&bearer) || parameter(r, "key") == key;
        match (r.host.as_str(), parameter(r, "q").as_str(), told) {
            ("api.openverse.org", "dog", true) => redirect("http://thief.test/?q=dog"),
            ("api.openverse.org", _, true) => {
                let mut at_the_api = image(1, "cat");
                (at_the_api["url"], at_the_api["foreign_landing_url"]) = ("#".into(), "".into());
                answer(&json!({"page_count": 1, "results": [at_the_api]}))
            }
            ("thief.test", _, false) => answer(&json!({"page_count": 1, "results": [image(2, "dog")]})),
            ("thief.test", _, true) => status(500),
            _ => status(401),
        }
    })
    .await;
    let with_key =
        |change: &dyn Fn(&mut capfilt_crawler::ApiKey)| ready("openverse", |search| change(search.adapter.key.as_mut().unwrap()));
    let (rows, facts) = search(&server, &with_key(&|key| key.env = SET.to_owned()), 0).await.unwrap();
    assert_eq!(texts(&rows, "url").last().map(String::as_str), Some("http://img.test/2.jpg"), "{facts}");
    let parameter = with_key(&|key| {
        (key.env, key.header, key.parameter) = (SET.to_owned(), None, Some("key".to_owned()));
    });
    let (rows, facts) = search(&server, &parameter, 0).await.unwrap();
    assert_eq!(rows.num_rows(), 6, "{:?}", matched_lines(&rows));
    assert!(!matched_lines(&rows).concat().contains(&secret), "{:?}", matched_lines(&rows));
    let told = format!("{facts} {:?}", serde_json::to_string(&parameter.params(&queries(), "now").unwrap()));
    assert!(!told.contains("capfilt-crawler\"") && told.contains(SET), "{told}");
    let missing = with_key(&|key| (key.env, key.required) = ("NO_SUCH_KEY_HERE".to_owned(), true));
    let error = search(&server, &missing, 0).await.unwrap_err();
    assert!(
        !error.is_retryable() && error.to_string().contains("the environment variable NO_SUCH_KEY_HERE is not set"),
        "{error}"
    );
}

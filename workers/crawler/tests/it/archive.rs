//! Discovering candidates in WARC and WAT files, from disk and over connections that break.

use std::path::Path;
use std::time::Duration;

use arrow::array::RecordBatch;
use capfilt_crawler::{ArchiveConfig, DiscoverConfig, DiscoverParams, QueryList, SourceConfig, WebConfig};
use capfilt_runtime::StageError;
use serde_json::Value;

use crate::archives::{Page, member, record, warc, wat};
use crate::server::{Reply, Request, Server, ok, redirect, status, with};
use crate::support::{discover_stage, lines, run, texts, web, worker};

fn pages() -> Vec<Page<'static>> {
    let page = |url, html| Page { url, headers: "", html };
    vec![
        page(
            "http://a.test/dir/one.html",
            "<html lang=en><meta name=robots content=noarchive><title>One</title><a href=/>home</a>\
             <img src=logo.png alt='the cat logo'><img src='/x.jpg?a=1&amp;b=2' alt='A &quot;red&quot;  cat' title='Ein Kätzchen &amp; a dog'>\
             <img src=no-query.jpg alt='nothing of note'><img src='data:image/gif;base64,AA' alt='a cat as data'>\
             <a href=/full.jpg title='the whole dog'><img src=thumb.jpg alt='a dog in small'></a><a href=p.html><img src=in.png alt='dog'></a>",
        ),
        page(
            "http://b.test/",
            "<base href='//cdn.test/i/'><img src=y.png alt='猫 and cat'><img src=logo.png alt='the cat logo'>",
        ),
        page("http://b.test/2", "<base href='//cdn.test/i/'><img src=logo.png alt='the cat logo'>"),
        page("http://c.test/", "<meta name=robots content='noai'><img src=n.jpg alt='an unwilling cat'>"),
        Page {
            url: "http://d.test/",
            headers: "X-Robots-Tag: noarchive\r\nX-Robots-Tag: noimageai\r\n",
            html: "<img src=n.jpg alt='a cat'>",
        },
    ]
}

/// What the pages above give, however they were read.
const WANTED: [&str; 8] = [
    "http://a.test/dir/logo.png | the cat logo | alt | http://a.test/dir/one.html",
    "http://a.test/x.jpg?a=1&b=2 | A \"red\" cat | alt | http://a.test/dir/one.html",
    "http://a.test/x.jpg?a=1&b=2 | Ein Kätzchen & a dog | title | http://a.test/dir/one.html",
    "http://a.test/full.jpg | a dog in small | alt | http://a.test/dir/one.html",
    "http://a.test/full.jpg | the whole dog | title | http://a.test/dir/one.html",
    "http://a.test/dir/in.png | dog | alt | http://a.test/dir/one.html",
    "http://cdn.test/i/y.png | 猫 and cat | alt | http://b.test/",
    "http://cdn.test/i/logo.png | the cat logo | alt | http://b.test/",
];

fn packed(records: &[Vec<u8>]) -> Vec<u8> {
    records.iter().flat_map(|r| member(r)).collect()
}

fn archive(paths: &[String]) -> DiscoverConfig {
    let source = serde_json::from_value(serde_json::json!({"kind": "archive", "paths": paths})).unwrap();
    DiscoverConfig { sources: vec![source], web: WebConfig { retries: 2, ..web() }, ..DiscoverConfig::default() }
}

fn queries() -> QueryList {
    QueryList::from_texts(["cat", "dog"])
}

fn tasks(config: &DiscoverConfig) -> Vec<DiscoverParams> {
    config.check().unwrap();
    config.params(&queries(), "now").unwrap()
}

async fn read(server: &Server, params: &DiscoverParams) -> Result<(RecordBatch, Value), StageError> {
    let stage = discover_stage(&worker(server.address), queries());
    run(&stage, params, vec![]).await
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn warc_and_wat_files_and_a_crawl_give_the_same_candidates() {
    let server = Server::start(|r| {
        if r.path == "/robots.txt" {
            return status(404);
        }
        let url = format!("http://{}{}", r.host, r.path);
        match pages().into_iter().find(|page| page.url == url) {
            Some(page) => page
                .headers
                .lines()
                .filter_map(|line| line.split_once(": "))
                .fold(ok("text/html; charset=utf-8", page.html), |reply, (name, value)| with(reply, name, value)),
            None => status(404),
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [
        ("1.warc.gz", packed(&warc(&pages()))),
        ("2.warc", warc(&pages()).concat()),
        ("3.warc.wat.gz", packed(&wat(&pages()))),
        ("4.wat", wat(&pages()).concat()),
    ] {
        let path = write(folder.path(), name, &bytes);
        let tasks = tasks(&archive(&[path]));
        let (rows, facts) = read(&server, &tasks[0]).await.unwrap();
        assert_eq!(lines(&rows), WANTED, "{name}");
        assert_eq!(texts(&rows, "source"), vec![name; WANTED.len()]);
        for (fact, n) in
            [("records_seen", 16), ("records_bad", 0), ("pages_read", 5), ("pages_opted_out", 2), ("images_opted_out", 2)]
        {
            assert_eq!(facts[fact], n, "{fact} in {facts}, {name}");
        }
    }
    let seeds: Vec<&str> = pages().iter().map(|p| p.url).collect();
    let source = serde_json::from_value(serde_json::json!({"kind": "pages", "seeds": seeds, "max_depth": 0})).unwrap();
    let crawl = DiscoverConfig { sources: vec![source], web: web(), ..DiscoverConfig::default() };
    let (rows, _) = read(&server, &tasks(&crawl)[0]).await.unwrap();
    let sorted = |mut lines: Vec<String>| {
        lines.sort();
        lines
    };
    assert_eq!(sorted(lines(&rows)), sorted(WANTED.map(str::to_owned).to_vec()));
}

#[tokio::test]
async fn each_file_is_a_task_that_its_content_names() {
    let folder = tempfile::tempdir().unwrap();
    let first = write(folder.path(), "a.warc.gz", &packed(&warc(&pages())));
    write(folder.path(), "b.warc.gz", &packed(&warc(&pages()[..1])));
    write(folder.path(), "wat.paths", b"one.wat.gz\ntwo.wat.gz\n");
    let config =
        archive(&[folder.path().to_string_lossy().into_owned(), folder.path().join("wat.paths").to_string_lossy().into_owned()]);
    let of = |config: &DiscoverConfig| tasks(config).iter().map(|t| serde_json::to_string(t).unwrap()).collect::<Vec<_>>();
    let before = of(&config);
    assert_eq!(before.len(), 4);
    assert!(before[2].contains("https://data.commoncrawl.org/one.wat.gz") && !before[2].contains("\"list\""));
    assert!(before[0].contains("\"list\""));
    // What else is read does not change a task, what is in its own file does.
    assert_eq!(of(&archive(std::slice::from_ref(&first))), before[..1]);
    let planned = tasks(&config);
    write(folder.path(), "a.warc.gz", &packed(&warc(&pages()[1..])));
    let after = of(&config);
    assert_ne!(after[0], before[0]);
    assert_eq!(after[1..], before[1..]);
    let server = Server::start(|_| status(404)).await;
    let error = read(&server, &planned[0]).await.unwrap_err();
    assert!(error.to_string().contains("needs the archive with digest"), "{error}");
}

#[tokio::test]
async fn a_file_without_records_fails_clearly() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(|_| status(404)).await;
    for bytes in [b"<html>".to_vec(), member(b"<html>"), Vec::new()] {
        let path = write(folder.path(), "x.warc.gz", &bytes);
        let error = read(&server, &tasks(&archive(&[path]))[0]).await.unwrap_err();
        assert!(!error.is_retryable() && error.chain().contains("no WARC record can be read in it"), "{}", error.chain());
    }
    // Records, but none about pages: nothing to find is no error.
    let path = write(folder.path(), "y.warc", &record("warcinfo", "y.warc", "application/warc-fields", b"software: x\r\n"));
    assert_eq!(read(&server, &tasks(&archive(&[path]))[0]).await.unwrap().0.num_rows(), 0);
}

/// Where the range begins that is asked for, if one is.
fn first_byte(r: &Request) -> Option<usize> {
    r.head.lines().find_map(|l| l.strip_prefix("range: bytes=")?.split('-').next()?.parse().ok())
}

/// A file server that answers ranges, and breaks off after so many bytes.
fn broken(file: Vec<u8>, after: usize) -> impl Fn(&Request) -> Reply {
    move |r| {
        let from = first_byte(r);
        let (code, place) = match from {
            Some(from) => (206, format!("Content-Range: bytes {from}-{}/{}\r\n", file.len() - 1, file.len())),
            None => (200, String::new()),
        };
        let from = from.unwrap_or(0);
        let head = format!("HTTP/1.1 {code} x\r\nETag: \"v1\"\r\n{place}Content-Length: {}\r\n\r\n", file.len() - from);
        let part = &file[from..file.len().min(from + after)];
        Reply::Raw([head.as_bytes(), part].concat())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_download_goes_on_where_it_broke() {
    let file = packed(&warc(&pages()));
    let url = "http://archive.test/x.warc.gz";
    let params = tasks(&archive(&[url.to_owned()]));
    let third = file.len().div_ceil(3);
    let server = Server::start(broken(file.clone(), third)).await;
    let (rows, facts) = read(&server, &params[0]).await.unwrap();
    assert_eq!(lines(&rows), WANTED);
    assert_eq!(facts["records_bad"], 0);
    assert_eq!(server.asked(), ["archive.test/x.warc.gz"; 3], "robots.txt is for crawlers, not for a file that was named");

    // Servers that know no ranges send it all again.
    let copy = file.clone();
    let server = Server::start(move |r| match r.before {
        0 => Reply::Reset(
            [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", copy.len()).as_bytes(), &copy[..third]].concat(),
        ),
        1 => status(503),
        _ => ok("application/gzip", copy.clone()),
    })
    .await;
    assert_eq!(lines(&read(&server, &params[0]).await.unwrap().0), WANTED);

    // An answer without a length, behind a redirect.
    let copy = file.clone();
    let server = Server::start(move |r| match r.path.as_str() {
        "/x.warc.gz" => redirect("http://mirror.test/real"),
        _ => Reply::Raw([b"HTTP/1.1 200 OK\r\n\r\n".as_slice(), &copy].concat()),
    })
    .await;
    assert_eq!(lines(&read(&server, &params[0]).await.unwrap().0), WANTED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_is_read_from_its_store() {
    let of = |server: &Server| {
        let endpoint = format!("http://{}", server.address);
        let options = serde_json::json!({
            "aws_endpoint": endpoint, "aws_allow_http": "true", "aws_skip_signature": "true", "aws_region": "us-east-1",
        });
        let source = serde_json::json!({"kind": "archive", "paths": ["s3://bucket/crawl/x.warc.gz"], "options": options});
        let source = serde_json::from_value(source).unwrap();
        tasks(&DiscoverConfig { sources: vec![source], web: web(), ..DiscoverConfig::default() }).remove(0)
    };
    let file = packed(&warc(&pages()));
    let third = file.len().div_ceil(3);
    let server = Server::start(broken(file, third)).await;
    let (rows, facts) = read(&server, &of(&server)).await.unwrap();
    assert_eq!(lines(&rows), WANTED);
    assert_eq!(facts["records_bad"], 0);
    assert!(server.asked().iter().all(|asked| asked.ends_with("/bucket/crawl/x.warc.gz")), "{:?}", server.asked());

    // It stalls, and tells no ETag by which its client could go on by itself.
    let file = packed(&warc(&pages()));
    let stalls = move |r: &Request| {
        let from = first_byte(r);
        let end = file.len();
        match from {
            None => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {end}\r\n\r\n");
                Reply::Endless([head.as_bytes(), &file[..third]].concat(), Vec::new(), Duration::from_millis(50))
            }
            Some(from) => {
                let head = format!(
                    "HTTP/1.1 206 x\r\nContent-Range: bytes {from}-{}/{end}\r\nContent-Length: {}\r\n\r\n",
                    end - 1,
                    end - from
                );
                Reply::Raw([head.as_bytes(), &file[from..]].concat())
            }
        }
    };
    let server = Server::start(stalls).await;
    assert_eq!(lines(&read(&server, &of(&server)).await.unwrap().0), WANTED);

    let server = Server::start(|_| status(404)).await;
    let error = read(&server, &of(&server)).await.unwrap_err();
    assert!(!error.is_retryable() && error.chain().contains("cannot read `s3://bucket/crawl/x.warc.gz`"), "{}", error.chain());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_without_progress_ends() {
    let file = packed(&warc(&pages()));
    let half = file.len() / 2;
    let params = tasks(&archive(&["http://archive.test/x.warc.gz".to_owned()]));
    let failed = async |answer: Box<dyn Fn(&Request) -> Reply + Send + Sync>| {
        let server = Server::start(answer).await;
        let error = tokio::time::timeout(Duration::from_secs(30), read(&server, &params[0])).await.unwrap().unwrap_err();
        (error.is_retryable(), error.chain(), server.asked().len())
    };
    let (retry, why, asked) = failed(Box::new(|_| status(404))).await;
    assert!(!retry && why.contains("http 404") && asked == 1, "{why} {asked}");
    let (retry, why, asked) = failed(Box::new(|_| status(503))).await;
    assert!(retry && why.contains("http 503") && asked == 3, "{why} {asked}");
    let head = format!("HTTP/1.1 200 OK\r\nETag: \"v1\"\r\nContent-Length: {}\r\n\r\n", file.len());
    let stall = [head.as_bytes(), &file[..half]].concat();
    let (retry, why, asked) =
        failed(Box::new(move |_| Reply::Endless(stall.clone(), Vec::new(), Duration::from_millis(100)))).await;
    assert!(retry && why.contains("stalls") && asked == 3, "{why} {asked}");
    // Half of one state of the file and half of another are no file.
    let copy = file.clone();
    let changing = move |r: &Request| {
        let head = format!("HTTP/1.1 200 OK\r\nETag: \"v{}\"\r\nContent-Length: {}\r\n\r\n", r.before, copy.len());
        Reply::Raw([head.as_bytes(), &copy[..half]].concat())
    };
    let (retry, why, asked) = failed(Box::new(changing)).await;
    assert!(retry && why.contains("changed while it was read") && asked == 2, "{why} {asked}");
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let refused = |paths: &[&str], more: Value| {
        let mut source = serde_json::json!({"kind": "archive", "paths": paths});
        source.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let source: SourceConfig = serde_json::from_value(source).unwrap();
        DiscoverConfig { sources: vec![source], ..DiscoverConfig::default() }.check().map_err(|e| e.to_string())
    };
    let none = serde_json::json!({});
    assert!(refused(&[], none.clone()).unwrap_err().contains("discover.sources[0].paths"));
    assert!(refused(&["ftp://mine/x.warc.gz"], none.clone()).unwrap_err().contains("`ftp://mine/x.warc.gz` cannot be read"));
    assert!(refused(&["s3://mine/x.warc.gz", "gs://mine/x.wat.gz", "az://mine/x.wat"], none).is_ok());
    let secret = serde_json::json!({"options": {"aws_secret_access_key": "x"}});
    assert!(refused(&["s3://mine/x.wat"], secret).unwrap_err().contains("set it in the environment"));
    assert!(refused(&["x.warc"], serde_json::json!({"count": 0})).unwrap_err().contains("count"));
    assert!(
        refused(&["s3://commoncrawl/x.wat.gz", "x/*.warc", "http://a.test/x"], serde_json::json!({"count": 3, "seed": 5}))
            .is_ok()
    );
    let mut config: ArchiveConfig =
        serde_json::from_value(serde_json::json!({"paths": ["a/*.wat", "/b", "http://c.test/d"]})).unwrap();
    config.make_absolute(Path::new("/run"));
    assert_eq!(config.paths, ["/run/a/*.wat", "/b", "http://c.test/d"]);
    assert_eq!(config.base, "https://data.commoncrawl.org/");
}

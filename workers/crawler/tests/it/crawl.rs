//! Discovering candidates on a web that sets traps, and in lists.

use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use capfilt_crawler::{DiscoverConfig, ListConfig, PagesConfig, QueryList, SourceConfig, WebConfig};
use serde_json::Value;

use crate::server::{Reply, Request, Server, ok, redirect, status, with};
use crate::support::{discover, discover_stage, gzip, matched_lines, run, texts, web, worker};

fn html(body: &str) -> Reply {
    ok("text/html; charset=utf-8", format!("<!doctype html><body>{body}"))
}

/// A site with every kind of trap. Its answers are the same however often and in whatever order it is asked.
fn site(r: &Request) -> Reply {
    match (r.host.as_str(), r.path.as_str()) {
        ("a.test", "/robots.txt") => {
            ok("text/plain", "User-agent: *\nDisallow: /private/\nSitemap: /sitemap.xml\nSitemap: http://a.test/none.xml\n")
        }
        ("a.test", "/sitemap.xml") => ok("text/xml", "<urlset><url><loc>http://a.test/unlinked.html</loc></url></urlset>"),
        ("a.test", "/") => html(
            "<img src=logo.png alt='the cat logo'><a href=/p1.html>1</a><a href='/p2.html?sid=9'>2</a><a href='/p2.html?sid=10'>2</a>\
             <a href=/private/secret.html>3</a><a rel=nofollow href=/hidden.html>4</a><a href=//b.test/>5</a><a href=http://c.test/>6</a>\
             <a href=/cal/1/2>7</a><a href=/endless>8</a><a href=/drip>9</a><a href=/gone>10</a><a href=/moved>11</a><a href=/out>12</a>\
             <a href=/noai.html>13</a><a href=/noai-header.html>14</a><a href=/notes.txt>15</a><a href=/nofollow.html>16</a><a href=/l/>17</a>",
        ),
        ("a.test", "/p1.html") => html(
            "<img src=logo.png alt='the cat logo'><img src=x.jpg alt='A dog on a red cat' title='nothing to see'>\
             <figure><img src=//img.test/y.jpg alt='no query here'><figcaption>Dogs and a dog</figcaption></figure><a href=/deep1.html>d</a>",
        ),
        ("a.test", "/p2.html") => html("<base href=/other/><img src=z.jpg alt='RED CAT!'><img src=z.jpg alt='red cat?'>"),
        ("a.test", "/unlinked.html") => html("<img src=u.jpg alt='a cat from the sitemap'>"),
        ("a.test", "/endless") => {
            let page = "<img src=e.jpg alt='an endless cat'>".repeat(100);
            Reply::Endless(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n".to_vec(), page.into_bytes(), Duration::ZERO)
        }
        ("a.test", "/drip") => Reply::Endless(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<img src=d.jpg alt='a dripping cat'>".to_vec(),
            b" ".to_vec(),
            Duration::from_millis(100),
        ),
        ("a.test", "/moved") => redirect("/target.html"),
        ("a.test", "/target.html") => html("<img src=t.jpg alt='a cat behind a redirect'>"),
        ("a.test", "/out") => redirect("http://c.test/"),
        ("a.test", "/noai.html") => {
            html("<meta name=robots content='noai'><img src=n.jpg alt='an artist&apos;s cat'><a href=/after-noai.html>x</a>")
        }
        ("a.test", "/after-noai.html") => html("<img src=a.jpg alt='a cat after it'>"),
        ("a.test", "/noai-header.html") => with(html("<img src=n2.jpg alt='an artist cat'>"), "X-Robots-Tag", "noimageai"),
        ("a.test", "/nofollow.html") => html("<meta name=robots content=nofollow><a href=/hidden.html>x</a>"),
        ("a.test", "/notes.txt") => ok("text/plain", "<img src=k.jpg alt='a plain cat'>"),
        ("a.test", path) if path.starts_with("/l/") => html("<a href=l/>deeper</a><a href=../l/>same</a>"),
        ("a.test", path) if path.starts_with("/cal/") => {
            let n: u32 = path.split(['/', '?', '=']).filter_map(|s| s.parse().ok()).next().unwrap_or(0);
            html(&format!("<a href=/cal/{}/{}>next</a><a href='?day={n}'>day</a><a href='?day={n}9'>day</a>", n + 1, n + 2))
        }
        ("a.test", path) if path.starts_with("/deep") => {
            let n: u32 = path.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
            html(&format!("<img src=deep{n}.jpg alt='cat number {n}'><a href=/deep{}.html>d</a>", n + 1))
        }
        ("b.test", "/") => {
            let page = gzip(b"<meta charset=latin1><img src=b.jpg alt='caf\xe9 dog &amp; h\xf6hle'>");
            with(ok("text/html", page), "Content-Encoding", "gzip")
        }
        _ => status(404),
    }
}

fn config(server: &Server) -> DiscoverConfig {
    let port = server.address.port();
    assert_ne!(port, 0);
    let pages = PagesConfig {
        seeds: vec!["http://a.test/".to_owned()],
        hosts: vec!["b.test".to_owned()],
        max_pages_per_shape: 6,
        max_depth: 6,
        max_page_bytes: 50_000,
        ..PagesConfig::default()
    };
    DiscoverConfig { sources: vec![SourceConfig::Pages(pages)], web: web(), ..DiscoverConfig::default() }
}

async fn crawl(server: &Server, config: &DiscoverConfig, connections: usize) -> (RecordBatch, Value) {
    let queries = QueryList::from_texts(["cat", "Red-Cat", "dog", "café dog"]);
    let mut route = worker(server.address);
    route.connections = connections;
    discover(&route, queries, config).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crawl_finds_what_is_allowed_and_ends() {
    let server = Server::start(site).await;
    let begin = Instant::now();
    let (rows, facts) = crawl(&server, &config(&server), 16).await;
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    let mut found = matched_lines(&rows);
    // Level by level; within a level hosts take turns, and b.test has one page.
    let first = ["http://a.test/logo.png | the cat logo | alt | http://a.test/ | [0]"];
    assert_eq!(found[..1], first);
    found.sort();
    let mut wanted = vec![
        "http://a.test/a.jpg | a cat after it | alt | http://a.test/after-noai.html | [0]",
        "http://a.test/deep1.jpg | cat number 1 | alt | http://a.test/deep1.html | [0]",
        "http://a.test/deep2.jpg | cat number 2 | alt | http://a.test/deep2.html | [0]",
        "http://a.test/deep3.jpg | cat number 3 | alt | http://a.test/deep3.html | [0]",
        "http://a.test/deep4.jpg | cat number 4 | alt | http://a.test/deep4.html | [0]",
        "http://a.test/deep5.jpg | cat number 5 | alt | http://a.test/deep5.html | [0]",
        "http://a.test/e.jpg | an endless cat | alt | http://a.test/endless | [0]",
        "http://a.test/logo.png | the cat logo | alt | http://a.test/ | [0]",
        "http://a.test/other/z.jpg | RED CAT! | alt | http://a.test/p2.html | [0, 1]",
        "http://a.test/other/z.jpg | red cat? | alt | http://a.test/p2.html | [0, 1]",
        "http://a.test/t.jpg | a cat behind a redirect | alt | http://a.test/target.html | [0]",
        "http://a.test/u.jpg | a cat from the sitemap | alt | http://a.test/unlinked.html | [0]",
        "http://a.test/x.jpg | A dog on a red cat | alt | http://a.test/p1.html | [0, 1, 2]",
        "http://b.test/b.jpg | café dog & höhle | alt | http://b.test/ | [2, 3]",
        "http://img.test/y.jpg | Dogs and a dog | figcaption | http://a.test/p1.html | [2]",
    ];
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    assert_eq!(texts(&rows, "source"), vec!["pages"; wanted.len()]);
    let ids: Vec<String> =
        texts(&rows, "url").iter().zip(texts(&rows, "text")).map(|(u, t)| capfilt_schemas::sample_id(u, &t)).collect();
    assert_eq!(texts(&rows, "sample_id"), ids);

    let asked = server.asked();
    let hits = |part: &str| asked.iter().filter(|a| a.contains(part)).count();
    assert_eq!(asked[0], "a.test/robots.txt");
    assert_eq!((hits("/private/"), hits("/hidden.html"), hits("sid=")), (0, 0, 0));
    assert_eq!(server.hits("c.test/robots.txt") + server.hits("c.test/"), 2, "only where a redirect led, and nothing came of it");
    assert_eq!(hits("a.test/p2.html"), 1, "one page under many session ids");
    assert!(hits("/cal/") <= 12 && hits("/l/") <= 6, "traps end: {asked:?}");
    assert_eq!(hits("/drip"), 2, "a page that times out is tried again once");
    for (fact, n) in [
        ("pages_opted_out", 2),
        ("pages_timeout", 1),
        ("pages_not_html", 1),
        ("pages_robots", 1),
        ("images_opted_out", 2),
        ("sitemaps_read", 1),
    ] {
        assert_eq!(facts[fact], n, "{fact} in {facts}");
    }
    assert_eq!(facts["texts_seen"].as_u64().unwrap() - facts["texts_without_query"].as_u64().unwrap(), wanted.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_pages_are_visited_whatever_the_speed() {
    let fast = Server::start(site).await;
    let mut config = config(&fast);
    let SourceConfig::Pages(pages) = &mut config.sources[0] else { panic!() };
    pages.max_pages = 15;
    let (wanted, _) = crawl(&fast, &config, 32).await;
    for connections in [1, 7] {
        let slow = Server::start(move |r| {
            let pause = r.path.bytes().map(u64::from).sum::<u64>() * (connections as u64 + 3) % 40;
            Reply::Late(Duration::from_millis(pause), Box::new(site(r)))
        })
        .await;
        let (rows, _) = crawl(&slow, &config, connections).await;
        assert_eq!(matched_lines(&rows), matched_lines(&wanted));
        assert_eq!(rows, wanted);
    }
}

#[tokio::test]
async fn what_pages_ask_for_can_be_left_aside() {
    let server = Server::start(site).await;
    let mut config = config(&server);
    config.web = WebConfig { opt_out: false, ..config.web };
    let (rows, _) = crawl(&server, &config, 16).await;
    assert!(texts(&rows, "text").contains(&"an artist cat".to_owned()));
    assert_eq!(server.hits("a.test/hidden.html"), 1);
}

#[tokio::test]
async fn lists_are_matched_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("urls.csv");
    std::fs::write(&path, "url,caption\nhttp://a.test/1,A cat\nhttp://a.test/2,nothing\nnot an address,dog\n").unwrap();
    let list = ListConfig { path, format: None, url_col: "url".to_owned(), caption_col: "caption".to_owned(), verify_hash: None };
    let config = DiscoverConfig { sources: vec![SourceConfig::List(list)], ..DiscoverConfig::default() };
    let server = Server::start(|_| status(404)).await;
    let (rows, facts) = crawl(&server, &config, 1).await;
    assert_eq!(matched_lines(&rows), ["http://a.test/1 | A cat | list | - | [0]", "not an address | dog | list | - | [2]"]);
    assert_eq!(texts(&rows, "source"), ["urls.csv", "urls.csv"]);
    assert_eq!((facts["texts_seen"].as_u64(), facts["texts_without_query"].as_u64()), (Some(3), Some(1)));
}

#[tokio::test]
async fn a_crawl_that_finds_no_way_in_fails_and_says_why() {
    let server = Server::start(|_| status(404)).await;
    let queries = QueryList::from_texts(["cat"]);
    let error = discover(&worker(server.address), queries, &config(&server)).await.unwrap_err();
    let said = error.to_string();
    assert!(error.is_retryable() && said.contains("starting from http://a.test/ (http_4xx 1)"), "{said}");
}

#[tokio::test]
async fn another_query_list_is_refused() {
    let server = Server::start(|_| status(404)).await;
    let stage = discover_stage(&worker(server.address), QueryList::from_texts(["cat"]));
    let other = QueryList::from_texts(["dog"]);
    let error = run(&stage, &config(&server).params(&other, "now").unwrap()[0], vec![]).await.unwrap_err();
    assert!(!error.is_retryable() && error.to_string().contains("needs the query list with digest"), "{error}");
}

#[test]
fn settings_are_read_from_toml_like_text_and_refused_when_unknown() {
    let read = |json: Value| serde_json::from_value::<DiscoverConfig>(json).map_err(|e| e.to_string());
    let good = read(serde_json::json!({"sources": [{"kind": "pages", "seeds": ["http://a.test/"], "max_page_bytes": "1 MiB"},
        {"kind": "list", "path": "x.csv", "caption_col": "TEXT"}], "web": {"timeout": "1.5s"}}))
    .unwrap();
    assert_eq!(good.web.timeout, Duration::from_millis(1500));
    let SourceConfig::Pages(pages) = &good.sources[0] else { panic!() };
    assert_eq!((pages.max_page_bytes, pages.max_depth), (1 << 20, 8));
    let back = serde_json::to_value(&good).unwrap();
    assert_eq!(serde_json::from_value::<DiscoverConfig>(back).unwrap(), good);
    assert!(read(serde_json::json!({"sources": [{"kind": "pages", "seed": []}]})).unwrap_err().contains("unknown field `seed`"));
    assert!(read(serde_json::json!({"sources": [{"kind": "ftp"}]})).unwrap_err().contains("unknown variant `ftp`"));
    assert!(read(serde_json::json!({"web": {"timeout": "soon"}})).unwrap_err().contains("is not a length of time"));
    let nowhere = read(serde_json::json!({"sources": [{"kind": "pages", "seeds": ["a.test"]}]})).unwrap().check().unwrap_err();
    assert!(nowhere.to_string().contains("discover.sources[0].seeds"), "{nowhere}");
}

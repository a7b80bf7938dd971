//! Sitemaps as a source: indexes, packed parts, images with texts, pages.

use arrow::array::RecordBatch;
use capfilt_crawler::{DiscoverConfig, QueryList};
use capfilt_runtime::StageError;
use serde_json::{Value, json};

use crate::archives::member;
use crate::server::{Reply, Request, Server, ok, status, with};
use crate::support::{discover, lines, texts, web, worker};

fn site(r: &Request) -> Reply {
    let xml = |body: &str| ok("application/xml", format!("<?xml version='1.0' encoding='UTF-8'?>{body}"));
    match format!("{}{}", r.host, r.path).as_str() {
        "a.test/robots.txt" => ok("text/plain", "User-agent: *\nDisallow: /private\nSitemap: http://a.test/index.xml\n"),
        "a.test/index.xml" => xml(
            "<sitemapindex><sitemap><loc>http://a.test/1.xml.gz</loc></sitemap><sitemap><loc>http://a.test/gone.xml</loc></sitemap>\
             <sitemap><loc>/index.xml</loc></sitemap><sitemap><loc>http://a.test/index.xml</loc></sitemap>\
             <sitemap><loc>http://a.test/2.txt</loc></sitemap></sitemapindex>",
        ),
        "a.test/1.xml.gz" => ok(
            "application/gzip",
            member(
                b"<urlset xmlns:image='x'><url><loc>http://a.test/p1</loc><image:image><image:loc>http://cdn.test/1.jpg</image:loc>\
                  <image:caption>a cat by its sitemap</image:caption><image:title>a dog</image:title></image:image></url>\
                  <url><loc>http://a.test/noai</loc><image:image><image:loc>http://cdn.test/2.jpg</image:loc>\
                  <image:title>an unwilling cat</image:title></image:image></url>\
                  <url><loc>http://a.test/private</loc><image:image><image:loc>http://cdn.test/3.jpg</image:loc>\
                  <image:title>a private cat</image:title></image:image></url>\
                  <url><loc>http://elsewhere.test/</loc><image:image><image:loc>http://cdn.test/4.jpg</image:loc>\
                  <image:title>a far cat</image:title></image:image></url></urlset>",
            ),
        ),
        "a.test/2.txt" => ok("text/plain", "http://a.test/p2\n"),
        "a.test/p1" => ok("text/html", "<img src=/own.jpg alt='a cat of its page'><a href=/unlisted>x</a>"),
        "a.test/p2" => ok("text/html", "<img src=/two.jpg alt='a second cat'>"),
        "a.test/noai" => with(ok("text/html", "<img src=n.jpg alt='another cat'>"), "X-Robots-Tag", "noai"),
        "b.test/sitemap.xml" => xml("<urlset><url><loc>http://b.test/</loc></url></urlset>"),
        "b.test/" => ok("text/html", "<img src=b.jpg alt='cat b'>"),
        _ => status(404),
    }
}

async fn visit(server: &Server, source: Value) -> Result<(RecordBatch, Value), StageError> {
    let source = serde_json::from_value(source).unwrap();
    let config = DiscoverConfig { sources: vec![source], web: web(), ..DiscoverConfig::default() };
    discover(&worker(server.address), QueryList::from_texts(["cat", "dog"]), &config).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_sitemaps_are_visited_and_no_others() {
    let server = Server::start(site).await;
    let (rows, facts) =
        visit(&server, json!({"kind": "sitemaps", "sitemaps": ["http://a.test/", "http://b.test/"]})).await.unwrap();
    let mut found = lines(&rows);
    found.sort();
    let wanted = [
        "http://a.test/own.jpg | a cat of its page | alt | http://a.test/p1",
        "http://a.test/two.jpg | a second cat | alt | http://a.test/p2",
        "http://b.test/b.jpg | cat b | alt | http://b.test/",
        "http://cdn.test/1.jpg | a cat by its sitemap | figcaption | http://a.test/p1",
        "http://cdn.test/1.jpg | a dog | title | http://a.test/p1",
    ];
    assert_eq!(found, wanted);
    assert_eq!(texts(&rows, "source"), vec!["sitemaps"; 5]);
    assert_eq!(server.hits("a.test/unlisted") + server.hits("a.test/private") + server.hits("elsewhere.test/"), 0);
    assert_eq!(server.hits("a.test/index.xml"), 1, "an index that names itself");
    for (fact, n) in
        [("sitemaps_read", 4), ("sitemaps_http_4xx", 1), ("pages_read", 4), ("pages_opted_out", 1), ("pages_robots", 1)]
    {
        assert_eq!(facts[fact], n, "{fact} in {facts}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sitemaps_alone_give_the_images_that_they_name() {
    let server = Server::start(site).await;
    let source = json!({"kind": "sitemaps", "sitemaps": ["http://a.test/1.xml.gz"], "visit": false, "hosts": ["elsewhere.test"]});
    let (rows, facts) = visit(&server, source).await.unwrap();
    assert_eq!(
        texts(&rows, "text"),
        ["a cat by its sitemap", "a dog", "an unwilling cat", "a private cat", "a far cat"],
        "{facts}"
    );
    assert_eq!(server.asked(), ["a.test/robots.txt", "a.test/1.xml.gz"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crawl_takes_images_from_the_sitemaps_on_its_way() {
    let server = Server::start(site).await;
    let (rows, _) = visit(&server, json!({"kind": "pages", "seeds": ["http://a.test/p2"], "max_depth": 1})).await.unwrap();
    assert!(texts(&rows, "text").contains(&"a cat by its sitemap".to_owned()));
    assert!(!texts(&rows, "text").contains(&"an unwilling cat".to_owned()));
}

#[tokio::test]
async fn sitemaps_that_cannot_be_had_are_an_error() {
    let server = Server::start(site).await;
    let error = visit(&server, json!({"kind": "sitemaps", "sitemaps": ["http://c.test/"]})).await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("http://c.test/ (http_4xx 1)"), "{error}");
}

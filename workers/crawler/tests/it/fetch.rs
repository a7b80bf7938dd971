//! Downloads from a hostile web: every address ends, with the right status, and the good ones arrive.

use std::time::{Duration, Instant};

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{UInt16Type, UInt32Type, UInt64Type};
use capfilt_crawler::{CrawlerWorkerConfig, Fetch, FetchConfig, ImageConfig, ResizeMode, StoredFormat, Web, WebConfig};
use capfilt_schemas::FetchStatus;

use crate::server::{Reply, Request, Server, head, ok, redirect, status, with};
use crate::support::{gzip, png, run, selected, texts, web, worker};

const MAX_BODY: usize = 200_000;

fn config() -> FetchConfig {
    FetchConfig { web: web(), max_body: MAX_BODY, ..FetchConfig::default() }
}

/// A server on which nearly everything goes wrong.
fn hostile(r: &Request) -> Reply {
    let image = || ok("image/png", png(1));
    let half = || [head("Content-Length: 1000\r\n"), png(1)[..60].to_vec()].concat();
    match (r.host.as_str(), r.path.as_str()) {
        ("closed.test", "/robots.txt") => status(503),
        ("late-robots.test", "/robots.txt") if r.before == 0 => with(status(503), "Retry-After", "0"),
        ("html-robots.test", "/robots.txt") => ok("text/html", "<html><body>Disallow: nothing here</body></html>"),
        ("reset.test", _) => Reply::Reset(vec![]),
        (_, "/robots.txt") => ok("text/plain", "User-agent: *\nDisallow: /private/\n"),
        (_, "/drip") => Reply::Endless(head("Content-Length: 100000\r\n"), b"x".to_vec(), Duration::from_millis(100)),
        (_, "/drip-headers") => {
            Reply::Endless(b"HTTP/1.1 200 OK\r\n".to_vec(), b"X-A: b\r\n".to_vec(), Duration::from_millis(100))
        }
        (_, "/stall") => Reply::Late(Duration::from_secs(600), Box::new(image())),
        (_, "/stall-after-headers") => Reply::Endless(half(), vec![], Duration::from_secs(600)),
        (_, "/endless") => Reply::Endless(head(""), vec![0; 8192], Duration::ZERO),
        (_, "/endless-chunks") => Reply::Endless(
            head("Transfer-Encoding: chunked\r\n"),
            [b"1000\r\n".to_vec(), vec![b'x'; 0x1000], b"\r\n".to_vec()].concat(),
            Duration::ZERO,
        ),
        (_, "/huge-by-header") => Reply::Endless(head("Content-Length: 1000000000000\r\n"), vec![0; 10], Duration::from_secs(5)),
        (_, "/reset") => Reply::Reset(vec![]),
        (_, "/reset-in-body") => Reply::Reset(half()),
        (_, "/short") => Reply::Raw(half()),
        (_, "/broken-chunks") => Reply::Raw([head("Transfer-Encoding: chunked\r\n"), b"zz\r\nxx".to_vec()].concat()),
        (_, "/no-http") => Reply::Raw(b"SSH-2.0-OpenSSH_9.0\r\n".to_vec()),
        (_, "/closed-at-once") => Reply::Raw(vec![]),
        (_, "/huge-headers") => {
            Reply::Raw([b"HTTP/1.1 200 OK\r\nX-A: ".to_vec(), vec![b'a'; 2_000_000], b"\r\n\r\n".to_vec()].concat())
        }
        (_, "/bomb") => with(ok("image/png", gzip(&vec![0; 50_000_000])), "Content-Encoding", "gzip"),
        (_, "/bad-gzip") => with(ok("image/png", "no gzip at all"), "Content-Encoding", "gzip"),
        (_, "/gzip") => with(ok("image/png", gzip(&png(1))), "Content-Encoding", "gzip"),
        (_, "/loop") => redirect("/loop"),
        (_, "/two-loop") => redirect("/two-loop-back"),
        (_, "/two-loop-back") => redirect("/two-loop"),
        (_, path) if path.starts_with("/chain") => redirect(&format!("{path}x")),
        (_, "/moved") => redirect("http://other.test/ok.png?moved#here"),
        (_, "/to-private") => redirect("/private/x.png"),
        (_, "/to-file") => redirect("file:///etc/passwd"),
        (_, "/to-nowhere") => status(302),
        (_, "/503-then-ok") if r.before == 0 => with(status(503), "Retry-After", "1"),
        (_, "/reset-then-ok") if r.before == 0 => Reply::Reset(vec![]),
        (_, "/503") => status(503),
        (_, "/404") => status(404),
        (_, "/304") => status(304),
        ("busy.test", "/once") if r.before == 0 => with(status(429), "Retry-After", "1"),
        ("very-busy.test", _) => with(status(429), "Retry-After", "3600"),
        (_, "/empty") => ok("image/png", ""),
        (_, "/html") => ok("image/jpeg", "<!doctype html><h1>403 no hotlinking</h1>"),
        (_, "/text-type") => ok("text/plain", png(1)),
        (_, "/cut-png") => ok("image/png", &png(1)[..100]),
        (_, "/noai") => with(image(), "X-Robots-Tag", "noai, noimageai"),
        (_, "/other-bot") => with(image(), "X-Robots-Tag", "otherbot: noai, noimageai"),
        (_, "/tdm") => with(image(), "TDM-Reservation", "1"),
        _ => image(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_address_ends_with_its_status() {
    let server = Server::start(hostile).await;
    let refused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut route = worker(server.address);
    route.resolve.insert("refused.test".to_owned(), refused);
    use FetchStatus as S;
    let cases = [
        ("http://a.test/ok.png", S::Ok),
        ("http://a.test/drip", S::Timeout),
        ("http://a.test/drip-headers", S::Timeout),
        ("http://a.test/stall", S::Timeout),
        ("http://a.test/stall-after-headers", S::Timeout),
        ("http://a.test/endless", S::TooLarge),
        ("http://a.test/endless-chunks", S::TooLarge),
        ("http://a.test/huge-by-header", S::TooLarge),
        ("http://a.test/huge-headers", S::TooLarge),
        ("http://a.test/bomb", S::TooLarge),
        ("http://a.test/reset", S::Connect),
        ("http://a.test/no-http", S::Connect),
        ("http://a.test/closed-at-once", S::Connect),
        ("http://a.test/reset-in-body", S::Truncated),
        ("http://a.test/short", S::Truncated),
        ("http://a.test/broken-chunks", S::Truncated),
        ("http://a.test/bad-gzip", S::Truncated),
        ("http://a.test/gzip", S::Ok),
        ("http://a.test/loop", S::Redirect),
        ("http://a.test/two-loop", S::Redirect),
        ("http://a.test/chain", S::Redirect),
        ("http://a.test/moved", S::Ok),
        ("http://a.test/to-private", S::Robots),
        ("http://a.test/to-file", S::Redirect),
        ("http://a.test/to-nowhere", S::Redirect),
        ("http://a.test/304", S::Redirect),
        ("http://a.test/503-then-ok", S::Ok),
        ("http://a.test/reset-then-ok", S::Ok),
        ("http://a.test/503", S::HttpServer),
        ("http://a.test/404", S::HttpClient),
        ("http://busy.test/once", S::Ok),
        ("http://very-busy.test/x", S::RateLimited),
        ("http://very-busy.test/y", S::RateLimited),
        ("http://a.test/empty", S::Empty),
        ("http://a.test/html", S::NotImage),
        ("http://a.test/text-type", S::Ok),
        ("http://a.test/cut-png", S::Decode),
        ("http://a.test/noai", S::OptOut),
        ("http://a.test/other-bot", S::Ok),
        ("http://a.test/tdm", S::OptOut),
        ("http://a.test/private/x.png", S::Robots),
        ("http://a.test/%70rivate/x.png", S::Robots),
        ("http://closed.test/ok.png", S::HttpServer),
        ("http://late-robots.test/ok.png", S::Ok),
        ("http://html-robots.test/ok.png", S::Ok),
        ("http://reset.test/ok.png", S::Connect),
        ("http://refused.test/ok.png", S::Connect),
        ("https://a.test/ok.png", S::Tls),
        ("ftp://a.test/ok.png", S::BadUrl),
        ("not an address", S::BadUrl),
        ("http://", S::BadUrl),
        ("http://a.test/last.png", S::Ok),
    ];
    let urls: Vec<String> = cases.iter().map(|c| c.0.to_owned()).collect();
    let stage = Fetch::new(Web::new(&route).unwrap());
    let begin = Instant::now();
    let (rows, facts) = run(&stage, &config().params("now").unwrap(), selected(&urls)).await.unwrap();
    // (1 + retries) × timeout, the longest Retry-After, and room for a busy machine.
    assert!(begin.elapsed() < Duration::from_secs(120), "{:?}", begin.elapsed());

    assert_eq!(texts(&rows, "url"), urls, "one row out for one row in, in order");
    let errors = texts(&rows, "error");
    for ((case, found), error) in cases.iter().zip(texts(&rows, "status")).zip(&errors) {
        assert_eq!(found, case.1.as_str(), "{}: {error}", case.0);
        assert_eq!(error == "-", case.1 == S::Ok, "{}", case.0);
    }
    for (i, case) in cases.iter().enumerate() {
        let image = |name: &str| rows.column_by_name(name).unwrap().is_valid(i);
        for column in ["image", "format", "width", "original_height", "bytes_downloaded", "sha256", "phash"] {
            assert_eq!(image(column), case.1 == S::Ok, "{column} of {}", case.0);
        }
    }
    let codes = rows.column_by_name("http_status").unwrap().as_primitive::<UInt16Type>();
    let code = |url: &str| {
        (!codes.is_null(urls.iter().position(|u| u == url).unwrap()))
            .then(|| codes.value(urls.iter().position(|u| u == url).unwrap()))
    };
    assert_eq!(
        (code("http://a.test/404"), code("http://a.test/ok.png"), code("http://a.test/stall")),
        (Some(404), Some(200), None)
    );
    assert!(facts["bytes_downloaded"].as_u64().unwrap() > 1000);

    assert_eq!(server.hits("a.test/private/x.png"), 0);
    assert_eq!(server.hits("closed.test/ok.png") + server.hits("reset.test/ok.png"), 0);
    assert_eq!(
        server.hits("very-busy.test/robots.txt"),
        1,
        "an hour is not waited for, and nothing is asked again before it is over"
    );
    assert_eq!(server.hits("a.test/503"), 2, "one attempt and one further attempt");
    assert_eq!((server.hits("a.test/404"), server.hits("a.test/noai"), server.hits("a.test/robots.txt")), (1, 1, 1));
    assert_eq!(server.asked().iter().filter(|a| a.contains("/chain")).count(), 6, "five redirects");
}

#[tokio::test]
async fn rows_hold_the_image_as_configured() {
    let server = Server::start(|r| match r.path.as_str() {
        "/robots.txt" => status(404),
        _ => ok("image/png", png(7)),
    })
    .await;
    let image = ImageConfig { size: 24, format: StoredFormat::Png, ..ImageConfig::default() };
    let config = FetchConfig { image, ..config() };
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let (rows, _) =
        run(&stage, &config.params("now").unwrap(), selected(&["http://a.test/x#fragment".to_owned()])).await.unwrap();
    let number = |name: &str| rows.column_by_name(name).unwrap().as_primitive::<UInt32Type>().value(0);
    assert_eq!([number("width"), number("height"), number("original_width"), number("original_height")], [32, 24, 64, 48]);
    assert_eq!(texts(&rows, "format"), ["png"]);
    assert_eq!(texts(&rows, "sha256"), [capfilt_schemas::Digest::of(&png(7)).to_string()]);
    assert_eq!(rows.column_by_name("bytes_downloaded").unwrap().as_primitive::<UInt64Type>().value(0), png(7).len() as u64);
    let stored = image::load_from_memory(rows.column_by_name("image").unwrap().as_binary::<i32>().value(0)).unwrap();
    assert_eq!((stored.width(), stored.height()), (32, 24));
}

/// A well-behaved crowd of hosts, each a little slow, one of them with a limit.
fn crowd(r: &Request) -> Reply {
    let number = r.path.bytes().fold(0_u8, u8::wrapping_add);
    match r.path.as_str() {
        "/robots.txt" => status(404),
        _ if r.host == "slow.test" => Reply::Late(Duration::from_millis(60), Box::new(ok("image/png", png(number)))),
        _ => Reply::Late(Duration::from_millis(u64::from(number % 7)), Box::new(ok("image/png", png(number)))),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_rows_come_out_whatever_the_speed_and_hosts_are_not_crowded() {
    let urls: Vec<String> = (0..150)
        .map(|i| format!("http://{}.test/{i}", if i % 10 == 0 { "slow".to_owned() } else { format!("h{}", i % 4) }))
        .collect();
    let mut outputs = Vec::new();
    for (connections, per_host, buffer) in [(1, 1, 1 << 20), (64, 3, 512 << 20), (8, 2, 2 << 20)] {
        let server = Server::start(crowd).await;
        let route = CrawlerWorkerConfig { connections, per_host, buffer, ..worker(server.address) };
        let stage = Fetch::new(Web::new(&route).unwrap());
        let (rows, _) = run(&stage, &config().params("now").unwrap(), selected(&urls)).await.unwrap();
        assert!(texts(&rows, "status").iter().all(|s| s == "ok"));
        for host in ["slow.test", "h0.test", "h1.test"] {
            assert!(server.most_at_once(host) <= per_host, "{host}: {}", server.most_at_once(host));
        }
        outputs.push(rows);
    }
    assert!(outputs.windows(2).all(|w| w[0] == w[1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_in_their_own_size_come_many_at_once_and_wait_where_there_is_no_room() {
    let urls: Vec<String> = (0..60).map(|i| format!("http://slow.test/{i}")).collect();
    let image = ImageConfig { resize: ResizeMode::No, ..ImageConfig::default() };
    let params = FetchConfig { image, ..config() }.params("now").unwrap();
    let mut outputs = Vec::new();
    // One of these images may need 6 kB.
    for (buffer, least) in [(512 << 20, 20), (20_000, 1), (1, 1)] {
        let server = Server::start(crowd).await;
        let route = CrawlerWorkerConfig { per_host: 32, buffer, ..worker(server.address) };
        let stage = Fetch::new(Web::new(&route).unwrap());
        let (rows, _) = run(&stage, &params, selected(&urls)).await.unwrap();
        assert_eq!(texts(&rows, "status"), vec!["ok"; 60]);
        assert!(server.most_at_once("slow.test") >= least, "{buffer}: {}", server.most_at_once("slow.test"));
        outputs.push(rows);
    }
    assert!(outputs.windows(2).all(|w| w[0] == w[1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_on_its_way_does_not_wait_for_room() {
    // While the slow host holds up the first rows, a finished image takes all room there is, and redirects come back.
    let server = Server::start(|r| match (r.host.as_str(), r.path.as_str()) {
        (_, "/robots.txt") => ok("text/plain", if r.host == "slow.test" { "User-agent: *\nCrawl-delay: 2" } else { "" }),
        ("fast.test", path) if path.starts_with("/to/") => {
            Reply::Late(Duration::from_millis(500), Box::new(redirect("/there.png")))
        }
        _ => ok("image/png", png(1)),
    })
    .await;
    let slow = (0..3).map(|n| format!("http://slow.test/{n}"));
    let fast = ["http://fast.test/at-once.png".to_owned()].into_iter().chain((0..4).map(|n| format!("http://fast.test/to/{n}")));
    let urls: Vec<String> = slow.chain(fast).collect();
    let stage = Fetch::new(Web::new(&CrawlerWorkerConfig { buffer: 1, ..worker(server.address) }).unwrap());
    let config = FetchConfig { web: WebConfig { deadline: Duration::from_secs(3), ..web() }, ..config() };
    let (rows, _) = run(&stage, &config.params("now").unwrap(), selected(&urls)).await.unwrap();
    assert_eq!(texts(&rows, "status"), vec!["ok"; urls.len()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_limits_its_rate_gives_all_its_images() {
    // More than one request in 100 ms is answered 429.
    let last = std::sync::Mutex::new(Instant::now() - Duration::from_secs(1));
    let server = Server::start(move |r| {
        let mut last = last.lock().unwrap();
        if r.path == "/robots.txt" {
            return status(404);
        }
        if last.elapsed() < Duration::from_millis(100) {
            return with(status(429), "Retry-After", "1");
        }
        *last = Instant::now();
        ok("image/png", png(3))
    })
    .await;
    let urls: Vec<String> = (0..12).map(|i| format!("http://limited.test/{i}")).collect();
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let config = FetchConfig { web: WebConfig { retries: 4, ..web() }, ..config() };
    let (rows, _) = run(&stage, &config.params("now").unwrap(), selected(&urls)).await.unwrap();
    assert_eq!(texts(&rows, "status"), vec!["ok"; 12]);
    assert!(server.asked().len() < 40, "it slows down instead of knocking: {}", server.asked().len());
}

#[tokio::test]
async fn bytes_that_are_not_the_expected_ones_are_refused() {
    let server = Server::start(hostile).await;
    let digest = capfilt_schemas::Digest::of(&png(1)).to_string();
    let other = digest.replace(|c: char| c.is_ascii_digit(), "0");
    let expected = [Some(format!("sha256:{digest}")), Some(format!("sha256:{other}")), None];
    let urls: Vec<String> = (0..3).map(|i| format!("http://a.test/{i}.png")).collect();
    let rows = selected(&urls).remove(0);
    let mut columns = rows.columns().to_vec();
    columns[rows.schema().index_of("expected_hash").unwrap()] = std::sync::Arc::new(StringArray::from(expected.to_vec()));
    let rows = RecordBatch::try_new(rows.schema(), columns).unwrap();
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let (rows, _) = run(&stage, &config().params("now").unwrap(), vec![rows]).await.unwrap();
    assert_eq!(texts(&rows, "status"), ["ok", "hash_mismatch", "ok"]);
    assert_eq!(texts(&rows, "expected_hash")[1], format!("sha256:{other}"));
    assert!(rows.column_by_name("image").unwrap().is_null(1));
}

#[tokio::test]
async fn manners_can_be_set() {
    let server = Server::start(hostile).await;
    let urls = ["http://a.test/private/x.png", "http://a.test/noai"].map(str::to_owned);
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let rude = WebConfig { robots: false, opt_out: false, agent: "testbot/9 (someone@a.test)".to_owned(), ..web() };
    let (rows, _) = run(&stage, &FetchConfig { web: rude, ..config() }.params("now").unwrap(), selected(&urls)).await.unwrap();
    assert_eq!(texts(&rows, "status"), ["ok", "ok"]);
    assert_eq!(server.hits("a.test/robots.txt"), 0);
    let named = Server::start(|r| match r.path.as_str() {
        "/robots.txt" => ok("text/plain", "User-agent: testbot\nDisallow: /\n"),
        _ if r.head.contains("user-agent: testbot/9 (someone@a.test)\r\n") => ok("image/png", png(1)),
        _ => status(403),
    })
    .await;
    let stage = Fetch::new(Web::new(&worker(named.address)).unwrap());
    let agent = |agent: &str, robots| {
        FetchConfig { web: WebConfig { agent: agent.to_owned(), robots, ..web() }, ..config() }.params("now").unwrap()
    };
    let one = selected(&urls[1..]);
    let (rows, _) = run(&stage, &agent("testbot/9 (someone@a.test)", true), one.clone()).await.unwrap();
    assert_eq!(texts(&rows, "status"), ["robots"]);
    let (rows, _) = run(&stage, &agent("testbot/9 (someone@a.test)", false), one.clone()).await.unwrap();
    assert_eq!(texts(&rows, "status"), ["ok"]);
    let (rows, _) = run(&stage, &agent("other/1", true), one).await.unwrap();
    assert_eq!(texts(&rows, "status"), ["http_4xx"]);
}

#[tokio::test]
async fn a_plain_proxy_is_asked_for_everything() {
    let proxy = Server::start(|r| match r.path.as_str() {
        "http://far.test/robots.txt" => status(404),
        "http://far.test/x.png?q=1" => ok("image/png", png(1)),
        other => panic!("asked the proxy for {other}"),
    })
    .await;
    let route = CrawlerWorkerConfig { proxy: Some(format!("http://{}", proxy.address)), ..CrawlerWorkerConfig::default() };
    let stage = Fetch::new(Web::new(&route).unwrap());
    let (rows, _) =
        run(&stage, &config().params("now").unwrap(), selected(&["http://far.test/x.png?q=1".to_owned()])).await.unwrap();
    assert_eq!(texts(&rows, "status"), ["ok"]);
}

#[tokio::test]
async fn a_task_of_another_version_fails_clearly() {
    let stage = Fetch::new(Web::new(&CrawlerWorkerConfig::default()).unwrap());
    let error = run(&stage, &serde_json::json!({"fetch": {"colour": 1}, "snapshot": "x"}), vec![]).await.unwrap_err();
    assert!(!error.is_retryable() && error.chain().contains("unknown field `colour`"), "{}", error.chain());
}

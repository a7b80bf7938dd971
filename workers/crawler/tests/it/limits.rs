//! What ends an address that would otherwise go on: the deadline, the least rate, the host that is dead, the owner who opted out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use capfilt_crawler::{
    CrawlerWorkerConfig, DiscoverConfig, Fetch, FetchConfig, PagesConfig, QueryList, SourceConfig, Web, WebConfig,
};

use crate::server::{Reply, Server, ok, redirect, status, with};
use crate::support::{discover_stage, png, run, selected, texts, web, worker};

fn urls(host: &str, n: usize) -> Vec<String> {
    (0..n).map(|i| format!("http://{host}/{i}.png")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_host_with_many_rows_is_given_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = silent.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            held.push(connection);
        }
    });
    let server = Server::start(|_| ok("image/png", png(1))).await;
    let mut route = CrawlerWorkerConfig { per_host: 4, ..worker(server.address) };
    route.resolve.insert("dead.test".to_owned(), address);
    let mut rows = urls("dead.test", 2_000);
    rows.extend(urls("good.test", 50));
    let stage = Fetch::new(Web::new(&route).unwrap());
    let web = WebConfig {
        timeout: Duration::from_millis(400),
        retries: 2,
        robots: false,
        give_up_host_after: Duration::from_secs(1),
        ..web()
    };
    let config = FetchConfig { web, ..FetchConfig::default() };
    let begin = Instant::now();
    let (out, _) = run(&stage, &config.params("now").unwrap(), selected(&rows)).await.unwrap();
    // Asked to the end, the dead host would take 2,000 × 3 × 0.4 s / 4 = 10 minutes.
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    let (statuses, errors) = (texts(&out, "status"), texts(&out, "error"));
    assert!(statuses[..2_000].iter().all(|s| s == "timeout") && statuses[2_000..].iter().all(|s| s == "ok"));
    assert!(errors[..2_000].windows(2).all(|w| w[0] == w[1]), "all its rows say the same, asked or not");
    assert!(accepted.load(Ordering::SeqCst) < 40, "{accepted:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_slow_in_good_manner_loses_no_row_and_one_that_drips_keeps_none_for_long() {
    let server = Server::start(|r| match (r.host.as_str(), r.path.as_str()) {
        ("polite.test", "/robots.txt") => ok("text/plain", "User-agent: *\nCrawl-delay: 0.1\n"),
        (_, "/robots.txt") => status(404),
        ("dripping.test", _) => {
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n".to_vec();
            Reply::Endless(head, vec![0], Duration::from_millis(50))
        }
        _ => ok("image/png", png(1)),
    })
    .await;
    let mut rows = urls("polite.test", 80);
    rows.extend(urls("dripping.test", 300));
    rows.extend(urls("quick.test", 60));
    let route = CrawlerWorkerConfig { per_host: 4, ..worker(server.address) };
    let stage = Fetch::new(Web::new(&route).unwrap());
    let limits = WebConfig { deadline: Duration::from_secs(3), timeout: Duration::from_secs(1), retries: 0, ..web() };
    let config = FetchConfig { web: limits, ..FetchConfig::default() };
    let begin = Instant::now();
    let (out, _) = run(&stage, &config.params("now").unwrap(), selected(&rows)).await.unwrap();
    // The dripping host would take 300 × 1 s / 4 if all its rows had their turn.
    assert!(begin.elapsed() > Duration::from_secs(7) && begin.elapsed() < Duration::from_secs(45), "{:?}", begin.elapsed());
    let (statuses, errors) = (texts(&out, "status"), texts(&out, "error"));
    assert!(statuses[..80].iter().chain(&statuses[380..]).all(|s| s == "ok"), "{errors:?}");
    assert!(statuses[80..380].iter().all(|s| s == "timeout"));
    assert_eq!(errors[379], "the deadline for the address passed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_and_a_long_pause_cost_few_rows() {
    let began = Instant::now();
    let server = Server::start(move |r| match (r.host.as_str(), r.path.as_str()) {
        (_, "/robots.txt") => status(404),
        ("outage.test", _) if (200..1_500).contains(&began.elapsed().as_millis()) => Reply::Raw(vec![]),
        ("pause.test", "/20.png") if r.before == 0 => with(status(429), "Retry-After", "2"),
        _ => ok("image/png", png(1)),
    })
    .await;
    let mut rows = urls("outage.test", 150);
    rows.extend(urls("pause.test", 50));
    let route = CrawlerWorkerConfig { per_host: 4, requests_per_second: 100.0, ..worker(server.address) };
    let stage = Fetch::new(Web::new(&route).unwrap());
    let limits = WebConfig { max_retry_after: Duration::from_secs(1), backoff: Duration::from_secs(1), retries: 3, ..web() };
    let config = FetchConfig { web: limits, ..FetchConfig::default() };
    let (out, _) = run(&stage, &config.params("now").unwrap(), selected(&rows)).await.unwrap();
    let (statuses, errors) = (texts(&out, "status"), texts(&out, "error"));
    let lost: Vec<usize> = (0..200).filter(|i| statuses[*i] != "ok").collect();
    assert_eq!(lost, [170], "the one that was told to wait longer than it may: {errors:?}");
    assert_eq!(statuses[170], "http_429");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_must_keep_its_least_rate() {
    let server = Server::start(|r| match r.path.as_str() {
        "/robots.txt" => status(404),
        "/drip" => {
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n".to_vec();
            Reply::Endless([head, vec![0; 100_000]].concat(), vec![0], Duration::from_millis(50))
        }
        _ => ok("image/png", png(1)),
    })
    .await;
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let slow = WebConfig { timeout: Duration::from_secs(60), retries: 0, ..web() };
    let config = FetchConfig { web: slow, ..FetchConfig::default() };
    let begin = Instant::now();
    let rows = ["http://a.test/drip", "http://a.test/good"].map(str::to_owned);
    let (out, _) = run(&stage, &config.params("now").unwrap(), selected(&rows)).await.unwrap();
    assert_eq!(texts(&out, "status"), ["timeout", "ok"]);
    assert_eq!(texts(&out, "error")[0], "the body comes with less than 256 bytes a second");
    // The first five seconds brought enough, the next did not.
    assert!(begin.elapsed() >= Duration::from_secs(9) && begin.elapsed() < Duration::from_secs(40), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn those_who_opted_out_are_not_asked() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("out.txt");
    std::fs::write(&list, "gone.test\nhttps://a.test/art/*\nhttp://a.test/1.png\n").unwrap();
    let server = Server::start(|r| match (r.host.as_str(), r.path.as_str()) {
        (_, "/robots.txt") => status(404),
        ("a.test", "/moved") => redirect("http://sub.gone.test/x.png"),
        ("a.test", "/") => {
            ok("text/html", "<img src=2.png alt='a cat'><a href=/art/page.html>x</a><a href=http://gone.test/>y</a>")
        }
        (_, path) if path.ends_with(".html") => ok("text/html", "<img src=3.png alt='a cat'>"),
        _ => ok("image/png", png(1)),
    })
    .await;
    let manners = WebConfig { opt_out_lists: vec![list.clone()], ..web() };
    let config = FetchConfig { web: manners.clone(), ..FetchConfig::default() };
    let rows = [
        "http://a.test/1.png",
        "http://a.test/2.png",
        "http://a.test/art/3.png",
        "http://gone.test/4.png",
        "http://a.test/moved",
    ];
    let params = config.params("now").unwrap();
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let (out, _) = run(&stage, &params, selected(&rows.map(str::to_owned))).await.unwrap();
    assert_eq!(texts(&out, "status"), ["opt_out", "ok", "opt_out", "opt_out", "opt_out"]);
    assert_eq!(texts(&out, "error")[0], "an opt-out list names the address");
    assert!(
        server.asked().iter().all(|a| !a.contains("gone.test") && !a.contains("/art/") && !a.ends_with("/1.png")),
        "{:?}",
        server.asked()
    );

    // Pages that are named are not crawled either.
    let pages = PagesConfig { seeds: vec!["http://a.test/".to_owned()], hosts: vec!["*".to_owned()], ..PagesConfig::default() };
    let queries = QueryList::from_texts(["cat"]);
    let discover = DiscoverConfig { sources: vec![SourceConfig::Pages(pages)], web: manners, ..DiscoverConfig::default() };
    let tasks = discover.params(&queries, "now").unwrap();
    let stage_of_pages = discover_stage(&worker(server.address), queries);
    let (found, facts) = run(&stage_of_pages, &tasks[0], vec![]).await.unwrap();
    assert_eq!((texts(&found, "url"), &facts["pages_opt_out"]), (vec!["http://a.test/2.png".to_owned()], &2.into()));

    // The list is named by its content.
    std::fs::write(&list, "other.test\n").unwrap();
    assert_ne!(config.params("now").unwrap(), params);
    let fresh = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let error = run(&fresh, &params, selected(&rows.map(str::to_owned))).await.unwrap_err();
    assert!(!error.is_retryable() && error.to_string().contains("opt-out list"), "{error}");
    std::fs::remove_file(&list).unwrap();
    assert!(config.params("now").unwrap_err().to_string().contains("out.txt"));
}

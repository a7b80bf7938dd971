//! Downloads that are done again, and those that must not be done.

use arrow::array::RecordBatch;
use capfilt_crawler::{Fetch, FetchConfig, FetchParams, RetryParams, Web, WebConfig};
use capfilt_schemas::{Digest, FetchStatus, REMOVED_URL};
use capfilt_store::{Store, Targets};

use crate::server::{Server, ok, redirect, status};
use crate::support::{png, run, run_on, selected, texts, web, worker};

fn params(retry: &[FetchStatus]) -> FetchParams {
    let config = FetchConfig { web: WebConfig { retries: 0, ..web() }, ..FetchConfig::default() };
    let retry = (!retry.is_empty()).then(|| RetryParams { name: "test/1".to_owned(), statuses: retry.to_vec() });
    FetchParams { retry, ..config.params("now").unwrap() }
}

/// Picture n of ten: every third fails at first with 503, every fifth always with 404.
async fn server(fails: bool) -> Server {
    Server::start(move |r| match r.path.trim_start_matches('/').parse::<u8>() {
        Ok(n) if n % 5 == 4 => status(404),
        Ok(n) if n % 3 == 0 && fails && r.before == 0 => status(503),
        Ok(n) => ok("image/png", png(n)),
        Err(_) => status(404),
    })
    .await
}

fn batches(rows: &RecordBatch, size: usize) -> Vec<RecordBatch> {
    (0..rows.num_rows()).step_by(size).map(|from| rows.slice(from, size.min(rows.num_rows() - from))).collect()
}

#[tokio::test]
async fn a_row_that_is_fetched_again_is_what_it_would_have_been_at_first() {
    let urls: Vec<String> = (0..10).map(|n| format!("http://a.test/{n}")).collect();
    let calm = server(false).await;
    let stage = Fetch::new(Web::new(&worker(calm.address)).unwrap());
    let (expected, _) = run(&stage, &params(&[]), selected(&urls)).await.unwrap();

    let server = server(true).await;
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let (first, _) = run(&stage, &params(&[]), selected(&urls)).await.unwrap();
    assert_eq!(texts(&first, "status").iter().filter(|s| *s == "http_5xx").count(), 3);
    // However the rows come in, and with batches in which nothing is to be done.
    for (size, statuses) in [(1, [FetchStatus::Timeout, FetchStatus::Dns]), (4, [FetchStatus::HttpServer, FetchStatus::Dns])] {
        let asked = server.asked().len();
        let (again, facts) = run(&stage, &params(&statuses), batches(&first, size)).await.unwrap();
        if statuses[0] == FetchStatus::Timeout {
            assert_eq!(again, first, "no row has that status");
            assert_eq!((server.asked().len(), facts), (asked, serde_json::json!({})));
        } else {
            assert_eq!(again, expected);
            assert!(server.asked().len() - asked <= 4, "{:?}", server.asked());
        }
    }
    let (none, _) = run(&stage, &params(&[FetchStatus::Dns]), vec![]).await.unwrap();
    assert_eq!(none.num_rows(), 0);
    let wrong = run(&stage, &params(&[FetchStatus::Dns]), selected(&urls)).await.unwrap_err();
    assert!(wrong.chain().contains("wants rows of samples"), "{}", wrong.chain());
}

#[tokio::test]
async fn what_was_taken_down_is_not_fetched() {
    let server = Server::start(|r| match r.path.as_str() {
        "/robots.txt" => status(404),
        "/moved" => redirect("http://www.down.test/elsewhere"),
        path => ok("image/png", png(path.len() as u8)),
    })
    .await;
    let store = Store::open("memory:").await.unwrap();
    let mut targets = Targets::default();
    for line in ["down.test", "http://a.test/22", &Digest::of(&png(4)).to_string()] {
        targets.add_line(line).unwrap();
    }
    store.take_down(&targets, None).await.unwrap();
    let urls = [
        "http://a.test/1",
        "https://a.test/22#x",
        "http://a.test/333",
        "http://www.down.test/1",
        "http://a.test/moved",
        REMOVED_URL,
    ]
    .map(str::to_owned);
    let stage = Fetch::new(Web::new(&worker(server.address)).unwrap());
    let (rows, _) = run_on(&store, &stage, &params(&[]), selected(&urls)).await.unwrap();
    assert_eq!(texts(&rows, "status"), ["ok", "taken_down", "taken_down", "taken_down", "taken_down", "taken_down"]);
    assert_eq!(texts(&rows, "sha256")[1..], ["-"; 5]);
    let asked = server.asked().join(" ");
    assert!(!asked.contains("down.test") && !asked.contains("/22"), "{asked}");
}

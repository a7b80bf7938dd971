//! The run report, made from a store as a run would leave it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod report_store;

use std::collections::BTreeSet;

use capfilt_coordinator::build::{BuildConfig, Policy};
use capfilt_coordinator::report::{self, ReportInput};
use capfilt_schemas::{Digest, RunId, StageKind, Table, Task};
use capfilt_store::Store;
use report_store::{Pair, Recorder, jpeg, metrics};

fn input(samples: usize) -> ReportInput {
    ReportInput { run: RunId::new("demo").unwrap(), dataset: "pairs".to_owned(), version: None, samples }
}

/// Pairs of every verdict, `n` of each, and some that were not fetched.
fn pairs(n: usize) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for i in 0..n {
        for (web, synthetic) in [(0.9, 0.8), (0.1, 0.95), (0.7, 0.2), (0.3, 0.05)] {
            let url = format!("http://a.test/{i}/{web}.jpg");
            pairs.push(Pair::new(&url, &format!("alt text {i} {web}"), web).caption(&format!("a caption {i} {web}"), synthetic));
        }
        pairs.push(Pair::failed(&format!("http://a.test/{i}/gone.jpg"), "gone", "http_4xx"));
    }
    pairs.push(Pair::failed("http://a.test/robots.jpg", "no robots", "robots"));
    pairs
}

/// Everything that the page could load or run.
fn assert_stands_alone(page: &str) {
    let lower = page.to_lowercase();
    for (i, _) in lower.match_indices("src=").chain(lower.match_indices("href=")) {
        let value = &lower[i..].split_once('=').unwrap().1[..12];
        assert!(value.starts_with("\"data:image/"), "{value}");
    }
    for bad in ["<script", "<link", "<iframe", "<object", "url(", "@import", "http-equiv=\"refresh", "<base"] {
        assert!(!lower.contains(bad), "{bad}");
    }
    let tags: BTreeSet<&str> = lower.split('<').skip(1).map(|t| t.split([' ', '>', '\n']).next().unwrap()).collect();
    let opened = tags.iter().filter(|t| !t.starts_with(['/', '!']));
    let never_closed = ["meta", "img", "input", "line", "rect", "circle", "polyline"];
    for tag in opened.filter(|t| !never_closed.contains(t)) {
        let (opens, closes) = (
            lower.matches(&format!("<{tag} ")).count() + lower.matches(&format!("<{tag}>")).count(),
            lower.matches(&format!("</{tag}>")).count(),
        );
        assert_eq!(opens, closes, "<{tag}>");
    }
}

#[tokio::test]
async fn a_finished_run_is_shown_whole() {
    let store = Store::open("memory:").await.unwrap();
    let mut recorder = Recorder::new(&store, "demo", pairs(5)).await;
    let build = BuildConfig::default();
    recorder.round(1, &build, metrics(0.40, 0.71), metrics(0.45, 0.69), &["captioner"]).await;
    recorder.round(2, &build, metrics(0.45, 0.71), metrics(0.45, 0.80), &["filter"]).await;
    let page = report::render(&store, &input(8)).await.unwrap();
    assert_stands_alone(&page);
    assert!(page.contains("2 rounds finished"));
    assert!(page.contains("<dt>Candidates</dt><dd>52</dd><p>26 selected</p>"), "funnel");
    assert!(page.contains("<dt>Fetched</dt><dd>20</dd><p>76.9% of the tries</p>"));
    // 5 of each verdict: web texts 10 of 20 kept, synthetic 10 of 20 kept.
    assert!(page.contains("<dt>Kept pairs</dt><dd>20</dd><p>10 web, 10 synthetic</p>"));
    assert!(page.contains("<dt>Noise ratio</dt><dd>50.0%</dd><p>web 50.0%, synthetic 50.0%</p>"));
    assert!(page.contains("<dt>Promoted models</dt><dd>2</dd><p>trained in 2 rounds</p>"));
    assert!(page.contains("http_4xx <small>refused or not there</small></span><span class=\"value\">5 <small>19.2%"));
    assert!(page.contains("robots <small>forbidden by robots.txt</small></span><span class=\"value\">1 "));
    assert!(page.contains("<title>Web texts, ITM 0.90 to 0.95: 5 texts, 25.0%</title>"), "histogram");
    assert!(page.contains("kept from 0.50 on"));
    assert_eq!(page.matches("<article").count(), 8);
    for class in ["both", "synthetic-only", "web-only", "neither"] {
        assert_eq!(page.matches(&format!("<article class=\"card {class}\"")).count(), 2, "{class}");
    }
    assert_eq!(page.matches("src=\"data:image/jpeg;base64,/9j/").count(), 8);
    assert!(page.contains("CIDEr-D") && page.contains("AUROC"));
    assert!(page.contains("<em class=\"change up\">▲ +0.050</em>"), "captioner of round 1");
    assert!(page.contains("<em class=\"change down\">▼ −0.020</em>"), "filter of round 1");
    assert_eq!(page.matches("<span class=\"badge good\">promoted</span>").count(), 2);
    assert!(page.contains("pairs v2") && page.contains("round 1 promoted a new captioner"));
    assert_eq!(page, report::render(&store, &input(8)).await.unwrap(), "the same store, another page");
}

#[tokio::test]
async fn hostile_texts_stay_texts() {
    let store = Store::open("memory:").await.unwrap();
    let attack = "\"><script>alert('x')</script><img src=http://evil.test/x onerror=alert(1)>\u{202e}\0";
    let pairs = vec![
        Pair::new("http://a.test/'><script>1</script>", attack, 0.9).caption("</blockquote><iframe src=//evil.test>", 0.9),
        Pair::failed("http://a.test/2", "x", "<script>status"),
    ];
    let mut recorder = Recorder::new(&store, "demo", pairs).await;
    let values = [("<script>/cider_d".to_owned(), 1.0)].into();
    recorder.round(1, &BuildConfig::default(), values, metrics(0.1, 0.1), &["<script>"]).await;
    let run = RunId::new("demo").unwrap();
    store.log_event(&run, attack).await.unwrap();
    let task = Task { stage: StageKind::Discover, stage_version: 1, params: "lost".into(), model: None, inputs: vec![] };
    store.record_failure(&run, &task, attack, false).await.unwrap();
    let page = report::render(&store, &input(8)).await.unwrap();
    assert!(page.contains("&quot;&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&lt;img src"));
    assert!(page.contains("&lt;/blockquote&gt;&lt;iframe"));
    assert!(page.contains("1 task failed at least once; not done: 1") && page.contains("given up"));
    assert_stands_alone(&page.replace("&lt;img src=http", "&lt;img ").replace("&lt;iframe src=", "&lt;iframe "));
}

#[tokio::test]
async fn a_round_that_was_built_again_shows_its_newest_version() {
    let store = Store::open("memory:").await.unwrap();
    let mut recorder = Recorder::new(&store, "demo", pairs(5)).await;
    recorder.round(1, &BuildConfig::default(), metrics(0.611, 0.71), metrics(0.5, 0.8), &[]).await;
    let strict = BuildConfig { min_itm: 0.85, ..BuildConfig::default() };
    recorder.round(1, &strict, metrics(0.622, 0.71), metrics(0.5, 0.8), &[]).await;
    let page = report::render(&store, &input(8)).await.unwrap();
    assert!(page.contains("pairs, version 2") && page.contains("1 round finished"));
    assert!(page.contains("<dt>Kept pairs</dt><dd>10</dd>"));
    assert!(page.contains("0.622") && !page.contains("0.611"), "the result belongs to the version");
    assert!(page.contains("<code>build.min_itm</code></dt><dd>0.85</dd>"));
    assert!(page.contains("<tr><td>Build</td><td class=\"num\">1</td>"), "the work on the earlier version is left out");
    assert!(page.contains("<tr><td>Fetch</td><td class=\"num\">1</td>"));
    // Back at the first settings nothing is built: what they led to is shown again.
    let page = report::render(&store, &ReportInput { version: Some(1), ..input(8) }).await.unwrap();
    assert!(page.contains("pairs, version 1") && page.contains("0.611") && !page.contains("0.622"));
    assert!(page.contains("<code>build.min_itm</code></dt><dd>0.5</dd>"));
}

#[tokio::test]
async fn texts_left_out_for_other_reasons_are_told_apart() {
    let store = Store::open("memory:").await.unwrap();
    let twice = Pair::new("http://a.test/1", "a red car", 0.9).caption("a car", 0.9);
    let pairs = vec![
        twice.clone(),
        Pair { url: "http://b.test/1".to_owned(), text: "a red car again".to_owned(), ..twice },
        Pair::new("http://a.test/2", "A green car", 0.9).caption("a green car", 0.9),
    ];
    let mut recorder = Recorder::new(&store, "demo", pairs).await;
    recorder.round(1, &BuildConfig::default(), metrics(0.4, 0.7), metrics(0.5, 0.8), &[]).await;
    let page = report::render(&store, &input(9)).await.unwrap();
    assert!(page.contains(">repeats</span>"));
    // The duplicate has the image of the other, so only one of the two is shown.
    assert_eq!(page.matches("<article").count(), 2);
}

#[tokio::test]
async fn a_version_made_by_rank_has_no_threshold() {
    let store = Store::open("memory:").await.unwrap();
    let mut recorder = Recorder::new(&store, "demo", pairs(2)).await;
    let rank = BuildConfig { policy: Policy::Rank, keep: 1, ..BuildConfig::default() };
    recorder.round(1, &rank, metrics(0.4, 0.7), metrics(0.5, 0.8), &[]).await;
    let page = report::render(&store, &input(8)).await.unwrap();
    assert!(page.contains("Texts were kept by rank") && !page.contains("kept from 0.50 on"));
    assert_eq!(page.matches(">removed</span>").count(), 8);
}

#[tokio::test]
async fn runs_without_results_have_a_page() {
    let store = Store::open("memory:").await.unwrap();
    let page = report::render(&store, &input(8)).await.unwrap();
    assert_stands_alone(&page);
    for text in
        ["no round yet", "pairs, no version yet", "Nothing was gathered yet", "Nothing was fetched yet", "No task is done yet"]
    {
        assert!(page.contains(text), "{text}");
    }
    // Fetched, but nothing built.
    Recorder::new(&store, "demo", pairs(5)).await.start(1).await;
    let page = report::render(&store, &input(8)).await.unwrap();
    assert_stands_alone(&page);
    assert!(page.contains("round 1 unfinished") && page.contains("<dd>52</dd>") && page.contains("not built"));
    assert!(page.contains("fetched</span><span class=\"value\">20 <small>38.5% · 76.9% of previous"));
    // Another run's work is not this one's.
    let other = ReportInput { run: RunId::new("other").unwrap(), ..input(8) };
    let page = report::render(&store, &other).await.unwrap();
    assert!(page.contains("no round yet") && page.contains("Nothing was fetched yet"));
}

#[tokio::test]
async fn a_run_that_reuses_anothers_work_shows_it() {
    let store = Store::open("memory:").await.unwrap();
    let mut first = Recorder::new(&store, "demo", pairs(5)).await;
    first.round(1, &BuildConfig::default(), metrics(0.4, 0.7), metrics(0.5, 0.8), &[]).await;
    let mut second = Recorder::new(&store, "again", pairs(5)).await;
    second.round(1, &BuildConfig::default(), metrics(0.4, 0.7), metrics(0.5, 0.8), &[]).await;
    let page = report::render(&store, &ReportInput { run: RunId::new("again").unwrap(), ..input(8) }).await.unwrap();
    assert!(page.contains("pairs, version 2") && page.contains("<dd>20</dd><p>76.9% of the tries</p>"));
    assert!(page.contains("<tr><td>Fetch</td><td class=\"num\">1</td><td class=\"num\">1</td>"));
}

#[tokio::test]
async fn images_do_not_outgrow_the_page() {
    let store = Store::open("memory:").await.unwrap();
    let large = |i: usize| {
        let mut pair = Pair::new(&format!("http://a.test/{i}"), &format!("large {i}"), 0.9);
        pair.image = Some(jpeg(i as u64, 1 << 20));
        pair
    };
    let mut pairs: Vec<Pair> = (0..10).map(large).collect();
    pairs.push(Pair { image: Some(b"<svg onload=alert(1)>".to_vec()), ..Pair::new("http://a.test/svg", "no photo", 0.8) });
    pairs.push(Pair::new("http://a.test/small", "small", 0.9));
    let mut recorder = Recorder::new(&store, "demo", pairs).await;
    recorder.round(1, &BuildConfig::default(), metrics(0.4, 0.7), metrics(0.5, 0.8), &[]).await;
    let page = report::render(&store, &input(12)).await.unwrap();
    assert_eq!(page.matches("src=\"data:image/jpeg;base64,").count(), 6, "5 large ones and the small one");
    assert!(page.len() < 9 << 20);
    assert_eq!(page.matches("<span>no image</span>").count(), 1, "an image of no known format");
    assert_stands_alone(&page);
}

#[tokio::test]
async fn the_file_is_replaced_and_a_lost_shard_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("store").to_str().unwrap()).await.unwrap();
    let mut recorder = Recorder::new(&store, "demo", pairs(2)).await;
    let path = folder.path().join("reports/deep/demo.html");
    report::write(&store, &input(4), &path).await.unwrap();
    let before = std::fs::read_to_string(&path).unwrap();
    recorder.round(1, &BuildConfig::default(), metrics(0.4, 0.7), metrics(0.5, 0.8), &[]).await;
    report::write(&store, &input(4), &path).await.unwrap();
    assert_ne!(std::fs::read_to_string(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");

    let lost: Digest = recorder.shards[&Table::Scores];
    std::fs::remove_file(folder.path().join(format!("store/objects/scores/{lost}.parquet"))).unwrap();
    let error = report::write(&store, &input(4), &path).await.unwrap_err();
    assert!(error.to_string().contains(&lost.to_string()), "{error}");
    report::write(&store, &input(0), &path).await.expect("a page without samples needs no shards");

    let blocked = folder.path().join("reports/deep/demo.html/x.html");
    let error = report::write(&store, &input(0), &blocked).await.unwrap_err();
    assert!(error.to_string().contains("demo.html"), "{error}");
}

//! Downloads of lists into files: layouts, resume, odd servers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::Int32Type;
use capfilt_crawler::{
    CrawlError, DownloadConfig, DownloadProgress, DownloadSummary, FetchConfig, HashKind, ImageConfig, IncrementalMode,
    ListFormat, OutputFormat, ResizeMode, download,
};
use capfilt_schemas::{Digest, FetchStatus};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::server::{Reply, Request, Server, ok, status, with};
use crate::support::{png, texts, web, worker};

/// `/N` is a picture of its own, some are not there.
fn pictures(r: &Request) -> Reply {
    match r.path.as_str() {
        "/robots.txt" => status(404),
        "/gone" => status(404),
        "/text" => ok("image/png", "<html>no</html>"),
        "/noai" => with(ok("image/png", png(1)), "X-Robots-Tag", "noai"),
        path => ok("image/png", png(path[1..].parse().unwrap_or(255))),
    }
}

fn config(server: &Server, folder: &Path, list: &str, format: ListFormat) -> DownloadConfig {
    let url_list = folder.join("list");
    std::fs::write(&url_list, list).unwrap();
    DownloadConfig {
        url_list,
        input_format: format,
        gzipped: false,
        url_col: "url".to_owned(),
        caption_col: (format != ListFormat::Txt).then(|| "caption".to_owned()),
        verify_hash: None,
        save_additional_columns: Vec::new(),
        output_folder: folder.join("out"),
        output_format: OutputFormat::Webdataset,
        number_sample_per_shard: 3,
        oom_shard_count: 5,
        compute_hash: Some(HashKind::Sha256),
        extract_exif: true,
        incremental_mode: IncrementalMode::Incremental,
        max_shard_retry: 1,
        retry_status: Vec::new(),
        fetch: FetchConfig {
            web: web(),
            image: ImageConfig {
                size: 32,
                resize: ResizeMode::Border,
                min_side: 0,
                max_aspect: f64::INFINITY,
                ..ImageConfig::default()
            },
            ..FetchConfig::default()
        },
        crawler: worker(server.address),
    }
}

async fn run(config: &DownloadConfig) -> Result<DownloadSummary, CrawlError> {
    Ok(counted(config).await?.0)
}

/// What a download comes to, and its downloads by status.
async fn counted(config: &DownloadConfig) -> Result<(DownloadSummary, BTreeMap<FetchStatus, u64>), CrawlError> {
    let progress = Arc::new(DownloadProgress::default());
    let summary = download(config.clone(), Arc::clone(&progress), CancellationToken::new()).await?;
    assert_eq!(progress.rows(), progress.traffic().totals().all());
    Ok((summary, progress.traffic().totals().by_status))
}

fn rows(path: &Path) -> RecordBatch {
    let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(path).unwrap()).unwrap();
    let schema = Arc::clone(reader.schema());
    let batches: Vec<_> = reader.build().unwrap().collect::<Result<_, _>>().unwrap();
    concat_batches(&schema, &batches).unwrap()
}

/// Every file below a folder, by its name; stats without their times.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            let mut bytes = std::fs::read(&path).unwrap();
            if name.ends_with("_stats.json") {
                let mut stats: Value = serde_json::from_slice(&bytes).unwrap();
                for time in ["start_time", "end_time", "duration"] {
                    assert!(stats.as_object_mut().unwrap().remove(time).unwrap().is_f64());
                }
                bytes = stats.to_string().into_bytes();
            }
            found.insert(name, bytes);
        }
    }
    found
}

fn members(tar: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        (entry.path().unwrap().display().to_string(), bytes)
    });
    entries.collect()
}

const LIST: &str = "url,caption,n\nhttp://a.test/1,\"a red, car\",1\nhttp://a.test/gone,gone,2\nhttp://b.test/2,,3\n\
                    http://b.test/text,text,4\nhttp://b.test/noai,noai,5\n,none,6\nhttp://a.test/3,\u{e9}t\u{e9},7\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn webdataset_has_img2datasets_layout() {
    let server = Server::start(pictures).await;
    let folder = tempfile::tempdir().unwrap();
    let config =
        DownloadConfig { save_additional_columns: vec!["n".to_owned()], ..config(&server, folder.path(), LIST, ListFormat::Csv) };
    let summary = run(&config).await.unwrap();
    assert_eq!((summary.shards, summary.count, summary.successes), (3, 7, 3));
    assert_eq!((summary.failed_to_download, summary.failed_to_resize, summary.stopped), (3, 1, false));
    let files = files(&config.output_folder);
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let shard = |n: u32| ["parquet", "tar"].map(|e| format!("0000{n}.{e}")).into_iter().chain([format!("0000{n}_stats.json")]);
    assert_eq!(names, (0..3).flat_map(shard).collect::<Vec<_>>());
    let members = members(&files["00000.tar"]);
    let names: Vec<&str> = members.iter().map(|m| m.0.as_str()).collect();
    assert_eq!(names, ["000000.jpg", "000000.json", "000000.txt", "000002.jpg", "000002.json", "000002.txt"]);
    let image = image::load_from_memory(&members[0].1).unwrap();
    assert_eq!((image.width(), image.height()), (32, 32));
    let about: Value = serde_json::from_slice(&members[1].1).unwrap();
    let wanted = json!({
        "n": 1, "caption": "a red, car", "url": "http://a.test/1", "key": "000000", "status": "success", "error_message": null,
        "width": 32, "height": 32, "original_width": 64, "original_height": 48, "exif": "{}", "sha256": Digest::of(&png(1)).to_string(),
    });
    assert_eq!(about, wanted);
    assert_eq!((members[2].1.as_slice(), members[5].1.as_slice()), (&b"a red, car"[..], &b""[..]));
    let rows = rows(&config.output_folder.join("00001.parquet"));
    let schema = rows.schema();
    let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    let wanted = "n caption url key status error_message width height original_width original_height exif sha256";
    assert_eq!(names.join(" "), wanted);
    assert_eq!(texts(&rows, "key"), ["000010", "000011", "000012"]);
    assert_eq!(texts(&rows, "status"), ["failed_to_resize", "failed_to_download", "failed_to_download"]);
    let messages = texts(&rows, "error_message");
    assert!(messages[0].starts_with("not_image: ") && messages[2].starts_with("bad_url: "), "{messages:?}");
    assert_eq!(messages[1], "Use of image disallowed by X-Robots-Tag directive");
    assert!(rows.column_by_name("width").unwrap().as_primitive::<Int32Type>().is_null(0));
    let mut stats: Value = serde_json::from_slice(&files["00000_stats.json"]).unwrap();
    let settings = stats.as_object_mut().unwrap().remove("settings").unwrap();
    assert_eq!(
        (&settings["size"], &settings["resize"], &settings["caption_col"], &settings["save_additional_columns"]),
        (&json!(32), &json!("border"), &json!("caption"), &json!(["n"]))
    );
    let wanted = json!({"count": 3, "successes": 2, "failed_to_download": 1, "failed_to_resize": 0,
        "status_dict": {"success": 2, "HTTP Error 404: Not Found": 1}});
    assert_eq!(stats, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_layouts_hold_the_same() {
    let server = Server::start(pictures).await;
    let folder = tempfile::tempdir().unwrap();
    let base = config(&server, folder.path(), LIST, ListFormat::Csv);
    let at =
        |name: &str, output_format| DownloadConfig { output_format, output_folder: folder.path().join(name), ..base.clone() };
    for config in [at("tar", OutputFormat::Webdataset), at("files", OutputFormat::Files), at("parquet", OutputFormat::Parquet)] {
        assert_eq!(run(&config).await.unwrap().successes, 3);
    }
    let (tar, parquet) = (folder.path().join("tar"), folder.path().join("parquet"));
    let loose = files(&folder.path().join("files"));
    for shard in ["00000", "00001", "00002"] {
        let packed = members(&files(&tar)[&format!("{shard}.tar")]);
        for (name, bytes) in &packed {
            assert_eq!(&loose[&format!("{shard}/{name}")], bytes, "{name}");
        }
        let there = loose.keys().filter(|name| name.starts_with(&format!("{shard}/"))).count();
        assert_eq!(there, packed.len());
        let (with, without) = (rows(&parquet.join(format!("{shard}.parquet"))), rows(&tar.join(format!("{shard}.parquet"))));
        let (images, rest) = with.columns().split_last().unwrap();
        assert_eq!(rest, without.columns());
        let stored: Vec<&[u8]> = images.as_binary::<i32>().iter().flatten().collect();
        let wanted: Vec<&[u8]> = packed.iter().filter(|(name, _)| name.ends_with("jpg")).map(|(_, b)| b.as_slice()).collect();
        assert_eq!(stored, wanted);
    }
    let records = at("records", OutputFormat::Tfrecord);
    run(&records).await.unwrap();
    let names: BTreeSet<String> = files(&records.output_folder).into_keys().filter(|n| n.starts_with("00002")).collect();
    assert_eq!(names, ["00002.parquet", "00002.tfrecord", "00002_stats.json"].map(str::to_owned).into());
    let nothing = at("nothing", OutputFormat::Dummy);
    run(&nothing).await.unwrap();
    assert!(files(&nothing.output_folder).keys().all(|name| name.ends_with("_stats.json")));
    // The same list gives the same bytes.
    let again = at("again", OutputFormat::Webdataset);
    run(&again).await.unwrap();
    assert!(files(&again.output_folder) == files(&tar));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opt_out_lists_count() {
    let server = Server::start(pictures).await;
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("opt-out.txt");
    std::fs::write(&list, "b.test\n").unwrap();
    let mut config = config(&server, folder.path(), LIST, ListFormat::Csv);
    config.fetch.web.opt_out_lists = vec![list];
    assert_eq!(run(&config).await.unwrap().successes, 2);
    let rows = rows(&config.output_folder.join("00001.parquet"));
    assert_eq!(texts(&rows, "error_message")[0], "opt_out: an opt-out list names the address");
    assert!(server.asked().iter().all(|a| !a.starts_with("b.test")));
}

fn numbers(n: u32) -> String {
    (0..n).map(|i| format!("http://h{}.test/{i}\n", i % 5)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_goes_on_where_it_ended() {
    let server = Server::start(pictures).await;
    let folder = tempfile::tempdir().unwrap();
    let base = config(&server, folder.path(), &numbers(20), ListFormat::Txt);
    assert_eq!(run(&base).await.unwrap().shards, 7);
    let whole = files(&base.output_folder);
    // A shard without its stats is not done, whatever else is there of it; what a killed run left behind goes.
    let out = &base.output_folder;
    std::fs::remove_file(out.join("00003_stats.json")).unwrap();
    std::fs::write(out.join("00003.tar"), "torn").unwrap();
    std::fs::remove_file(out.join("00006.parquet")).unwrap();
    std::fs::remove_file(out.join("00006_stats.json")).unwrap();
    std::fs::create_dir_all(out.join("_tmp/00003")).unwrap();
    std::fs::write(out.join("_tmp/00003.tar"), "torn").unwrap();
    let before = server.asked().len();
    let summary = run(&base).await.unwrap();
    assert_eq!((summary.shards, summary.shards_there, summary.count), (2, 5, 5));
    assert_eq!(server.asked().iter().skip(before).filter(|a| !a.ends_with("robots.txt")).count(), 5);
    assert!(files(out) == whole);
    let summary = run(&base).await.unwrap();
    assert_eq!((summary.shards, summary.shards_there), (0, 7));

    // Another list, or another size of shards, is refused before anything is asked.
    let before = server.asked().len();
    let error = run(&DownloadConfig { number_sample_per_shard: 4, ..base.clone() }).await.unwrap_err().to_string();
    assert!(error.contains("shard 00000 was made with another `number_sample_per_shard`: 3 there, 4 here"), "{error}");
    let mut larger = base.clone();
    larger.fetch.image.size = 64;
    let error = run(&larger).await.unwrap_err().to_string();
    assert!(error.contains("shard 00000 was made with another `size`: 32 there, 64 here"), "{error}");
    let error = run(&DownloadConfig { output_format: OutputFormat::Files, ..base.clone() }).await.unwrap_err().to_string();
    assert!(error.contains(r#"another `output_format`: "webdataset" there, "files" here"#), "{error}");
    std::fs::write(&base.url_list, "").unwrap();
    let overwrite = DownloadConfig { incremental_mode: IncrementalMode::Overwrite, ..base.clone() };
    assert!(run(&overwrite).await.unwrap_err().to_string().contains("it holds no row"));
    assert!(files(out) == whole && server.asked().len() == before, "a list that cannot be used costs nothing");

    std::fs::write(&base.url_list, numbers(4)).unwrap();
    let extend = DownloadConfig { incremental_mode: IncrementalMode::Extend, ..base.clone() };
    assert_eq!(run(&extend).await.unwrap().shards, 2);
    let extended = files(out);
    assert!(whole.iter().all(|(name, bytes)| &extended[name] == bytes) && extended.contains_key("00008.tar"));
    assert_eq!(texts(&rows(&out.join("00008.parquet")), "url"), ["http://h3.test/3"]);
    // Only what a download wrote is removed.
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    assert_eq!(run(&overwrite).await.unwrap().shards, 2);
    let left: Vec<String> = files(out).into_keys().collect();
    assert_eq!(
        left,
        ["00000.parquet", "00000.tar", "00000_stats.json", "00001.parquet", "00001.tar", "00001_stats.json", "notes.txt"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn samples_of_a_killed_attempt_do_not_stay_in_a_shard_of_files() {
    let answers = Arc::new(AtomicBool::new(true));
    let server = {
        let answers = Arc::clone(&answers);
        Server::start(move |r| if r.path == "/4" && !answers.load(Ordering::SeqCst) { status(404) } else { pictures(r) }).await
    };
    let folder = tempfile::tempdir().unwrap();
    let base = config(&server, folder.path(), &numbers(6), ListFormat::Txt);
    let base = DownloadConfig { output_format: OutputFormat::Files, ..base };
    assert_eq!(run(&base).await.unwrap().successes, 6);
    let out = &base.output_folder;
    // It was killed when its samples were in their place, and the second time one of them is not there.
    std::fs::remove_file(out.join("00001_stats.json")).unwrap();
    assert!(out.join("00001/000011.jpg").exists());
    answers.store(false, Ordering::SeqCst);
    let summary = run(&base).await.unwrap();
    assert_eq!((summary.shards, summary.successes), (1, 2));
    let names: Vec<String> = files(&out.join("00001")).into_keys().collect();
    assert_eq!(names, ["000010.jpg", "000010.json", "000012.jpg", "000012.json"]);
    assert_eq!(files(&out.join("00000")).len(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_host_holds_up_nobody_and_order_stays() {
    // The first row of each shard comes late, one not at all.
    let server = Server::start(|r| match r.path.as_str() {
        "/0" => Reply::Late(Duration::from_secs(600), Box::new(status(200))),
        "/3" | "/6" => Reply::Late(Duration::from_millis(400), Box::new(pictures(r))),
        _ => pictures(r),
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let base = config(&server, folder.path(), &numbers(30), ListFormat::Txt);
    let began = Instant::now();
    let progress = Arc::new(DownloadProgress::default());
    let work = tokio::spawn(download(base.clone(), Arc::clone(&progress), CancellationToken::new()));
    // Two attempts of a second each hold the first shard open: others must be there before.
    while progress.shards() < 3 {
        assert!(began.elapsed() < Duration::from_secs(60) && !base.output_folder.join("00000.tar").exists());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let summary = work.await.unwrap().unwrap();
    let timeouts = progress.traffic().totals().by_status[&FetchStatus::Timeout];
    assert_eq!((summary.successes, timeouts, summary.shards), (29, 1, 10));
    let out = &base.output_folder;
    for shard in 0..10 {
        let urls = texts(&rows(&out.join(format!("{shard:05}.parquet"))), "url");
        assert!(urls.iter().enumerate().all(|(i, url)| url.ends_with(&format!("/{}", shard * 3 + i))));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_rows_of_chosen_classes_are_downloaded_again() {
    let broken = Arc::new(AtomicBool::new(true));
    let server = {
        let broken = Arc::clone(&broken);
        Server::start(move |r| match r.path.as_str() {
            "/4" | "/5" if broken.load(Ordering::SeqCst) => status(503),
            "/7" => status(404),
            _ => pictures(r),
        })
        .await
    };
    for output_format in [OutputFormat::Webdataset, OutputFormat::Files, OutputFormat::Parquet] {
        let folder = tempfile::tempdir().unwrap();
        let base = DownloadConfig { output_format, ..config(&server, folder.path(), &numbers(10), ListFormat::Txt) };
        broken.store(false, Ordering::SeqCst);
        let undisturbed = DownloadConfig { output_folder: folder.path().join("whole"), ..base.clone() };
        run(&undisturbed).await.unwrap();
        broken.store(true, Ordering::SeqCst);
        assert_eq!(run(&base).await.unwrap().successes, 7);
        let asked = server.asked().len();
        let other = DownloadConfig { retry_status: vec![FetchStatus::Dns], ..base.clone() };
        assert_eq!(run(&other).await.unwrap().shards, 0);
        assert_eq!(server.asked().len(), asked);
        broken.store(false, Ordering::SeqCst);
        let again = DownloadConfig { retry_status: vec![FetchStatus::HttpServer, FetchStatus::Timeout], ..base.clone() };
        let (summary, status) = counted(&again).await.unwrap();
        assert_eq!((summary.shards, status), (1, [(FetchStatus::Ok, 2)].into()));
        let asked: Vec<String> = server.asked().split_off(asked);
        assert_eq!(asked.iter().filter(|a| !a.ends_with("robots.txt")).count(), 2, "{asked:?}");
        assert!(files(&base.output_folder) == files(&undisturbed.output_folder), "{output_format:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hashes_are_verified_and_columns_keep_their_place() {
    let server = Server::start(pictures).await;
    let folder = tempfile::tempdir().unwrap();
    let right = HashKind::Md5.of(&png(1));
    let list = format!("address,sum\nhttp://a.test/1,{}\nhttp://a.test/2,{right}\n", right.to_uppercase());
    let config = DownloadConfig {
        caption_col: None,
        url_col: "address".to_owned(),
        verify_hash: Some(("sum".to_owned(), HashKind::Md5)),
        compute_hash: Some(HashKind::Md5),
        extract_exif: false,
        ..config(&server, folder.path(), &list, ListFormat::Csv)
    };
    run(&config).await.unwrap();
    let rows = rows(&config.output_folder.join("00000.parquet"));
    let schema = rows.schema();
    let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names.join(" "), "md5 url key status error_message width height original_width original_height");
    assert_eq!(texts(&rows, "md5"), [right.as_str(), "-"]);
    assert_eq!(texts(&rows, "error_message"), ["-", "hash mismatch"]);
    let tar = members(&files(&config.output_folder)["00000.tar"]);
    assert_eq!(tar.len(), 2, "no captions were asked for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_download_leaves_whole_shards() {
    let server = Server::start(|r| match r.path.trim_start_matches('/').parse::<u32>() {
        Ok(n) if n >= 6 => Reply::Late(Duration::from_secs(600), Box::new(pictures(r))),
        _ => pictures(r),
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let base = config(&server, folder.path(), &numbers(30), ListFormat::Txt);
    let (progress, stop) = (Arc::new(DownloadProgress::default()), CancellationToken::new());
    let work = tokio::spawn(download(base.clone(), Arc::clone(&progress), stop.clone()));
    while progress.shards() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // A second download into the folder is refused.
    let error = run(&base).await.unwrap_err().to_string();
    assert!(error.contains("another download writes into"), "{error}");
    stop.cancel();
    let summary = tokio::time::timeout(Duration::from_secs(20), work).await.unwrap().unwrap().unwrap();
    assert_eq!((summary.stopped, summary.shards), (true, 2));
    let names: Vec<String> = files(&base.output_folder).into_keys().collect();
    assert_eq!(names, ["00000.parquet", "00000.tar", "00000_stats.json", "00001.parquet", "00001.tar", "00001_stats.json"]);
    assert!(!base.output_folder.join("_tmp").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_cannot_be_written_ends_the_download() {
    let server = Server::start(pictures).await;
    let folder = tempfile::tempdir().unwrap();
    let base = config(&server, folder.path(), &numbers(12), ListFormat::Txt);
    // Where a shard's file should go stands a folder that holds something.
    std::fs::create_dir_all(base.output_folder.join("00001.tar/x")).unwrap();
    let summary = run(&base).await.unwrap();
    assert_eq!((summary.shards, summary.failed_shards.keys().copied().collect::<Vec<_>>()), (3, vec![1]));
    assert!(summary.failed_shards[&1].contains("cannot write") && summary.failed_shards[&1].contains("00001.tar"));
    std::fs::remove_dir_all(base.output_folder.join("00001.tar")).unwrap();
    assert_eq!(run(&base).await.unwrap().shards, 1);
    std::fs::write(folder.path().join("file"), "").unwrap();
    let error = run(&DownloadConfig { output_folder: folder.path().join("file/x"), ..base }).await.unwrap_err();
    assert!(error.to_string().contains("cannot write"), "{error}");
}

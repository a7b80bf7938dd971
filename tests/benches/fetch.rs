//! Images fetched a second and core from a server on loopback: request, decode, resize to 256, encode, hash, write as Parquet.
//!
//! The environment variable `IMG2DATASET` names the program of the peer; without it ours runs alone.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::io::{BufRead, BufReader, Cursor};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, ListArray, RecordBatch, StringArray, new_null_array};
use arrow::datatypes::{DataType, UInt32Type};
use axum::http::Uri;
use capfilt_crawler::{CrawlerWorkerConfig, Fetch, FetchConfig, ImageConfig, Web};
use capfilt_runtime::{Stage, Work};
use capfilt_schemas::{RunId, StageKind, Table, Task, sample_id};
use capfilt_store::{ShardWriter, Store};
use capfilt_tests::{Figures, cpu_seconds};
use futures::{StreamExt, TryStreamExt, stream};
use image::{ImageFormat, Rgb, RgbImage};

/// Different pictures, requests of one measurement, and measurements.
const PICTURES: u32 = 24;
const REQUESTS: usize = 1000;
const ROUNDS: usize = 3;

/// The argument that makes this program the server.
const SERVE: &str = "serve-pictures";

/// A picture of about two megapixels with smooth parts and texture, as a JPEG.
fn picture(n: u32) -> Vec<u8> {
    let image = RgbImage::from_fn(1600, 1200, |x, y| {
        let wave = |k: u32| ((x * k + y * (n + 3)) / 16 % 200) as u8;
        let grain = ((x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503 + n)) >> 27) as u8;
        Rgb([wave(1).wrapping_add(grain), wave(2) / 2 + 40, (y / 6) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Jpeg).unwrap();
    bytes.into_inner()
}

/// Rows of `selected`.
fn selected(urls: &[String]) -> RecordBatch {
    let text = |f: &dyn Fn(&String) -> String| Arc::new(urls.iter().map(|u| Some(f(u))).collect::<StringArray>()) as ArrayRef;
    let schema = Table::Selected.schema();
    let queries = || {
        let list = ListArray::from_iter_primitive::<UInt32Type, _, _>(urls.iter().map(|_| Some(vec![Some(0)])));
        arrow::compute::cast(&list, schema.field(6).data_type()).unwrap()
    };
    let columns = vec![
        text(&|u| sample_id(u, "a picture")),
        text(&Clone::clone),
        text(&|_| "a picture".to_owned()),
        text(&|_| "list".to_owned()),
        new_null_array(&DataType::Utf8, urls.len()),
        text(&|_| "bench".to_owned()),
        queries(),
        queries(),
    ];
    RecordBatch::try_new(schema, columns).unwrap()
}

/// The pictures at `/0`, `/1` and so on, again and again, in a process of its own: its work is in nobody's figures.
#[tokio::main]
async fn serve() {
    let pictures: Arc<Vec<Vec<u8>>> = Arc::new((0..PICTURES).map(picture).collect());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let app = axum::Router::new().fallback(move |uri: Uri| {
        let n = uri.path()[1..].parse::<usize>().ok();
        let body = n.map(|n| pictures[n % pictures.len()].clone());
        async move { body.ok_or(axum::http::StatusCode::NOT_FOUND) }
    });
    axum::serve(listener, app).await.unwrap();
}

struct Server(Child, String);

impl Server {
    fn start() -> Self {
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new(program).arg(SERVE).stdout(Stdio::piped()).spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self(child, address.trim().to_owned())
    }

    fn urls(&self, round: usize) -> Vec<String> {
        (0..REQUESTS).map(|i| format!("http://{}/{}", self.1, round * REQUESTS + i)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// img2dataset with the same request: shorter side 256, JPEG at quality 95, sha256, Parquet.
fn img2dataset(program: &str, urls: &[String], folder: &Path) {
    let list = folder.join("urls.txt");
    std::fs::write(&list, urls.join("\n")).unwrap();
    let cores = std::thread::available_parallelism().unwrap().to_string();
    let out = folder.join("out");
    let status = Command::new(program)
        .arg("--url_list")
        .arg(&list)
        .arg("--output_folder")
        .arg(&out)
        .args(["--input_format", "txt", "--output_format", "parquet", "--image_size", "256", "--resize_mode", "keep_ratio"])
        .args(["--resize_only_if_bigger", "True", "--encode_quality", "95", "--compute_hash", "sha256"])
        .args(["--thread_count", "64", "--number_sample_per_shard", "500", "--processes_count", &cores])
        .env("NO_ALBUMENTATIONS_UPDATE", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{program} failed");
    let done: u64 = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with("_stats.json"))
        .map(|path| serde_json::from_slice::<serde_json::Value>(&std::fs::read(path).unwrap()).unwrap())
        .map(|stats| stats["successes"].as_u64().unwrap())
        .sum();
    assert_eq!(done, REQUESTS as u64, "{program} did not fetch everything");
}

async fn ours(urls: &[String]) {
    let worker = CrawlerWorkerConfig {
        per_host: 64,
        requests_per_second: 1e6,
        allow_networks: vec!["127.0.0.0/8".parse().unwrap()],
        ..CrawlerWorkerConfig::default()
    };
    let stage = Fetch::new(Web::new(&worker).unwrap());
    let config = FetchConfig { image: ImageConfig { size: 256, ..ImageConfig::default() }, ..FetchConfig::default() };
    let params = serde_json::to_value(config.params("bench").unwrap()).unwrap();
    let task = Task { stage: StageKind::Fetch, stage_version: 1, params, model: None, inputs: vec![] };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).await.unwrap();
    let work = Work::new(task, store.clone(), RunId::new("bench").unwrap(), folder.path());
    let mut rows = stage.process(work, stream::iter([Ok(selected(urls))]).boxed());
    let mut shard = ShardWriter::new(Table::Samples).unwrap();
    while let Some(batch) = rows.try_next().await.unwrap() {
        shard.write(&batch).unwrap();
        let status = batch.column_by_name("status").unwrap().as_string::<i32>();
        assert!(status.iter().all(|status| status == Some("ok")), "{status:?}");
    }
    assert_eq!(shard.finish(&store).await.unwrap().rows, REQUESTS as u64);
}

fn main() {
    if std::env::args().any(|argument| argument == SERVE) {
        return serve();
    }
    let server = Server::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let peer = std::env::var("IMG2DATASET").ok();
    let rate = |work: &dyn Fn()| {
        let before = cpu_seconds();
        work();
        REQUESTS as f64 / (cpu_seconds() - before)
    };
    let (mut of_us, mut of_peer) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let urls = server.urls(round);
        of_us.push(rate(&|| runtime.block_on(ours(&urls))));
        if let Some(program) = &peer {
            let folder = tempfile::tempdir().unwrap();
            of_peer.push(rate(&|| img2dataset(program, &urls, folder.path())));
        }
    }
    let peer = peer.map(|_| ("img2dataset".to_owned(), of_peer));
    Figures { name: "fetch", unit: "images/s/core (2 Mpixel JPEG, shorter side to 256, Parquet)", ours: of_us, peer }
        .report()
        .unwrap();
}

//! Download, decode, resize to 256, encode, hash and write shards: 5,000 addresses of 500 photos of about 300 KB and 2 megapixels
//! (`fetch_data.py`), served by nginx on loopback, by the fetch stage and by img2dataset in its best settings, in turn.
//!
//! The environment names the folder that `fetch_data.py` filled (`FETCH_DATA`) and the peer's program (`IMG2DATASET`; without it ours runs alone). Each
//! runs in processes of its own. CPU time is theirs without the server's; memory is the most that was seen, in all processes together.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, missing_docs)]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, AsArray, ListArray, RecordBatch, StringArray, new_null_array};
use arrow::datatypes::{DataType, UInt32Type};
use capfilt_crawler::{CrawlerWorkerConfig, Fetch, FetchConfig, ImageConfig, Web};
use capfilt_runtime::{Stage, Work};
use capfilt_schemas::{RunId, StageKind, Table, Task, sample_id};
use capfilt_store::{ShardWriter, Store};
use capfilt_tests::{Figures, cpu_seconds};
use futures::{StreamExt, TryStreamExt, stream};

/// Addresses of one measurement, rows of a shard, and measurements.
const ADDRESSES: usize = 5_000;
const SHARD: usize = 1_000;
const ROUNDS: usize = 3;

/// The argument that makes this program fetch a list into a folder.
const OURS: &str = "fetch-list";

/// nginx with one worker, on a port that was free.
struct Server {
    nginx: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(data: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (here, photos) = (folder.path().display(), data.join("photos"));
        let photos = photos.display();
        let config = format!(
            "daemon off; worker_processes 1; pid {here}/pid; error_log {here}/error.log; events {{ worker_connections 1024; }}\n\
             http {{ access_log off; client_body_temp_path {here}; proxy_temp_path {here}; fastcgi_temp_path {here};\n\
             uwsgi_temp_path {here}; scgi_temp_path {here}; sendfile on; keepalive_requests 1000000; types {{ image/jpeg jpg; }}\n\
             server {{ listen 127.0.0.1:{port}; root {photos}; }} }}\n"
        );
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, config).unwrap();
        let path = format!("{}:{}:/usr/sbin", data.display(), std::env::var("PATH").unwrap_or_default());
        let nginx = Command::new("nginx").env("PATH", path).arg("-c").arg(&file).stderr(Stdio::null()).spawn();
        let nginx = nginx.unwrap_or_else(|e| panic!("nginx cannot be started ({e}): scripts/bench.sh brings it"));
        let server = Self { nginx, port, _folder: folder };
        let begin = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10), "nginx does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGTERM ends the worker, too.
        _ = Command::new("kill").arg(self.nginx.id().to_string()).status();
        _ = self.nginx.wait();
    }
}

/// What one side used for all addresses.
struct Used {
    /// From the first request to the last shard, without the start of the program.
    seconds: f64,
    /// User and system, with the start of the program.
    cpu: f64,
    /// MiB, of all processes together.
    memory: f64,
}

/// Runs a program to its end. What it says goes to `log`.
fn measure(command: &mut Command, log: &Path) -> Used {
    let before = cpu_seconds();
    let out = std::fs::File::create(log).unwrap();
    let begin = Instant::now();
    let mut child = command.stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap();
    let mut memory: f64 = 0.0;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        memory = memory.max(tree_memory(child.id()));
        std::thread::sleep(Duration::from_millis(100));
    };
    let seconds = begin.elapsed().as_secs_f64();
    assert!(status.success(), "{command:?} failed:\n{}", std::fs::read_to_string(log).unwrap_or_default());
    Used { seconds, cpu: cpu_seconds() - before, memory }
}

/// Proportional set size of a process and of what it started, in MiB: a page that several share counts once.
fn tree_memory(process: u32) -> f64 {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{process}/{name}")).unwrap_or_default();
    let pss =
        read("smaps_rollup").lines().find_map(|l| l.strip_prefix("Pss:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let children = tasks.map(|task| std::fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let below: f64 =
        children.flat_map(|list| list.split(' ').filter_map(|id| id.parse().ok()).map(tree_memory).collect::<Vec<_>>()).sum();
    pss.unwrap_or(0.0) / 1024.0 + below
}

/// img2dataset 1.47 as it is fastest: WebDataset, a process for each core, 64 threads, shards of 1,000.
fn img2dataset(program: &str, list: &Path, folder: &Path) -> Used {
    let cores = std::thread::available_parallelism().unwrap().to_string();
    let out = folder.join("out");
    let mut command = Command::new(program);
    command.arg("--url_list").arg(list).arg("--output_folder").arg(&out).env("NO_ALBUMENTATIONS_UPDATE", "1");
    command.args(["--input_format", "csv", "--url_col", "url", "--caption_col", "caption", "--output_format", "webdataset"]);
    command.args(["--image_size", "256", "--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True"]);
    command.args(["--thread_count", "64", "--number_sample_per_shard", &SHARD.to_string(), "--processes_count", &cores]);
    let used = measure(&mut command, &folder.join("log"));
    let (mut done, mut start, mut end) = (0, f64::MAX, 0.0_f64);
    for entry in std::fs::read_dir(&out).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().ends_with("_stats.json") {
            let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            done += stats["successes"].as_u64().unwrap();
            start = start.min(stats["start_time"].as_f64().unwrap());
            end = end.max(stats["end_time"].as_f64().unwrap());
        }
    }
    assert_eq!(done, ADDRESSES as u64, "{program} did not fetch everything");
    Used { seconds: end - start, ..used }
}

fn ours(list: &Path, folder: &Path) -> Used {
    let program = std::env::current_exe().unwrap();
    measure(Command::new(program).arg(OURS).arg(list).arg(folder), &folder.join("log"))
}

/// Rows of `selected`.
fn selected(urls: &[String]) -> RecordBatch {
    let text = |f: &dyn Fn(&String) -> String| Arc::new(urls.iter().map(|u| Some(f(u))).collect::<StringArray>()) as ArrayRef;
    let schema = Table::Selected.schema();
    let queries = || {
        let list = ListArray::from_iter_primitive::<UInt32Type, _, _>(urls.iter().map(|_| Some(vec![Some(0)])));
        arrow::compute::cast(&list, schema.field(7).data_type()).unwrap()
    };
    let columns = vec![
        text(&|u| sample_id(u, "a picture")),
        text(&Clone::clone),
        text(&|_| "a picture".to_owned()),
        text(&|_| "list".to_owned()),
        new_null_array(&DataType::Utf8, urls.len()),
        text(&|_| "bench".to_owned()),
        new_null_array(&DataType::Utf8, urls.len()),
        queries(),
        queries(),
    ];
    RecordBatch::try_new(schema, columns).unwrap()
}

/// The fetch stage on one shard of addresses after the other, as a worker does it.
#[tokio::main]
async fn fetch_list(list: &Path, folder: &Path) {
    let urls: Vec<String> = std::fs::read_to_string(list).unwrap().lines().skip(1).map(|l| l.replace(",a picture", "")).collect();
    let loopback = vec!["127.0.0.0/8".parse().unwrap()];
    let worker = CrawlerWorkerConfig {
        per_host: 64,
        requests_per_second: 1e6,
        allow_networks: loopback,
        ..CrawlerWorkerConfig::default()
    };
    let stage = Fetch::new(Web::new(&worker).unwrap());
    let config = FetchConfig { image: ImageConfig { size: 256, ..ImageConfig::default() }, ..FetchConfig::default() };
    let store = Store::open(folder.join("store").to_str().unwrap()).await.unwrap();
    for urls in urls.chunks(SHARD) {
        let params = serde_json::to_value(config.params("bench").unwrap()).unwrap();
        let task = Task { stage: StageKind::Fetch, stage_version: 1, params, model: None, inputs: vec![] };
        let work = Work::new(task, store.clone(), RunId::new("bench").unwrap(), folder);
        let mut rows = stage.process(work, stream::iter([Ok(selected(urls))]).boxed());
        let mut shard = ShardWriter::new(Table::Samples).unwrap();
        while let Some(batch) = rows.try_next().await.unwrap() {
            shard.write(&batch).unwrap();
            let status = batch.column_by_name("status").unwrap().as_string::<i32>();
            assert!(status.iter().all(|status| status == Some("ok")), "{status:?}");
        }
        assert_eq!(shard.finish(&store).await.unwrap().rows, urls.len() as u64);
    }
}

fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().map(PathBuf::from).collect();
    if let Some(at) = arguments.iter().position(|a| a == Path::new(OURS)) {
        return fetch_list(&arguments[at + 1], &arguments[at + 2]);
    }
    let Some(data) = std::env::var_os("FETCH_DATA").map(PathBuf::from) else {
        return println!("fetch: FETCH_DATA names no folder of photos; scripts/bench.sh makes one");
    };
    let data = data.canonicalize().unwrap();
    let photos = data.join("photos");
    let mut names: Vec<String> =
        std::fs::read_dir(&photos).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".jpg"));
    names.sort();
    let server = Server::start(&data);
    let peer = std::env::var("IMG2DATASET").ok();
    let (mut of_us, mut of_peer): (Vec<Used>, Vec<Used>) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("urls.csv");
        let rows = (0..ADDRESSES).map(|i| {
            let name = &names[i % names.len()];
            format!("http://127.0.0.1:{}/{name}?i={round}-{i},a picture\n", server.port)
        });
        std::fs::write(&list, std::iter::once("url,caption\n".to_owned()).chain(rows).collect::<String>()).unwrap();
        of_us.push(ours(&list, folder.path()));
        if let Some(program) = &peer {
            of_peer.push(img2dataset(program, &list, folder.path()));
        }
    }
    let figures = |name, unit, of: &dyn Fn(&Used) -> f64| {
        let peer = peer.as_ref().map(|_| ("img2dataset".to_owned(), of_peer.iter().map(of).collect()));
        Figures { name, unit, ours: of_us.iter().map(of).collect(), peer }.report().unwrap();
    };
    let count = ADDRESSES as f64;
    figures("fetch", "images/s (2 Mpixel JPEG, shorter side to 256, shards)", &|used| count / used.seconds);
    figures("fetch_cpu", "images/s/core (the same, by CPU time)", &|used| count / used.cpu);
    let peak = |of: &[Used]| of.iter().map(|used| used.memory).fold(0.0, f64::max);
    let ms = |of: &[Used]| of.iter().map(|used| used.cpu).sum::<f64>() / of.len() as f64 / count * 1e3;
    println!("fetch      ours {:.1} ms of CPU an image, {:.0} MiB at most", ms(&of_us), peak(&of_us));
    if peer.is_some() {
        println!("fetch      img2dataset {:.1} ms of CPU an image, {:.0} MiB at most", ms(&of_peer), peak(&of_peer));
    }
}

//! Candidates balanced a second: deduplication by address, a cap per query, the selected pairs written in the order of their ids.
//!
//! Two threads for each side; 4 GiB for ours, what it takes by itself for the peer. The environment variable `DUCKDB_PYTHON` names a
//! Python with the peer, `duckdb`; without it, or if it fails, ours stands alone. `BALANCE_ROWS` (50 million), `BALANCE_PER_QUERY`
//! (20000) and `BALANCE_FOLDER` (the system's temporary folder) change the work. The full size takes some 20 GB there, and the peer's
//! spill more than 48 GB; 20 million rows got through with 28 GB.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use capfilt_coordinator::SqlConfig;
use capfilt_coordinator::balance::{BalanceConfig, balance};
use capfilt_coordinator::bench::balance_inputs;
use capfilt_schemas::Digest;
use capfilt_store::Store;
use capfilt_tests::Figures;
use serde_json::{Value, json};

const THREADS: usize = 2;
const MEMORY_MIB: usize = 4096;

/// The argument that makes this program do the work: each side is a process of its own, so that its peak of memory is its own.
const WORK: &str = "balance-candidates";

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.replace('_', "").parse().unwrap())
}

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == WORK) {
        println!("{}", runtime.block_on(work(Path::new(&args[2]))));
        return;
    }
    let rows = setting("BALANCE_ROWS", 50_000_000);
    let parent = std::env::var_os("BALANCE_FOLDER").map_or_else(std::env::temp_dir, Into::into);
    let folder = tempfile::Builder::new().prefix("balance-bench").tempdir_in(parent).unwrap();
    let inputs = runtime.block_on(async {
        let store = Store::open(folder.path().to_str().unwrap()).await.unwrap();
        balance_inputs(&store, rows).await.unwrap()
    });
    std::fs::write(folder.path().join("inputs.json"), serde_json::to_vec(&inputs).unwrap()).unwrap();
    let candidates = folder.path().join("objects/candidates");
    println!("{rows} candidates in {} shards, {:.2} GB", inputs.len(), size(&candidates) as f64 / 1e9);

    let ours = output(Command::new(&args[0]).arg(WORK).arg(folder.path())).unwrap();
    let _ = std::fs::remove_dir_all(folder.path().join("objects/selected"));
    say("capfilt", &ours);
    let peer = std::env::var_os("DUCKDB_PYTHON").and_then(|python| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/duckdb_peer.py");
        let [out, spill] = ["peer.parquet", "spill"].map(|name| folder.path().join(name));
        let limits = [THREADS as u64, setting("BALANCE_PER_QUERY", 20_000)].map(|n| n.to_string());
        let peer = output(Command::new(python).arg(script).arg(&candidates).arg(out).arg(spill).args(limits));
        match &peer {
            Ok(peer) => say(&format!("duckdb {}", peer["version"].as_str().unwrap_or("")), peer),
            Err(why) => println!("duckdb failed: {}", why.trim().lines().last().unwrap_or("")),
        }
        peer.ok()
    });
    let rate = |of: &Value| rows as f64 / 1e6 / of["seconds"].as_f64().unwrap();
    Figures {
        name: "balance",
        unit: "million candidates/s, 2 threads",
        ours: vec![rate(&ours)],
        peer: peer.map(|p| ("duckdb".to_owned(), vec![rate(&p)])),
    }
    .report()
    .unwrap();
}

/// Balances the inputs in `folder`; tells how long that took.
async fn work(folder: &Path) -> Value {
    let store = Store::open(folder.to_str().unwrap()).await.unwrap();
    let inputs: Vec<Digest> = serde_json::from_slice(&std::fs::read(folder.join("inputs.json")).unwrap()).unwrap();
    let sql = SqlConfig { memory_mib: MEMORY_MIB, partitions: THREADS, spill_folder: Some(folder.to_owned()) };
    let config = BalanceConfig { per_query: setting("BALANCE_PER_QUERY", 20_000), ..BalanceConfig::default() };
    let began = Instant::now();
    let done = balance(&store, &sql, &config, &inputs).await.unwrap();
    let seconds = began.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    json!({"seconds": seconds, "peak": peak.map(|kib| kib << 10), "rows": done.counts["ok"], "facts": done.facts})
}

/// The JSON that a command prints, or what it says when it fails.
fn output(command: &mut Command) -> Result<Value, String> {
    let done = command.output().unwrap();
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&done.stdout).unwrap())
}

fn say(name: &str, done: &Value) {
    let peak = done["peak"].as_f64().unwrap_or(f64::NAN) / f64::from(1 << 30);
    println!("{name}: {:.1} s, peak {peak:.2} GiB, {} pairs selected", done["seconds"].as_f64().unwrap(), done["rows"]);
}

fn size(folder: &Path) -> u64 {
    std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum()
}

//! WAT files from their packed bytes to (url, text), beside cc2dataset: pairs, records and bytes a second on one core.
//!
//! `CAPFILT_PAGES` is a folder with real HTML pages; they are put into files of Common Crawl's format, once for each of some made-up
//! hosts; `CAPFILT_WAT` may name a file of Common Crawl's own instead. `CC2DATASET_PYTHON` is a Python in which cc2dataset is installed; without it ours runs alone.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "../tests/it/archives.rs"]
mod archives;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use archives::{Page, member, wat};
use capfilt_tests as _;

/// Unpacked size of the file, and measurements.
const SIZE: usize = 300 << 20;
const ROUNDS: usize = 5;

fn main() {
    // `cargo test --benches` passes no such argument.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let path = match (std::env::var_os("CAPFILT_WAT"), std::env::var_os("CAPFILT_PAGES")) {
        (Some(file), _) => PathBuf::from(file),
        (None, Some(folder)) => {
            let path = scratch.path().join("CC-MAIN-bench.warc.wat.gz");
            write(&pages(Path::new(&folder)), &path);
            path
        }
        (None, None) => {
            println!("wat: set CAPFILT_PAGES to a folder with HTML pages; scripts/bench.sh wat does");
            return;
        }
    };
    let packed = std::fs::read(&path).unwrap();
    let mut whole = Vec::new();
    flate2::read::MultiGzDecoder::new(packed.as_slice()).read_to_end(&mut whole).unwrap();
    let (records, unpacked) = (memchr::memmem::find_iter(&whole, b"WARC/1.0\r\n").count(), whole.len());
    drop(whole);
    println!("wat: {records} records, {} MB packed, {} MB unpacked", packed.len() / 1_000_000, unpacked / 1_000_000);
    let peer = std::env::var("CC2DATASET_PYTHON").ok().map(|python| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/cc2dataset_peer.py");
        Command::new(python)
            .arg(script)
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    });
    let mut theirs =
        peer.map(|mut child| (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines(), child));
    let (mut best, mut best_peer): (Option<Round>, Option<Round>) = (None, None);
    for _ in 0..ROUNDS {
        // In turn: the other waits.
        if let Some((go, lines, _)) = &mut theirs {
            writeln!(go).unwrap();
            let line = lines.next().unwrap().unwrap();
            let (seconds, pairs) = line.split_once(' ').unwrap();
            keep(&mut best_peer, Round { seconds: seconds.parse().unwrap(), pairs: pairs.parse().unwrap() });
        }
        let begin = cpu_seconds();
        let mut pairs = 0;
        capfilt_crawler::archive_pairs(packed.as_slice(), |_, _| pairs += 1).unwrap();
        keep(&mut best, Round { seconds: cpu_seconds() - begin, pairs });
    }
    if let Some((go, _, mut child)) = theirs {
        drop(go);
        assert!(child.wait().unwrap().success());
    }
    let tell = |who: &str, round: &Round| {
        let rate = |n: usize| n as f64 / round.seconds;
        println!(
            "wat: {who}: {:.2} s, {} pairs, {:.0} records/s, {:.1} MB/s packed, {:.0} MB/s unpacked",
            round.seconds,
            round.pairs,
            rate(records),
            rate(packed.len()) / 1e6,
            rate(unpacked) / 1e6
        );
        let figures = [("records_per_second", rate(records)), ("unpacked_bytes_per_second", rate(unpacked))];
        for (name, value) in figures {
            println!("{{\"bench\":\"wat\",\"who\":\"{who}\",\"figure\":\"{name}\",\"value\":{value:.0}}}");
        }
    };
    let ours = best.unwrap();
    tell("capfilt", &ours);
    if let Some(peer) = best_peer {
        tell("cc2dataset", &peer);
        let ratio = peer.seconds / ours.seconds;
        println!("wat: {ratio:.1}x cc2dataset on one core");
        println!("{{\"bench\":\"wat\",\"figure\":\"ratio\",\"value\":{ratio:.2}}}");
    }
}

/// CPU time of this thread so far: a busy machine does not count.
fn cpu_seconds() -> f64 {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    times.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

struct Round {
    seconds: f64,
    pairs: usize,
}

fn keep(best: &mut Option<Round>, round: Round) {
    if best.as_ref().is_none_or(|b| round.seconds < b.seconds) {
        *best = Some(round);
    }
}

/// All HTML files below a folder, in the order of their names.
fn pages(folder: &Path) -> Vec<(String, String)> {
    let (mut files, mut folders) = (BTreeSet::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path: PathBuf = entry.path();
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "html" || e == "htm") && entry.file_type().unwrap().is_file() {
                files.insert(path);
            }
        }
    }
    let page = |path: &PathBuf| {
        let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
        (name, String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned())
    };
    files.iter().map(page).collect()
}

/// Writes a packed WAT file.
fn write(pages: &[(String, String)], path: &Path) {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let mut unpacked = 0;
    for host in 0.. {
        for (name, html) in pages {
            let url = format!("http://www.host{host}.test/{name}");
            let of_page = wat(&[Page { url: &url, headers: "X-Powered-By: PHP/5.5.9\r\n", html }]);
            for record in &of_page[usize::from(unpacked > 0)..] {
                file.write_all(&member(record)).unwrap();
                unpacked += record.len();
            }
            if unpacked >= SIZE {
                file.flush().unwrap();
                return;
            }
        }
    }
}

//! Texts matched against 500,000 queries a second and core, whole words, all overlapping matches.
//!
//! `MATCHING_DATA` names the folder that `matching_data.py` has filled, and `MATCHING_PYTHON` a Python with pyahocorasick; without it
//! ours runs alone. Both work on one thread and are measured in its CPU seconds, in turn. The peer matches in two ways (see
//! `matching_peer.py`); in a third, untimed one it works on the words as we fold them and has to find as much as we do.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use capfilt_crawler::{Matcher, QueryList, Scratch};
use capfilt_tests::{Figures, cpu_seconds};
use serde_json::Value;

/// Measurements, and passes of one of ours.
const ROUNDS: usize = 5;
const PASSES: usize = 6;

struct Peer {
    child: Child,
    ask: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    fn start(python: &str, data: &Path) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/matching_peer.py");
        let mut command = Command::new(python);
        command.arg(script).arg(data.join("queries.txt")).arg(data.join("texts.txt"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (ask, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
        let mut peer = Self { child, ask, answers };
        let built = peer.answer();
        println!("pyahocorasick: built in {:.2} s, {:.0} MB", built["build_seconds"], built["megabytes"]);
        peer
    }

    fn answer(&mut self) -> Value {
        serde_json::from_str(&self.answers.next().unwrap().unwrap()).unwrap()
    }

    /// Matches all texts once in one way: CPU seconds and matches.
    fn run(&mut self, way: &str) -> (f64, u64) {
        writeln!(self.ask, "{way}").unwrap();
        let answer = self.answer();
        (answer["seconds"].as_f64().unwrap(), answer["matches"].as_u64().unwrap())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

fn main() {
    let Some(data) = std::env::var_os("MATCHING_DATA").map(PathBuf::from) else {
        println!("matching: MATCHING_DATA is not set; run `make bench NAME=matching`");
        return;
    };
    let queries = QueryList::load(&data.join("queries.txt")).unwrap();
    let all = std::fs::read_to_string(data.join("texts.txt")).unwrap();
    let texts: Vec<&str> = all.lines().collect();
    let bytes: usize = texts.iter().map(|text| text.len()).sum();
    let begin = cpu_seconds();
    let matcher = Matcher::new(&queries).unwrap();
    let (built, megabytes) = (cpu_seconds() - begin, matcher.bytes() as f64 / 1e6);
    println!("{} queries: built in {built:.2} s, {megabytes:.1} MB", queries.len());

    let mut scratch = Scratch::default();
    let mut count = |of: &mut dyn Iterator<Item = &str>| {
        let mut n = 0;
        matcher.find_all(of, &mut scratch, |_, found| n += found.len() as u64);
        n
    };
    let matches = count(&mut texts.iter().copied());
    let per_text = matches as f64 / texts.len() as f64;
    println!("{} texts of {} bytes on average, {per_text:.1} queries in each", texts.len(), bytes / texts.len());
    let mut peer = std::env::var("MATCHING_PYTHON").ok().map(|python| Peer::start(&python, &data));
    if let Some(peer) = &mut peer {
        // Where a text is ASCII, both make the same words of it.
        let (_, theirs) = peer.run("folded");
        let ours = count(&mut texts.iter().copied().filter(|text| text.is_ascii()));
        assert_eq!(ours, theirs, "the peer finds another number of queries");
        println!("on ASCII texts, folded for it, pyahocorasick finds the same {theirs} queries");
    }

    let rate = |seconds: f64| texts.len() as f64 / seconds;
    let (mut ours, mut spaced, mut boundary) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begin = cpu_seconds();
        for _ in 0..PASSES {
            assert_eq!(count(&mut texts.iter().copied()), matches);
        }
        ours.push(rate((cpu_seconds() - begin) / PASSES as f64));
        if let Some(peer) = &mut peer {
            spaced.push(rate(peer.run("spaced").0));
            boundary.push(rate(peer.run("boundary").0));
        }
    }
    let best = ours.iter().copied().fold(0.0, f64::max);
    println!("at best {:.1} MB/s", best * bytes as f64 / texts.len() as f64 / 1e6);
    let peers = peer.is_some().then_some([("matching", "spaced", spaced), ("matching-boundary", "boundary", boundary)]);
    match peers {
        None => Figures { name: "matching", unit: "texts/s/core", ours, peer: None }.report().unwrap(),
        Some(peers) => {
            for (name, way, figures) in peers {
                let peer = Some((format!("pyahocorasick ({way})"), figures));
                Figures { name, unit: "texts/s/core", ours: ours.clone(), peer }.report().unwrap();
            }
        }
    }
}

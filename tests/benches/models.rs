//! Captions and ITM scores a second, BLIP-base at 384 px with random weights: what a caption pass and a score pass cost.
//!
//! The environment variable `BLIP_PYTHON` names a Python that has transformers: the peer; without it ours runs alone.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::config::MedConfig;
use capfilt_models::device::{DType, Device};
use capfilt_models::generate::Captioner;
use capfilt_models::med::Parts;
use capfilt_models::parameters::fresh_tensors;
use capfilt_models::preprocess::Pixels;
use capfilt_models::sampling::Sampling;
use capfilt_models::score::{FilterScorer, ItmToken};
use capfilt_models::special;
use capfilt_models::tokenizer::train_wordpiece;
use capfilt_tests::Figures;

/// Images of one measurement, and measurements.
const IMAGES: usize = 4;
const ROUNDS: usize = 3;
/// Tokens written for an image, beside the prompt.
const TOKENS: usize = 20;

fn checkpoint(folder: &std::path::Path, parts: Parts) -> Checkpoint {
    let mut config = MedConfig::base();
    let text = &mut config.text_config;
    (text.bos_token_id, text.pad_token_id, text.sep_token_id) = (special::DEC_ID, special::PAD_ID, special::SEP_ID);
    text.enc_token_id = Some(special::ENC_ID);
    let tokenizer = train_wordpiece(&["a picture of a grey heron standing in the water"], 100).unwrap();
    let tensors = fresh_tensors(&config, parts, 1, &Device::Cpu).unwrap();
    Checkpoint::save(folder, &config, &tensors, DType::BF16, &tokenizer).unwrap()
}

fn images() -> Vec<Pixels> {
    let value = |n: usize, i: usize| ((n * 7919 + i * 104_729) % 1000) as f32 / 500.0 - 1.0;
    (0..IMAGES).map(|n| Pixels::new(384, (0..3 * 384 * 384).map(|i| value(n, i)).collect()).unwrap()).collect()
}

/// `blip_peer.py`: it does the same work when told, and answers with its figure.
struct Peer {
    child: Child,
    asked: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start() -> Option<Self> {
        let python = std::env::var("BLIP_PYTHON").ok()?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/blip_peer.py");
        let mut child = Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (asked, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut peer = Self { child, asked, answers };
        assert_eq!(peer.answer(), "ready");
        Some(peer)
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn rate(&mut self, what: &str) -> f64 {
        writeln!(self.asked, "{what}").unwrap();
        self.answer().parse().unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// `count` done by `work`, a second, measured a few times after a warm-up, the peer after each.
fn measure(name: &'static str, unit: &'static str, count: usize, peer: Option<&mut Peer>, mut work: impl FnMut()) {
    work();
    let mut rate = || {
        let began = Instant::now();
        work();
        count as f64 / began.elapsed().as_secs_f64()
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    match peer {
        None => ours.extend((0..ROUNDS).map(|_| rate())),
        Some(peer) => {
            peer.rate(name);
            for _ in 0..ROUNDS {
                ours.push(rate());
                theirs.push(peer.rate(name));
            }
        }
    }
    let peer = (!theirs.is_empty()).then(|| ("transformers".to_owned(), theirs));
    Figures { name, unit, ours, peer }.report().unwrap();
}

fn main() {
    let folder = tempfile::tempdir().unwrap();
    let images = images();
    let mut peer = Peer::start();

    let captioner = checkpoint(&folder.path().join("captioner"), Parts { decoder: true, encoder: false });
    let sampling = Sampling { min_length: TOKENS + 4, max_length: TOKENS + 4, prompt: String::new(), ..Sampling::default() };
    let captioner =
        Captioner::new(captioner.med(&Device::Cpu, DType::F32).unwrap(), captioner.tokenizer().unwrap(), sampling).unwrap();
    let keys = ["a", "b", "c", "d"];
    let unit = "captions/s (BLIP-base, 384 px, f32, 20 new tokens, nucleus)";
    measure("caption", unit, IMAGES, peer.as_mut(), || _ = captioner.generate(&images, &keys, 1).unwrap());
    drop(captioner);

    let filter = checkpoint(&folder.path().join("filter"), Parts { decoder: false, encoder: true });
    let filter =
        FilterScorer::new(filter.med(&Device::Cpu, DType::F32).unwrap(), filter.tokenizer().unwrap(), ItmToken::Enc).unwrap();
    let texts = vec![vec!["a grey heron standing in the water of a lake", "a picture of a heron"]; IMAGES];
    let unit = "ITM and ITC scores/s (BLIP-base, 384 px, f32, 2 texts an image)";
    measure("score", unit, 2 * IMAGES, peer.as_mut(), || _ = filter.score(&images, &texts).unwrap());
}

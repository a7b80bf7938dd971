//! Images a second of the models on the CPU, with random weights, at each one's best batch size, beside transformers: the CapFilt pass
//! (BLIP-base at 384 px: a caption of 20 new tokens, then ITM and ITC of two texts by a second model), captioning alone, and CLIP ViT-B/32's
//! image features. Also how much of the machine's own rate of large products captioning reaches.
//!
//! The environment variable `TRANSFORMERS_PYTHON` names a Python that has transformers: the peer; without it ours runs alone.
//! With the argument `gpu` all this is that of `models/gpu.rs`.
#![allow(clippy::unwrap_used, clippy::explicit_write, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

#[path = "models/gpu.rs"]
mod gpu;

use candle_nn::{VarBuilder, VarMap};
use capfilt_models::clip::{Clip, ClipConfig};
use capfilt_models::config::MedConfig;
use capfilt_models::device::{DType, Device, share_threads};
use capfilt_models::generate::Captioner;
use capfilt_models::layers::Linear;
use capfilt_models::med::{Med, Parts};
use capfilt_models::ops::{Precision, is_fast, multiplies};
use capfilt_models::parameters::fresh_tensors;
use capfilt_models::preprocess::Pixels;
use capfilt_models::sampling::Sampling;
use capfilt_models::score::{FilterScorer, ItmToken};
use capfilt_models::special;
use capfilt_models::tokenizer::{TextTokenizer, train_wordpiece};
use capfilt_tests::Figures;

/// Measurements of each kind.
const ROUNDS: usize = 3;
/// Tokens written for an image.
const TOKENS: usize = 20;
/// Images that go through a model together, ours and the peer's.
const BATCHES: [usize; 2] = [16, 32];
const PEER_BATCHES: [usize; 3] = [4, 8, 16];
/// Texts of an image that are judged.
const TEXTS: [&str; 2] = ["a grey heron standing in the water of a picture", "a picture of a grey heron in the water"];
/// Of a caption of 20 new tokens by BLIP-base at 384 px, in 10^9: the image 111, keys and values 16.3, the tokens 6.
const CAPTION_GFLOP: f64 = 133.3;

/// How numbers are multiplied: our setting and its name, and the peer's number type. Where the processor has no fast bf16, f32 is ours for both
/// of the peer's.
const NUMBERS: [(Precision, &str, &str); 6] = [
    (Precision::Bf16x3, "bf16x3", "float32"),
    (Precision::Bf16, "bf16", "bfloat16"),
    (Precision::F32, "f32", "bfloat16"),
    (Precision::F32, "f32", "float32"),
    (Precision::Int8, "int8", "bfloat16"),
    (Precision::Int8, "int8", "float32"),
];

fn med(config: &MedConfig, parts: Parts, dtype: DType, device: &Device) -> (Med, TextTokenizer) {
    let mut config = config.clone();
    let text = &mut config.text_config;
    (text.bos_token_id, text.pad_token_id, text.sep_token_id) = (special::DEC_ID, special::PAD_ID, special::SEP_ID);
    text.enc_token_id = Some(special::ENC_ID);
    let json = train_wordpiece(&["a picture of a grey heron standing in the water"], 100).unwrap();
    let tokenizer = TextTokenizer::from_json(json, &config.text_config, "tokenizer.json".as_ref()).unwrap();
    let tensors = fresh_tensors(&config, parts, 1, &Device::Cpu).unwrap();
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), dtype, device);
    (Med::load(&config, vb, parts).unwrap(), tokenizer)
}

fn clip(config: &str, dtype: DType, device: &Device) -> Clip {
    let variables = VarMap::new();
    let config = ClipConfig::from_hugging_face(config, "config.json".as_ref()).unwrap();
    Clip::load(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    let tensors = variables.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    Clip::load(&config, VarBuilder::from_tensors(tensors, dtype, device)).unwrap()
}

/// Nucleus sampling of exactly [`TOKENS`] tokens after `[DEC]`.
fn sampling() -> Sampling {
    Sampling { min_length: TOKENS + 1, max_length: TOKENS + 1, prompt: String::new(), ..Sampling::default() }
}

fn images(count: usize, side: usize) -> Vec<Pixels> {
    let value = |n: usize, i: usize| ((n * 7919 + i * 104_729) % 1000) as f32 / 500.0 - 1.0;
    (0..count).map(|n| Pixels::new(side, (0..3 * side * side).map(|i| value(n, i)).collect()).unwrap()).collect()
}

/// `transformers_peer.py`: it does the same work when told, and answers with its figure.
struct Peer {
    child: Child,
    asked: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start(device: &str) -> Option<Self> {
        let python = std::env::var("TRANSFORMERS_PYTHON").ok()?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/transformers_peer.py");
        let threads = std::thread::available_parallelism().unwrap().to_string();
        let mut child =
            Command::new(python).args([script, &threads, device]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
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

    /// Images a second of a batch, repeated for so many seconds; once for 0.
    fn rate(&mut self, work: &str, numbers: &str, batch: usize, seconds: f64) -> f64 {
        writeln!(self.asked, "{work} {numbers} {batch} {seconds}").unwrap();
        self.answer().parse().unwrap()
    }

    /// As the function of that name.
    fn large_product(&mut self, numbers: &str) -> f64 {
        (0..2 * ROUNDS).map(|_| LARGE_GFLOP * self.rate("product", numbers, 1, 0.0)).fold(0.0, f64::max)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// The batch size at which `rate` is best, each tried twice, the first time as a warm-up.
fn best_batch(batches: &[usize], mut rate: impl FnMut(usize) -> f64) -> usize {
    let rates = batches.iter().map(|&batch| {
        rate(batch);
        (batch, if batches.len() > 1 { rate(batch) } else { 0.0 })
    });
    rates.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0
}

/// Prints the images a second of `work`, and the peer's, taken in turn; gives the median of ours.
fn measure(name: &str, (ours, theirs): (&str, &str), peer: Option<&mut Peer>, mut work: impl FnMut(usize)) -> f64 {
    let mut rate = |batch: usize| {
        let began = Instant::now();
        work(batch);
        batch as f64 / began.elapsed().as_secs_f64()
    };
    let batch = best_batch(&BATCHES, &mut rate);
    let (mut figures, mut peers) = (Vec::new(), Vec::new());
    let mut peer_name = String::new();
    match peer {
        None => figures.extend((0..ROUNDS).map(|_| rate(batch))),
        Some(peer) => {
            let peer_batch = best_batch(&PEER_BATCHES, |batch| peer.rate(name, theirs, batch, 0.0));
            peer_name = format!("transformers ({theirs}, batch {peer_batch})");
            for _ in 0..ROUNDS {
                figures.push(rate(batch));
                peers.push(peer.rate(name, theirs, peer_batch, 0.0));
            }
        }
    }
    let mut sorted = figures.clone();
    sorted.sort_by(f64::total_cmp);
    let unit = format!("images/s ({ours}, batch {batch})");
    let peer = (!peers.is_empty()).then_some((peer_name, peers));
    Figures { name, unit: &unit, ours: figures, peer }.report().unwrap();
    sorted[sorted.len() / 2]
}

/// Rows, columns and depth of a large product, also of the peer's.
const LARGE: (usize, usize, usize) = (4096, 3072, 3072);
const LARGE_GFLOP: f64 = 2.0 * (LARGE.0 * LARGE.1 * LARGE.2) as f64 / 1e9;

/// This machine's rate of one large product, in 10^9 operations a second.
fn large_product(precision: Precision) -> f64 {
    use candle_core::Tensor;
    let (m, n, k) = LARGE;
    let x = Tensor::ones((m, k), DType::F32, &Device::Cpu).unwrap();
    let weight = Tensor::ones((n, k), DType::F32, &Device::Cpu).unwrap();
    let mut layer = Linear::new(weight, Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap()).unwrap();
    layer.pack(precision).unwrap();
    let rate = |_| {
        let began = Instant::now();
        layer.forward(&x).unwrap();
        LARGE_GFLOP / began.elapsed().as_secs_f64()
    };
    (0..2 * ROUNDS).map(rate).fold(0.0, f64::max)
}

fn main() {
    share_threads();
    // Arguments choose among the works and the numbers: `capfilt bf16`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if let Some((_, wanted)) = wanted.split_first().filter(|(first, _)| *first == "gpu") {
        return gpu::run(wanted);
    }
    let among =
        |names: &[&str], name: &str| !wanted.iter().any(|w| names.contains(&w.as_str())) || wanted.iter().any(|w| w == name);
    let runs = |name: &str| among(&["caption", "capfilt", "clip"], name);
    let mut peer = Peer::start("cpu");
    let most = BATCHES[BATCHES.len() - 1];
    let pictures = images(most, 384);
    let keys: Vec<String> = (0..most).map(|n| n.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let texts = vec![TEXTS.to_vec(); most];

    for (precision, ours, theirs) in NUMBERS {
        let made = match precision {
            Precision::F32 => theirs == "float32" || !is_fast(Precision::Bf16),
            Precision::Bf16 | Precision::Int8 => multiplies(precision),
            Precision::Bf16x3 => is_fast(Precision::Bf16x3),
        };
        if !made || !among(&["f32", "bf16x3", "bf16", "int8"], ours) {
            continue;
        }
        let captioner = || {
            let (mut med, tokenizer) = med(&MedConfig::base(), Parts::CAPTIONER, DType::F32, &Device::Cpu);
            med.pack(precision).unwrap();
            Captioner::new(med, tokenizer, sampling()).unwrap()
        };
        if runs("caption") {
            let captioner = captioner();
            let rate = measure("caption", (ours, theirs), peer.as_mut(), |batch| {
                captioner.generate(&pictures[..batch], &keys[..batch], 1).unwrap();
            });
            let own = large_product(precision);
            let theirs = peer.as_mut().map_or(0.0, |peer| peer.large_product(theirs));
            let reached = rate * CAPTION_GFLOP;
            writeln!(
                std::io::stdout(),
                "captioning in {ours}: {reached:.0} GFLOP/s; one large product: ours {own:.0} ({:.0} %), the peer's {theirs:.0} ({:.0} %)",
                100.0 * reached / own,
                100.0 * reached / theirs
            )
            .unwrap();
        }
        if runs("capfilt") {
            let captioner = captioner();
            let (mut med, tokenizer) = med(&MedConfig::base(), Parts::FILTER, DType::F32, &Device::Cpu);
            med.pack(precision).unwrap();
            let filter = FilterScorer::new(med, tokenizer, ItmToken::Enc).unwrap();
            measure("capfilt", (ours, theirs), peer.as_mut(), |batch| {
                captioner.generate(&pictures[..batch], &keys[..batch], 1).unwrap();
                filter.score(&pictures[..batch], &texts[..batch]).unwrap();
            });
        }
        if runs("clip") {
            let mut clip = clip(r#"{"model_type": "clip"}"#, DType::F32, &Device::Cpu);
            clip.pack(precision).unwrap();
            let pictures = images(most, 224);
            measure("clip", (ours, theirs), peer.as_mut(), |batch| _ = clip.encode_images(&pictures[..batch]).unwrap());
        }
    }
}

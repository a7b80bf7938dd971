//! The models on an NVIDIA GPU in bf16, each at its best batch size, beside transformers there as it is and compiled: BLIP-base and -large
//! at 384 px (a caption of 20 new tokens; ITM and ITC of two texts of an image), and CLIP ViT-L/14's image features. Images start in main
//! memory, in f32, on both sides.
//!
//! Beside the images a second stand the share of what the GPU could do at best, and how long it was idle.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use capfilt_models::clip::ClipVision;
use capfilt_models::config::{MedConfig, TextConfig, VisionConfig};
use capfilt_models::device::{DType, Device, device};
use capfilt_models::generate::Captioner;
use capfilt_models::med::Parts;
use capfilt_models::preprocess::Pixels;
use capfilt_models::score::{FilterScorer, ItmToken};
use capfilt_tests::Figures;

use super::{Peer, ROUNDS, TEXTS, TOKENS, best_batch, clip, images, med, sampling};

/// Models and what they do.
const WORKS: [&str; 5] = ["caption-base", "caption-large", "score-base", "score-large", "clip-large"];
/// Tokens of each of [`TEXTS`], with padding.
const TEXT_LENGTH: usize = 24;
/// GPUs by a part of their name, the narrower before the wider: products in bf16 with dense operands, in 10^12 operations a second, and
/// memory, in 10^12 bytes a second, as NVIDIA states them.
const GPUS: [(&str, f64, f64); 16] = [
    ("B200", 2250.0, 8.0),
    ("H200", 989.0, 4.8),
    ("H100 PCIe", 756.0, 2.0),
    ("H100 NVL", 835.0, 3.9),
    ("H100", 989.0, 3.35),
    ("A100 80GB PCIe", 312.0, 1.935),
    ("A100-SXM4-80GB", 312.0, 2.04),
    ("A100", 312.0, 1.555),
    ("A10G", 70.0, 0.6),
    ("A10", 125.0, 0.6),
    ("L40S", 362.0, 0.864),
    ("L40", 181.0, 0.864),
    ("L4", 121.0, 0.3),
    ("RTX 4090", 165.0, 1.008),
    ("RTX 3090", 71.0, 0.936),
    ("RTX A6000", 155.0, 0.768),
];

/// Runs the works that are wanted, or all.
pub(super) fn run(wanted: &[String]) {
    let settings = Settings::read();
    let gpu = Gpu::find();
    for work in WORKS.into_iter().filter(|work| wanted.is_empty() || wanted.iter().any(|w| w == work)) {
        // One at a time: the memory is that of the models at hand.
        let mut peer = Peer::start(&settings.device);
        measure(work, &settings, &gpu, peer.as_mut());
    }
}

struct Settings {
    device: String,
    batches: Vec<usize>,
    /// How long a measurement takes at least.
    seconds: f64,
}

impl Settings {
    /// From `BENCH_DEVICE`, `BENCH_BATCHES` and `BENCH_SECONDS`.
    fn read() -> Self {
        let of = |name: &str, usual: &str| std::env::var(name).unwrap_or_else(|_| usual.to_owned());
        Self {
            device: of("BENCH_DEVICE", "cuda"),
            batches: of("BENCH_BATCHES", "32,64,128,256").split(',').map(|batch| batch.trim().parse().unwrap()).collect(),
            seconds: of("BENCH_SECONDS", "5").parse().unwrap(),
        }
    }
}

fn measure(work: &str, settings: &Settings, gpu: &Gpu, mut peer: Option<&mut Peer>) {
    let (run, cost) = ours(work, &device(&settings.device).unwrap(), settings.batches.iter().copied().max().unwrap());
    // Images a second over at least `seconds`, after a first time that is not counted; 0 where there is no memory for the batch.
    let rate = |batch: usize, seconds: f64| {
        if let Err(e) = run(batch) {
            writeln!(std::io::stderr(), "{work}, batch {batch}: {e}").unwrap();
            return 0.0;
        }
        let (began, mut images) = (Instant::now(), 0);
        while images == 0 || began.elapsed().as_secs_f64() < seconds {
            run(batch).unwrap();
            images += batch;
        }
        images as f64 / began.elapsed().as_secs_f64()
    };
    let short = settings.seconds / 4.0;
    let batch = best_batch(&settings.batches, |batch| rate(batch, short));
    let peers = ["bfloat16", "bfloat16-compiled"].map(|numbers| {
        let best = peer.as_mut().map(|peer| best_batch(&settings.batches, |batch| peer.rate(work, numbers, batch, short)));
        (numbers, best.unwrap_or(0))
    });
    let (mut figures, mut theirs, mut idle) = (Vec::new(), [Vec::new(), Vec::new()], Vec::new());
    for _ in 0..ROUNDS {
        let watch = gpu.watch();
        figures.push(rate(batch, settings.seconds));
        idle.extend(watch.idle());
        if let Some(peer) = peer.as_mut() {
            for ((numbers, batch), theirs) in peers.iter().zip(&mut theirs) {
                theirs.push(peer.rate(work, numbers, *batch, settings.seconds));
            }
        }
    }
    let (name, unit) = (format!("gpu-{work}"), format!("images/s (bf16, batch {batch}, {})", gpu.name));
    let report = |peer| Figures { name: &name, unit: &unit, ours: figures.clone(), peer }.report().unwrap();
    if peer.is_none() {
        report(None);
    }
    for ((numbers, batch), theirs) in peers.iter().zip(theirs).filter(|(_, theirs)| theirs.iter().any(|rate| *rate > 0.0)) {
        report(Some((format!("transformers ({numbers}, batch {batch})"), theirs)));
    }
    figures.sort_by(f64::total_cmp);
    let (rate, cost) = (figures[ROUNDS / 2], cost(batch));
    let bound = match gpu.rates {
        Some((products, memory)) => {
            let most = 1.0 / (cost.operations / products + cost.bytes / memory);
            format!(
                "{:.0} % of the {most:.0} images/s of {products:.3e} operations/s and {memory:.3e} bytes/s",
                100.0 * rate / most
            )
        }
        None => "no bound: the GPU is not in the table; set GPU_TFLOPS and GPU_TBPS".to_owned(),
    };
    let idle = match idle.is_empty() {
        true => "how long the GPU was idle is not known".to_owned(),
        false => {
            let mean = idle.iter().sum::<f64>() / idle.len() as f64;
            format!("the GPU was idle {mean:.0} % of the time (what its utilization by nvidia-smi leaves)")
        }
    };
    writeln!(std::io::stdout(), "{name}: {bound}; {:.1} GFLOP an image; {idle}", cost.operations / 1e9).unwrap();
}

type Run = Box<dyn Fn(usize) -> capfilt_models::Result<()>>;

/// A work of ours for up to `most` images, which ends when its results are in main memory, and what it costs.
fn ours(work: &str, device: &Device, most: usize) -> (Run, Box<dyn Fn(usize) -> Cost>) {
    let keys: Vec<String> = (0..most).map(|n| n.to_string()).collect();
    let config = if work.ends_with("large") { large() } else { MedConfig::base() };
    let (bf16, costs) = (DType::BF16, config.clone());
    match work.split('-').next() {
        Some("caption") => {
            let (med, tokenizer) = med(&config, Parts::CAPTIONER, bf16, device);
            let (captioner, pictures) = (Captioner::new(med, tokenizer, sampling()).unwrap(), images(most, 384));
            let run = move |batch: usize| {
                let keys: Vec<&str> = keys[..batch].iter().map(String::as_str).collect();
                captioner.generate(&pictures[..batch], &keys, 1).map(|_| ())
            };
            (Box::new(run), Box::new(move |batch| Cost::caption(&costs, batch)))
        }
        Some("score") => {
            let (med, tokenizer) = med(&config, Parts::FILTER, bf16, device);
            let filter = FilterScorer::new(med, tokenizer, ItmToken::Enc).unwrap();
            let (pictures, texts) = (images(most, 384), vec![TEXTS.to_vec(); most]);
            let run = move |batch: usize| filter.score(&pictures[..batch], &texts[..batch]).map(|_| ());
            (Box::new(run), Box::new(move |batch| Cost::score(&costs, batch)))
        }
        _ => {
            let text = r#""text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}"#;
            let vision = r#""vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "patch_size": 14}"#;
            let clip = clip(&format!(r#"{{"model_type": "clip", "projection_dim": 768, {vision}, {text}}}"#), bf16, device);
            let ClipVision::Vit(vision) = clip.config().vision.clone() else { unreachable!("CLIP L/14 is a transformer") };
            let pictures: Vec<Pixels> = images(most, 224);
            let run = move |batch: usize| {
                let features = clip.encode_images(&pictures[..batch])?;
                Ok(features.to_device(&Device::Cpu).map(|_| ())?)
            };
            (Box::new(run), Box::new(move |_| Cost { operations: Cost::vision(&vision, true), bytes: 0.0 }))
        }
    }
}

/// BLIP-large: another vision transformer, the same text transformer.
fn large() -> MedConfig {
    let base = MedConfig::base();
    MedConfig {
        vision_config: VisionConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            ..base.vision_config
        },
        text_config: TextConfig { encoder_hidden_size: 1024, ..base.text_config },
        ..base
    }
}

/// What an image costs: operations, 2 for each product with its sum, and bytes that memory must send while texts are written or judged
/// (weights, once for the batch, and keys and values of the image). An image's way through the vision transformer is all products.
struct Cost {
    operations: f64,
    bytes: f64,
}

impl Cost {
    fn vision(config: &VisionConfig, class: bool) -> f64 {
        let (d, ff) = (config.hidden_size as f64, config.intermediate_size as f64);
        let patches = config.num_patches() as f64;
        let tokens = patches + f64::from(u8::from(class));
        let patch = 3.0 * (config.patch_size * config.patch_size) as f64;
        let layer = tokens * (8.0 * d * d + 4.0 * d * ff) + 4.0 * tokens * tokens * d;
        2.0 * patches * patch * d + config.num_hidden_layers as f64 * layer
    }

    /// Numbers of an image's keys and values, and operations that make them.
    fn keys_values(config: &MedConfig) -> (f64, f64) {
        let (text, states) = (&config.text_config, (config.vision_config.num_patches() + 1) as f64);
        let numbers = text.num_hidden_layers as f64 * 2.0 * states * text.hidden_size as f64;
        (numbers, numbers * 2.0 * text.encoder_hidden_size as f64)
    }

    /// Operations of one token that sees `seen` tokens, and the image if `grounded`.
    fn token(config: &MedConfig, seen: f64, grounded: bool) -> f64 {
        let text = &config.text_config;
        let (d, ff) = (text.hidden_size as f64, text.intermediate_size as f64);
        let states = (config.vision_config.num_patches() + 1) as f64;
        let image = if grounded { 4.0 * d * d + 4.0 * states * d } else { 0.0 };
        text.num_hidden_layers as f64 * (8.0 * d * d + 4.0 * d * ff + 4.0 * seen * d + image)
    }

    /// Weights that a token goes through.
    fn weights(text: &TextConfig) -> f64 {
        let (d, ff) = (text.hidden_size as f64, text.intermediate_size as f64);
        text.num_hidden_layers as f64 * (6.0 * d * d + 2.0 * d * ff)
    }

    fn caption(config: &MedConfig, batch: usize) -> Self {
        let (numbers, made) = Self::keys_values(config);
        let (tokens, d) = (TOKENS as f64, config.text_config.hidden_size as f64);
        let head = d * (d + config.text_config.vocab_size as f64);
        let weights = Self::weights(&config.text_config) + head;
        let decoder = tokens * (Self::token(config, tokens / 2.0, true) + 2.0 * head);
        Self {
            operations: Self::vision(&config.vision_config, true) + made + decoder,
            bytes: tokens * 2.0 * (weights / batch as f64 + numbers),
        }
    }

    fn score(config: &MedConfig, batch: usize) -> Self {
        let (numbers, made) = Self::keys_values(config);
        let (length, weights) = (TEXT_LENGTH as f64, 2.0 * Self::weights(&config.text_config));
        let token = Self::token(config, length, true) + Self::token(config, length, false);
        Self {
            operations: Self::vision(&config.vision_config, true) + made + TEXTS.len() as f64 * length * token,
            bytes: 2.0 * (weights / batch as f64 + numbers),
        }
    }
}

/// The GPU by `nvidia-smi`: the first of `CUDA_VISIBLE_DEVICES`, or of all.
struct Gpu {
    number: String,
    name: String,
    /// Operations and bytes a second at best.
    rates: Option<(f64, f64)>,
}

impl Gpu {
    fn find() -> Self {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let number = visible.split(',').next().filter(|first| !first.is_empty()).unwrap_or("0").to_owned();
        let asked = Command::new("nvidia-smi").args(["--query-gpu=name", "--format=csv,noheader", "--id", &number]).output();
        let name = match asked {
            Ok(said) if said.status.success() => String::from_utf8_lossy(&said.stdout).trim().to_owned(),
            _ => "a GPU without a name".to_owned(),
        };
        let stated = |variable: &str| std::env::var(variable).ok().map(|number| number.parse::<f64>().unwrap());
        let known = GPUS.iter().find(|(part, ..)| name.contains(part));
        let products = stated("GPU_TFLOPS").or(known.map(|(_, products, _)| *products));
        let memory = stated("GPU_TBPS").or(known.map(|(.., memory)| *memory));
        let rates = products.zip(memory).map(|(products, memory)| (products * 1e12, memory * 1e12));
        Self { number, name, rates }
    }

    fn watch(&self) -> Watch {
        let query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200", "--id", &self.number];
        let started = Command::new("nvidia-smi").args(query).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let samples = Arc::new(Mutex::new(Vec::new()));
        let child = started.ok().map(|mut child| {
            let (lines, samples) = (BufReader::new(child.stdout.take().unwrap()), Arc::clone(&samples));
            std::thread::spawn(move || {
                for used in lines.lines().map_while(Result::ok).filter_map(|line| line.trim().parse::<f64>().ok()) {
                    samples.lock().unwrap().push((Instant::now(), used));
                }
            });
            child
        });
        Watch { child, began: Instant::now(), samples }
    }
}

/// Asks `nvidia-smi` over and over.
struct Watch {
    child: Option<Child>,
    began: Instant,
    samples: Arc<Mutex<Vec<(Instant, f64)>>>,
}

impl Watch {
    /// How many of a hundred parts of the time the GPU had nothing to do: a number for each sample, each over up to the second before it.
    fn idle(mut self) -> Vec<f64> {
        if let Some(child) = &mut self.child {
            _ = child.kill();
            _ = child.wait();
        }
        let from = self.began + Duration::from_secs(1);
        self.samples.lock().unwrap().iter().filter(|(at, _)| *at > from).map(|(_, used)| 100.0 - used).collect()
    }
}

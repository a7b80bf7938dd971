//! Pairs a second of MED pre-training on the CPU in f32 (all three losses, slow encoders, queues, AdamW), at small sizes with random weights,
//! beside the same steps in `PyTorch` (`tests/goldens/training.py`) on the same threads, taken in turn. Pairs lie prepared.
//!
//! The environment variable `TRANSFORMERS_PYTHON` names a Python that has transformers: the peer; without it ours runs alone.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use capfilt_models::config::MedConfig;
use capfilt_models::device::{DType, Device, share_threads};
use capfilt_models::tokenizer::train_wordpiece;
use capfilt_models::train::{AdamWConfig, Architecture, Augmentation, Example, Pretrained, Recipe, Role, Schedule, Trainer};
use capfilt_tests::Figures;

const ROUNDS: usize = 5;
/// Steps of one measurement.
const STEPS: usize = 3;
const BATCH: usize = 64;
const QUEUE: usize = 1024;
const VOCABULARY: usize = 2000;
/// Words of a text, all of which are in the vocabulary: 3 to 17, 10 in the mean, as alt texts have them (Conceptual Captions: 10.3, with a deviation of
/// 4.5; Sharma et al. 2018, table 2).
const fn words(text: usize) -> usize {
    3 + 7 * text % 15
}

/// Widths that are measured, with their blocks, heads and sides of images.
const SIZES: [(usize, usize, usize, usize); 2] = [(128, 4, 4, 64), (256, 6, 4, 96)];

fn config((width, blocks, heads, side): (usize, usize, usize, usize)) -> MedConfig {
    let mut config = MedConfig::tiny(VOCABULARY);
    let (vision, text) = (&mut config.vision_config, &mut config.text_config);
    (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) = (width, 4 * width, blocks);
    (vision.num_attention_heads, vision.image_size) = (heads, side);
    (text.hidden_size, text.intermediate_size, text.num_hidden_layers) = (width, 4 * width, blocks - 1);
    text.num_attention_heads = heads;
    config
}

fn main() {
    share_threads();
    // Arguments choose among the widths.
    let wanted: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    for size in SIZES.into_iter().filter(|size| wanted.is_empty() || wanted.contains(&size.0)) {
        let vocabulary: Vec<String> = (0..400).map(|i| format!("w{i}")).collect();
        let texts: Vec<String> = (0..BATCH)
            .map(|i| {
                (0..words(i)).map(|j| vocabulary[(i * 37 + j * 101) % vocabulary.len()].as_str()).collect::<Vec<_>>().join(" ")
            })
            .collect();
        let recipe = Recipe {
            role: Role::Med,
            seed: 1,
            schedule: Schedule { peak: 1e-4, floor: 1e-6, warmup_steps: 0, steps: 1000 },
            optimizer: AdamWConfig::default(),
            accumulate: 1,
            dtype: DType::F32,
            momentum: 0.995,
            queue: QUEUE,
            alpha: 0.4,
            alpha_ramp: 0,
            label_smoothing: 0.1,
            prompt: String::new(),
            max_tokens: 30,
            augmentation: Augmentation { min_area: 1.0, flip: false, distort: 0.0 },
        };
        let config = config(size);
        let side = config.vision_config.image_size;
        let tokenizer = train_wordpiece(&[texts.as_slice(), texts.as_slice()].concat(), VOCABULARY).unwrap();
        let mut trainer =
            Trainer::fresh(&Architecture::Med(config), tokenizer, Pretrained::default(), recipe, &Device::Cpu).unwrap();
        let images: Vec<Vec<u8>> =
            (0..BATCH).map(|n| (0..3 * side * side).map(|i| ((n * 7919 + i * 104_729) % 256) as u8).collect()).collect();
        let names: Vec<String> = (0..BATCH).map(|i| i.to_string()).collect();
        let examples: Vec<Example<'_>> =
            (0..BATCH).map(|i| Example { sample_id: &names[i], epoch: 0, text: &texts[i], pixels: &images[i] }).collect();
        let prepared = trainer.preparer().prepare(&examples).unwrap();
        let mut ours = || {
            let began = Instant::now();
            for _ in 0..STEPS {
                trainer.step(&prepared).unwrap();
            }
            (STEPS * BATCH) as f64 / began.elapsed().as_secs_f64()
        };
        ours();
        let (mut figures, mut peers) = (Vec::new(), Vec::new());
        let (width, blocks, heads, side) = size;
        let mut peer = std::env::var("TRANSFORMERS_PYTHON").ok().map(|python| {
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/training_peer.py");
            let threads = std::thread::available_parallelism().unwrap().get();
            let sizes = [threads, width, blocks, heads, side, VOCABULARY, QUEUE, STEPS].map(|n| n.to_string());
            // With the first and the last token.
            let lengths = (0..BATCH).map(|text| (words(text) + 2).to_string());
            let mut command = Command::new(python);
            command.arg(script).args(sizes).args(lengths).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        });
        let mut asked = peer.as_mut().and_then(|peer| Some((peer.stdin.take()?, BufReader::new(peer.stdout.take()?))));
        let mut theirs = || {
            let (stdin, stdout) = asked.as_mut()?;
            writeln!(stdin).unwrap();
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            Some(line.trim().parse::<f64>().unwrap())
        };
        theirs();
        for _ in 0..ROUNDS {
            figures.push(ours());
            peers.extend(theirs());
        }
        let unit = format!("pairs/s (width {width}, {side} px, batches of {BATCH})");
        let peer_figures = (!peers.is_empty()).then(|| ("PyTorch".to_owned(), peers));
        Figures { name: "training", unit: &unit, ours: figures, peer: peer_figures }.report().unwrap();
        if let Some(mut peer) = peer {
            drop(asked);
            peer.wait().unwrap();
        }
    }
}

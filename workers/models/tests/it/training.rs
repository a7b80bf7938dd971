//! Steps of training against those of a reference in `PyTorch` (`goldens/training.py`): losses, gradients, updates, slow encoders, queues.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Shape, Tensor};
use capfilt_models::clip::openclip::{self, Part, Source};
use capfilt_models::clip::{ClipConfig, ClipFamily, ClipTextConfig, ClipVision, ResNetConfig};
use capfilt_models::config::{MedConfig, TextConfig};
use capfilt_models::ops::Activation;
use capfilt_models::train::{
    AdamWConfig, Architecture, Augmentation, Example, Pretrained, Recipe, Role, Schedule, StepReport, Trainer,
};
use safetensors::SafeTensors;

use crate::families::{numbers, weight};
use crate::fixture::{config, goldens};

const SIDE: usize = 32;
const TEXTS: [[&str; 2]; 3] =
    [["a red bird", "two green boats on a lake"], ["a boat", "a red lake and two birds"], ["green green", "the bird"]];
/// Further texts of CLIP's batches.
const MORE: [&str; 2] = ["no lake", "is it a bird"];

fn recipe() -> Recipe {
    Recipe {
        role: Role::Med,
        seed: 0,
        schedule: Schedule { peak: 1e-3, floor: 1e-3, warmup_steps: 0, steps: 3 },
        optimizer: AdamWConfig { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.05, max_grad_norm: 1.0 },
        accumulate: 1,
        dtype: DType::F32,
        momentum: 0.9,
        queue: 5,
        alpha: 0.4,
        alpha_ramp: 2,
        label_smoothing: 0.1,
        prompt: String::new(),
        max_tokens: 30,
        augmentation: Augmentation { min_area: 1.0, flip: false, distort: 0.0 },
    }
}

fn trainer(recipe: Recipe) -> Trainer {
    let small = config();
    let config = MedConfig { text_config: TextConfig { vocab_size: 19, ..small.text_config }, ..small };
    Trainer::fresh(&Architecture::Med(config), tokenizer("med"), Pretrained::default(), recipe, &Device::Cpu).unwrap()
}

fn tokenizer(folder: &str) -> String {
    std::fs::read_to_string(goldens().join("training").join(folder).join("tokenizer.json")).unwrap()
}

fn golden(folder: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(goldens().join("training").join(folder).join("golden.safetensors"), &Device::Cpu).unwrap()
}

/// A step on these texts, with images of this side that the rule makes.
fn step(trainer: &mut Trainer, number: usize, texts: &[&'static str], side: usize) -> StepReport {
    let size = side * side * 3;
    let values = numbers(&format!("pixels {number}"), texts.len() * size);
    let pixels: Vec<u8> = values.iter().map(|x| ((x + 0.5) * 256.0) as u8).collect();
    let names: Vec<String> = (0..texts.len()).map(|i| format!("{number}/{i}")).collect();
    let example =
        |(i, text): (usize, &&'static str)| Example { sample_id: &names[i], epoch: 0, text, pixels: &pixels[i * size..][..size] };
    let examples: Vec<Example<'_>> = texts.iter().enumerate().map(example).collect();
    let prepared = trainer.preparer().prepare(&examples).unwrap();
    trainer.step(&prepared).unwrap()
}

/// The state of a trainer, by name.
fn state(trainer: &Trainer, path: &Path) -> HashMap<String, Tensor> {
    trainer.save_state(path).unwrap();
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// Gives a trainer other weights and queues, by way of its state.
fn set_state(trainer: &mut Trainer, path: &Path, tensors: &HashMap<String, Tensor>) {
    let bytes = std::fs::read(path).unwrap();
    let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone();
    std::fs::write(path, safetensors::serialize(tensors, metadata).unwrap()).unwrap();
    trainer.load_state(path).unwrap();
}

/// Numbers at even distances behind the largest magnitude, as `weights.py` has them.
fn sample(tensor: &Tensor) -> Vec<f32> {
    let flat: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    let largest = flat.iter().fold(0_f32, |max, x| max.max(x.abs()));
    let step = (flat.len() / 64).max(1);
    [largest].into_iter().chain(flat.into_iter().step_by(step).take(64)).collect()
}

/// Holds numbers against golden ones: the length of the difference against theirs.
fn assert_close(what: &str, ours: &[f32], golden: &Tensor, tolerance: f32) {
    let golden: Vec<f32> = golden.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(ours.len(), golden.len(), "{what}");
    let length = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| x * x).sum::<f32>().sqrt();
    let apart = length(&mut ours.iter().zip(&golden).map(|(ours, golden)| ours - golden)) / length(&mut golden.iter().copied());
    assert!(apart <= tolerance, "{what} is {apart} of its length away");
}

#[test]
fn three_steps_of_a_med_are_those_of_the_reference() {
    let golden = golden("med");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let mut trainer = trainer(recipe());
    let mut before = state(&trainer, &path);
    for (name, tensor) in &mut before {
        let shape: &Shape = tensor.shape();
        *tensor = match name.split_once('/').unwrap() {
            ("weights", "temperature") | ("first" | "second", _) => continue,
            ("weights" | "momentum", name) => weight(name, shape).unwrap(),
            ("queue", "images") => golden["image_queue"].clone(),
            ("queue", "texts") => golden["text_queue"].clone(),
            _ => continue,
        };
    }
    set_state(&mut trainer, &path, &before);
    let reports = golden["reports"].to_vec2::<f32>().unwrap();
    for (number, (texts, golden)) in TEXTS.iter().zip(&reports).enumerate() {
        let report = step(&mut trainer, number, texts, SIDE);
        let losses = report.losses;
        let ours = [losses.itc.unwrap(), losses.itm.unwrap(), losses.lm.unwrap(), report.gradient_norm as f32];
        for (ours, golden) in ours.iter().zip(golden) {
            assert!((ours - golden).abs() <= 1e-4 * golden.abs(), "step {number}: {ours} is not {golden}");
        }
    }
    let after = state(&trainer, &path);
    let mut compared = 0;
    for (name, golden) in golden.iter().filter(|(name, _)| name.contains('/')) {
        // Keys' biases move no softmax: their gradient is rounding, which AdamW makes steps of.
        if name.ends_with("key.bias") || name.ends_with("qkv.bias") {
            continue;
        }
        let moved = (&after[name] - &before[name]).unwrap();
        assert_close(name, &sample(&moved), golden, 5e-3);
        compared += 1;
    }
    assert!(compared > 150, "{compared} tensors were compared");
    for (ours, theirs) in [("queue/images", "image_queue_after"), ("queue/texts", "text_queue_after")] {
        let ours: Vec<f32> = after[ours].flatten_all().unwrap().to_vec1().unwrap();
        assert_close(theirs, &ours, &golden[theirs], 1e-4);
    }
}

#[test]
fn three_steps_of_a_clip_are_those_of_the_reference() {
    let golden = golden("clip");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let config = ClipConfig {
        family: ClipFamily::Clip,
        vision: ClipVision::ResNet(ResNetConfig { layers: [1; 4], width: 16, heads: 8, image_size: 64 }),
        text: ClipTextConfig {
            vocab_size: 30,
            hidden_size: 32,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            max_position_embeddings: 24,
            hidden_act: Activation::Gelu,
            eos_token_id: 2,
            ..ClipTextConfig::clip()
        },
        projection_dim: 16,
    };
    let recipe = Recipe { role: Role::Clip, ..recipe() };
    let mut trainer =
        Trainer::fresh(&Architecture::Clip(config), tokenizer("clip"), Pretrained::default(), recipe, &Device::Cpu).unwrap();
    let mut before = state(&trainer, &path);
    for (name, tensor) in &mut before {
        *tensor = match name.split_once('/').unwrap() {
            ("weights", "logit_scale") => Tensor::new(2_f32, &Device::Cpu).unwrap(),
            ("weights" | "running", name) => open_clip_weight(name, tensor.shape()),
            _ => continue,
        };
    }
    set_state(&mut trainer, &path, &before);
    let reports = golden["reports"].to_vec2::<f32>().unwrap();
    for (number, (texts, golden)) in TEXTS.iter().zip(&reports).enumerate() {
        let report = step(&mut trainer, number, &[*texts, MORE].concat(), 64);
        // Processors add up products in different orders, which batch norms enlarge. After the first update AdamW has made whole steps of gradients
        // that are little more than rounding.
        let tolerance = if number == 0 { 5e-4 } else { 2e-2 };
        for (ours, golden) in [report.losses.itc.unwrap(), report.gradient_norm as f32].iter().zip(golden) {
            assert!((ours - golden).abs() <= tolerance * golden.abs(), "step {number}: {ours} is not {golden}");
        }
    }
    let after = state(&trainer, &path);
    let mut compared = 0;
    for name in after.keys() {
        let (kind, inside) = name.split_once('/').unwrap();
        let Source { name: theirs, part } = openclip::source(inside, false);
        // Keys' biases: see above.
        if !["weights", "running"].contains(&kind) || inside.ends_with("k_proj.bias") {
            continue;
        }
        let moved = (&after[name] - &before[name]).unwrap();
        let moved = match part {
            Part::Whole => moved,
            Part::Transposed => moved.t().unwrap().contiguous().unwrap(),
            // The reference samples queries, keys and values together.
            Part::Third(_) => continue,
        };
        // A step the other way of one number in 64 makes a quarter; all of them would make 2.
        assert_close(inside, &sample(&moved), &golden[&format!("moved/{theirs}")], 0.5);
        compared += 1;
    }
    assert!(compared > 90, "{compared} tensors were compared");
}

/// The weight that the rule makes of its name in OpenCLIP's layout.
fn open_clip_weight(name: &str, shape: &Shape) -> Tensor {
    let Source { name, part } = openclip::source(name, false);
    let turned = |shape: &Shape| Shape::from(shape.dims().iter().rev().copied().collect::<Vec<_>>());
    match part {
        Part::Whole => weight(&name, shape).unwrap(),
        Part::Transposed => weight(&name, &turned(shape)).unwrap().t().unwrap().contiguous().unwrap(),
        Part::Third(third) => {
            let rows = shape.dims()[0];
            let whole = [&[3 * rows], &shape.dims()[1..]].concat();
            weight(&name, &Shape::from(whole)).unwrap().narrow(0, third * rows, rows).unwrap().contiguous().unwrap()
        }
    }
}

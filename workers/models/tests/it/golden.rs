//! Outputs of Hugging Face transformers 5.23 on the same weights, made by `goldens/make_goldens.py`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::generate::Captioner;
use capfilt_models::med::Med;
use capfilt_models::preprocess::{Pixels, Preprocessor};
use capfilt_models::sampling::{Sampling, Strategy};
use capfilt_models::tokenizer::TextTokenizer;
use serde_json::json;

use crate::fixture::{difference, goldens};

/// Largest difference allowed, relative to the largest number of the tensor.
const TOLERANCE: f32 = 1e-4;

const SEP: u32 = 3;

fn tensors(file: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(goldens().join(file), &Device::Cpu).unwrap()
}

fn ids(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::U32).unwrap()
}

fn model(folder: &str) -> (Checkpoint, Med, HashMap<String, Tensor>) {
    let checkpoint = Checkpoint::open(&goldens().join(folder)).unwrap();
    let med = checkpoint.med(&Device::Cpu, DType::F32).unwrap();
    (checkpoint, med, tensors(&format!("{folder}/golden.safetensors")))
}

#[test]
fn image_states_agree() {
    let (_, med, golden) = model("captioner");
    let states = med.encode_image(&golden["pixels"]).unwrap();
    assert!(difference(&states, &golden["image_states"]) < TOLERANCE);
}

#[test]
fn language_model_logits_agree_under_padding() {
    let (_, med, golden) = model("captioner");
    let states = med.encode_image(&golden["pixels"]).unwrap();
    let logits = med.lm_logits(&ids(&golden["ids"]), &golden["mask"], &states).unwrap();
    assert!(difference(&logits, &golden["lm_logits"]) < TOLERANCE);
}

#[test]
fn greedy_and_beam_captions_agree_token_by_token() {
    let (checkpoint, med, golden) = model("captioner");
    let side = checkpoint.config().unwrap().vision_config.image_size;
    let images: Vec<Pixels> = (0..3)
        .map(|i| Pixels::new(side, golden["pixels"].get(i).unwrap().flatten_all().unwrap().to_vec1().unwrap()).unwrap())
        .collect();
    // A vocabulary in which the prompt of the golden run is "a picture of".
    let mut vocab: HashMap<String, u32> = (0..100).map(|i| (format!("w{i}"), i)).collect();
    for (word, id) in [("[PAD]", 0), ("[UNK]", 1), ("[CLS]", 2), ("[SEP]", SEP), ("a", 40), ("picture", 41), ("of", 42)] {
        vocab.retain(|_, other| *other != id);
        vocab.insert(word.to_owned(), id);
    }
    let json = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    });
    let config = &checkpoint.config().unwrap().text_config;
    let tokenizer = TextTokenizer::from_json(json.to_string(), config, Path::new("golden")).unwrap();

    let greedy = Sampling { min_length: 0, max_length: 16, ..Sampling::new(Strategy::Greedy) };
    let beam = Sampling { min_length: 0, max_length: 16, ..Sampling::new(Strategy::Beam) };
    let runs = [
        ("beam3", Sampling { prompt: String::new(), ..beam.clone() }),
        ("beam3_prompt", beam.clone()),
        ("beam3_k", Sampling { captions: 3, ..beam.clone() }),
        ("beam3_penalty", Sampling { prompt: String::new(), repetition_penalty: 1.3, min_length: 12, ..beam.clone() }),
        (
            "beam4_short",
            Sampling { prompt: String::new(), num_beams: Some(4), length_penalty: Some(0.5), captions: 4, ..beam.clone() },
        ),
        (
            "beam4_long",
            Sampling { prompt: String::new(), num_beams: Some(4), length_penalty: Some(2.0), captions: 4, ..beam.clone() },
        ),
        ("beam5_early", Sampling { num_beams: Some(5), length_penalty: Some(-1.0), captions: 5, max_length: 30, ..beam }),
        ("greedy", Sampling { prompt: String::new(), ..greedy.clone() }),
        ("greedy_prompt", greedy.clone()),
        ("greedy_penalty", Sampling { prompt: String::new(), repetition_penalty: 1.3, min_length: 12, ..greedy }),
    ];
    for (name, sampling) in runs {
        let captioner = Captioner::new(med.clone(), tokenizer.clone(), sampling).unwrap();
        let written = captioner.write(&images, &["x", "y", "z"], 0).unwrap().concat();
        if let Some(expected) = golden.get(&format!("{name}_scores")) {
            for (caption, expected) in written.iter().zip(expected.to_vec1::<f32>().unwrap()) {
                assert!((caption.score.unwrap() - expected).abs() < TOLERANCE * expected.abs(), "{name}");
            }
        }
        let got: Vec<Vec<u32>> = written.into_iter().map(|caption| caption.ids).collect();
        let expected: Vec<Vec<u32>> = ids(&golden[name]).to_vec2().unwrap();
        for (got, mut expected) in got.into_iter().zip(expected) {
            // The reference pads texts that end early.
            let end = expected.iter().position(|id| *id == SEP).map_or(expected.len(), |end| end + 1);
            expected.truncate(end);
            assert_eq!(got, expected, "{name}");
        }
    }
}

#[test]
fn matching_and_contrastive_scores_agree_under_padding() {
    let (checkpoint, med, golden) = model("filter");
    let (text, mask) = (ids(&golden["ids"]), &golden["mask"]);
    let states = med.encode_image(&golden["pixels"]).unwrap();

    let itc = med.image_features(&states).unwrap().matmul(&med.text_features(&text, mask).unwrap().t().unwrap()).unwrap();
    assert!(difference(&itc, &golden["itc"]) < TOLERANCE);

    let with_cls = med.itm_logits(&text, mask, &states).unwrap();
    assert!(difference(&with_cls, &golden["itm_cls"]) < TOLERANCE);

    // The golden run puts [ENC] after [DEC].
    let enc = checkpoint.config().unwrap().text_config.bos_token_id + 1;
    let (rows, width) = text.dims2().unwrap();
    let first = Tensor::full(enc, (rows, 1), &Device::Cpu).unwrap();
    let grounded = Tensor::cat(&[&first, &text.narrow(1, 1, width - 1).unwrap()], 1).unwrap();
    let with_enc = med.itm_logits(&grounded, mask, &states).unwrap();
    assert!(difference(&with_enc, &golden["itm_enc"]) < TOLERANCE);
    assert!(difference(&with_enc, &golden["itm_cls"]) > 100.0 * TOLERANCE, "the first token must matter");
}

#[test]
fn the_distribution_that_is_drawn_from_agrees() {
    let cases = [
        Sampling { repetition_penalty: 1.1, min_length: 5, temperature: 1.0, top_k: 50, top_p: 0.9, ..Sampling::default() },
        Sampling { repetition_penalty: 1.5, min_length: 9, temperature: 0.7, top_k: 10, top_p: 0.5, ..Sampling::default() },
        Sampling { repetition_penalty: 1.0, min_length: 0, temperature: 1.3, top_k: 0, top_p: 0.95, ..Sampling::default() },
        Sampling { repetition_penalty: 1.2, min_length: 0, temperature: 1.0, top_k: 5, top_p: 1.0, ..Sampling::default() },
    ];
    let golden = tensors("sampling.safetensors");
    let history: Vec<Vec<u32>> = ids(&golden["history"]).to_vec2().unwrap();
    for (number, sampling) in cases.iter().enumerate() {
        let source = if sampling.top_p < 1.0 { "logits" } else { "ties" };
        let logits: Vec<Vec<f32>> = golden[source].to_vec2().unwrap();
        let expected: Vec<Vec<f32>> = golden[&format!("probabilities.{number}")].to_vec2().unwrap();
        for ((logits, history), expected) in logits.iter().zip(&history).zip(&expected) {
            let mut got = vec![0.0; expected.len()];
            for (id, probability) in sampling.distribution(&mut logits.clone(), history, SEP).unwrap() {
                got[id as usize] = probability as f32;
            }
            for (id, (got, expected)) in got.iter().zip(expected).enumerate() {
                assert_eq!(*got > 0.0, *expected > 0.0, "case {number}: token {id} kept");
                assert!((got - expected).abs() < 1e-5, "case {number}: token {id}: {got} for {expected}");
            }
        }
    }
}

#[test]
fn resized_pixels_are_those_of_pillow() {
    let golden = tensors("preprocess.safetensors");
    let (height, width, _) = golden["image"].dims3().unwrap();
    let bytes = golden["image"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let image = image::RgbImage::from_raw(width as u32, height as u32, bytes).unwrap();
    for side in [32, 128] {
        let got = Preprocessor::new(side).prepare(&image).unwrap();
        let expected: Vec<f32> = golden[&format!("pixels.{side}")].flatten_all().unwrap().to_vec1().unwrap();
        // In steps of 8-bit brightness; 0.27 is about the deviation that normalisation divides by.
        let steps: Vec<f32> = got.values().iter().zip(&expected).map(|(a, b)| (a - b).abs() * 0.27 * 255.0).collect();
        let mean = steps.iter().sum::<f32>() / steps.len() as f32;
        let most = steps.iter().copied().fold(0.0, f32::max);
        assert!(mean < 0.05 && most < 1.1, "side {side}: mean {mean}, most {most} of 255");
    }
}

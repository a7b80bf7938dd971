//! Images and texts as transformers 5.23 and OpenCLIP 3.3 prepare them; made by `goldens/inputs.py`.

use std::path::Path;

use candle_core::{DType, Device};
use capfilt_models::clip::{ClipFamily, ClipTokenizer};
use capfilt_models::config::MedConfig;
use capfilt_models::preprocess::Preprocessor;
use capfilt_models::tokenizer::{FirstToken, TextTokenizer};
use image::RgbImage;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use crate::fixture::goldens;

/// Mean difference allowed, in units of full brightness.
const TOLERANCE: f32 = 1.0 / 255.0;

/// Compares the preprocessor of a config with its golden images, of which every pixel is divided by `deviation`.
fn prepared(name: &str, deviation: f32, open: impl Fn(&str) -> Preprocessor) {
    let bytes = std::fs::read(goldens().join("images.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let preprocessor = open(&header.metadata().as_ref().unwrap()[name]);
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let mut number = 0;
    while let Some(image) = tensors.get(&format!("image.{number}")) {
        let (height, width, _) = image.dims3().unwrap();
        let raw: Vec<u8> = image.flatten_all().unwrap().to_vec1().unwrap();
        let image = RgbImage::from_raw(width as u32, height as u32, raw).unwrap();
        let got = preprocessor.prepare(&image).unwrap();
        let expected = &tensors[&format!("{name}.{number}")];
        assert_eq!(expected.dims(), [3, preprocessor.side(), preprocessor.side()]);
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        let sum: f32 = got.values().iter().zip(&expected).map(|(a, b)| (a - b).abs() * deviation).sum();
        let mean = sum / expected.len() as f32;
        assert!(mean < TOLERANCE / 10.0, "{name} of {width}x{height} differs by {} of 255", mean * 255.0);
        number += 1;
    }
    assert_eq!(number, 7);
}

/// The smallest deviation of CLIP's channels.
const CLIP_DEVIATION: f32 = 0.276;

fn hugging_face(text: &str) -> Preprocessor {
    Preprocessor::from_json(text, Path::new("golden")).unwrap()
}

fn open_clip(text: &str) -> Preprocessor {
    Preprocessor::from_open_clip(text, 30, Path::new("golden")).unwrap()
}

#[test]
fn blip_images_agree() {
    prepared("blip", CLIP_DEVIATION, hugging_face);
}

#[test]
fn clip_images_agree() {
    prepared("clip", CLIP_DEVIATION, hugging_face);
    prepared("clip_same", CLIP_DEVIATION, hugging_face);
}

#[test]
fn siglip_images_agree() {
    prepared("siglip", 0.5, hugging_face);
}

#[test]
fn open_clip_images_agree() {
    prepared("open_clip", CLIP_DEVIATION, open_clip);
    prepared("open_clip_squash", 0.5, open_clip);
    // Also once they are in the layout of transformers.
    let read_back = |text: &str| Preprocessor::from_json(&open_clip(text).to_json(), Path::new("written")).unwrap();
    prepared("open_clip", CLIP_DEVIATION, read_back);
    assert_eq!(read_back("{}"), open_clip("{}"));
}

#[test]
fn settings_of_every_spelling_are_read() {
    let side = |text: Value| Preprocessor::from_json(&text.to_string(), Path::new("p")).map(|p| p.side());
    // OpenAI's first file, and its later one.
    let older = json!({"crop_size": 224, "do_center_crop": true, "do_normalize": true, "do_resize": true,
                       "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224});
    assert_eq!(side(older).unwrap(), 224);
    assert_eq!(
        side(json!({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336},
                           "crop_size": {"height": 336, "width": 336}}))
        .unwrap(),
        336
    );
    assert_eq!(side(json!({"image_processor_type": "BlipImageProcessor", "size": 480})).unwrap(), 480);
    assert_eq!(side(json!({"image_processor_type": "SiglipImageProcessor"})).unwrap(), 224);
    for (change, message) in [
        (json!({"size": {"height": 2, "width": 3}}), "3x2"),
        (json!({"resample": 1}), "filter 1"),
        (json!({"do_center_crop": true, "crop_size": 300, "size": 224}), "no full square"),
        (json!({"do_normalize": false}), "another transform"),
        (json!({"image_std": [0.5, 0.0, 0.5]}), "deviation of 0"),
    ] {
        let error = side(change.clone()).unwrap_err().to_string();
        assert!(error.contains(message), "{change}: {error}");
    }
}

#[test]
fn a_very_long_image_takes_no_more_memory_than_its_crop() {
    let preprocessor = hugging_face(r#"{"image_processor_type": "CLIPImageProcessor"}"#);
    // Resized as a whole it would have 4,480,000 x 224 pixels.
    assert_eq!(preprocessor.prepare(&RgbImage::new(20_000, 1)).unwrap().side(), 224);
}

fn text(name: &str) -> String {
    std::fs::read_to_string(goldens().join("texts").join(name)).unwrap()
}

/// The ids of every text in `ids.safetensors`.
fn expected(name: &str) -> Vec<Vec<u32>> {
    let tensors = candle_core::safetensors::load(goldens().join("texts/ids.safetensors"), &Device::Cpu).unwrap();
    let flat = |name: &str| tensors[name].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let ids = flat(name);
    let mut start = 0;
    let row = |length: u32| {
        start += length as usize;
        ids[start - length as usize..start].to_vec()
    };
    flat(&format!("{name}.lengths")).into_iter().map(row).collect()
}

fn compare(name: &str, encode: impl Fn(&str) -> Vec<u32>) {
    let (texts, expected) = (text("texts.txt"), expected(name));
    assert_eq!(expected.len(), 1000);
    for (text, expected) in texts.lines().zip(expected) {
        assert_eq!(encode(text), expected, "{text}");
    }
}

/// CLIP's `vocab.json`: bytes, bytes that end a word, merges, start and end (OpenAI's `simple_tokenizer.py`).
fn clip_vocab(merges: &str) -> String {
    let letters: Vec<u32> = (33..127).chain(161..173).chain(174..256).collect();
    let others = 256..(512 - letters.len() as u32);
    let bytes: Vec<String> = letters.into_iter().chain(others).map(|c| char::from_u32(c).unwrap().to_string()).collect();
    let ends = bytes.iter().map(|byte| format!("{byte}</w>"));
    let merged = merges.lines().skip(1).map(|line| line.replace(' ', ""));
    let special = ["<|startoftext|>".to_owned(), "<|endoftext|>".to_owned()];
    let words = bytes.iter().cloned().chain(ends).chain(merged).chain(special);
    let vocab: Map<String, Value> = words.zip(0..).map(|(word, id)| (word, json!(id))).collect();
    Value::Object(vocab).to_string()
}

#[test]
fn a_thousand_texts_have_clips_ids() {
    let dir = tempfile::TempDir::new().unwrap();
    let merges = text("clip_merges.txt");
    std::fs::write(dir.path().join("vocab.json"), clip_vocab(&merges)).unwrap();
    std::fs::write(dir.path().join("merges.txt"), merges).unwrap();
    let tokenizer = ClipTokenizer::from_dir(dir.path(), ClipFamily::Clip).unwrap();
    assert_eq!((tokenizer.size(), tokenizer.pad_id()), (49_408, 49_407));
    compare("clip", |text| tokenizer.encode(text, 77).unwrap());
    let cut = tokenizer.encode("one two three four five", 4).unwrap();
    assert_eq!(cut, [49_406, 637, 1237, 49_407]);
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"pad_token": {"content": "!"}}"#).unwrap();
    assert_eq!(ClipTokenizer::from_dir(dir.path(), ClipFamily::Clip).unwrap().pad_id(), 0);
    assert!(ClipTokenizer::from_dir(goldens().as_path(), ClipFamily::Clip).unwrap_err().to_string().contains("tokenizer.json"));
}

#[test]
fn a_thousand_texts_have_berts_ids() {
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("vocab.txt"), text("bert_vocab.txt")).unwrap();
    let tokenizer = TextTokenizer::from_dir(dir.path(), &MedConfig::base().text_config).unwrap();
    assert_eq!(tokenizer.first_id(FirstToken::Enc), 30_523);
    compare("bert", |text| tokenizer.encode(text, FirstToken::Cls, 512).unwrap());
    let prompt = tokenizer.prompt("a picture of ").unwrap();
    assert_eq!(prompt, [30_522, 1037, 3861, 1997]);
}

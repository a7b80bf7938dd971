//! Small models, tokenizers and images for the other tests.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use capfilt_models::config::{MedConfig, TextConfig, VisionConfig};
use capfilt_models::med::{Med, Parts};
use capfilt_models::parameters::parameters;
use capfilt_models::preprocess::Pixels;
use capfilt_models::random::Stream;
use capfilt_models::special::SEP_ID;
use capfilt_models::tokenizer::{TextTokenizer, train_wordpiece};

/// The folder of golden files.
pub(crate) fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Captions that a small vocabulary is trained on.
pub(crate) const CAPTIONS: [&str; 8] = [
    "a picture of a dog running on the beach",
    "a picture of a cat sleeping on a red sofa",
    "two dogs and a cat sitting in the green grass",
    "a man riding a wave on top of a surfboard",
    "a woman holding a red umbrella in the rain",
    "the beach with a man and two dogs",
    "a red bus driving down a wet street",
    "a bowl of green apples on a wooden table",
];

/// A `tokenizer.json` for [`CAPTIONS`].
pub(crate) fn tokenizer_json() -> String {
    train_wordpiece(&CAPTIONS, 200).unwrap()
}

/// A config smaller than [`MedConfig::tiny`], with a vision width that differs from the text width.
pub(crate) fn config() -> MedConfig {
    let tiny = MedConfig::tiny(200);
    let config = MedConfig {
        vision_config: VisionConfig {
            hidden_size: 48,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            image_size: 32,
            ..tiny.vision_config
        },
        text_config: TextConfig {
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            max_position_embeddings: 40,
            ..tiny.text_config
        },
        image_text_hidden_size: 24,
        ..tiny
    };
    config.checked().unwrap()
}

/// The tokenizer of [`config`].
pub(crate) fn tokenizer() -> TextTokenizer {
    TextTokenizer::from_json(tokenizer_json(), &config().text_config, Path::new("tokenizer.json")).unwrap()
}

/// Weights that are large enough for every part to move the output.
pub(crate) fn tensors(config: &MedConfig, parts: Parts) -> HashMap<String, Tensor> {
    let draw = |name: &str, shape: &[usize]| {
        let mut stream = Stream::new("test weight", 0, &[name.as_bytes()]);
        let norm = name.to_lowercase().contains("norm") && name.ends_with("weight");
        let (mean, scale) = if norm { (1.0, 0.1) } else { (0.0, 0.2) };
        let mut values: Vec<f32> = (0..shape.iter().product()).map(|_| (mean + scale * stream.normal()) as f32).collect();
        if name == "text_decoder.cls.predictions.bias" {
            // Captions end at all lengths.
            values[SEP_ID as usize] += 3.0;
        }
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let list = parameters(config, parts).unwrap();
    list.into_iter().map(|parameter| (parameter.name.clone(), draw(&parameter.name, &parameter.shape))).collect()
}

/// A model of [`config`].
pub(crate) fn med(parts: Parts) -> Med {
    med_in(parts, DType::F32)
}

/// [`med`] that computes in another number type.
pub(crate) fn med_in(parts: Parts, dtype: DType) -> Med {
    let config = config();
    let vb = VarBuilder::from_tensors(tensors(&config, parts), dtype, &Device::Cpu);
    Med::load(&config, vb, parts).unwrap()
}

/// Random images for [`config`].
pub(crate) fn images(count: usize) -> Vec<Pixels> {
    (0..count as u64)
        .map(|number| {
            let mut stream = Stream::new("test image", number, &[]);
            let values = (0..3 * 32 * 32).map(|_| stream.normal() as f32).collect();
            Pixels::new(32, values).unwrap()
        })
        .collect()
}

/// The largest difference between two tensors of one shape, relative to the largest expected number.
pub(crate) fn difference(got: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(got.dims(), expected.dims());
    let numbers = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (got, expected) = (numbers(got), numbers(expected));
    let scale = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    assert!(got.iter().all(|x| x.is_finite()));
    got.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / scale
}

//! Every family, small and full-size, against transformers 5.23 and OpenCLIP 3.3 on the same weights, which a rule makes of their names
//! (`goldens/weights.py`); outputs were made by `goldens/families.py`.

use std::collections::HashMap;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::clip::{Clip, ClipConfig};
use capfilt_models::config::MedConfig;
use capfilt_models::generate::Captioner;
use capfilt_models::med::{Med, Parts};
use capfilt_models::preprocess::Pixels;
use capfilt_models::sampling::{Sampling, Strategy};
use capfilt_models::tokenizer::TextTokenizer;
use capfilt_models::trunk::{Trunk, TrunkKind};
use capfilt_models::vqa::Vqa;
use rayon::prelude::*;
use safetensors::SafeTensors;

use crate::fixture::goldens;

/// Largest difference allowed, relative to the largest number of the tensor.
const TOLERANCE: f32 = 1e-4;

/// Other number types, and the same for them.
pub(crate) const OTHER_TYPES: [(DType, f32); 3] = [(DType::F64, TOLERANCE), (DType::F16, 0.02), (DType::BF16, 0.1)];

/// FNV-1a of the name, the finalizer of `MurmurHash3` of it and the index, the upper 24 bits: `count` numbers in [-0.5, 0.5).
pub(crate) fn numbers(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let number = |index: usize| {
        let mut x = (index as u32).wrapping_mul(0x9e37_79b1).wrapping_add(seed);
        x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
        x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
        x ^= x >> 16;
        (x >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).into_par_iter().map(number).collect()
}

/// The weight that the rule makes.
pub(crate) fn weight(name: &str, shape: &Shape) -> candle_core::Result<Tensor> {
    let mut values = numbers(name, shape.elem_count());
    let (scale, shift) = if shape.rank() < 2 {
        (0.2, if name.ends_with(".weight") || name.ends_with("running_var") { 1.0 } else { 0.0 })
    } else {
        let inputs: usize = shape.dims()[1..].iter().product();
        ((4.0 / (inputs as f64).sqrt()) as f32, 0.0)
    };
    values.par_iter_mut().for_each(|value| *value = *value * scale + shift);
    Tensor::from_vec(values, shape, &Device::Cpu)
}

struct Rule;

impl SimpleBackend for Rule {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, _: &Device) -> candle_core::Result<Tensor> {
        weight(name, &shape)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name} was asked for without a shape")
    }

    /// The language-model head is tied.
    fn contains_tensor(&self, _: &str) -> bool {
        false
    }
}

/// A source of every tensor there may be.
pub(crate) fn rule() -> VarBuilder<'static> {
    rule_in(DType::F32)
}

fn rule_in(dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Rule), dtype, Device::Cpu)
}

/// What one file of `goldens/families` holds.
struct Golden {
    tensors: HashMap<String, Tensor>,
    texts: HashMap<String, String>,
    /// The number type that is tried.
    dtype: DType,
    tolerance: f32,
}

impl Golden {
    fn read(name: &str) -> Self {
        Self::read_in(name, (DType::F32, TOLERANCE))
    }

    fn read_in(name: &str, (dtype, tolerance): (DType, f32)) -> Self {
        let bytes = std::fs::read(goldens().join(format!("families/{name}.safetensors"))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
        Self { tensors, texts: header.metadata().clone().unwrap(), dtype, tolerance }
    }

    fn clip_config(&self) -> ClipConfig {
        ClipConfig::from_hugging_face(&self.texts["config"], "golden".as_ref()).unwrap()
    }

    fn med_config(&self) -> MedConfig {
        serde_json::from_str::<MedConfig>(&self.texts["config"]).unwrap().checked().unwrap()
    }

    fn ids(&self, name: &str) -> Tensor {
        self.tensors[name].to_dtype(DType::U32).unwrap()
    }

    fn rows(&self, name: &str) -> Vec<Vec<u32>> {
        self.ids(name).to_vec2().unwrap()
    }

    /// How many images the features are of.
    fn images(&self) -> usize {
        self.tensors["image_features"].dim(0).unwrap()
    }

    fn pixels(&self, side: usize, count: usize) -> Tensor {
        let values: Vec<f32> = numbers("pixels", count * 3 * side * side).iter().map(|x| x * 4.0).collect();
        Tensor::from_vec(values, (count, 3, side, side), &Device::Cpu).unwrap()
    }

    /// Compares a whole tensor with one of the same shape.
    fn whole(&self, name: &str, got: &Tensor) {
        let expected = &self.tensors[name];
        assert_eq!(got.dims(), expected.dims(), "{name}");
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        self.close(name, &flat(got), &expected, most);
    }

    /// Compares numbers at even distances with a sample: the largest magnitude of the whole tensor, then its numbers.
    fn sampled(&self, name: &str, got: &Tensor) {
        let sample: Vec<f32> = self.tensors[name].to_vec1().unwrap();
        let got = flat(got);
        let (most, expected) = (sample[0], &sample[1..]);
        let found = got.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        assert!((found - most).abs() < self.tolerance * most, "{name}: the largest number is {found}, expected {most}");
        let step = (got.len() / 256).max(1);
        let got: Vec<f32> = got.into_iter().step_by(step).take(256).collect();
        self.close(name, &got, expected, most);
    }

    fn close(&self, name: &str, got: &[f32], expected: &[f32], most: f32) {
        assert_eq!(got.len(), expected.len(), "{name}");
        assert!(got.iter().all(|x| x.is_finite()), "{name}");
        let worst = got.iter().zip(expected).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst < self.tolerance * most, "{name} in {:?} differs by {worst} of {most}", self.dtype);
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A model of Hugging Face's.
fn contrastive(golden: &Golden) {
    let clip = Clip::load(&golden.clip_config(), rule_in(golden.dtype)).unwrap();
    let pixels = golden.pixels(clip.config().image_size(), golden.images());
    let ids = golden.ids("ids");
    golden.sampled("image_states", &clip.image_states(&pixels).unwrap().unwrap());
    golden.sampled("text_states", &clip.text_states(&ids).unwrap());
    same_features(golden, &clip, &pixels, &ids);
}

/// A checkpoint of OpenCLIP's.
fn open_clip(golden: &Golden) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("open_clip_config.json"), &golden.texts["config"]).unwrap();
    let shapes: HashMap<String, Vec<usize>> = serde_json::from_str(&golden.texts["shapes"]).unwrap();
    let tensors: HashMap<String, Tensor> =
        shapes.into_iter().map(|(name, shape)| (name.clone(), weight(&name, &shape.into()).unwrap())).collect();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let clip = Checkpoint::open(folder.path()).unwrap().clip(&Device::Cpu, golden.dtype).unwrap();
    let pixels = golden.pixels(clip.config().image_size(), golden.images());
    same_features(golden, &clip, &pixels, &golden.ids("ids"));
}

fn same_features(golden: &Golden, clip: &Clip, pixels: &Tensor, ids: &Tensor) {
    let (images, texts) = (clip.image_features(pixels).unwrap(), clip.encode_texts(ids).unwrap());
    golden.whole("image_features", &images);
    golden.whole("text_features", &texts);
    golden.whole("logits", &clip.logits(&images, &texts).unwrap());
}

#[test]
fn trunks_agree_with_timm() {
    for (name, kind, side) in
        [("efficientnet_lite0", TrunkKind::EfficientNetLite0, 96), ("efficientnet_lite3", TrunkKind::EfficientNetLite3, 64)]
    {
        let golden = Golden::read(name);
        let map = Trunk::load(kind, &rule()).unwrap().forward(&golden.pixels(side, 2)).unwrap();
        assert_eq!(map.dims(), [2, side / 32 * (side / 32), 1280]);
        golden.sampled("map", &map);
    }
}

#[test]
fn a_small_clip_agrees() {
    contrastive(&Golden::read("clip_small"));
}

#[test]
fn a_small_clip_with_exact_gelu_and_the_older_end_of_text_agrees() {
    contrastive(&Golden::read("clip_small_gelu"));
}

#[test]
fn a_small_siglip_agrees() {
    contrastive(&Golden::read("siglip_small"));
}

#[test]
fn a_small_vision_transformer_of_open_clip_agrees() {
    open_clip(&Golden::read("openclip_vit_small"));
}

#[test]
fn a_small_resnet_of_open_clip_agrees() {
    open_clip(&Golden::read("openclip_resnet_small"));
}

#[test]
fn clip_b32_agrees() {
    contrastive(&Golden::read("clip_b32"));
}

#[test]
fn clip_l14_agrees() {
    contrastive(&Golden::read("clip_l14"));
}

#[test]
fn siglip_b16_agrees() {
    contrastive(&Golden::read("siglip_b16"));
}

#[test]
fn clip_rn50_agrees() {
    open_clip(&Golden::read("openclip_rn50"));
}

fn captioner(name: &str) {
    let golden = Golden::read(name);
    let config = golden.med_config();
    let med = Med::load(&config, rule(), Parts::CAPTIONER).unwrap();
    let pixels = golden.pixels(config.vision_config.image_size, 1);
    let states = med.encode_image(&pixels).unwrap();
    golden.sampled("states", &states);
    let ids = golden.ids("ids");
    golden.sampled("logits", &med.lm_logits(&ids, &ids.ones_like().unwrap(), &states).unwrap());

    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(goldens().join("texts/bert_vocab.txt"), folder.path().join("vocab.txt")).unwrap();
    let tokenizer = TextTokenizer::from_dir(folder.path(), &config.text_config).unwrap();
    let image = Pixels::new(config.vision_config.image_size, flat(&pixels)).unwrap();
    for (name, strategy, repetition_penalty) in [("greedy", Strategy::Greedy, 2.0), ("beam3", Strategy::Beam, 1.0)] {
        let expected = golden.rows(name);
        let sampling = Sampling {
            prompt: String::new(),
            min_length: 0,
            max_length: expected[0].len(),
            repetition_penalty,
            ..Sampling::new(strategy)
        };
        assert!(strategy == Strategy::Greedy || sampling.beams() == 3);
        let captioner = Captioner::new(med.clone(), tokenizer.clone(), sampling).unwrap();
        assert_eq!(captioner.generate(std::slice::from_ref(&image), &["key"], 0).unwrap(), expected, "{name}");
    }
}

#[test]
fn blip_base_captions_agree() {
    captioner("blip_base");
}

#[test]
fn blip_large_captions_agree() {
    captioner("blip_large");
}

#[test]
fn blip_base_matching_agrees() {
    let golden = Golden::read("blip_itm_base");
    let config = golden.med_config();
    let med = Med::load(&config, rule(), Parts::FILTER).unwrap();
    let states = med.encode_image(&golden.pixels(config.vision_config.image_size, 1)).unwrap();
    let ids = golden.ids("ids");
    let mask = ids.ones_like().unwrap();
    golden.whole("itm_cls", &med.itm_logits(&ids, &mask, &states).unwrap());
    golden.whole("itm_enc", &med.itm_logits(&golden.ids("grounded"), &mask, &states).unwrap());
    let (image, text) = (med.image_features(&states).unwrap(), med.text_features(&ids, &mask).unwrap());
    golden.whole("itc", &image.matmul(&text.t().unwrap()).unwrap());
}

fn questions(golden: &Golden, count: usize) {
    let config = golden.med_config();
    let vqa = Vqa::load(&config, rule_in(golden.dtype)).unwrap();
    let pixels = golden.pixels(config.vision_config.image_size, count);
    let images = vqa.image_cache(&vqa.encode_image(&pixels).unwrap()).unwrap();
    let (ids, mask) = (golden.ids("ids"), golden.ids("mask"));
    let states = vqa.question_states(&ids, &mask, &images).unwrap();
    golden.sampled("states", &states);
    golden.sampled("logits", &vqa.answer_logits(&golden.ids("answers"), &states).unwrap());
    if golden.tolerance > TOLERANCE {
        return; // words may be others
    }
    let pad = |mut row: Vec<u32>, length| {
        row.resize(length, config.text_config.pad_token_id);
        row
    };
    let expected = golden.rows("greedy");
    let length = expected[0].len();
    let got: Vec<_> = vqa.generate(&states, length).unwrap().into_iter().map(|row| pad(row, length)).collect();
    assert_eq!(got, expected);
    // Each question by itself, at its own length.
    let lengths: Vec<u32> = mask.sum(1).unwrap().to_vec1().unwrap();
    for (row, length) in lengths.into_iter().enumerate() {
        let image = vqa.encode_image(&pixels.narrow(0, row, 1).unwrap()).unwrap();
        let ids = ids.narrow(0, row, 1).unwrap().narrow(1, 0, length as usize).unwrap().contiguous().unwrap();
        let image = vqa.image_cache(&image).unwrap();
        let states = vqa.question_states(&ids, &ids.ones_like().unwrap(), &image).unwrap();
        let expected: Vec<u32> = golden.ids(&format!("greedy.{row}")).to_vec1().unwrap();
        assert_eq!(vqa.generate(&states, expected.len()).unwrap(), [expected], "question {row}");
    }
}

#[test]
fn small_answers_agree_alone_and_in_a_padded_batch() {
    questions(&Golden::read("vqa_small"), 3);
}

#[test]
fn blip_base_answers_agree() {
    questions(&Golden::read("blip_vqa_base"), 1);
}

/// On a CPU all number types but f32 go a GPU's way, of candle's operations alone.
#[test]
fn small_models_agree_in_other_number_types() {
    for dtype in OTHER_TYPES {
        for name in ["clip_small", "clip_small_gelu", "siglip_small"] {
            contrastive(&Golden::read_in(name, dtype));
        }
        open_clip(&Golden::read_in("openclip_resnet_small", dtype));
        questions(&Golden::read_in("vqa_small", dtype), 3);
    }
}

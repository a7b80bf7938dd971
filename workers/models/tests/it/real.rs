//! The public checkpoints' own golden values (`convert_blip_original_pytorch_to_hf.py` of transformers), where the checkpoints are at hand:
//!
//! | variable | names |
//! |---|---|
//! | `CAPFILT_BLIP_CAPTIONING` | the folder of `blip-image-captioning-base` |
//! | `CAPFILT_BLIP_ITM` | the folder of `blip-itm-base-coco` |
//! | `CAPFILT_BLIP_VQA` | the folder of `blip-vqa-base` |
//! | `CAPFILT_BLIP_DEMO_IMAGE` | BLIP's `demo.jpg`: a woman and a dog on a beach |

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::generate::Captioner;
use capfilt_models::preprocess::Pixels;
use capfilt_models::sampling::{Sampling, Strategy};
use capfilt_models::tokenizer::{FirstToken, TextBatch};
use capfilt_models::vqa::Answerer;

/// The folder that a variable names and the demo's image; without them a test has nothing to say.
fn at_hand(variable: &str) -> Option<(PathBuf, image::RgbImage)> {
    let path = |name: &str| {
        let path = std::env::var_os(name).map(PathBuf::from);
        if path.is_none() {
            eprintln!("skipped: {name} is not set");
        }
        path
    };
    let (folder, image) = (path(variable)?, path("CAPFILT_BLIP_DEMO_IMAGE")?);
    Some((folder, image::open(image).unwrap().into_rgb8()))
}

fn states(checkpoint: &Checkpoint, image: &image::RgbImage) -> (capfilt_models::med::Med, Tensor) {
    let med = checkpoint.med(&Device::Cpu, DType::F32).unwrap();
    let pixels = checkpoint.preprocessor().unwrap().prepare(image).unwrap();
    let states = med.encode_image(&Pixels::stack(&[pixels], &Device::Cpu).unwrap()).unwrap();
    (med, states)
}

#[test]
fn the_public_captioner_says_what_it_said() {
    let Some((folder, image)) = at_hand("CAPFILT_BLIP_CAPTIONING") else { return };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let pixels = checkpoint.preprocessor().unwrap().prepare(&image).unwrap();
    let write = |prompt: &str| {
        let sampling = Sampling {
            prompt: prompt.to_owned(),
            min_length: 0,
            max_length: 20,
            repetition_penalty: 1.0,
            ..Sampling::new(Strategy::Greedy)
        };
        let med = checkpoint.med(&Device::Cpu, DType::F32).unwrap();
        let captioner = Captioner::new(med, checkpoint.tokenizer().unwrap(), sampling).unwrap();
        captioner.generate(std::slice::from_ref(&pixels), &["key"], 0).unwrap().remove(0)
    };
    assert_eq!(write("a picture of "), [30522, 1037, 3861, 1997, 1037, 2450, 3564, 2006, 1996, 3509, 2007, 2014, 3899, 102]);
    assert_eq!(write(""), [30522, 1037, 2450, 3564, 2006, 1996, 3509, 2007, 2014, 3899, 102]);
}

#[test]
fn the_public_filter_judges_as_it_did() {
    let Some((folder, image)) = at_hand("CAPFILT_BLIP_ITM") else { return };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let (med, states) = states(&checkpoint, &image);
    let tokenizer = checkpoint.tokenizer().unwrap();
    let ids = tokenizer.encode("A picture of a woman with a dog sitting in a beach", FirstToken::Cls, 35).unwrap();
    // The values were made with padding that nothing hid.
    let (ids, _) = TextBatch::pad(&[ids], 35, tokenizer.pad_id()).tensors(&Device::Cpu).unwrap();
    let mask = ids.ones_like().unwrap();
    let logits = med.itm_logits(&ids, &mask, &states).unwrap();
    let probability: Vec<f32> = candle_nn::ops::softmax(&logits, 1).unwrap().squeeze(0).unwrap().to_vec1().unwrap();
    assert!((probability[1] - 0.456_988_45).abs() < 1e-4, "{probability:?}");
    let (image, text) = (med.image_features(&states).unwrap(), med.text_features(&ids, &mask).unwrap());
    let cosine: f32 = image.matmul(&text.t().unwrap()).unwrap().flatten_all().unwrap().get(0).unwrap().to_scalar().unwrap();
    assert!((cosine - 0.211_068_75).abs() < 1e-4, "{cosine}");
}

#[test]
fn the_public_answerer_counts_one_dog() {
    let Some((folder, image)) = at_hand("CAPFILT_BLIP_VQA") else { return };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let (vqa, tokenizer) = (checkpoint.vqa(&Device::Cpu, DType::F32).unwrap(), checkpoint.tokenizer().unwrap());
    let pixels = checkpoint.preprocessor().unwrap().prepare(&image).unwrap();
    let answerer = Answerer::new(vqa, tokenizer, FirstToken::Cls).unwrap();
    assert_eq!(answerer.answer(&[pixels], &[vec!["How many dogs are in this image?"]]).unwrap(), [["1"]]);
}

//! The same from any number type. On a CPU all but f32 go a GPU's way: candle's operations, and cross-attention to heads laid apart.

use candle_core::{DType, Device, Tensor};
use capfilt_models::generate::Captioner;
use capfilt_models::med::{Med, Parts};
use capfilt_models::preprocess::Pixels;
use capfilt_models::retrieval::retrieval_scores;
use capfilt_models::sampling::{Sampling, Strategy};
use capfilt_models::score::{FilterScorer, ItmToken};

use crate::families::OTHER_TYPES;
use crate::fixture::{CAPTIONS, difference, images, med, med_in, tokenizer};

/// What a MED can be asked, for two images and four texts.
fn outputs(med: &Med) -> Vec<(&'static str, Tensor)> {
    let states = med.encode_images(&images(2)).unwrap();
    let ids: Vec<u32> = (0..4 * 9).map(|i| 7 + i * 13 % 150).collect();
    let ids = Tensor::from_vec(ids, (4, 9), &Device::Cpu).unwrap();
    let lengths = [9, 4, 7, 9];
    let mask: Vec<u32> = lengths.iter().flat_map(|&length| (0..9).map(move |i| u32::from(i < length))).collect();
    let mask = Tensor::from_vec(mask, (4, 9), &Device::Cpu).unwrap();
    let (cross, mut cache) = (med.decoder_cross_cache(&states).unwrap(), med.decoder_self_cache(4, 9).unwrap());
    let mut step = |from, count| med.decode_step(&ids.narrow(1, from, count).unwrap(), &mut cache, &cross).unwrap();
    let steps = [step(0, 3), step(3, 1), step(4, 1)];
    let [first, second, third] = steps;
    let order = Tensor::new(&[1u32, 1, 0, 1], &Device::Cpu).unwrap();
    let chosen = med.encoder_cross_cache(&states).unwrap().select(&order).unwrap();
    vec![
        ("image features", med.image_features(&states).unwrap()),
        ("text features", med.text_features(&ids, &mask).unwrap()),
        ("matches", med.itm_logits(&ids, &mask, &states).unwrap()),
        ("matches of chosen images", med.itm_logits_cached(&ids, &mask, &chosen).unwrap()),
        ("language model", med.lm_logits(&ids, &mask, &states).unwrap()),
        ("prompt", first),
        ("a token", second),
        ("another", third),
        ("states", states),
    ]
}

#[test]
fn a_med_agrees_with_itself() {
    let exact = outputs(&med(Parts::FULL));
    for (dtype, tolerance) in OTHER_TYPES {
        for ((name, got), (_, expected)) in outputs(&med_in(Parts::FULL, dtype)).iter().zip(&exact) {
            let worst = difference(got, expected);
            assert!(worst < tolerance, "{name} in {dtype:?} differs by {worst}");
        }
    }
}

#[test]
fn captions_are_the_same_or_sound() {
    let images = images(6);
    let keys: Vec<String> = (0..images.len()).map(|i| format!("sample-{i}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let samplings = [
        Sampling { captions: 2, ..Sampling::default() },
        Sampling { min_length: 0, ..Sampling::new(Strategy::Greedy) },
        Sampling { min_length: 0, num_beams: Some(3), ..Sampling::new(Strategy::Beam) },
    ];
    for sampling in samplings {
        let write = |dtype| {
            let captioner = Captioner::new(med_in(Parts::CAPTIONER, dtype), tokenizer(), sampling.clone()).unwrap();
            captioner.generate(&images, &keys, 7).unwrap()
        };
        let exact = write(DType::F32);
        for (dtype, _) in OTHER_TYPES {
            let got = write(dtype);
            assert_eq!(got.len(), exact.len());
            assert!(got.iter().all(|ids| ids.len() > 1 && ids.len() <= sampling.max_length), "{dtype:?}");
            assert!(dtype != DType::F64 || got == exact, "{sampling:?}");
        }
    }
}

#[test]
fn scores_are_close() {
    let images = images(3);
    let texts = vec![vec![CAPTIONS[0], CAPTIONS[1]], vec!["a dog"], vec![CAPTIONS[2], CAPTIONS[3], "in the green grass"]];
    let flat = |images: &[Pixels], dtype| {
        let med = med_in(Parts::FILTER, dtype);
        let ranks = retrieval_scores(&med, &tokenizer(), images, &CAPTIONS[..4], 9).unwrap();
        let filter = FilterScorer::new(med, tokenizer(), ItmToken::Enc).unwrap();
        let scores = filter.score(images, &texts).unwrap().concat();
        let mut numbers: Vec<f32> = scores.iter().flat_map(|score| [score.itm, score.itc]).collect();
        numbers.extend(ranks.texts_of_image.iter().chain(&ranks.images_of_text));
        Tensor::new(numbers, &Device::Cpu).unwrap()
    };
    let exact = flat(&images, DType::F32);
    for (dtype, tolerance) in OTHER_TYPES {
        let worst = difference(&flat(&images, dtype), &exact);
        assert!(worst < tolerance, "{dtype:?} differs by {worst}");
    }
}

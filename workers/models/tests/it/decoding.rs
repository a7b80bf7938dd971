//! Captions: the cache, the batch, the randomness.

use candle_core::{Device, Tensor};
use capfilt_models::generate::Captioner;
use capfilt_models::med::Parts;
use capfilt_models::preprocess::Pixels;
use capfilt_models::sampling::{Sampling, Strategy};
use capfilt_models::{ModelError, layers};

use crate::fixture::{difference, images, med, tokenizer};

fn captioner(sampling: Sampling) -> Captioner {
    Captioner::new(med(Parts::CAPTIONER), tokenizer(), sampling).unwrap()
}

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("sample-{i}")).collect()
}

fn generate(captioner: &Captioner, images: &[Pixels], keys: &[String], seed: u64) -> Vec<Vec<u32>> {
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    captioner.generate(images, &keys, seed).unwrap()
}

#[test]
fn decoding_step_by_step_equals_the_whole_sequence() {
    let med = med(Parts::CAPTIONER);
    let pixels = Pixels::stack(&images(2), &Device::Cpu).unwrap();
    let states = med.encode_image(&pixels).unwrap();
    // Two texts per image, so that rows share image keys and values.
    let ids: Vec<u32> = (0..4 * 9).map(|i| 7 + i * 13 % 150).collect();
    let ids = Tensor::from_vec(ids, (4, 9), &Device::Cpu).unwrap();
    let whole = med.lm_logits(&ids, &ids.ones_like().unwrap(), &states).unwrap();

    let cross = med.decoder_cross_cache(&states).unwrap();
    let mut cache = med.decoder_self_cache(4, 9).unwrap();
    let prompt = med.decode_step(&ids.narrow(1, 0, 3).unwrap(), &mut cache, &cross).unwrap();
    assert!(difference(&prompt, &whole.narrow(1, 2, 1).unwrap().squeeze(1).unwrap()) < 1e-5);
    for position in 3..9 {
        let next = med.decode_step(&ids.narrow(1, position, 1).unwrap(), &mut cache, &cross).unwrap();
        assert!(difference(&next, &whole.narrow(1, position, 1).unwrap().squeeze(1).unwrap()) < 1e-5);
    }
    assert_eq!(cache.length(), 9);
    assert!(med.decode_step(&ids.narrow(1, 0, 1).unwrap(), &mut cache, &cross).is_err(), "the cache is full");
}

#[test]
fn a_caption_does_not_depend_on_its_batch() {
    let beam = Sampling { min_length: 0, num_beams: Some(4), ..Sampling::new(Strategy::Beam) };
    let samplings = [
        Sampling::default(),
        Sampling { captions: 3, ..Sampling::default() },
        Sampling { min_length: 0, ..Sampling::new(Strategy::Greedy) },
        Sampling { captions: 3, ..beam.clone() },
        // Searches end at once, and rows leave at different times.
        Sampling { length_penalty: Some(-1.0), ..beam },
    ];
    for sampling in samplings {
        let captions = sampling.captions;
        let captioner = captioner(sampling.clone());
        let (images, keys) = (images(21), keys(21));
        let batch = generate(&captioner, &images, &keys, 7);
        assert_eq!(batch.len(), 21 * captions);
        for i in 0..images.len() {
            let alone = generate(&captioner, &images[i..=i], &keys[i..=i], 7);
            assert_eq!(alone, batch[i * captions..(i + 1) * captions], "image {i}, {sampling:?}");
        }
        let lengths: std::collections::BTreeSet<usize> = batch.iter().map(Vec::len).collect();
        assert!(lengths.len() > 2, "rows must have left at different times: {lengths:?}, {sampling:?}");
    }
}

#[test]
fn captions_depend_on_seed_key_and_number_alone() {
    let captioner = captioner(Sampling { captions: 2, ..Sampling::default() });
    // Four times the same image: what differs comes from the randomness.
    let images = vec![images(1).remove(0); 4];
    let mut keys = keys(4);
    keys[3] = keys[0].clone();
    let captions = generate(&captioner, &images, &keys, 1);
    assert_eq!(captions[0..2], captions[6..8], "same key, same captions");
    assert_ne!(captions[0], captions[1], "captions of one image differ");
    assert_ne!(captions[0..2], captions[2..4], "other key, other captions");
    assert_eq!(captions, generate(&captioner, &images, &keys, 1));
    assert_ne!(captions, generate(&captioner, &images, &keys, 2));
    // The first of two captions is the only one of one.
    let one = self::captioner(Sampling::default());
    assert_eq!(generate(&one, &images[..1], &keys[..1], 1)[0], captions[0]);
}

#[test]
fn lengths_and_prompt_are_kept() {
    let sampling = Sampling { min_length: 9, max_length: 12, ..Sampling::default() };
    let captioner = captioner(sampling);
    let tokenizer = tokenizer();
    let prompt = tokenizer.prompt("a picture of ").unwrap();
    let rows = generate(&captioner, &images(12), &keys(12), 3);
    for row in &rows {
        assert_eq!(row[..prompt.len()], prompt);
        let end = row.iter().position(|id| *id == tokenizer.sep_id());
        assert_eq!(end.map_or(12, |end| end + 1), row.len());
        assert!(end.is_none_or(|end| end >= 9) && row.len() <= 12);
    }
    let keys = keys(12);
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let texts = captioner.caption(&images(12), &keys, 3).unwrap();
    for (texts, row) in texts.iter().zip(&rows) {
        let whole = tokenizer.decode(row).unwrap();
        assert_eq!(Some(texts[0].as_str()), whole.strip_prefix("a picture of").map(str::trim));
    }
}

#[test]
fn impossible_captioners_are_refused() {
    let refuse = |sampling| Captioner::new(med(Parts::CAPTIONER), tokenizer(), sampling).unwrap_err().to_string();
    let base = Sampling::default();
    assert!(refuse(Sampling { max_length: 41, ..base.clone() }).contains("40 positions"));
    assert!(refuse(Sampling { min_length: 0, max_length: 4, ..base.clone() }).contains("nothing is left"));
    assert!(refuse(Sampling { top_p: 1.5, ..base.clone() }).contains("top_p"));
    let beam = Sampling { num_beams: Some(100), ..Sampling::new(Strategy::Beam) };
    assert!(refuse(beam).contains("100 beams are too many for 200 tokens"));
    let filter = Captioner::new(med(Parts::FILTER), tokenizer(), base.clone()).unwrap_err();
    assert!(matches!(filter, ModelError::MissingPart { missing: "text_decoder", .. }));

    let captioner = captioner(base);
    assert!(captioner.caption(&images(2), &["only one"], 0).is_err());
    let small = Pixels::new(16, vec![0.0; 3 * 16 * 16]).unwrap();
    assert!(captioner.caption(&[small], &["x"], 0).is_err());
    assert_eq!(captioner.caption(&[], &[], 0).unwrap(), Vec::<Vec<String>>::new());
}

#[test]
fn a_row_of_a_dense_layer_does_not_depend_on_the_others() {
    // Below and above the sizes at which the matrix product changes its order of summation, up to BLIP's widths.
    for (inputs, outputs) in [(16, 2), (128, 64), (128, 128), (128, 300), (768, 256), (3072, 768)] {
        let values = |count: usize| (0..count).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect::<Vec<_>>();
        let tensor = |shape: (usize, usize)| Tensor::from_vec(values(shape.0 * shape.1), shape, &Device::Cpu).unwrap();
        let bias = Tensor::from_vec(values(outputs), outputs, &Device::Cpu).unwrap();
        let layer = layers::Linear::new(tensor((outputs, inputs)), bias).unwrap();
        let x = tensor((300, inputs));
        let all = layer.forward(&x).unwrap().to_vec2::<f32>().unwrap();
        for rows in [1, 2, 3, 5, 8, 17, 64, 65, 129] {
            let some = layer.forward(&x.narrow(0, 0, rows).unwrap()).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(some, all[..rows], "{rows} rows of {inputs} to {outputs}");
        }
    }
}

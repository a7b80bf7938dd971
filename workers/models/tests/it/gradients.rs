//! Every parameter must learn: candle's fused layers would lose gradients without a word.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use capfilt_models::med::{Med, Parts};
use capfilt_models::preprocess::Pixels;

use crate::fixture::{config, images, tensors};

/// The gradient of `loss` for every parameter, as its largest magnitude.
fn gradients(parts: Parts, loss: impl Fn(&Med, &Tensor, &Tensor) -> Tensor) -> BTreeMap<String, f32> {
    let config = config();
    let vars: BTreeMap<String, Var> =
        tensors(&config, parts).into_iter().map(|(name, tensor)| (name, Var::from_tensor(&tensor).unwrap())).collect();
    let table: HashMap<String, Tensor> = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let med = Med::load(&config, VarBuilder::from_tensors(table, DType::F32, &Device::Cpu), parts).unwrap();
    let states = med.encode_image(&Pixels::stack(&images(3), &Device::Cpu).unwrap()).unwrap();
    let rows: Vec<u32> = (0..3 * 7).map(|i| 7 + i * 11 % 150).collect();
    let ids = Tensor::from_vec(rows, (3, 7), &Device::Cpu).unwrap();
    let grads = loss(&med, &ids, &states).backward().unwrap();
    vars.into_iter()
        .map(|(name, var)| {
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let most = grad.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            (name, most)
        })
        .collect()
}

fn assert_all_learn(gradients: &BTreeMap<String, f32>) {
    for (name, most) in gradients {
        assert!(most.is_finite(), "{name} has a gradient of {most}");
        // Softmax ignores what all keys have in common, so a key bias has no gradient but rounding.
        if !name.ends_with("key.bias") {
            assert!(*most > 1e-6, "{name} has a gradient of {most}");
        }
    }
}

/// A smooth number that every element of `x` moves.
fn mix(x: &Tensor) -> Tensor {
    let weights: Vec<f32> = (0..x.elem_count()).map(|i| ((i * 31 % 17) as f32 - 8.0) / 8.0).collect();
    let weights = Tensor::from_vec(weights, x.shape(), x.device()).unwrap();
    (x * weights).unwrap().sum_all().unwrap()
}

#[test]
fn the_language_model_teaches_every_parameter_of_a_captioner() {
    let learnt =
        gradients(Parts::CAPTIONER, |med, ids, states| mix(&med.lm_logits(ids, &ids.ones_like().unwrap(), states).unwrap()));
    assert_all_learn(&learnt);
    assert!(learnt.keys().any(|name| name.starts_with("vision_model.")));
}

#[test]
fn contrast_and_matching_teach_every_parameter_of_a_filter() {
    let learnt = gradients(Parts::FILTER, |med, ids, states| {
        let mask = ids.ones_like().unwrap();
        let texts = med.text_features(ids, &mask).unwrap();
        let itc = med.image_features(states).unwrap().matmul(&texts.t().unwrap()).unwrap();
        (mix(&itc) + mix(&med.itm_logits(ids, &mask, states).unwrap())).unwrap()
    });
    assert_all_learn(&learnt);
}

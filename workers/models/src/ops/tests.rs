//! Each operation against its composed form, value and gradient, and its independence of the number of threads.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device, Result, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::tile::Precision;
use super::{
    Activation, attention, attention_kv, attention_qkv, dense, layer_norm, linear, mlp, smoothed_cross_entropy, tile::multiplies,
};

/// Deterministic numbers in ±`spread`.
fn random(shape: &[usize], spread: f32, seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| (rng.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0) * spread).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    if a.elem_count() == 0 {
        return 0.0;
    }
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Value and gradients of `Σ weights ∘ f(inputs)` for the fused and the composed form.
fn compare(
    inputs: &[Tensor],
    tolerance: f32,
    fused: impl Fn(&[Tensor]) -> Result<Tensor>,
    composed: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let run = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let value = f(&tensors).unwrap();
        let weights = random(value.dims(), 1.0, 99);
        let grads = (&value * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let grads: Vec<Tensor> = tensors.iter().map(|t| grads.get(t).expect("a gradient").clone()).collect();
        (value.detach(), grads)
    };
    let (value, grads) = run(&fused);
    let (expected, expected_grads) = run(&composed);
    assert!(distance(&value, &expected) <= tolerance, "value differs by {}", distance(&value, &expected));
    for (index, (grad, expected)) in grads.iter().zip(&expected_grads).enumerate() {
        let difference = distance(grad, expected);
        assert!(difference <= tolerance * 4.0, "gradient of input {index} differs by {difference}");
    }
}

#[test]
fn linear_equals_its_composed_form() {
    let inputs = [random(&[3, 50, 20], 1.0, 1), random(&[33, 20], 1.0, 2), random(&[33], 1.0, 3)];
    compare(&inputs, 2e-5, |x| linear(&x[0], &x[1], Some(&x[2])), |x| x[0].broadcast_matmul(&x[1].t()?)?.broadcast_add(&x[2]));
}

#[test]
fn linear_refuses_shapes_that_do_not_fit() {
    let (x, w, b) = (random(&[2, 4], 1.0, 1), random(&[3, 5], 1.0, 2), random(&[3], 1.0, 3));
    assert!(linear(&x, &w, Some(&b)).unwrap_err().to_string().contains("input width 4"));
    let x = random(&[2, 5], 1.0, 1);
    assert!(linear(&x, &w, Some(&random(&[4], 1.0, 3))).is_err());
}

/// What a dense layer is made of, from the library's own operations.
fn plain(x: &Tensor, norm: Option<(&Tensor, &Tensor)>, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let last = x.rank() - 1;
    let x = match norm {
        Some((weight, bias)) => {
            let centred = x.broadcast_sub(&x.mean_keepdim(last)?)?;
            let variance = centred.sqr()?.mean_keepdim(last)?;
            centred.broadcast_div(&(variance + 1e-5)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)?
        }
        None => x.clone(),
    };
    x.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)
}

#[test]
fn a_dense_layer_with_all_that_goes_with_it_equals_its_composed_form() {
    if !multiplies(Precision::F32) {
        return;
    }
    // Whole and broken steps of 32 numbers, more rows than one part of a deep product has, blocks that are not full.
    for (rows, inputs, outputs) in [(70, 32, 64), (2060, 20, 33), (5, 96, 3)] {
        let inputs = [
            random(&[2, rows, inputs], 1.0, 1),
            random(&[outputs, inputs], 0.5, 2),
            random(&[outputs], 1.0, 3),
            random(&[inputs], 1.0, 4),
            random(&[inputs], 1.0, 5),
            random(&[2, rows, outputs], 1.0, 6),
        ];
        let tolerance = 4e-5 * (rows as f32 / 64.0).max(1.0);
        let norm = |x: &[Tensor]| -> (Tensor, Tensor) { (x[3].clone(), x[4].clone()) };
        for activation in [None, Some(Activation::Gelu), Some(Activation::QuickGelu), Some(Activation::TanhGelu)] {
            compare(
                &inputs,
                tolerance,
                |x| {
                    let (weight, bias) = norm(x);
                    let made = dense(&x[0], &[(&x[1], &x[2])], Some((&weight, &bias, 1e-5)), activation, Some(&x[5]))?;
                    Ok(made.expect("kernels"))
                },
                |x| {
                    let (weight, bias) = norm(x);
                    let y = plain(&x[0], Some((&weight, &bias)), &x[1], &x[2])?;
                    activation.map_or(Ok(y.clone()), |activation| activation.forward(&y))? + &x[5]
                },
            );
        }
        let two =
            |x: &[Tensor]| dense(&x[0], &[(&x[1], &x[2]), (&x[3], &x[4])], None, None, None).map(|made| made.expect("kernels"));
        let inputs = [
            inputs[0].clone(),
            inputs[1].clone(),
            inputs[2].clone(),
            random(&[7, inputs[0].dim(2).unwrap()], 1.0, 7),
            random(&[7], 1.0, 8),
        ];
        compare(&inputs, tolerance, two, |x| {
            Tensor::cat(&[plain(&x[0], None, &x[1], &x[2])?, plain(&x[0], None, &x[3], &x[4])?], 2)
        });
    }
}

#[test]
fn an_mlp_equals_its_composed_form() {
    if !multiplies(Precision::F32) {
        return;
    }
    for (rows, width, hidden) in [(150, 32, 128), (9, 20, 50)] {
        let inputs = [
            random(&[2, rows, width], 1.0, 1),
            random(&[hidden, width], 0.5, 2),
            random(&[hidden], 1.0, 3),
            random(&[width, hidden], 0.5, 4),
            random(&[width], 1.0, 5),
            random(&[width], 1.0, 6),
            random(&[width], 1.0, 7),
        ];
        for with_norm in [true, false] {
            let norm = |x: &[Tensor]| with_norm.then(|| (x[5].clone(), x[6].clone()));
            // Without a norm its weights have no part in it.
            let of = if with_norm { &inputs[..] } else { &inputs[..5] };
            compare(
                of,
                1e-4,
                |x| {
                    let norm = norm(x);
                    let norm = norm.as_ref().map(|(weight, bias)| (weight, bias, 1e-5));
                    Ok(mlp(&x[0], norm, ((&x[1], &x[2]), Activation::Gelu, (&x[3], &x[4])))?.expect("kernels"))
                },
                |x| {
                    let norm = norm(x);
                    let hidden = plain(&x[0], norm.as_ref().map(|(weight, bias)| (weight, bias)), &x[1], &x[2])?.gelu_erf()?;
                    plain(&hidden, None, &x[3], &x[4])? + &x[0]
                },
            );
        }
    }
}

#[test]
fn images_that_many_texts_ask_are_like_copies_of_them() {
    // Image 1 is asked by none, image 2 by three.
    let of: std::sync::Arc<[u32]> = [2, 0, 2, 3, 2].into();
    let inputs = [random(&[5, 12, 24], 2.0, 1), random(&[4, 19, 48], 2.0, 2)];
    compare(
        &inputs,
        1e-5,
        |x| attention_kv(&x[0], &x[1], &of, 3, 0.3),
        |x| {
            let kv = x[1].index_select(&Tensor::new(&*of, &Device::Cpu)?, 0)?;
            plain_attention(&x[0], &kv.narrow(2, 0, 24)?, &kv.narrow(2, 24, 24)?, 3, None)
        },
    );
    assert!(attention_kv(&inputs[0], &inputs[1], &[0, 1, 2, 3, 4].into(), 3, 0.3).is_err());
    assert!(attention_kv(&inputs[0], &inputs[1], &[0, 1].into(), 3, 0.3).is_err());
}

#[test]
fn layer_norm_equals_its_composed_form() {
    let inputs = [random(&[2, 70, 24], 3.0, 1), random(&[24], 1.0, 2), random(&[24], 1.0, 3)];
    compare(
        &inputs,
        2e-5,
        |x| layer_norm(&x[0], &x[1], &x[2], 1e-5),
        |x| {
            let centred = x[0].broadcast_sub(&x[0].mean_keepdim(2)?)?;
            let variance = centred.sqr()?.mean_keepdim(2)?;
            centred.broadcast_div(&(variance + 1e-5)?.sqrt()?)?.broadcast_mul(&x[1])?.broadcast_add(&x[2])
        },
    );
}

#[test]
fn the_stand_ins_for_gelu_equal_their_composed_forms() {
    let inputs = [random(&[3, 50, 7], 6.0, 1)];
    compare(&inputs, 2e-6, |x| Activation::QuickGelu.forward(&x[0]), |x| &x[0] / ((&x[0] * -1.702)?.exp()? + 1.0)?);
    let tanh = |x: &[Tensor]| {
        let inner = ((&x[0] + (x[0].powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
        (&x[0] * 0.5)? * (inner.tanh()? + 1.0)?
    };
    compare(&inputs, 4e-6, |x| Activation::TanhGelu.forward(&x[0]), tanh);
}

#[test]
fn gelu_equals_the_exact_form() {
    compare(&[random(&[7, 300], 6.0, 1)], 2e-6, |x| Activation::Gelu.forward(&x[0]), |x| x[0].gelu_erf());
}

/// Attention from whole matrices, one head at a time.
fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Option<&Tensor>) -> Result<Tensor> {
    let width = q.dim(2)? / heads;
    let outputs = (0..heads)
        .map(|head| {
            let [q, k, v] = [q, k, v].map(|x| x.narrow(2, head * width, width).and_then(|x| x.contiguous()));
            let mut scores = (q?.matmul(&k?.t()?)? * 0.3)?;
            if let Some(mask) = mask {
                scores = scores.broadcast_add(&mask.squeeze(1)?)?;
            }
            candle_nn::ops::softmax(&scores, 2)?.matmul(&v?)
        })
        .collect::<Result<Vec<_>>>()?;
    Tensor::cat(&outputs, 2)
}

#[test]
fn attention_equals_plain_matrices_with_and_without_masks() {
    let inputs = [random(&[2, 70, 24], 2.0, 1), random(&[2, 19, 24], 2.0, 2), random(&[2, 19, 24], 2.0, 3)];
    let hidden = |keep: &dyn Fn(usize, usize) -> bool| -> Vec<f32> {
        (0..2 * 19).map(|i| if keep(i / 19, i % 19) { 0.0 } else { -1e4 }).collect()
    };
    let padding = Tensor::from_vec(hidden(&|b, key| key < 19 - 5 * b), (2, 1, 1, 19), &Device::Cpu).unwrap();
    let each_query = random(&[1, 1, 70, 19], 3.0, 4);
    for mask in [None, Some(&padding), Some(&each_query)] {
        compare(
            &inputs,
            5e-6,
            |x| attention(&x[0], &x[1], &x[2], 3, 0.3, mask),
            |x| plain_attention(&x[0], &x[1], &x[2], 3, mask),
        );
    }
    // A hidden key has no influence at all.
    let value = attention(&inputs[0], &inputs[1], &inputs[2], 3, 0.3, Some(&padding)).unwrap();
    let cut = |x: &Tensor| x.narrow(0, 1, 1).unwrap().narrow(1, 0, 14).unwrap();
    let shorter = attention(&inputs[0].narrow(0, 1, 1).unwrap(), &cut(&inputs[1]), &cut(&inputs[2]), 3, 0.3, None).unwrap();
    assert_eq!(distance(&value.narrow(0, 1, 1).unwrap(), &shorter), 0.0);
}

#[test]
fn packed_attention_equals_plain_matrices() {
    compare(
        &[random(&[3, 21, 36], 2.0, 1)],
        5e-6,
        |x| attention_qkv(&x[0], 2, 0.3, None),
        |x| {
            let part = |i: usize| x[0].narrow(2, i * 12, 12);
            plain_attention(&part(0)?, &part(1)?, &part(2)?, 2, None)
        },
    );
}

#[test]
fn attention_refuses_shapes_that_do_not_fit() {
    let (q, k) = (random(&[2, 4, 12], 1.0, 1), random(&[2, 5, 12], 1.0, 2));
    assert!(attention(&q, &k, &k, 5, 1.0, None).is_err());
    assert!(attention(&q, &k, &q, 3, 1.0, None).is_err());
    assert!(attention(&q, &k, &k, 3, 1.0, Some(&random(&[2, 1, 4, 4], 1.0, 3))).is_err());
    assert!(attention_qkv(&random(&[2, 4, 13], 1.0, 1), 1, 1.0, None).is_err());
}

#[test]
fn cross_entropy_equals_its_definition() {
    let targets = vec![Some(3), None, Some(0), Some(10), None, Some(7)];
    let smoothing = 0.1;
    let kept: Vec<u32> = vec![0, 2, 3, 5];
    let ids: Vec<u32> = targets.iter().flatten().copied().collect();
    compare(
        &[random(&[6, 11], 4.0, 1)],
        2e-6,
        |x| smoothed_cross_entropy(&x[0], targets.clone(), smoothing),
        |x| {
            let device = &Device::Cpu;
            let log_p = candle_nn::ops::log_softmax(&x[0].index_select(&Tensor::new(kept.clone(), device)?, 0)?, 1)?;
            let of_target = log_p.gather(&Tensor::new(ids.clone(), device)?.unsqueeze(1)?, 1)?.mean_all()?;
            (of_target * -0.9)? - (log_p.mean_all()? * 0.1)?
        },
    );
}

#[test]
fn cross_entropy_refuses_bad_targets_and_survives_none() {
    let logits = random(&[2, 4], 1.0, 1);
    assert!(smoothed_cross_entropy(&logits, vec![Some(4), None], 0.0).is_err());
    assert!(smoothed_cross_entropy(&logits, vec![Some(1)], 0.0).is_err());
    let none = smoothed_cross_entropy(&logits, vec![None, None], 0.1).unwrap();
    assert_eq!(none.to_scalar::<f32>().unwrap(), 0.0);
}

/// Forward and backward of everything at once, on `threads` threads, as bytes.
fn chain(threads: usize) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let x = Var::from_tensor(&random(&[5, 65, 32], 1.0, 1)).unwrap();
        let w = Var::from_tensor(&random(&[96, 32], 0.3, 2)).unwrap();
        let b = Var::from_tensor(&random(&[96], 0.3, 3)).unwrap();
        let g = Var::from_tensor(&random(&[32], 1.0, 4)).unwrap();
        let shift = random(&[32], 1.0, 5);
        let (layers, norm) = ([(w.as_tensor(), b.as_tensor())], Some((g.as_tensor(), &shift, 1e-5)));
        let qkv = dense(x.as_tensor(), &layers, norm, Some(Activation::Gelu), None).unwrap();
        let qkv = qkv.unwrap_or_else(|| {
            let normed = layer_norm(x.as_tensor(), g.as_tensor(), &shift, 1e-5).unwrap();
            Activation::Gelu.forward(&linear(&normed, w.as_tensor(), Some(b.as_tensor())).unwrap()).unwrap()
        });
        let mixed = attention_qkv(&qkv, 4, 0.35, None).unwrap().reshape((5 * 65, 32)).unwrap();
        let targets = (0..325).map(|i| (i % 7 != 0).then_some(i % 32)).collect();
        let loss = smoothed_cross_entropy(&mixed, targets, 0.1).unwrap();
        let grads = loss.backward().unwrap();
        let mut bits = vec![loss.to_scalar::<f32>().unwrap().to_bits()];
        for var in [&x, &w, &b, &g] {
            let grad: Vec<f32> = grads.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            bits.extend(grad.into_iter().map(f32::to_bits));
        }
        bits
    })
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let one = chain(1);
    for threads in [2, 3, 5] {
        assert!(chain(threads) == one, "{threads} threads differ from one");
    }
}

#[test]
fn other_number_types_take_the_composed_path() {
    let to64 = |x: Tensor| x.to_dtype(DType::F64).unwrap();
    let (x, w, b) = (random(&[2, 3, 8], 1.0, 1), random(&[8, 8], 1.0, 2), random(&[8], 1.0, 3));
    let fused = [
        linear(&x, &w, Some(&b)).unwrap(),
        layer_norm(&x, &b, &b, 1e-5).unwrap(),
        Activation::Gelu.forward(&x).unwrap(),
        attention(&x, &x, &x, 2, 0.5, None).unwrap(),
        smoothed_cross_entropy(&w, vec![Some(1); 8], 0.1).unwrap(),
    ];
    let (x, w, b) = (to64(x), to64(w), to64(b));
    let composed = [
        linear(&x, &w, Some(&b)).unwrap(),
        layer_norm(&x, &b, &b, 1e-5).unwrap(),
        Activation::Gelu.forward(&x).unwrap(),
        attention(&x, &x, &x, 2, 0.5, None).unwrap(),
        smoothed_cross_entropy(&w, vec![Some(1); 8], 0.1).unwrap(),
    ];
    for (index, (fused, composed)) in fused.iter().zip(&composed).enumerate() {
        let difference = distance(&to64(fused.clone()).to_dtype(DType::F32).unwrap(), &composed.to_dtype(DType::F32).unwrap());
        assert!(difference < 5e-6, "operation {index} differs by {difference}");
    }
}

/// candle's fused layer norm and softmax have no gradient: a silent loss, if they were taken in training.
#[test]
fn other_number_types_can_be_trained() {
    for dtype in [DType::F64, DType::BF16] {
        let inputs = [random(&[2, 3, 8], 1.0, 1), random(&[8], 1.0, 2), random(&[8], 1.0, 3)];
        let [x, w, b] = inputs.map(|input| Var::from_tensor(&input.to_dtype(dtype).unwrap()).unwrap());
        let normal = layer_norm(&x, &w, &b, 1e-5).unwrap();
        let mixed = attention(&normal, &normal, &normal, 2, 0.5, None).unwrap();
        let grads = mixed.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for var in [&x, &w, &b] {
            let grad = grads.get(var).expect("a gradient").to_dtype(DType::F32).unwrap().abs().unwrap();
            assert!(grad.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap() > 1e-3, "{dtype:?}");
        }
    }
}

//! Products in tiles against the definition in f64, by every set of instructions that the machine has.

#![allow(clippy::unwrap_used)]

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::heads::{Heads, SequenceHeads, Tokens};
use super::product::{Inputs, Norm, Weights};
use super::{Instructions, Precision, has_bf16};
use crate::ops::Activation;

const PRECISIONS: [Precision; 2] = [Precision::Bf16, Precision::Bf16x3];

/// Rows, inputs, outputs: whole tiles, parts of them, fewer rows than a tile, more than a chunk.
const SIZES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (1, 40, 200), (16, 32, 64), (17, 33, 65), (70, 100, 130), (5, 768, 300), (700, 768, 96)];

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
}

/// How far a sum of products may be off, of the sum of their magnitudes.
fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::Bf16 => 2f64.powi(-7),
        Precision::Bf16x3 => 2f64.powi(-15),
    }
}

fn bare(x: &[f32]) -> Inputs<'_> {
    Inputs { x, norm: None, added: None }
}

#[test]
fn a_processor_with_instructions_is_known_to_have_them() {
    assert_eq!(has_bf16(), !Instructions::found().is_empty());
    #[cfg(target_arch = "x86_64")]
    assert_eq!(Instructions::found().contains(&Instructions::Avx512), is_x86_feature_detected!("avx512bf16"));
}

#[test]
fn products_equal_the_definition() {
    for &instructions in Instructions::found() {
        for precision in PRECISIONS {
            for (rows, inputs, outputs) in SIZES {
                let (x, weight, bias) = (random(rows * inputs, 1), random(outputs * inputs, 2), random(outputs, 3));
                let product = Weights::with(instructions, &weight, &bias, precision).product(bare(&x), None);
                assert_eq!(product.len(), rows * outputs);
                for (at, &found) in product.iter().enumerate() {
                    let (row, output) = (at / outputs, at % outputs);
                    let terms = (0..inputs).map(|i| f64::from(x[row * inputs + i]) * f64::from(weight[output * inputs + i]));
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let error = (f64::from(found) - sum - f64::from(bias[output])).abs();
                    let most = tolerance(precision) * size + 1e-6;
                    assert!(error <= most, "{instructions:?} {precision:?} {rows}x{inputs}x{outputs}: off by {error}, {size}");
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    for &instructions in Instructions::found() {
        for precision in PRECISIONS {
            for (rows, inputs, outputs) in SIZES {
                let (x, weight, bias) = (random(rows * inputs, 4), random(outputs * inputs, 5), random(outputs, 6));
                let weights = Weights::with(instructions, &weight, &bias, precision);
                let together = weights.product(bare(&x), Some(Activation::Gelu));
                for row in [0, rows / 2, rows - 1] {
                    let alone = weights.product(bare(&x[row * inputs..][..inputs]), Some(Activation::Gelu));
                    assert_eq!(alone, together[row * outputs..][..outputs], "{instructions:?} {precision:?} row {row} of {rows}");
                }
            }
        }
    }
}

#[test]
fn norm_activation_and_addition_are_those_of_their_own() {
    let (rows, inputs, outputs) = (37, 96, 80);
    let (x, weight, bias) = (random(rows * inputs, 7), random(outputs * inputs, 8), random(outputs, 9));
    let (scale, shift, added) = (random(inputs, 10), random(inputs, 11), random(rows * outputs, 12));
    for &instructions in Instructions::found() {
        let weights = Weights::with(instructions, &weight, &bias, Precision::Bf16x3);
        let norm = Norm { weight: &scale, bias: &shift, eps: 1e-5 };
        let fused = weights.product(Inputs { x: &x, norm: Some(norm), added: Some(&added) }, Some(Activation::QuickGelu));
        let mut normal = vec![0.0; x.len()];
        for (row, out) in x.chunks_exact(inputs).zip(normal.chunks_exact_mut(inputs)) {
            let mean = row.iter().sum::<f32>() / inputs as f32;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / inputs as f32;
            for (i, out) in out.iter_mut().enumerate() {
                *out = (row[i] - mean) / (variance + 1e-5).sqrt() * scale[i] + shift[i];
            }
        }
        for ((fused, plain), added) in fused.iter().zip(weights.product(bare(&normal), None)).zip(&added) {
            let expected = plain / (1.0 + (-1.702 * plain).exp()) + added;
            assert!((fused - expected).abs() < 1e-4, "{fused} instead of {expected}");
        }
    }
}

#[test]
fn an_mlp_is_its_two_layers() {
    for &instructions in Instructions::found() {
        for precision in PRECISIONS {
            for (rows, width, hidden) in [(1, 32, 64), (20, 48, 100), (300, 96, 768)] {
                let (x, added) = (random(rows * width, 13), random(rows * width, 14));
                let layer = |seed, outputs: usize, inputs: usize| {
                    Weights::with(instructions, &random(outputs * inputs, seed), &random(outputs, seed + 1), precision)
                };
                let (first, second) = (layer(15, hidden, width), layer(17, width, hidden));
                let fused = first.mlp(&second, Inputs { x: &x, norm: None, added: Some(&added) }, Activation::Gelu);
                let between = first.product(bare(&x), Some(Activation::Gelu));
                let apart = second.product(Inputs { x: &between, norm: None, added: Some(&added) }, None);
                assert_eq!(fused, apart, "{instructions:?} {precision:?} {rows} rows");
            }
        }
    }
}

#[test]
fn attention_equals_the_definition_for_few_and_many_queries() {
    for &instructions in Instructions::found() {
        for (precision, most) in [(Precision::Bf16, 2e-2), (Precision::Bf16x3, 1e-4)] {
            for (queries, keys, width) in [(1, 1, 8), (1, 577, 64), (40, 77, 24), (300, 50, 64)] {
                let heads = Heads { count: 3, width, scale: (width as f32).powf(-0.5), precision };
                let total = 3 * width;
                let (q, k, v) = (random(queries * total, 18), random(keys * total, 19), random(keys * total, 20));
                let tokens = |numbers| Tokens { numbers, stride: total };
                let sequence = SequenceHeads::with(instructions, keys, tokens(&k), tokens(&v), heads);
                let mut out = vec![f32::NAN; queries * total];
                sequence.attend(tokens(&q), heads, &mut out);
                for query in [0, queries / 2, queries - 1] {
                    let mut alone = vec![f32::NAN; total];
                    sequence.attend(tokens(&q[query * total..][..total]), heads, &mut alone);
                    assert_eq!(alone, out[query * total..][..total], "{instructions:?} query {query} of {queries}");
                    for head in 0..3 {
                        let at = |rows: &[f32], row: usize, i: usize| f64::from(rows[row * total + head * width + i]);
                        let score = |key: usize| (0..width).map(|i| at(&q, query, i) * at(&k, key, i)).sum::<f64>();
                        let weights: Vec<f64> = (0..keys).map(|key| (score(key) * f64::from(heads.scale)).exp()).collect();
                        let all: f64 = weights.iter().sum();
                        for i in 0..width {
                            let expected = (0..keys).map(|key| weights[key] / all * at(&v, key, i)).sum::<f64>();
                            let error = (at(&out, query, i) - expected).abs();
                            assert!(error < most, "{instructions:?} {precision:?} {queries}x{keys}x{width}: off by {error}");
                        }
                    }
                }
            }
        }
    }
}

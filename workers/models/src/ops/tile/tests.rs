//! Products in tiles against the definition in f64, by every set of instructions that the machine has.

#![allow(clippy::unwrap_used)]

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::absorbed::{Absorbed, States};
use super::heads::{Heads, Tokens, attend_itself};
use super::product::{Inputs, Norm, Weights};
use super::{Instructions, Precision, multiplies};
use crate::ops::Activation;

/// All that this machine can do.
fn ways() -> impl Iterator<Item = (Instructions, Precision)> {
    let of = |precision| move |&instructions: &Instructions| instructions.makes(precision).then_some((instructions, precision));
    let precisions = [Precision::Int8, Precision::Bf16, Precision::Bf16x3, Precision::F32];
    precisions.into_iter().flat_map(move |precision| Instructions::found().iter().filter_map(of(precision)))
}

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
        Precision::Int8 => 2f64.powi(-6),
        Precision::Bf16 => 2f64.powi(-7),
        Precision::Bf16x3 => 2f64.powi(-15),
        Precision::F32 => 2f64.powi(-20),
    }
}

fn bare(x: &[f32]) -> Inputs<'_> {
    Inputs { x, norm: None, added: None }
}

#[test]
fn a_processor_with_instructions_is_known_to_have_them() {
    for precision in [Precision::Int8, Precision::Bf16, Precision::Bf16x3, Precision::F32] {
        assert_eq!(multiplies(precision), ways().any(|(_, made)| made == precision));
    }
    #[cfg(target_arch = "x86_64")]
    {
        assert_eq!(multiplies(Precision::Int8), is_x86_feature_detected!("avx512vnni"));
        assert_eq!(Instructions::found().contains(&Instructions::Avx512), is_x86_feature_detected!("avx512bf16"));
        assert_eq!(ways().any(|(_, precision)| precision == Precision::F32), is_x86_feature_detected!("fma"));
    }
}

#[test]
fn products_equal_the_definition() {
    for (instructions, precision) in ways() {
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

#[test]
fn a_row_does_not_depend_on_the_others() {
    for (instructions, precision) in ways() {
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

#[test]
fn what_is_not_a_number_spoils_its_row_alone() {
    let (rows, inputs, outputs) = (20, 70, 40);
    for (instructions, precision) in ways() {
        for spoiled in [f32::NAN, f32::INFINITY] {
            let (mut x, weight) = (random(rows * inputs, 31), random(outputs * inputs, 32));
            x[7 * inputs + 50] = spoiled;
            // Neither zeros nor tiny numbers have an inverse.
            x[..inputs].fill(0.0);
            x[inputs..2 * inputs].fill(1e-40);
            let product = Weights::with(instructions, &weight, &vec![0.0; outputs], precision).product(bare(&x), None);
            for (row, numbers) in product.chunks_exact(outputs).enumerate() {
                let finite = numbers.iter().all(|x| x.is_finite());
                assert_eq!(finite, row != 7, "{instructions:?} {precision:?} row {row}: {numbers:?}");
                assert!(row > 1 || numbers.iter().all(|x| x.abs() < 1e-30), "{instructions:?} {precision:?} row {row}");
            }
        }
    }
}

#[test]
fn norm_activation_and_addition_are_those_of_their_own() {
    let (rows, inputs, outputs) = (37, 96, 80);
    let (x, weight, bias) = (random(rows * inputs, 7), random(outputs * inputs, 8), random(outputs, 9));
    let (scale, shift, added) = (random(inputs, 10), random(inputs, 11), random(rows * outputs, 12));
    for (instructions, precision) in ways().filter(|(_, precision)| !matches!(precision, Precision::Int8 | Precision::Bf16)) {
        let weights = Weights::with(instructions, &weight, &bias, precision);
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
    for (instructions, precision) in ways() {
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

/// `softmax(q · kᵀ · scale) · v` of one query and head, in f64.
fn mix(scores: &[f64], value: impl Fn(usize) -> f64) -> f64 {
    let weights: Vec<f64> = scores.iter().map(|score| score.exp()).collect();
    let all: f64 = weights.iter().sum();
    weights.iter().enumerate().map(|(key, weight)| weight / all * value(key)).sum()
}

#[test]
fn attention_of_a_sequence_to_itself_equals_the_definition() {
    for (instructions, precision) in ways() {
        let most = match precision {
            Precision::Int8 | Precision::Bf16 => 2e-2,
            Precision::Bf16x3 => 1e-4,
            Precision::F32 => 1e-5,
        };
        for (tokens, width) in [(1, 8), (16, 64), (77, 24), (300, 64)] {
            let heads = Heads { count: 3, width, scale: (width as f32).powf(-0.5), precision };
            let total = 3 * width;
            let [q, k, v] = [18, 19, 20].map(|seed| random(tokens * total, seed));
            let of = |numbers| Tokens { numbers, stride: total };
            let mut out = vec![f32::NAN; tokens * total];
            attend_itself(instructions, tokens, of(&q), (of(&k), of(&v)), heads, &mut out);
            for (query, head, i) in [(0, 0, 0), (tokens / 2, 1, width / 2), (tokens - 1, 2, width - 1)] {
                let at = |rows: &[f32], row: usize, i: usize| f64::from(rows[row * total + head * width + i]);
                let score = |key: usize| (0..width).map(|i| at(&q, query, i) * at(&k, key, i)).sum::<f64>();
                let scores: Vec<f64> = (0..tokens).map(|key| score(key) * f64::from(heads.scale)).collect();
                let error = (at(&out, query, i) - mix(&scores, |key| at(&v, key, i))).abs();
                assert!(error < most, "{instructions:?} {precision:?} {tokens} tokens of {width}: off by {error}");
            }
        }
    }
}

#[test]
fn absorbed_cross_attention_equals_the_definition_whatever_else_is_asked() {
    let (count, width, depth, images) = (3, 20, 48, 3);
    let total = count * width;
    for (instructions, precision) in ways() {
        let most = match precision {
            Precision::Int8 | Precision::Bf16 => 4e-2,
            Precision::Bf16x3 => 2e-4,
            Precision::F32 => 1e-5,
        };
        for (states_count, per_image) in [(1, 1), (50, 1), (577, 2), (40, 13)] {
            let heads = Heads { count, width, scale: (width as f32).powf(-0.5), precision };
            let half = |numbers: Vec<f32>| numbers.into_iter().map(|x| x * 0.3).collect::<Vec<f32>>();
            let (key, value) = (half(random(total * depth, 21)), half(random(total * depth, 22)));
            let (bias, q) = (random(total, 23), random(images * per_image * total, 24));
            let numbers = random(images * states_count * depth, 25);
            let absorbed = Absorbed::new(instructions, &key, &value, &bias, heads);
            let states: Vec<States> =
                numbers.chunks(states_count * depth).map(|image| States::new(image, depth, heads)).collect();
            let seen = absorbed.attend(&q, &states.iter().collect::<Vec<_>>());
            for (image, states) in states.iter().enumerate() {
                let row = image * per_image + per_image / 2;
                let alone = absorbed.attend(&q[row * total..][..total], &[states]);
                assert_eq!(alone, seen[row * total..][..total], "{instructions:?} row {row}");
                let of_image = &numbers[image * states_count * depth..][..states_count * depth];
                let project = |weight: &[f32], at: usize, state: usize| {
                    let terms = (0..depth).map(|i| f64::from(weight[at * depth + i]) * f64::from(of_image[state * depth + i]));
                    terms.sum::<f64>()
                };
                for (head, i) in [(0, 0), (2, width - 1)] {
                    let score = |state: usize| {
                        let at = |i: usize| head * width + i;
                        (0..width).map(|i| f64::from(q[row * total + at(i)]) * project(&key, at(i), state)).sum::<f64>()
                    };
                    let scores: Vec<f64> = (0..states_count).map(|state| score(state) * f64::from(heads.scale)).collect();
                    let at = head * width + i;
                    let expected = mix(&scores, |state| project(&value, at, state)) + f64::from(bias[at]);
                    let error = (f64::from(seen[row * total + at]) - expected).abs();
                    assert!(error < most, "{instructions:?} {precision:?} {states_count} states: off by {error}");
                }
            }
        }
    }
}

//! Functions of numbers that products in tiles make or take: to about 1e-7, with fused operations and without division. Processors with the
//! instructions for such products have fast fused ones too.

use super::super::activation::Activation;
use super::layout::{DEPTH, Tiles};

/// `e^x`, of numbers below -87 that of -87, of those above 80 that of 80.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 80.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // Taylor series to r^6: its remainder is below 2e-7 relative for |r| ≤ 0.347.
    let series = (1.0f32 / 720.0).mul_add(r, 1.0 / 120.0).mul_add(r, 1.0 / 24.0).mul_add(r, 1.0 / 6.0);
    let series = series.mul_add(r, 0.5).mul_add(r, 1.0).mul_add(r, 1.0);
    // 2^n through the exponent bits: the low bits of `shifted` hold n.
    series * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// `1 / x` of a number from 1 to 2^120.
#[inline(always)]
fn reciprocal(x: f32) -> f32 {
    // The bits of the exponent negated, right to 12 %; each step of Newton's squares the error.
    let mut y = f32::from_bits(0x7ef3_11c7_u32.wrapping_sub(x.to_bits()));
    for _ in 0..3 {
        y = y.mul_add((-x).mul_add(y, 1.0), y);
    }
    y
}

/// The normal distribution function by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7, and `e^(−x²/2)`.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let magnitude = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = reciprocal(magnitude.mul_add(0.327_591_1, 1.0));
    let series = 1.061_405_4f32.mul_add(t, -1.453_152_1).mul_add(t, 1.421_413_8).mul_add(t, -0.284_496_72);
    let series = series.mul_add(t, 0.254_829_6) * t;
    let bell = exp(-magnitude * magnitude);
    let tail = 0.5 * series * bell;
    (if x < 0.0 { tail } else { 1.0 - tail }, bell)
}

/// `g(x) = 2 √(2/π) (x + 0.044715 x³)`, without the bracket: (1 + tanh y) / 2 = σ(2 y).
const TANH_FACTOR: f32 = 2.0 * 0.797_884_6;

/// `x · σ(factor)`.
#[inline(always)]
fn gated(x: f32, factor: f32) -> f32 {
    x * reciprocal(1.0 + exp(-factor))
}

/// The activation of some numbers, in place.
#[inline(always)]
pub(super) fn activate(activation: Activation, numbers: &mut [f32; DEPTH]) {
    // Loops all through: what takes a closure is not always inlined, and then knows nothing of the processor.
    match activation {
        Activation::Gelu => {
            for x in numbers {
                *x *= normal(*x).0;
            }
        }
        Activation::QuickGelu => {
            for x in numbers {
                *x = gated(*x, 1.702 * *x);
            }
        }
        Activation::TanhGelu => {
            for x in numbers {
                *x = gated(*x, TANH_FACTOR * *x * (0.044_715 * *x).mul_add(*x, 1.0));
            }
        }
        Activation::Relu6 => {
            for x in numbers {
                *x = x.clamp(0.0, 6.0);
            }
        }
    }
}

/// [`activate`], and the derivative at each number.
#[inline(always)]
pub(crate) fn activate_with_slope(activation: Activation, numbers: &mut [f32], slopes: &mut [f32]) {
    /// `x · σ(g)`, and its derivative with that of `g`.
    #[inline(always)]
    fn gated(x: f32, (g, g_slope): (f32, f32)) -> (f32, f32) {
        let open = reciprocal(1.0 + exp(-g));
        (x * open, open * (x * (1.0 - open)).mul_add(g_slope, 1.0))
    }
    match activation {
        Activation::Gelu => {
            const DENSITY: f32 = 0.398_942_3; // 1 / √(2π)
            for (x, slope) in numbers.iter_mut().zip(slopes) {
                let (cumulative, bell) = normal(*x);
                *slope = (*x * DENSITY).mul_add(bell, cumulative);
                *x *= cumulative;
            }
        }
        Activation::QuickGelu => {
            for (x, slope) in numbers.iter_mut().zip(slopes) {
                (*x, *slope) = gated(*x, (1.702 * *x, 1.702));
            }
        }
        Activation::TanhGelu => {
            for (x, slope) in numbers.iter_mut().zip(slopes) {
                let square = *x * *x;
                let g = (TANH_FACTOR * *x * 0.044_715f32.mul_add(square, 1.0), TANH_FACTOR * 0.134_145f32.mul_add(square, 1.0));
                (*x, *slope) = gated(*x, g);
            }
        }
        Activation::Relu6 => {
            for (x, slope) in numbers.iter_mut().zip(slopes) {
                *slope = if *x > 0.0 && *x < 6.0 { 1.0 } else { 0.0 };
                *x = x.clamp(0.0, 6.0);
            }
        }
    }
}

/// Writes the exponentials of a row's first `count` scores, less the largest, into row `row` of a left side, and returns the inverse of their
/// sum. The scores go on to whole steps; those behind `count` are overwritten.
#[inline(always)]
pub(super) fn softmax_row(scores: &mut [f32], count: usize, probabilities: &mut Tiles, row: usize) -> f32 {
    let end = count.next_multiple_of(DEPTH);
    scores[count..end].fill(f32::NEG_INFINITY);
    let parts = scores[..end].as_chunks::<DEPTH>().0;
    let mut largest = [f32::NEG_INFINITY; DEPTH];
    for part in parts {
        for (largest, &score) in largest.iter_mut().zip(part) {
            *largest = if score > *largest { score } else { *largest };
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let mut sums = [0.0; DEPTH];
    for (step, part) in parts.iter().enumerate() {
        let mut numbers = *part;
        for (number, sum) in numbers.iter_mut().zip(&mut sums) {
            *number = exp(*number - largest);
            *sum += *number;
        }
        probabilities.write_step(row, step, &numbers);
    }
    // In a fixed order that vectorises.
    let mut width = DEPTH / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    1.0 / sums[0]
}

#[cfg(test)]
mod tests {
    use super::super::super::activation::Activation;
    use super::*;

    #[test]
    fn functions_are_right_to_seven_digits() {
        for i in -20_000..20_000 {
            let x = i as f32 / 1000.0;
            let right = f64::from(x).exp();
            assert!((f64::from(exp(x)) / right - 1.0).abs() < 5e-7, "e^{x}");
            let above = x.abs() * 1e6 + 1.0;
            assert!((reciprocal(above) * above - 1.0).abs() < 3e-7, "1 / {above}");
            for activation in [Activation::Gelu, Activation::QuickGelu, Activation::TanhGelu, Activation::Relu6] {
                let right = f64::from(activation.at(x).0);
                let mut numbers = [x; DEPTH];
                activate(activation, &mut numbers);
                assert!(
                    (f64::from(numbers[3]) - right).abs() < 1e-6 * right.abs().max(1.0),
                    "{activation:?}({x}): {}",
                    numbers[3]
                );
                let (mut value, mut slope) = ([x], [0.0]);
                activate_with_slope(activation, &mut value, &mut slope);
                let (right, right_slope) = activation.at(x);
                let near = |got: f32, right: f32| (got - right).abs() < 2e-6 * right.abs().max(1.0);
                assert!(near(value[0], right) && near(slope[0], right_slope), "{activation:?}({x}): {value:?} {slope:?}");
            }
        }
        assert_eq!(exp(f32::NEG_INFINITY), exp(-87.0));
        let mut numbers = [f32::NAN; DEPTH];
        activate(Activation::Gelu, &mut numbers);
        assert!(numbers[0].is_nan());
    }
}

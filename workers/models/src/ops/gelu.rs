//! The Gaussian error linear unit in its exact form (Hendrycks and Gimpel 2016, arXiv 1606.08415).

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::kernel::{RowKernel, exp, for_row_blocks};
use super::{on_cpu, output, slice, tensor_like, with_slices};

/// Elements that one "row" of the element-wise loops holds.
const STRIP: usize = 64;

/// `x · Φ(x)` with Φ the normal distribution function, element by element.
///
/// # Errors
///
/// Only those of the tensor library.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if on_cpu(&[x]) { x.contiguous()?.apply_op1(Gelu) } else { x.gelu_erf() }
}

/// `(Φ(x), e^(−x²/2))`. Φ by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    let magnitude = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * magnitude);
    let series = ((((1.061_405_4 * t - 1.453_152_1) * t + 1.421_413_8) * t - 0.284_496_72) * t + 0.254_829_6) * t;
    let density = exp(-magnitude * magnitude);
    let tail = 0.5 * series * density;
    (if x < 0.0 { tail } else { 1.0 - tail }, density)
}

/// `x · Φ(x)` of one number.
#[inline(always)]
pub(super) fn gelu_of(x: f32) -> f32 {
    x * normal(x).0
}

struct Forward<'a>(&'a [f32]);

impl RowKernel for Forward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(&self.0[first * STRIP..]) {
            *out = gelu_of(*x);
        }
    }
}

struct Backward<'a> {
    xs: &'a [f32],
    grads: &'a [f32],
}

impl RowKernel for Backward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        // d/dx x Φ(x) = Φ(x) + x φ(x), φ(x) = e^(−x²/2) / √(2π).
        const DENSITY: f32 = 0.398_942_3;
        let start = first * STRIP;
        for ((out, x), grad) in out.iter_mut().zip(&self.xs[start..]).zip(&self.grads[start..]) {
            let (cumulative, density) = normal(*x);
            *out = grad * (cumulative + x * DENSITY * density);
        }
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut out = vec![0.0; x.len()];
        for_row_blocks(&mut out, STRIP, &Forward(x));
        Ok(output(out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        with_slices(&[x, &grad], |slices| {
            let (xs, grads) = (slices[0], slices[1]);
            let mut out = vec![0.0; xs.len()];
            for_row_blocks(&mut out, STRIP, &Backward { xs, grads });
            Ok(Some(tensor_like(out, x)?))
        })
    }
}

//! The activations of an MLP (Hendrycks and Gimpel 2016, arXiv 1606.08415): the exact GELU and its two cheap stand-ins, both `x · σ(g(x))`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use serde::{Deserialize, Serialize};

use super::kernel::{RowKernel, exp, for_row_blocks, unwritten};
use super::{on_cpu, output, slice, tensor_like, with_slices};

/// The activation of an MLP, by its name in transformers (`hidden_act`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x · Φ(x)` with Φ the normal distribution function.
    #[serde(rename = "gelu")]
    Gelu,
    /// `x · σ(1.702 x)`, of OpenAI's CLIP.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// `½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, of SigLIP.
    #[serde(rename = "gelu_pytorch_tanh")]
    TanhGelu,
    /// `x` between 0 and 6, of EfficientNet-Lite.
    #[serde(rename = "relu6")]
    Relu6,
}

impl Activation {
    /// Element by element.
    ///
    /// # Errors
    /// The tensor library failed.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        if on_cpu(&[x]) {
            return x.contiguous()?.apply_op1(self);
        }
        match self {
            Self::Gelu => x.gelu_erf(),
            Self::QuickGelu => x * candle_nn::ops::sigmoid(&(x * f64::from(SLOPE))?)?,
            Self::TanhGelu => x.gelu(),
            Self::Relu6 => x.clamp(0f32, 6f32),
        }
    }

    /// The activation of one number, and its derivative.
    #[inline(always)]
    pub(super) fn at(self, x: f32) -> (f32, f32) {
        // g(x) and g′(x)
        let (gate, slope) = match self {
            Self::Gelu => {
                let (cumulative, density) = normal(x);
                return (x * cumulative, cumulative + x * density);
            }
            Self::QuickGelu => (SLOPE * x, SLOPE),
            Self::Relu6 => return (x.clamp(0.0, 6.0), if x > 0.0 && x < 6.0 { 1.0 } else { 0.0 }),
            Self::TanhGelu => (TANH_SLOPE * x * (1.0 + CUBIC * x * x), TANH_SLOPE * (1.0 + 3.0 * CUBIC * x * x)),
        };
        let open = 1.0 / (1.0 + exp(-gate));
        (x * open, open * (1.0 + x * (1.0 - open) * slope))
    }
}

/// `g(x) = 1.702 x`.
const SLOPE: f32 = 1.702;

/// `g(x) = 2 √(2/π) (x + 0.044715 x³)`: ½ (1 + tanh u) is σ(2 u).
const CUBIC: f32 = 0.044_715;
const TANH_SLOPE: f32 = 1.595_769;

/// `Φ(x)`, by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7, and its derivative.
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const DENSITY: f32 = 0.398_942_3; // 1 / √(2π)
    let magnitude = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * magnitude);
    let series = ((((1.061_405_4 * t - 1.453_152_1) * t + 1.421_413_8) * t - 0.284_496_72) * t + 0.254_829_6) * t;
    let bell = exp(-magnitude * magnitude);
    let tail = 0.5 * series * bell;
    (if x < 0.0 { tail } else { 1.0 - tail }, DENSITY * bell)
}

/// Elements that one "row" of the element-wise loops holds.
const STRIP: usize = 64;

struct Forward<'a>(Activation, &'a [f32]);

impl RowKernel for Forward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(&self.1[first * STRIP..]) {
            *out = self.0.at(*x).0;
        }
    }
}

struct Backward<'a>(Activation, &'a [f32], &'a [f32]);

impl RowKernel for Backward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        let start = first * STRIP;
        for ((out, x), grad) in out.iter_mut().zip(&self.1[start..]).zip(&self.2[start..]) {
            *out = grad * self.0.at(*x).1;
        }
    }
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut out = unwritten(x.len());
        for_row_blocks(&mut out, STRIP, &Forward(*self, x));
        Ok(output(out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        with_slices(&[x, &grad], |slices| {
            let mut out = unwritten(slices[0].len());
            for_row_blocks(&mut out, STRIP, &Backward(*self, slices[0], slices[1]));
            Ok(Some(tensor_like(out, x)?))
        })
    }
}

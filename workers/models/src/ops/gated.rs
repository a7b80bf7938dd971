//! The two cheap stand-ins for the exact GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2). Both are `x · σ(g(x))`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::kernel::{RowKernel, exp, for_row_blocks};
use super::{on_cpu, output, slice, tensor_like, with_slices};

/// Elements that one "row" of the element-wise loops holds.
const STRIP: usize = 64;

/// `g(x) = 1.702 x` of the sigmoid form.
const SLOPE: f32 = 1.702;

/// `g(x) = 2 √(2/π) (x + 0.044715 x³)`: ½ (1 + tanh u) is σ(2 u).
const CUBIC: f32 = 0.044_715;
const TANH_SLOPE: f32 = 1.595_769;

/// `x · σ(1.702 x)`, element by element: `quick_gelu` of OpenAI's CLIP.
///
/// # Errors
///
/// Only those of the tensor library.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    if on_cpu(&[x]) {
        return x.contiguous()?.apply_op1(Gated(Gate::Linear));
    }
    x * candle_nn::ops::sigmoid(&(x * f64::from(SLOPE))?)?
}

/// `½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, element by element: `gelu_pytorch_tanh`.
///
/// # Errors
///
/// Only those of the tensor library.
pub fn tanh_gelu(x: &Tensor) -> Result<Tensor> {
    if on_cpu(&[x]) { x.contiguous()?.apply_op1(Gated(Gate::Cubic)) } else { x.gelu() }
}

/// The function inside the sigmoid.
#[derive(Clone, Copy)]
enum Gate {
    Linear,
    Cubic,
}

impl Gate {
    /// `σ(g(x))` and `g′(x)`.
    #[inline(always)]
    fn at(self, x: f32) -> (f32, f32) {
        let (gate, slope) = match self {
            Self::Linear => (SLOPE * x, SLOPE),
            Self::Cubic => (TANH_SLOPE * x * (1.0 + CUBIC * x * x), TANH_SLOPE * (1.0 + 3.0 * CUBIC * x * x)),
        };
        (1.0 / (1.0 + exp(-gate)), slope)
    }
}

struct Forward<'a>(Gate, &'a [f32]);

impl RowKernel for Forward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(&self.1[first * STRIP..]) {
            *out = x * self.0.at(*x).0;
        }
    }
}

struct Backward<'a> {
    gate: Gate,
    xs: &'a [f32],
    grads: &'a [f32],
}

impl RowKernel for Backward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        // d/dx x σ(g) = σ(g) (1 + x (1 − σ(g)) g′)
        let start = first * STRIP;
        for ((out, x), grad) in out.iter_mut().zip(&self.xs[start..]).zip(&self.grads[start..]) {
            let (open, slope) = self.gate.at(*x);
            *out = grad * open * (1.0 + x * (1.0 - open) * slope);
        }
    }
}

struct Gated(Gate);

impl CustomOp1 for Gated {
    fn name(&self) -> &'static str {
        "gated gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut out = vec![0.0; x.len()];
        for_row_blocks(&mut out, STRIP, &Forward(self.0, x));
        Ok(output(out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        with_slices(&[x, &grad], |slices| {
            let mut out = vec![0.0; slices[0].len()];
            for_row_blocks(&mut out, STRIP, &Backward { gate: self.0, xs: slices[0], grads: slices[1] });
            Ok(Some(tensor_like(out, x)?))
        })
    }
}

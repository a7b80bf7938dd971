//! Layer normalisation over the last dimension (Ba et al. 2016, arXiv 1607.06450).

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};

use super::kernel::{RowKernel, RowSum, for_row_blocks, sum, sum_over_rows, unwritten};
use super::{on_cpu, output, slice, tensor_like, wide, with_slices};

/// `(x − mean) / √(variance + eps) · weight + bias` over the last dimension; `weight` and `bias` have its size.
///
/// # Errors
///
/// Shapes that do not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if weight.dims() != [width] || bias.dims() != [width] {
        candle_core::bail!("layer norm: weight {:?} and bias {:?} do not fit width {width}", weight.dims(), bias.dims());
    }
    if on_cpu(&[x, weight, bias]) {
        return x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { eps: eps as f32 });
    }
    // Sums in f32 too. It has no gradient, and no f64.
    if ![x, weight, bias].iter().any(|tensor| tensor.track_op()) && x.dtype() != DType::F64 {
        return candle_nn::ops::layer_norm(&x.contiguous()?, &weight.contiguous()?, &bias.contiguous()?, eps as f32);
    }
    let rows = x.to_dtype(wide(x.dtype()))?;
    let centred = rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(x.dtype())?;
    normal.broadcast_mul(weight)?.broadcast_add(bias)
}

struct LayerNorm {
    eps: f32,
}

/// Mean and reciprocal standard deviation of one row.
#[inline(always)]
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let scale = 1.0 / row.len() as f32;
    let mean = sum(row.len(), |i| row[i]) * scale;
    let variance = sum(row.len(), |i| (row[i] - mean) * (row[i] - mean)) * scale;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// One row.
#[inline(always)]
pub(super) fn normalize(row: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let (mean, inverse) = moments(row, eps);
    for (((out, x), weight), bias) in out.iter_mut().zip(row).zip(weight).zip(bias) {
        *out = (x - mean) * inverse * weight + bias;
    }
}

struct Forward<'a> {
    eps: f32,
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
}

impl RowKernel for Forward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        let width = self.weight.len();
        for (row, out) in self.x[first * width..].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            normalize(row, self.weight, self.bias, self.eps, out);
        }
    }
}

struct Backward<'a> {
    eps: f32,
    x: &'a [f32],
    weight: &'a [f32],
    grad: &'a [f32],
    /// Added to the gradient of `x`.
    added: Option<&'a [f32]>,
}

impl<'a> Backward<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> (&'a [f32], &'a [f32]) {
        let width = self.weight.len();
        (&self.x[row * width..][..width], &self.grad[row * width..][..width])
    }
}

/// The gradient of `x`.
impl RowKernel for Backward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        let weight = self.weight;
        let width = weight.len();
        let scale = 1.0 / width as f32;
        for (offset, out) in out.chunks_exact_mut(width).enumerate() {
            let (row, grad) = self.row(first + offset);
            let (mean, inverse) = moments(row, self.eps);
            let mean_grad = sum(width, |i| grad[i] * weight[i]) * scale;
            let mean_projection = sum(width, |i| grad[i] * weight[i] * (row[i] - mean)) * inverse * scale;
            for (((out, x), grad), weight) in out.iter_mut().zip(row).zip(grad).zip(weight) {
                let normalised = (x - mean) * inverse;
                *out = inverse * (grad * weight - mean_grad - normalised * mean_projection);
            }
            if let Some(added) = self.added {
                for (out, added) in out.iter_mut().zip(&added[(first + offset) * width..]) {
                    *out += added;
                }
            }
        }
    }
}

/// The gradients of weight and bias, side by side.
impl RowSum for Backward<'_> {
    #[inline(always)]
    fn add(&self, row: usize, sums: &mut [f32]) {
        let (row, grad) = self.row(row);
        let (mean, inverse) = moments(row, self.eps);
        let (for_weight, for_bias) = sums.split_at_mut(row.len());
        for (((for_weight, for_bias), x), grad) in for_weight.iter_mut().zip(for_bias).zip(row).zip(grad) {
            *for_weight += grad * (x - mean) * inverse;
            *for_bias += grad;
        }
    }
}

/// The rows of `x`, normalised.
pub(super) fn normal(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let mut out = unwritten(x.len());
    for_row_blocks(&mut out, weight.len(), &Forward { eps, x, weight, bias });
    out
}

/// The gradients of `x`, with `added` added, and of weight and bias, behind each other, from that of the normal rows.
pub(super) fn gradients(x: &[f32], weight: &[f32], eps: f32, grad: &[f32], added: Option<&[f32]>) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let backward = Backward { eps, x, weight, grad, added };
    let mut for_x = unwritten(x.len());
    for_row_blocks(&mut for_x, width, &backward);
    // One pass gives both parameter gradients: weights first, biases after them.
    (for_x, sum_over_rows(x.len() / width.max(1), 2 * width, &backward))
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (slice(x, x_layout)?, slice(weight, weight_layout)?, slice(bias, bias_layout)?);
        Ok(output(normal(x, weight, bias, self.eps), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        with_slices(&[x, weight, &grad], |slices| {
            let (for_x, mut both) = gradients(slices[0], slices[1], self.eps, slices[2], None);
            let for_bias = both.split_off(slices[1].len());
            Ok((Some(tensor_like(for_x, x)?), Some(tensor_like(both, weight)?), Some(tensor_like(for_bias, bias)?)))
        })
    }
}

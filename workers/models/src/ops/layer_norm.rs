//! Layer normalisation over the last dimension (Ba et al. 2016, arXiv 1607.06450).

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};

use super::kernel::{for_row_blocks, sum, sum_over_rows};
use super::{on_cpu, output, slice, tensor_like, with_slices};

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
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

struct LayerNorm {
    eps: f32,
}

impl LayerNorm {
    /// Mean and reciprocal standard deviation of one row.
    #[inline(always)]
    fn moments(&self, row: &[f32]) -> (f32, f32) {
        let scale = 1.0 / row.len() as f32;
        let mean = sum(row.len(), |i| row[i]) * scale;
        let variance = sum(row.len(), |i| (row[i] - mean) * (row[i] - mean)) * scale;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }
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
        let width = weight.len();
        let mut out = vec![0.0; x.len()];
        for_row_blocks(&mut out, width, |first, block| {
            for (row, out) in x[first * width..].chunks_exact(width).zip(block.chunks_exact_mut(width)) {
                let (mean, inverse) = self.moments(row);
                for i in 0..width {
                    out[i] = (row[i] - mean) * inverse * weight[i] + bias[i];
                }
            }
        });
        Ok(output(out, x_layout.shape().clone()))
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
            let (xs, weights, grads) = (slices[0], slices[1], slices[2]);
            let width = weights.len();
            let rows = xs.len() / width.max(1);
            let mut for_x = vec![0.0; xs.len()];
            for_row_blocks(&mut for_x, width, |first, block| {
                for (index, out) in block.chunks_exact_mut(width).enumerate() {
                    let start = (first + index) * width;
                    let (row, grad) = (&xs[start..start + width], &grads[start..start + width]);
                    let (mean, inverse) = self.moments(row);
                    let scale = 1.0 / width as f32;
                    let mean_grad = sum(width, |i| grad[i] * weights[i]) * scale;
                    let mean_projection = sum(width, |i| grad[i] * weights[i] * (row[i] - mean)) * inverse * scale;
                    for i in 0..width {
                        let normalised = (row[i] - mean) * inverse;
                        out[i] = inverse * (grad[i] * weights[i] - mean_grad - normalised * mean_projection);
                    }
                }
            });
            // One pass gives both parameter gradients: weights first, biases after them.
            let mut both = sum_over_rows(rows, 2 * width, |row, sums| {
                let (row, grad) = (&xs[row * width..(row + 1) * width], &grads[row * width..(row + 1) * width]);
                let (mean, inverse) = self.moments(row);
                let (for_weight, for_bias) = sums.split_at_mut(width);
                for i in 0..width {
                    for_weight[i] += grad[i] * (row[i] - mean) * inverse;
                    for_bias[i] += grad[i];
                }
            });
            let for_bias = both.split_off(width);
            Ok((Some(tensor_like(for_x, x)?), Some(tensor_like(both, weight)?), Some(tensor_like(for_bias, bias)?)))
        })
    }
}

//! Affine maps.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};

use super::kernel::{RowKernel, RowSum, for_row_blocks, sum_over_rows};
use super::{on_cpu, output, slice, with_slices};

/// `x · weightᵀ + bias`: `x` is `(…, in)`, `weight` `(out, in)`, `bias` `(out)`, the result `(…, out)`.
///
/// # Errors
///
/// Shapes that do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let (outputs, inputs) = weight.dims2()?;
    if width != inputs {
        candle_core::bail!("linear: input width {width} does not fit weight ({outputs}, {inputs})");
    }
    if let Some(bias) = bias
        && on_cpu(&[x, weight, bias])
    {
        if bias.dims() != [outputs] {
            candle_core::bail!("linear: bias {:?} does not fit weight ({outputs}, {inputs})", bias.dims());
        }
        return x.contiguous()?.apply_op3(weight, &bias.contiguous()?, Linear);
    }
    let rows = x.elem_count() / width.max(1);
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let product = x.reshape((rows, width))?.matmul(&weight.t()?)?.reshape(shape)?;
    match bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}

/// Adds the bias to every row.
struct AddBias<'a>(&'a [f32]);

impl RowKernel for AddBias<'_> {
    #[inline(always)]
    fn rows(&self, _first: usize, out: &mut [f32]) {
        for row in out.chunks_exact_mut(self.0.len()) {
            for (value, bias) in row.iter_mut().zip(self.0) {
                *value += bias;
            }
        }
    }
}

/// Sums each column.
struct ColumnSums<'a> {
    elements: &'a [f32],
    width: usize,
}

impl RowSum for ColumnSums<'_> {
    #[inline(always)]
    fn add(&self, row: usize, sums: &mut [f32]) {
        for (sum, value) in sums.iter_mut().zip(&self.elements[row * self.width..]) {
            *sum += value;
        }
    }
}

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        let (outputs, inputs) = weight_layout.shape().dims2()?;
        let rows = x_layout.shape().elem_count() / inputs.max(1);
        let x_rows = Layout::contiguous_with_offset((rows, inputs), x_layout.start_offset());
        let product = x.matmul(weight, (1, rows, outputs, inputs), &x_rows, &weight_layout.transpose(0, 1)?)?;
        let CpuStorage::F32(mut product) = product else {
            candle_core::bail!("linear: product of f32 matrices is not f32");
        };
        let bias = slice(bias, bias_layout)?;
        for_row_blocks(&mut product, outputs, &AddBias(bias));
        let mut shape = x_layout.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        Ok(output(product, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let rows = x.elem_count() / inputs.max(1);
        let grad = grad.contiguous()?.reshape((rows, outputs))?;
        let for_x = x.track_op().then(|| grad.matmul(weight)?.reshape(x.shape())).transpose()?;
        let for_weight = weight.track_op().then(|| grad.t()?.matmul(&x.reshape((rows, inputs))?)).transpose()?;
        let for_bias = bias
            .track_op()
            .then(|| {
                with_slices(&[&grad], |slices| {
                    let sums = sum_over_rows(rows, outputs, &ColumnSums { elements: slices[0], width: outputs });
                    Tensor::from_vec(sums, outputs, grad.device())
                })
            })
            .transpose()?;
        Ok((for_x, for_weight, for_bias))
    }
}

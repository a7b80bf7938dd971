//! Affine maps.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor};

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::kernel::{BLOCK_ROWS, Left, RowKernel, RowSum, for_row_blocks, small_matmul, sum_over_rows, unwritten, vectorized};
use super::{on_cpu, output, slice, with_slices};

/// Elements of a weight up to which a product with it is made here. It then stays in a core's cache, where these loops are as fast as
/// the library's product, which looks up the number of cores in `/proc/cpuinfo` at every call (0.1 ms: as much as such a product takes).
const SMALL_WEIGHT: usize = 1 << 18;

/// Elements of a result up to which the library sums in another order.
const SMALL_PRODUCT: usize = 256;

/// `x · weightᵀ + bias`: `x` is `(…, in)`, `weight` `(out, in)`, `bias` `(out)`, the result `(…, out)`.
///
/// On the CPU, with a weight that is stored column by column, a row of the result is bit for bit the same whatever other rows `x` has.
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

/// `x · weight + bias` in blocks of rows, `weight` of shape `(in, out)`.
fn small_product(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let outputs = bias.len().max(1);
    let inputs = (weight.len() / outputs).max(1);
    let mut out = unwritten(x.len() / inputs * outputs);
    out.par_chunks_mut(BLOCK_ROWS * outputs)
        .zip(x.par_chunks(BLOCK_ROWS * inputs))
        .for_each(|(out, x)| vectorized(Product { x, weight, bias, out }));
    out
}

/// A block of rows of a product.
struct Product<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, weight, bias, out } = self;
        let outputs = bias.len();
        let (rows, inputs) = (out.len() / outputs, weight.len() / outputs);
        small_matmul(simd, (rows, outputs, inputs), Left::ByRow(x, inputs), (weight, outputs), (&mut *out, outputs));
        AddBias(bias).rows(0, out);
    }
}

/// Sums each column.
pub(super) struct ColumnSums<'a> {
    pub(super) elements: &'a [f32],
    pub(super) width: usize,
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
        let bias = slice(bias, bias_layout)?;
        let by_column = weight_layout.transpose(0, 1)?;
        let product = if by_column.is_contiguous() && inputs * outputs <= SMALL_WEIGHT {
            small_product(slice(x, x_layout)?, slice(weight, &by_column)?, bias)
        } else {
            let x_rows = Layout::contiguous_with_offset((rows, inputs), x_layout.start_offset());
            let floor = if by_column.is_contiguous() { (SMALL_PRODUCT / outputs.max(1) + 1).max(2) } else { 0 };
            let product = if rows < floor {
                let mut padded = slice(x, x_layout)?.to_vec();
                padded.resize(floor * inputs, 0.0);
                let sizes = (1, floor, outputs, inputs);
                CpuStorage::F32(padded).matmul(weight, sizes, &Layout::contiguous((floor, inputs)), &by_column)?
            } else {
                x.matmul(weight, (1, rows, outputs, inputs), &x_rows, &by_column)?
            };
            let CpuStorage::F32(mut product) = product else {
                candle_core::bail!("linear: product of f32 matrices is not f32");
            };
            product.truncate(rows * outputs);
            for_row_blocks(&mut product, outputs, &AddBias(bias));
            product
        };
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
        let for_x = x.track_op().then(|| grad.matmul(&weight.contiguous()?)?.reshape(x.shape())).transpose()?;
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

//! Depthwise convolutions of frozen models, over images that lie channels last.

use candle_core::{Result, Tensor};

use super::kernel::{RowKernel, for_row_blocks, unwritten};
use super::{on_cpu, with_slices};

/// The least and the largest output of `ReLU6`.
const SIX: (f32, f32) = (0.0, 6.0);

/// Zeros before and behind `size` numbers so that a window whose stride is `stride` makes `⌈size / stride⌉` outputs of them: `SAME` of TensorFlow,
/// where an odd zero comes behind.
pub(crate) fn same_padding(size: usize, window: usize, stride: usize) -> (usize, usize) {
    let zeros = ((size.div_ceil(stride) - 1) * stride + window).saturating_sub(size);
    (zeros / 2, zeros - zeros / 2)
}

/// `relu6(conv(x) + bias)`: `x` `(b, h, w, c)`, `kernel` `(window, window, c)`, `bias` `(c)`, padded as [`same_padding`] says. It has no gradient.
///
/// # Errors
/// Shapes do not fit.
pub(crate) fn depthwise_relu6(x: &Tensor, kernel: &Tensor, bias: &Tensor, stride: usize) -> Result<Tensor> {
    let (b, height, width, channels) = x.dims4()?;
    let window = kernel.dim(0)?;
    if kernel.dims() != [window, window, channels] || bias.dims() != [channels] {
        candle_core::bail!("depthwise: kernel {:?} and bias {:?} do not fit {channels} channels", kernel.dims(), bias.dims());
    }
    if on_cpu(&[x, kernel, bias]) {
        let (x, kernel, bias) = (x.contiguous()?, kernel.contiguous()?, bias.contiguous()?);
        let (rows, columns) = (height.div_ceil(stride), width.div_ceil(stride));
        let made = with_slices(&[&x, &kernel, &bias], |slices| {
            let mut out = unwritten(b * rows * columns * channels);
            let before = (same_padding(height, window, stride).0, same_padding(width, window, stride).0);
            let kernel = Depthwise {
                x: slices[0],
                kernel: slices[1],
                bias: slices[2],
                size: (height, width),
                made: (rows, columns),
                before,
                window,
                stride,
            };
            for_row_blocks(&mut out, channels, &kernel);
            Ok(out)
        })?;
        return Tensor::from_vec(made, (b, rows, columns, channels), x.device());
    }
    let mut sum =
        bias.reshape((1, 1, 1, channels))?.broadcast_as((b, height.div_ceil(stride), width.div_ceil(stride), channels))?;
    for (place, part) in windows(x, window, stride)?.into_iter().enumerate() {
        let weight = kernel.get(place / window)?.get(place % window)?;
        sum = (sum + part.broadcast_mul(&weight)?)?;
    }
    sum.clamp(SIX.0, SIX.1)
}

/// For each place of a window, row by row, what lies there: `window²` tensors `(b, ⌈h / stride⌉, ⌈w / stride⌉, c)` of `(b, h, w, c)`.
///
/// # Errors
/// The tensor library failed.
pub(crate) fn windows(x: &Tensor, window: usize, stride: usize) -> Result<Vec<Tensor>> {
    let mut x = x.clone();
    for dimension in [1, 2] {
        let (before, behind) = same_padding(x.dim(dimension)?, window, stride);
        // More than what windows need behind, so that steps can be cut off in whole strides.
        x = x.pad_with_zeros(dimension, before, behind + stride)?;
    }
    let (rows, columns) = ((x.dim(1)? - window) / stride, (x.dim(2)? - window) / stride);
    let every = |x: &Tensor, dimension: usize, first: usize, count: usize| {
        let mut cut = x.dims().to_vec();
        cut[dimension] = count;
        cut.insert(dimension + 1, stride);
        x.narrow(dimension, first, count * stride)?.reshape(cut)?.narrow(dimension + 1, 0, 1)?.squeeze(dimension + 1)
    };
    let mut parts = Vec::with_capacity(window * window);
    for row in 0..window {
        let of_row = every(&x, 1, row, rows)?;
        for column in 0..window {
            parts.push(every(&of_row, 2, column, columns)?);
        }
    }
    Ok(parts)
}

struct Depthwise<'a> {
    x: &'a [f32],
    kernel: &'a [f32],
    bias: &'a [f32],
    /// Height and width of `x`, and of what is made of it.
    size: (usize, usize),
    made: (usize, usize),
    /// Zeros above and on the left.
    before: (usize, usize),
    window: usize,
    stride: usize,
}

impl RowKernel for Depthwise<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        let channels = self.bias.len();
        let ((height, width), (rows, columns)) = (self.size, self.made);
        for (number, pixel) in out.chunks_exact_mut(channels).enumerate() {
            let place = first + number;
            let (image, top, left) =
                (place / (rows * columns), place / columns % rows * self.stride, place % columns * self.stride);
            pixel.copy_from_slice(self.bias);
            for row in 0..self.window {
                let y = (top + row).wrapping_sub(self.before.0);
                if y >= height {
                    continue;
                }
                for column in 0..self.window {
                    let x = (left + column).wrapping_sub(self.before.1);
                    if x >= width {
                        continue;
                    }
                    let seen = &self.x[((image * height + y) * width + x) * channels..][..channels];
                    let weights = &self.kernel[(row * self.window + column) * channels..][..channels];
                    for ((sum, seen), weight) in pixel.iter_mut().zip(seen).zip(weights) {
                        *sum += seen * weight;
                    }
                }
            }
            for sum in pixel {
                *sum = sum.max(SIX.0).min(SIX.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn the_loops_and_the_tensor_librarys_operations_agree() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 2.0, shape, &Device::Cpu).unwrap();
        for (height, width, window, stride) in [(7, 6, 3, 1), (7, 6, 3, 2), (8, 5, 5, 2), (2, 2, 5, 1), (1, 1, 3, 2)] {
            let (x, kernel, bias) = (random(&[2, height, width, 20]), random(&[window, window, 20]), random(&[20]));
            let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
            let by_loops = depthwise_relu6(&x, &kernel, &bias, stride).unwrap();
            let by_tensors = depthwise_relu6(&wide(&x), &wide(&kernel), &wide(&bias), stride).unwrap();
            assert_eq!(by_loops.dims(), [2, height.div_ceil(stride), width.div_ceil(stride), 20]);
            let apart = (wide(&by_loops) - by_tensors).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(apart < 1e-4, "{height} {width} {window} {stride}: {apart}");
        }
    }
}

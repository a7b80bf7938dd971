//! Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567).

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::kernel::{RowKernel, exp, for_row_blocks, sum, vectorized};
use super::{on_cpu, output, slice, tensor_like, with_slices};

/// Mean over the rows of `logits` `(n, classes)` that have a target of
/// `(1 − smoothing) · (−log p[target]) + smoothing · mean over classes of (−log p)`; a scalar.
///
/// `targets[i] = None` leaves row `i` out, of the mean too. Without any target the loss is 0.
///
/// # Errors
///
/// A target that is no class, or a number of targets that is not the number of rows.
pub fn smoothed_cross_entropy(logits: &Tensor, targets: Vec<Option<u32>>, smoothing: f32) -> Result<Tensor> {
    let (rows, classes) = logits.dims2()?;
    if targets.len() != rows {
        candle_core::bail!("cross-entropy: {} targets for {rows} rows", targets.len());
    }
    if let Some(bad) = targets.iter().flatten().find(|&&target| target as usize >= classes) {
        candle_core::bail!("cross-entropy: target {bad} is not one of {classes} classes");
    }
    let count = targets.iter().flatten().count().max(1) as f32;
    if on_cpu(&[logits]) {
        return logits.contiguous()?.apply_op1(CrossEntropy { targets: targets.into(), smoothing, count });
    }
    let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    let weights: Vec<f32> = targets.iter().map(|t| f32::from(u8::from(t.is_some())) / count).collect();
    let ids: Vec<u32> = targets.iter().map(|t| t.unwrap_or(0)).collect();
    let weights = Tensor::from_vec(weights, rows, logits.device())?.to_dtype(logits.dtype())?;
    let ids = Tensor::from_vec(ids, (rows, 1), logits.device())?;
    let of_target = log_p.gather(&ids, D::Minus1)?.squeeze(1)?;
    let spread = log_p.mean(D::Minus1)?;
    let rows_loss = ((of_target * f64::from(smoothing - 1.0))? - (spread * f64::from(smoothing))?)?;
    (rows_loss * weights)?.sum_all()
}

struct CrossEntropy {
    targets: Arc<[Option<u32>]>,
    smoothing: f32,
    count: f32,
}

/// Largest logit, and the logarithm of the sum of the exponentials above it.
#[inline(always)]
fn log_sum_exp(row: &[f32]) -> (f32, f32) {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    (max, sum(row.len(), |i| exp(row[i] - max)).ln())
}

struct RowLoss<'a> {
    row: &'a [f32],
    target: usize,
    smoothing: f32,
}

impl NullaryFnOnce for RowLoss<'_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let Self { row, target, smoothing } = self;
        let (max, log_sum) = log_sum_exp(row);
        let normaliser = max + log_sum;
        let mean = sum(row.len(), |i| row[i] - normaliser) / row.len() as f32;
        -f64::from((1.0 - smoothing) * (row[target] - normaliser) + smoothing * mean)
    }
}

struct Backward<'a> {
    op: &'a CrossEntropy,
    logits: &'a [f32],
    classes: usize,
    scale: f32,
}

impl RowKernel for Backward<'_> {
    #[inline(always)]
    fn rows(&self, first: usize, out: &mut [f32]) {
        let smoothing = self.op.smoothing;
        let even = smoothing / self.classes as f32;
        for (offset, out) in out.chunks_exact_mut(self.classes).enumerate() {
            let Some(target) = self.op.targets[first + offset] else { continue };
            let row = &self.logits[(first + offset) * self.classes..][..self.classes];
            let (max, log_sum) = log_sum_exp(row);
            for (out, x) in out.iter_mut().zip(row) {
                *out = self.scale * (exp(x - max - log_sum) - even);
            }
            out[target as usize] -= self.scale * (1.0 - smoothing);
        }
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "smoothed-cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, classes) = layout.shape().dims2()?;
        let logits = slice(logits, layout)?;
        let losses: Vec<f64> = logits
            .par_chunks_exact(classes)
            .zip(&*self.targets)
            .map(|(row, target)| match *target {
                Some(target) => vectorized(RowLoss { row, target: target as usize, smoothing: self.smoothing }),
                None => 0.0,
            })
            .collect();
        let total: f64 = losses.iter().sum();
        Ok(output(vec![(total / f64::from(self.count)) as f32], ()))
    }

    fn bwd(&self, logits: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, classes) = logits.dims2()?;
        let scale = grad.to_scalar::<f32>()? / self.count;
        with_slices(&[logits], |slices| {
            let mut out = vec![0.0; slices[0].len()];
            for_row_blocks(&mut out, classes, &Backward { op: self, logits: slices[0], classes, scale });
            Ok(Some(tensor_like(out, logits)?))
        })
    }
}

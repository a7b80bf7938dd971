//! Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567).

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::kernel::{exp, for_row_blocks, sum, vectorized};
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
            .map(|(row, target)| {
                let Some(target) = *target else { return 0.0 };
                vectorized(|| {
                    let (max, log_sum) = log_sum_exp(row);
                    let normaliser = max + log_sum;
                    let mean = sum(classes, |i| row[i] - normaliser) / classes as f32;
                    let of_target = row[target as usize] - normaliser;
                    -f64::from((1.0 - self.smoothing) * of_target + self.smoothing * mean)
                })
            })
            .collect();
        let total: f64 = losses.iter().sum();
        Ok(output(vec![(total / f64::from(self.count)) as f32], ()))
    }

    fn bwd(&self, logits: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, classes) = logits.dims2()?;
        let scale = grad.to_scalar::<f32>()? / self.count;
        let even = self.smoothing / classes as f32;
        with_slices(&[logits], |slices| {
            let mut out = vec![0.0; slices[0].len()];
            for_row_blocks(&mut out, classes, |first, block| {
                for (index, out) in block.chunks_exact_mut(classes).enumerate() {
                    let Some(target) = self.targets[first + index] else { continue };
                    let row = &slices[0][(first + index) * classes..][..classes];
                    let (max, log_sum) = log_sum_exp(row);
                    for (out, x) in out.iter_mut().zip(row) {
                        *out = scale * (exp(x - max - log_sum) - even);
                    }
                    out[target as usize] -= scale * (1.0 - self.smoothing);
                }
            });
            Ok(Some(tensor_like(out, logits)?))
        })
    }
}

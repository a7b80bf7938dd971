//! Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762).
//!
//! Heads are read and written in place inside `(batch, tokens, heads · width)`, so nothing is transposed or copied, and the
//! probabilities are never kept: the backward pass computes them again.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::kernel::{BLOCK_ROWS, Left, exp, max, small_matmul, sum, unwritten, vectorized};
use super::{on_cpu, output, slice, tensor_like, wide, with_slices};

/// Numbers added to the scores before the softmax, `(batch or 1, 1, queries or 1, keys)`.
#[derive(Clone)]
struct Mask {
    values: Arc<[f32]>,
    /// Distance between batches; 0 where all batches share the mask.
    batch: usize,
    /// Distance between queries; 0 where all queries share the mask.
    query: usize,
}

impl Mask {
    fn new(mask: &Tensor) -> Result<Self> {
        let (b, _, q, k) = mask.dims4()?;
        let values: Vec<f32> = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(Self { values: values.into(), batch: if b == 1 { 0 } else { q * k }, query: if q == 1 { 0 } else { k } })
    }
}

/// `softmax(q · kᵀ · scale) · v` for each head: `q` `(b, queries, heads · width)`, `k` and `v` `(b, keys, heads · width)`, the result
/// shaped like `q`. `mask` is added to the scores before the softmax: `(b or 1, 1, queries or 1, keys)`, 0 where a key may be seen and a
/// large negative number where not.
///
/// # Errors
///
/// Shapes that do not fit each other, the number of heads or the mask.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    let (batch, queries, total) = q.dims3()?;
    let keys = k.dim(1)?;
    let shape = Heads::new((batch, queries, keys, total), heads, scale, mask)?;
    if k.dims() != [batch, keys, total] || v.dims() != k.dims() {
        candle_core::bail!("attention: q {:?}, k {:?}, v {:?} do not fit", q.dims(), k.dims(), v.dims());
    }
    if on_cpu(&[q, k, v]) {
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention(shape.with(mask)?));
    }
    composed(q, &split_heads(k, heads)?, &split_heads(v, heads)?, &shape, mask)
}

/// [`attention`] without a mask, keys and values by [`split_heads`]: for those that are asked many times on a device without a kernel here.
pub(crate) fn attention_split(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    let (batch, queries, total) = q.dims3()?;
    let (_, heads, keys, _) = k.dims4()?;
    let shape = Heads::new((batch, queries, keys, total), heads, scale, None)?;
    composed(q, k, v, &shape, None)
}

/// `(batch, tokens, heads · width)` to `(batch, heads, tokens, width)`, each head's rows side by side.
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, total) = x.dims3()?;
    x.reshape((batch, tokens, heads, total / heads))?.transpose(1, 2)?.contiguous()
}

/// [`attention`] of a sequence to itself, from queries, keys and values side by side: `qkv` is `(b, tokens, 3 · heads · width)`, the
/// result `(b, tokens, heads · width)`.
///
/// # Errors
///
/// As [`attention`].
pub fn attention_qkv(qkv: &Tensor, heads: usize, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    let (batch, tokens, triple) = qkv.dims3()?;
    if triple % 3 != 0 {
        candle_core::bail!("attention: width {triple} does not hold queries, keys and values");
    }
    let total = triple / 3;
    let shape = Heads::new((batch, tokens, tokens, total), heads, scale, mask)?;
    if on_cpu(&[qkv]) {
        return qkv.contiguous()?.apply_op1(QkvAttention(shape.with(mask)?));
    }
    let part = |index: usize| qkv.narrow(D::Minus1, index * total, total);
    composed(&part(0)?, &split_heads(&part(1)?, heads)?, &split_heads(&part(2)?, heads)?, &shape, mask)
}

/// [`attention`] without a mask to keys and values side by side, `kv` `(images, keys, 2 · heads · width)`: batch `i` of the queries asks image
/// `of[i]`. In main memory, in f32.
///
/// # Errors
/// Shapes that do not fit, or an image that is not there.
pub(crate) fn attention_kv(q: &Tensor, kv: &Tensor, of: &Arc<[u32]>, heads: usize, scale: f64) -> Result<Tensor> {
    let (batch, queries, total) = q.dims3()?;
    let (images, keys, double) = kv.dims3()?;
    if double != 2 * total || of.len() != batch || of.iter().any(|&image| image as usize >= images) {
        candle_core::bail!("attention: q {:?} and kv {:?} with {} choices do not fit", q.dims(), kv.dims(), of.len());
    }
    let heads = Heads::new((batch, queries, keys, total), heads, scale, None)?;
    q.contiguous()?.apply_op2(&kv.contiguous()?, KvAttention(heads, Arc::clone(of)))
}

/// Attention from the tensor library's own operations, for devices without a kernel here; `k` and `v` by [`split_heads`].
fn composed(q: &Tensor, k: &Tensor, v: &Tensor, shape: &Heads, mask: Option<&Tensor>) -> Result<Tensor> {
    // There are fewer queries than scores.
    let q = split_heads(&(q * f64::from(shape.scale))?, shape.heads)?;
    let scores = q.matmul(&k.t()?)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?,
        None => scores,
    };
    let weights = match scores.track_op() {
        true => candle_nn::ops::softmax(&scores.to_dtype(wide(scores.dtype()))?, D::Minus1)?.to_dtype(scores.dtype())?,
        // Sums in f32 too, and has no gradient.
        false => candle_nn::ops::softmax_last_dim(&scores)?,
    };
    weights.matmul(v)?.transpose(1, 2)?.reshape((shape.batch, shape.queries, shape.total()))
}

/// Sizes of one attention.
#[derive(Clone)]
struct Heads {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    width: usize,
    scale: f32,
    mask: Option<Mask>,
}

/// Queries, keys or values: rows of stride `row`, batches of stride `batch`, all heads of a token in a row.
#[derive(Clone, Copy)]
struct Rows<'a> {
    elements: &'a [f32],
    row: usize,
    batch: usize,
    /// Which batch of the elements stands for each batch, if not the one of its number.
    of: Option<&'a [u32]>,
}

impl<'a> Rows<'a> {
    fn whole(elements: &'a [f32], tokens: usize, total: usize) -> Self {
        Self { elements, row: total, batch: tokens * total, of: None }
    }

    #[inline(always)]
    fn head(&self, batch: usize, head: usize, width: usize) -> &'a [f32] {
        let batch = self.of.map_or(batch, |of| of[batch] as usize);
        &self.elements[batch * self.batch + head * width..]
    }
}

/// Where a gradient goes within one batch: which buffer, the offset of its first element, and the stride of its rows.
type Target = (usize, usize, usize);

impl Heads {
    fn new(
        (batch, queries, keys, total): (usize, usize, usize, usize),
        heads: usize,
        scale: f64,
        mask: Option<&Tensor>,
    ) -> Result<Self> {
        if heads == 0 || total % heads != 0 {
            candle_core::bail!("attention: width {total} does not split into {heads} heads");
        }
        if let Some(mask) = mask {
            let (b, h, q, k) = mask.dims4()?;
            if (b != batch && b != 1) || h != 1 || (q != queries && q != 1) || k != keys {
                candle_core::bail!("attention: mask {:?} for {batch} batches of {queries} queries and {keys} keys", mask.dims());
            }
        }
        Ok(Self { batch, queries, keys, heads, width: total / heads, scale: scale as f32, mask: None })
    }

    /// With the numbers of a mask, which are read from its device.
    fn with(self, mask: Option<&Tensor>) -> Result<Self> {
        Ok(Self { mask: mask.map(Mask::new).transpose()?, ..self })
    }

    fn total(&self) -> usize {
        self.heads * self.width
    }

    /// Writes `(width, keys)`, the transpose of one head's rows.
    #[inline(always)]
    fn transpose(&self, rows: &[f32], stride: usize, out: &mut [f32]) {
        for key in 0..self.keys {
            let row = &rows[key * stride..][..self.width];
            for (column, value) in row.iter().enumerate() {
                out[column * self.keys + key] = *value;
            }
        }
    }

    /// Writes the attention probabilities `(count, keys)` of the queries `first..first + count` of one head.
    #[inline(always)]
    fn probabilities<S: Simd>(
        &self,
        simd: S,
        batch: usize,
        (first, count): (usize, usize),
        queries: Left<'_>,
        keys_transposed: &[f32],
        out: &mut [f32],
    ) {
        small_matmul(simd, (count, self.keys, self.width), queries, (keys_transposed, self.keys), (out, self.keys));
        for (offset, row) in out.chunks_exact_mut(self.keys).take(count).enumerate() {
            match &self.mask {
                Some(mask) => {
                    let added = &mask.values[batch * mask.batch + (first + offset) * mask.query..];
                    for (score, added) in row.iter_mut().zip(added) {
                        *score = *score * self.scale + added;
                    }
                }
                None => {
                    for score in row.iter_mut() {
                        *score *= self.scale;
                    }
                }
            }
            let largest = max(row);
            for score in row.iter_mut() {
                *score = exp(*score - largest);
            }
            let inverse = 1.0 / sum(row.len(), |i| row[i]);
            for score in row.iter_mut() {
                *score *= inverse;
            }
        }
    }

    fn forward(&self, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>) -> Vec<f32> {
        let total = self.total();
        let mut out = unwritten(self.batch * self.queries * total);
        out.par_chunks_mut((self.queries * total).max(1)).enumerate().for_each(|(batch, of_batch)| {
            of_batch.par_chunks_mut(BLOCK_ROWS * total).enumerate().for_each(|(block, out)| {
                let keys = &mut unwritten(self.width * self.keys);
                let weights = &mut unwritten(out.len() / total * self.keys);
                vectorized(Forward { heads: self, rows: [q, k, v], batch, first: block * BLOCK_ROWS, keys, weights, out });
            });
        });
        out
    }

    /// Gradients of one batch's queries, keys and values, from the gradient `grad` of the result.
    fn backward(&self, batch: usize, rows: [Rows<'_>; 3], grad: Rows<'_>, targets: [Target; 3], buffers: &mut [&mut [f32]]) {
        let transposed = &mut unwritten(self.width * self.keys);
        let weights = &mut unwritten(self.queries * self.keys);
        let scores = &mut unwritten(self.queries * self.keys);
        vectorized(Backward { heads: self, rows, batch, grad, transposed, weights, scores, targets, buffers });
    }
}

/// A block of queries against all keys, all heads.
struct Forward<'a> {
    heads: &'a Heads,
    rows: [Rows<'a>; 3],
    batch: usize,
    /// First query of the block.
    first: usize,
    /// Room for one head's keys, transposed.
    keys: &'a mut [f32],
    /// Room for one head's probabilities.
    weights: &'a mut [f32],
    out: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { heads, rows: [q, k, v], batch, first, keys, weights, out } = self;
        let (total, width) = (heads.total(), heads.width);
        let count = out.len() / total;
        for head in 0..heads.heads {
            heads.transpose(k.head(batch, head, width), k.row, keys);
            let queries = Left::ByRow(&q.head(batch, head, width)[first * q.row..], q.row);
            heads.probabilities(simd, batch, (first, count), queries, keys, weights);
            let values = (v.head(batch, head, width), v.row);
            small_matmul(
                simd,
                (count, width, heads.keys),
                Left::ByRow(weights, heads.keys),
                values,
                (&mut out[head * width..], total),
            );
        }
    }
}

/// Gradients of one batch, all heads.
struct Backward<'a, 'b> {
    heads: &'a Heads,
    rows: [Rows<'a>; 3],
    batch: usize,
    grad: Rows<'a>,
    /// Room for one head's keys or values, transposed.
    transposed: &'a mut [f32],
    /// Room for one head's probabilities.
    weights: &'a mut [f32],
    /// Room for their gradient.
    scores: &'a mut [f32],
    targets: [Target; 3],
    buffers: &'a mut [&'b mut [f32]],
}

impl WithSimd for Backward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { heads, rows: [q, k, v], batch, grad, transposed, weights, scores, targets, buffers } = self;
        let (queries, keys, width) = (heads.queries, heads.keys, heads.width);
        for head in 0..heads.heads {
            let [q_head, k_head, v_head, grad_head] = [q, k, v, grad].map(|rows| rows.head(batch, head, width));
            heads.transpose(k_head, k.row, transposed);
            heads.probabilities(simd, batch, (0, queries), Left::ByRow(q_head, q.row), transposed, weights);
            heads.transpose(v_head, v.row, transposed);
            small_matmul(simd, (queries, keys, width), Left::ByRow(grad_head, grad.row), (transposed, keys), (scores, keys));
            // Through the softmax: dS = P ∘ (dP − Σ P ∘ dP), and through the scale.
            for (dp, p) in scores.chunks_exact_mut(keys).zip(weights.chunks_exact(keys)) {
                let mean = sum(keys, |i| dp[i] * p[i]);
                for (dp, p) in dp.iter_mut().zip(p) {
                    *dp = p * (*dp - mean) * heads.scale;
                }
            }
            let [for_q, for_k, for_v] = targets.map(|(buffer, offset, row)| (buffer, offset + head * width, row));
            let out = &mut buffers[for_q.0][for_q.1..];
            small_matmul(simd, (queries, width, keys), Left::ByRow(scores, keys), (k_head, k.row), (out, for_q.2));
            let out = &mut buffers[for_k.0][for_k.1..];
            small_matmul(simd, (keys, width, queries), Left::ByColumn(scores, keys), (q_head, q.row), (out, for_k.2));
            let out = &mut buffers[for_v.0][for_v.1..];
            small_matmul(simd, (keys, width, queries), Left::ByColumn(weights, keys), (grad_head, grad.row), (out, for_v.2));
        }
    }
}

struct Attention(Heads);

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let heads = &self.0;
        let total = heads.total();
        let out = heads.forward(
            Rows::whole(slice(q, q_layout)?, heads.queries, total),
            Rows::whole(slice(k, k_layout)?, heads.keys, total),
            Rows::whole(slice(v, v_layout)?, heads.keys, total),
        );
        Ok(output(out, q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let heads = &self.0;
        let total = heads.total();
        let grad = grad.contiguous()?;
        with_slices(&[q, k, v, &grad], |slices| {
            let [q_rows, grad_rows] = [slices[0], slices[3]].map(|x| Rows::whole(x, heads.queries, total));
            let [k_rows, v_rows] = [slices[1], slices[2]].map(|x| Rows::whole(x, heads.keys, total));
            let mut for_q = unwritten(slices[0].len());
            let mut for_k = unwritten(slices[1].len());
            let mut for_v = unwritten(slices[2].len());
            for_q
                .par_chunks_mut((heads.queries * total).max(1))
                .zip(for_k.par_chunks_mut((heads.keys * total).max(1)))
                .zip(for_v.par_chunks_mut((heads.keys * total).max(1)))
                .enumerate()
                .for_each(|(batch, ((for_q, for_k), for_v))| {
                    let targets = [(0, 0, total), (1, 0, total), (2, 0, total)];
                    heads.backward(batch, [q_rows, k_rows, v_rows], grad_rows, targets, &mut [for_q, for_k, for_v]);
                });
            Ok((Some(tensor_like(for_q, q)?), Some(tensor_like(for_k, k)?), Some(tensor_like(for_v, v)?)))
        })
    }
}

struct KvAttention(Heads, Arc<[u32]>);

impl KvAttention {
    /// Queries, keys and values.
    fn parts<'a>(&'a self, q: &'a [f32], kv: &'a [f32]) -> [Rows<'a>; 3] {
        let Self(heads, of) = self;
        let total = heads.total();
        let side = |elements| Rows { elements, row: 2 * total, batch: 2 * total * heads.keys, of: Some(of) };
        [Rows::whole(q, heads.queries, total), side(kv), side(&kv[total.min(kv.len())..])]
    }
}

impl CustomOp2 for KvAttention {
    fn name(&self) -> &'static str {
        "cross-attention"
    }

    fn cpu_fwd(&self, q: &CpuStorage, q_at: &Layout, kv: &CpuStorage, kv_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let [q, k, v] = self.parts(slice(q, q_at)?, slice(kv, kv_at)?);
        Ok(output(self.0.forward(q, k, v), q_at.shape().clone()))
    }

    fn bwd(&self, q: &Tensor, kv: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Self(heads, of) = self;
        let total = heads.total();
        let grad = grad.contiguous()?;
        with_slices(&[q, kv, &grad], |slices| {
            let rows = self.parts(slices[0], slices[1]);
            let grad_rows = Rows::whole(slices[2], heads.queries, total);
            let mut for_q = unwritten(slices[0].len());
            let mut for_kv = vec![0.0; slices[1].len()];
            // An image's gradient is the sum over those that ask it, one after the other.
            let images = for_kv.par_chunks_mut((2 * heads.keys * total).max(1));
            let mut asked: Vec<Vec<(usize, &mut [f32])>> = (0..images.len()).map(|_| Vec::new()).collect();
            for (batch, for_q) in for_q.chunks_mut((heads.queries * total).max(1)).enumerate() {
                asked[of[batch] as usize].push((batch, for_q));
            }
            images.zip(asked).for_each(|(for_kv, queries)| {
                let mut one = unwritten(if queries.is_empty() { 0 } else { for_kv.len() });
                for (batch, for_q) in queries {
                    let targets = [(0, 0, total), (1, 0, 2 * total), (1, total, 2 * total)];
                    heads.backward(batch, rows, grad_rows, targets, &mut [for_q, &mut one]);
                    for (sum, one) in for_kv.iter_mut().zip(&one) {
                        *sum += one;
                    }
                }
            });
            Ok((Some(tensor_like(for_q, q)?), Some(tensor_like(for_kv, kv)?)))
        })
    }
}

struct QkvAttention(Heads);

impl QkvAttention {
    fn parts<'a>(&self, qkv: &'a [f32]) -> [Rows<'a>; 3] {
        let total = self.0.total();
        [0, 1, 2].map(|part| Rows {
            elements: &qkv[(part * total).min(qkv.len())..],
            row: 3 * total,
            batch: 3 * total * self.0.queries,
            of: None,
        })
    }
}

impl CustomOp1 for QkvAttention {
    fn name(&self) -> &'static str {
        "packed-attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let [q, k, v] = self.parts(slice(qkv, layout)?);
        let shape = (self.0.batch, self.0.queries, self.0.total());
        Ok(output(self.0.forward(q, k, v), shape))
    }

    fn bwd(&self, qkv: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let heads = &self.0;
        let total = heads.total();
        let grad = grad.contiguous()?;
        with_slices(&[qkv, &grad], |slices| {
            let parts = self.parts(slices[0]);
            let grad_rows = Rows::whole(slices[1], heads.queries, total);
            let mut out = unwritten(slices[0].len());
            out.par_chunks_mut((3 * total * heads.queries).max(1)).enumerate().for_each(|(batch, out)| {
                let targets = [0, 1, 2].map(|part| (0, part * total, 3 * total));
                heads.backward(batch, parts, grad_rows, targets, &mut [out]);
            });
            Ok(Some(tensor_like(out, qkv)?))
        })
    }
}

//! The few layers that every transformer here is made of.
//!
//! Each layer has one `forward` for training and inference. candle's fused layer norm and softmax have no backward pass and
//! lose the gradient without a word, so they run only where no gradient is tracked; otherwise composed operations do the work.
//!
//! On the CPU, the row of a batch comes out bit for bit the same whatever other rows the batch has: see [`Linear::forward`].

use candle_core::{D, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Spread of freshly initialised weights (BLIP and BERT: normal, 0.02).
const INIT_STD: f64 = 0.02;

/// Initialisation of weights and embeddings.
pub(crate) const INIT_WEIGHT: Init = Init::Randn { mean: 0.0, stdev: INIT_STD };

/// A dense layer `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// From a weight `(out, in)` and a bias `(out)`.
    #[must_use]
    pub fn new(weight: Tensor, bias: Tensor) -> Self {
        Self { weight, bias }
    }

    /// Reads `weight` `(outputs, inputs)` and `bias` `(outputs)`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(inputs: usize, outputs: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints((outputs, inputs), "weight", INIT_WEIGHT)?,
            bias: vb.get_with_hints(outputs, "bias", Init::Const(0.0))?,
        })
    }

    /// `(.., in)` to `(.., out)`.
    ///
    /// The CPU matrix product sums in another order when the result has at most 256 elements or a single row. Such products are
    /// padded with zero rows to just above that, so that a row never depends on how many others came with it.
    ///
    /// # Errors
    /// The last dimension of `x` is not the input width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        const SMALL_PRODUCT: usize = 256;
        let (outputs, inputs) = self.weight.dims2()?;
        let rows = x.elem_count() / inputs;
        let flat = x.reshape((rows, inputs))?;
        let floor = (SMALL_PRODUCT / outputs + 1).max(2);
        let weight = self.weight.t()?;
        let fixed = !tracks(&[x, &self.weight]) && x.device().is_cpu();
        let y = if fixed && rows < floor {
            flat.pad_with_zeros(0, 0, floor - rows)?.matmul(&weight)?.narrow(0, 0, rows)?
        } else {
            flat.matmul(&weight)?
        };
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        y.broadcast_add(&self.bias)?.reshape(shape)
    }
}

/// Layer normalisation over the last dimension, with weight and bias.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, both `(size)`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(size, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(size, "bias", Init::Const(0.0))?,
            eps,
        })
    }

    /// `(.., size)` to the same shape.
    ///
    /// # Errors
    /// The last dimension of `x` is not `size`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !tracks(&[x, &self.weight]) {
            return candle_nn::ops::layer_norm(&x.contiguous()?, &self.weight, &self.bias, self.eps as f32);
        }
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        centred.broadcast_div(&(variance + self.eps)?.sqrt()?)?.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}

/// A table of vectors.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// Reads `weight` `(rows, width)`.
    ///
    /// # Errors
    /// The tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(rows: usize, width: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self { weight: vb.get_with_hints((rows, width), "weight", INIT_WEIGHT)? })
    }

    /// The table `(rows, width)`.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Ids `(..)` (u32) to vectors `(.., width)`.
    ///
    /// # Errors
    /// An id is outside the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut shape = ids.dims().to_vec();
        shape.push(self.weight.dim(1)?);
        self.weight.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
    }
}

/// Softmax over the last dimension, with a gradient where one is tracked.
///
/// # Errors
/// The tensor library failed.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if !tracks(&[x]) {
        return candle_nn::ops::softmax_last_dim(&x.contiguous()?);
    }
    // Softmax does not change when all inputs shift, so the maximum needs no gradient.
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
    let weights = shifted.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
}

/// `(b, n, heads·w)` to `(b, heads, n, w)`.
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, width) = x.dims3()?;
    heads_first(&x.reshape((b, n, heads, width / heads))?)
}

/// `(b, n, heads, w)` to `(b, heads, n, w)`, copied only where the matrix product cannot read it in place.
pub(crate) fn heads_first(x: &Tensor) -> Result<Tensor> {
    let swapped = x.transpose(1, 2)?;
    // One image has one batch stride, which the product takes as it is; more need a copy.
    if swapped.dim(0)? == 1 && swapped.device().is_cpu() { Ok(swapped) } else { swapped.contiguous() }
}

/// Scaled dot-product attention: `softmax(q kᵀ / √w + mask) v`.
///
/// `q` `(b, h, n, w)`, `k` and `v` `(b, h, m, w)`, `mask` additive and broadcastable to `(b, h, n, m)`; returns `(b, n, h·w)`.
///
/// # Errors
/// The shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let (b, h, n, w) = q.dims4()?;
    let scores = (q * (w as f64).powf(-0.5))?.matmul(&k.transpose(2, 3)?)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    softmax(&scores)?.matmul(v)?.transpose(1, 2)?.reshape((b, n, h * w))
}

/// True if a gradient is tracked through any of these.
fn tracks(tensors: &[&Tensor]) -> bool {
    tensors.iter().any(|tensor| tensor.track_op())
}

/// The rows divided by their Euclidean length: `(.., w)` to the same shape.
///
/// # Errors
/// The tensor library failed.
pub fn l2_normalize(x: &Tensor) -> Result<Tensor> {
    // torch.nn.functional.normalize: the length is never taken below 1e-12.
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&(length + 1e-12)?)
}

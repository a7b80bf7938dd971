//! The operations as they are called with tensors: f32 in and out, without a gradient.

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::super::activation::Activation;
use super::super::with_slices;
use super::heads::{Heads, SequenceHeads, Tokens};
use super::layout::Precision;
use super::product::Weights;

/// The weight and bias of a layer that is not trained, in tiles. Cheap to clone.
#[derive(Clone)]
pub(crate) struct PackedLinear(Arc<Weights>);

impl std::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedLinear({} x {})", self.0.outputs(), self.0.inputs())
    }
}

impl PackedLinear {
    /// From a weight `(out, in)` and a bias `(out)` in main memory. `None` where the processor has no instructions for it.
    pub(crate) fn new(weight: &Tensor, bias: &Tensor, precision: Precision) -> Result<Option<Self>> {
        let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
        let weights = with_slices(&[&weight, &bias], |slices| Ok(Weights::new(slices[0], slices[1], precision)))?;
        Ok(weights.map(|weights| Self(Arc::new(weights))))
    }

    /// `activation(x · weightᵀ + bias) + added`: `(…, in)` to `(…, out)`. A row does not depend on the others.
    pub(crate) fn forward(&self, x: &Tensor, activation: Option<Activation>, added: Option<&Tensor>) -> Result<Tensor> {
        let (inputs, outputs) = (self.0.inputs(), self.0.outputs());
        if x.dim(D::Minus1)? != inputs {
            candle_core::bail!("linear: input {:?} does not fit weight ({outputs}, {inputs})", x.dims());
        }
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        let x = x.contiguous()?;
        let product = match added {
            Some(added) if added.dims() != shape => {
                candle_core::bail!("linear: {:?} cannot be added to {shape:?}", added.dims())
            }
            Some(added) => {
                let added = added.contiguous()?;
                with_slices(&[&x, &added], |slices| Ok(self.0.product(slices[0], activation, Some(slices[1]))))?
            }
            None => with_slices(&[&x], |slices| Ok(self.0.product(slices[0], activation, None)))?,
        };
        Tensor::from_vec(product, shape, x.device())
    }
}

/// Keys and values of several sequences, in tiles. Cheap to clone.
#[derive(Clone)]
pub(crate) struct PackedKeysValues {
    sequences: Vec<Arc<SequenceHeads>>,
    heads: Heads,
}

impl std::fmt::Debug for PackedKeysValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedKeysValues({} sequences, {:?})", self.sequences.len(), self.heads)
    }
}

impl PackedKeysValues {
    /// From keys and values `(b, keys, heads · width)`. `None` where the processor has no instructions for it.
    pub(crate) fn new(k: &Tensor, v: &Tensor, heads: usize, scale: f64, precision: Precision) -> Result<Option<Self>> {
        let (batch, keys, total) = k.dims3()?;
        if v.dims() != k.dims() || heads == 0 || total % heads != 0 {
            candle_core::bail!("attention: k {:?}, v {:?} do not fit {heads} heads", k.dims(), v.dims());
        }
        let heads = Heads { count: heads, width: total / heads, scale: scale as f32, precision };
        let (k, v) = (k.contiguous()?, v.contiguous()?);
        let sequences = with_slices(&[&k, &v], |slices| {
            Ok((0..batch)
                .into_par_iter()
                .map(|sequence| {
                    let tokens = |side: usize| Tokens { numbers: &slices[side][sequence * keys * total..], stride: total };
                    SequenceHeads::new(keys, tokens(0), tokens(1), heads).map(Arc::new)
                })
                .collect::<Option<Vec<_>>>())
        })?;
        Ok(sequences.map(|sequences| Self { sequences, heads }))
    }

    /// The number of sequences.
    pub(crate) fn len(&self) -> usize {
        self.sequences.len()
    }

    /// The sequences with these numbers, in this order.
    pub(crate) fn select(&self, numbers: &[usize]) -> Self {
        Self { sequences: numbers.iter().map(|&n| Arc::clone(&self.sequences[n])).collect(), heads: self.heads }
    }

    /// `softmax(q · kᵀ · scale) · v` for each head of queries `(b, queries, heads · width)`.
    pub(crate) fn attend(&self, q: &Tensor) -> Result<Tensor> {
        let (batch, queries, total) = q.dims3()?;
        if batch != self.sequences.len() || total != self.heads.count * self.heads.width {
            candle_core::bail!("attention: queries {:?} do not fit {self:?}", q.dims());
        }
        let q = q.contiguous()?;
        let mut out = vec![0.0; batch * queries * total];
        with_slices(&[&q], |slices| {
            out.par_chunks_mut((queries * total).max(1)).zip(&self.sequences).enumerate().for_each(
                |(number, (out, sequence))| {
                    let q = Tokens { numbers: &slices[0][number * queries * total..], stride: total };
                    sequence.attend(q, self.heads, out);
                },
            );
            Ok(())
        })?;
        Tensor::from_vec(out, q.shape(), q.device())
    }
}

/// Attention of sequences to themselves, from queries, keys and values side by side: `(b, tokens, 3 · heads · width)` to
/// `(b, tokens, heads · width)`. `None` where the processor has no instructions for it.
pub(crate) fn packed_self_attention(qkv: &Tensor, heads: usize, scale: f64, precision: Precision) -> Result<Option<Tensor>> {
    let (batch, tokens, triple) = qkv.dims3()?;
    if heads == 0 || triple % (3 * heads) != 0 {
        candle_core::bail!("attention: width {triple} does not hold queries, keys and values of {heads} heads");
    }
    let total = triple / 3;
    let heads = Heads { count: heads, width: total / heads, scale: scale as f32, precision };
    let qkv = qkv.contiguous()?;
    let mut out = vec![0.0; batch * tokens * total];
    let done = with_slices(&[&qkv], |slices| {
        let attend = |(number, out): (usize, &mut [f32])| {
            let numbers = &slices[0][number * tokens * triple..];
            let part = |index: usize| Tokens { numbers: &numbers[index * total..], stride: triple };
            let sequence = SequenceHeads::new(tokens, part(1), part(2), heads)?;
            sequence.attend(part(0), heads, out);
            Some(())
        };
        Ok(out.par_chunks_mut((tokens * total).max(1)).enumerate().map(attend).collect::<Option<()>>())
    })?;
    done.map(|()| Tensor::from_vec(out, (batch, tokens, total), qkv.device())).transpose()
}

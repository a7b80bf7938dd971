//! The operations as they are called with tensors: f32 in and out, without a gradient.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::super::activation::Activation;
use super::super::with_slices;
use super::heads::{Heads, SequenceHeads, Tokens, attend_itself};
use super::layout::Precision;
use super::product::{Inputs, Norm, Weights};
use crate::layers::LayerNorm;

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

    /// `activation(norm(x) · weightᵀ + bias) + added`: `(…, in)` to `(…, out)`. A row does not depend on the others.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        norm: Option<&LayerNorm>,
        activation: Option<Activation>,
        added: Option<&Tensor>,
    ) -> Result<Tensor> {
        let shape = shape(x, self.0.inputs(), self.0.outputs())?;
        let product = with_inputs(x, norm, added, &shape, |inputs| self.0.product(inputs, activation))?;
        Tensor::from_vec(product, shape, x.device())
    }

    /// This layer, an activation, another layer, and `added`: `(…, in)` to `(…, out)`.
    pub(crate) fn mlp(
        &self,
        second: &Self,
        x: &Tensor,
        norm: Option<&LayerNorm>,
        activation: Activation,
        added: Option<&Tensor>,
    ) -> Result<Tensor> {
        if self.0.outputs() != second.0.inputs() {
            candle_core::bail!("mlp: {self:?} and {second:?} do not fit");
        }
        let shape = shape(x, self.0.inputs(), second.0.outputs())?;
        let product = with_inputs(x, norm, added, &shape, |inputs| self.0.mlp(&second.0, inputs, activation))?;
        Tensor::from_vec(product, shape, x.device())
    }
}

/// The shape of what a layer makes of `x`.
fn shape(x: &Tensor, inputs: usize, outputs: usize) -> Result<Vec<usize>> {
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == inputs => *last = outputs,
        _ => candle_core::bail!("linear: input {:?} does not fit weight ({outputs}, {inputs})", x.dims()),
    }
    Ok(shape)
}

fn with_inputs<R>(
    x: &Tensor,
    norm: Option<&LayerNorm>,
    added: Option<&Tensor>,
    shape: &[usize],
    work: impl FnOnce(Inputs<'_>) -> R,
) -> Result<R> {
    let mut tensors = vec![x.contiguous()?];
    if let Some(norm) = norm {
        if [norm.weight(), norm.bias()].iter().any(|part| x.dims().last() != part.dims().last()) {
            candle_core::bail!("layer norm of {:?} does not fit {:?}", norm.weight().dims(), x.dims());
        }
        tensors.extend([norm.weight().contiguous()?, norm.bias().contiguous()?]);
    }
    if let Some(added) = added {
        if added.dims() != shape {
            candle_core::bail!("linear: {:?} cannot be added to {shape:?}", added.dims());
        }
        tensors.push(added.contiguous()?);
    }
    with_slices(&tensors.iter().collect::<Vec<_>>(), |slices| {
        Ok(work(Inputs {
            x: slices[0],
            norm: norm.map(|norm| Norm { weight: slices[1], bias: slices[2], eps: norm.eps() as f32 }),
            added: added.and_then(|_| slices.last().copied()),
        }))
    })
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
            attend_itself(tokens, part(0), (part(1), part(2)), heads, out)
        };
        Ok(out.par_chunks_mut((tokens * total).max(1)).enumerate().map(attend).collect::<Option<()>>())
    })?;
    done.map(|()| Tensor::from_vec(out, (batch, tokens, total), qkv.device())).transpose()
}

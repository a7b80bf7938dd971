//! The operations as they are called with tensors: f32 in and out, without a gradient.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::super::activation::Activation;
use super::super::kernel::unwritten;
use super::super::with_slices;
use super::Instructions;
use super::absorbed::{Absorbed, States};
use super::heads::{Heads, Tokens, attend_itself};
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

/// States of several images, in tiles. Cheap to clone.
#[derive(Clone)]
pub(crate) struct PackedStates(Vec<Arc<States>>);

impl std::fmt::Debug for PackedStates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedStates({})", self.0.len())
    }
}

impl PackedStates {
    /// The number of images.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The images with these numbers, in this order.
    pub(crate) fn select(&self, numbers: &[usize]) -> Self {
        Self(numbers.iter().map(|&n| Arc::clone(&self.0[n])).collect())
    }
}

/// Cross-attention of a layer that is not trained. Cheap to clone.
#[derive(Clone)]
pub(crate) struct PackedCrossAttention(Arc<Absorbed>);

impl std::fmt::Debug for PackedCrossAttention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedCrossAttention({:?}, depth {})", self.0.heads(), self.0.depth())
    }
}

impl PackedCrossAttention {
    /// From the weights `(heads · width, depth)` of keys and values, and the bias of the values. `None` where the processor has no
    /// instructions for it.
    pub(crate) fn new(
        key: &Tensor,
        value: &Tensor,
        value_bias: &Tensor,
        heads: usize,
        scale: f64,
        precision: Precision,
    ) -> Result<Option<Self>> {
        let (total, _) = key.dims2()?;
        if value.dims() != key.dims() || value_bias.dims() != [total] || heads == 0 || total % heads != 0 {
            candle_core::bail!("attention: weights {:?} and {:?} do not fit {heads} heads", key.dims(), value.dims());
        }
        let heads = Heads { count: heads, width: total / heads, scale: scale as f32, precision };
        let tensors = [key.contiguous()?, value.contiguous()?, value_bias.contiguous()?];
        with_slices(&tensors.each_ref(), |slices| {
            Ok(Instructions::best(heads.precision)
                .map(|instructions| Self(Arc::new(Absorbed::new(instructions, slices[0], slices[1], slices[2], heads)))))
        })
    }

    /// Image states `(b, n, depth)`, ready for every layer of this depth and precision.
    pub(crate) fn states(&self, states: &Tensor) -> Result<PackedStates> {
        let (_, count, depth) = states.dims3()?;
        if depth != self.0.depth() || count == 0 {
            candle_core::bail!("attention: states {:?} do not fit {self:?}", states.dims());
        }
        let states = states.contiguous()?;
        with_slices(&[&states], |slices| {
            let images = slices[0].par_chunks(count * depth);
            Ok(PackedStates(images.map(|image| Arc::new(States::new(image, depth, self.0.heads()))).collect()))
        })
    }

    /// What queries `(images, queries, heads · width)` see of their image, of that shape.
    pub(crate) fn attend(&self, q: &Tensor, states: &PackedStates) -> Result<Tensor> {
        let Heads { count, width, .. } = self.0.heads();
        let (images, _, total) = q.dims3()?;
        if images != states.len() || total != count * width {
            candle_core::bail!("attention: queries {:?} do not fit {self:?} and {states:?}", q.dims());
        }
        let images: Vec<&States> = states.0.iter().map(AsRef::as_ref).collect();
        let q = q.contiguous()?;
        let seen = with_slices(&[&q], |slices| Ok(self.0.attend(slices[0], &images)))?;
        Tensor::from_vec(seen, q.shape(), q.device())
    }
}

/// Attention of sequences to themselves, from queries, keys and values side by side: `(b, tokens, 3 · heads · width)` to
/// `(b, tokens, heads · width)`. `None` where the processor has no instructions for it.
pub(crate) fn packed_self_attention(qkv: &Tensor, heads: usize, scale: f64, precision: Precision) -> Result<Option<Tensor>> {
    let (batch, tokens, triple) = qkv.dims3()?;
    if heads == 0 || triple % (3 * heads) != 0 {
        candle_core::bail!("attention: width {triple} does not hold queries, keys and values of {heads} heads");
    }
    let Some(instructions) = Instructions::best(precision) else { return Ok(None) };
    let total = triple / 3;
    let heads = Heads { count: heads, width: total / heads, scale: scale as f32, precision };
    let qkv = qkv.contiguous()?;
    let mut out = unwritten(batch * tokens * total);
    with_slices(&[&qkv], |slices| {
        out.par_chunks_mut((tokens * total).max(1)).enumerate().for_each(|(number, out)| {
            let numbers = &slices[0][number * tokens * triple..];
            let part = |index: usize| Tokens { numbers: &numbers[index * total..], stride: triple };
            attend_itself(instructions, tokens, part(0), (part(1), part(2)), heads, out);
        });
        Ok(())
    })?;
    Tensor::from_vec(out, (batch, tokens, total), qkv.device()).map(Some)
}

//! The few layers that every transformer here is made of.
//!
//! Each layer's `forward` serves training and inference: it is made of operations of [`crate::ops`] that have a gradient, until a layer is
//! packed. What else a dense layer has in one call (a norm before, an activation or an addition behind it) is one pass once it is packed.
//!
//! On the CPU, the row of a batch comes out bit for bit the same whatever other rows the batch has: see [`Linear::forward`].

use candle_core::{D, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use crate::ops::{self, Activation, PackedLinear, Precision, dense, layer_norm, linear, wide};

/// Spread of freshly initialised weights (BLIP and BERT: normal, 0.02).
const INIT_STD: f64 = 0.02;

/// Initialisation of weights and embeddings.
pub(crate) const INIT_WEIGHT: Init = Init::Randn { mean: 0.0, stdev: INIT_STD };

/// A dense layer `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear(Weights);

#[derive(Debug, Clone)]
enum Weights {
    /// As tensors, of any device; may be in training.
    Tensors { weight: Tensor, bias: Tensor },
    /// Frozen, on a CPU.
    Packed(PackedLinear),
}

impl Linear {
    /// From a weight `(out, in)` and a bias `(out)`.
    ///
    /// A weight that is not being trained is laid out column by column: on the CPU, products of few rows, as in decoding, are then 2 to
    /// 5 times as fast, and no row depends on the others (see [`linear`]).
    ///
    /// # Errors
    /// The weight is not a matrix.
    pub fn new(weight: Tensor, bias: Tensor) -> Result<Self> {
        let weight = match weight.device().is_cpu() && !weight.track_op() {
            true => weight.t()?.contiguous()?.t()?,
            false => weight,
        };
        Ok(Self(Weights::Tensors { weight, bias }))
    }

    /// Reads `weight` `(outputs, inputs)` and `bias` `(outputs)`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(inputs: usize, outputs: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Self::new(
            vb.get_with_hints((outputs, inputs), "weight", INIT_WEIGHT)?,
            vb.get_with_hints(outputs, "bias", Init::Const(0.0))?,
        )
    }

    /// One layer of several with the same inputs; their outputs follow each other.
    ///
    /// # Errors
    /// A layer is packed, or the layers differ in their inputs.
    pub fn concat(layers: &[Self]) -> Result<Self> {
        let parts = |side: fn(&Tensor, &Tensor) -> Tensor| {
            let part = |layer: &Self| match &layer.0 {
                Weights::Tensors { weight, bias } => Ok(side(weight, bias)),
                Weights::Packed(_) => candle_core::bail!("a packed layer cannot be put together with others"),
            };
            Tensor::cat(&layers.iter().map(part).collect::<Result<Vec<_>>>()?, 0)
        };
        Self::new(parts(|weight, _| weight.clone())?, parts(|_, bias| bias.clone())?)
    }

    /// Multiplies from now on in tiles, where the processor has instructions for this precision; the layer can then no longer be trained.
    ///
    /// # Errors
    /// The weight is not in main memory.
    pub fn pack(&mut self, precision: Precision) -> Result<()> {
        if let Weights::Tensors { weight, bias } = &self.0
            && let Some(packed) = PackedLinear::new(weight, bias, precision)?
        {
            self.0 = Weights::Packed(packed);
        }
        Ok(())
    }

    /// The weight `(out, in)` and the bias `(out)`; nothing once packed.
    pub(crate) fn tensors(&self) -> Option<(&Tensor, &Tensor)> {
        match &self.0 {
            Weights::Tensors { weight, bias } => Some((weight, bias)),
            Weights::Packed(_) => None,
        }
    }

    /// `(.., in)` to `(.., out)`.
    ///
    /// On the CPU, a row of a frozen layer's result does not depend on the other rows of `x`.
    ///
    /// # Errors
    /// The last dimension of `x` is not the input width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Around::default())
    }

    /// [`Self::forward`] with what comes before and behind it.
    ///
    /// # Errors
    /// As [`Self::forward`], or what is added has another shape than the result.
    pub(crate) fn forward_with(&self, x: &Tensor, around: Around<'_>) -> Result<Tensor> {
        let Around { norm, activation, added } = around;
        let (weight, bias) = match &self.0 {
            Weights::Packed(packed) => return packed.forward(x, norm, activation, added),
            Weights::Tensors { weight, bias } => (weight, bias),
        };
        let layer_norm = norm.map(LayerNorm::parts);
        if let Some(made) = dense(x, &[(weight, bias)], layer_norm, activation, added)? {
            return Ok(made);
        }
        let y = match norm {
            Some(norm) => linear(&norm.forward(x)?, weight, Some(bias))?,
            None => linear(x, weight, Some(bias))?,
        };
        let y = activation.map_or(Ok(y.clone()), |activation| activation.forward(&y))?;
        added.map_or(Ok(y.clone()), |added| y + added)
    }
}

/// What goes with a dense layer: `activation(norm(x) Wᵀ + b) + added`. Of a packed layer it is one pass.
#[derive(Default, Clone, Copy)]
pub(crate) struct Around<'a> {
    pub(crate) norm: Option<&'a LayerNorm>,
    pub(crate) activation: Option<Activation>,
    /// `(.., out)`.
    pub(crate) added: Option<&'a Tensor>,
}

impl<'a> Around<'a> {
    /// An addition alone.
    pub(crate) fn added(added: &'a Tensor) -> Self {
        Self { added: Some(added), ..Self::default() }
    }
}

/// `x + second(activation(first(norm(x))))`, the MLP of a transformer; in `MED`'s post-norm blocks without `norm`.
///
/// # Errors
/// Shapes do not fit.
pub(crate) fn mlp(
    (first, second): (&Linear, &Linear),
    x: &Tensor,
    norm: Option<&LayerNorm>,
    activation: Activation,
) -> Result<Tensor> {
    if let (Weights::Packed(first), Weights::Packed(second)) = (&first.0, &second.0) {
        return first.mlp(second, x, norm, activation, Some(x));
    }
    if let (Some(first), Some(second)) = (first.tensors(), second.tensors())
        && let Some(made) = ops::mlp(x, norm.map(LayerNorm::parts), (first, activation, second))?
    {
        return Ok(made);
    }
    let hidden = first.forward_with(x, Around { norm, activation: Some(activation), added: None })?;
    second.forward_with(&hidden, Around::added(x))
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

    fn parts(&self) -> (&Tensor, &Tensor, f64) {
        (&self.weight, &self.bias, self.eps)
    }

    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub(crate) fn bias(&self) -> &Tensor {
        &self.bias
    }

    pub(crate) fn eps(&self) -> f64 {
        self.eps
    }

    /// `(.., size)` to the same shape.
    ///
    /// # Errors
    /// The last dimension of `x` is not `size`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, &self.weight, &self.bias, self.eps)
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

/// The rows divided by their Euclidean length: `(.., w)` to the same shape, of half-precision numbers in f32, for cosines to be exact.
///
/// # Errors
/// The tensor library failed.
pub fn l2_normalize(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(wide(x.dtype()))?;
    // torch.nn.functional.normalize: the length is never taken below 1e-12.
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&(length + 1e-12)?)
}

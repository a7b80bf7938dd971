//! The pre-norm transformer block of BLIP's and CLIP's vision transformers and of CLIP's text transformer.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::layers::{Around, LayerNorm, Linear, mlp};
use crate::ops::{Activation, Precision, attention, attention_qkv, packed_self_attention};

/// Sizes and kind of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockConfig {
    /// Width of the states.
    pub(crate) width: usize,
    /// Attention heads; divides `width`.
    pub(crate) heads: usize,
    /// Width inside the MLP.
    pub(crate) mlp_width: usize,
    /// Inside the MLP.
    pub(crate) activation: Activation,
    /// Epsilon of the layer norms.
    pub(crate) eps: f64,
    /// One weight for queries, keys and values (BLIP's `qkv` and `projection`), or three (CLIP's `q_proj` … and `out_proj`).
    pub(crate) fused: bool,
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    layer_norm1: LayerNorm,
    attention: SelfAttention,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

#[derive(Debug, Clone)]
struct SelfAttention {
    heads: usize,
    scale: f64,
    inputs: Inputs,
    output: Linear,
    /// Of the products in attention, once packed.
    precision: Option<Precision>,
}

/// Projections to queries, keys and values.
#[derive(Debug, Clone)]
enum Inputs {
    Fused(Linear),
    Split(Box<[Linear; 3]>),
}

/// Two dense layers with an activation in between.
#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
}

/// Reads the blocks `0..count` below the builder's prefix.
///
/// # Errors
/// A tensor is missing or misshapen.
#[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
pub(crate) fn load_blocks(config: &BlockConfig, count: usize, vb: VarBuilder<'_>) -> Result<Vec<Block>> {
    (0..count).map(|i| Block::load(config, vb.pp(i))).collect()
}

impl Block {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(config: &BlockConfig, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            layer_norm1: LayerNorm::load(config.width, config.eps, vb.pp("layer_norm1"))?,
            attention: SelfAttention::load(config, vb.pp("self_attn"))?,
            layer_norm2: LayerNorm::load(config.width, config.eps, vb.pp("layer_norm2"))?,
            mlp: Mlp::load(config, vb.pp("mlp"))?,
        })
    }

    /// `(b, n, width)` to the same shape; `mask` is additive, `(b or 1, 1, n or 1, n)`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub(crate) fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        self.forward_attended(&self.attention.attend(x, &self.layer_norm1, mask)?, x)
    }

    /// [`Self::forward`] without a mask, of which only the first token is wanted: `(b, n, width)` to `(b, 1, width)`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub(crate) fn forward_first(&self, x: &Tensor) -> Result<Tensor> {
        let context = self.attention.attend(x, &self.layer_norm1, None)?;
        self.forward_attended(&context.narrow(1, 0, 1)?.contiguous()?, &x.narrow(1, 0, 1)?.contiguous()?)
    }

    /// What becomes of tokens `x` and the context that they attended to.
    fn forward_attended(&self, context: &Tensor, x: &Tensor) -> Result<Tensor> {
        let x = self.attention.output.forward_with(context, Around::added(x))?;
        self.mlp.forward_add(&x, &self.layer_norm2)
    }

    /// See [`Linear::pack`].
    pub(crate) fn pack(&mut self, precision: Precision) -> Result<()> {
        self.attention.pack(precision)?;
        self.mlp.pack(precision)
    }
}

impl SelfAttention {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(config: &BlockConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let d = config.width;
        let square = |name: &str| Linear::load(d, d, vb.pp(name));
        let (inputs, output) = match config.fused {
            true => (Inputs::Fused(Linear::load(d, 3 * d, vb.pp("qkv"))?), square("projection")?),
            false => (Inputs::Split(Box::new([square("q_proj")?, square("k_proj")?, square("v_proj")?])), square("out_proj")?),
        };
        Ok(Self { heads: config.heads, scale: attention_scale(d, config.heads), inputs, output, precision: None })
    }

    fn pack(&mut self, precision: Precision) -> Result<()> {
        if let Inputs::Split(parts) = &self.inputs {
            self.inputs = Inputs::Fused(Linear::concat(&**parts)?);
        }
        if let Inputs::Fused(qkv) = &mut self.inputs {
            qkv.pack(precision)?;
        }
        self.precision = Some(precision);
        self.output.pack(precision)
    }

    /// What the tokens of `x`, normalised, attend to in each other: `softmax(q · kᵀ) · v`, before the output layer.
    fn attend(&self, x: &Tensor, norm: &LayerNorm, mask: Option<&Tensor>) -> Result<Tensor> {
        match &self.inputs {
            Inputs::Fused(qkv) => self.attend_qkv(&qkv.forward_with(x, Around { norm: Some(norm), ..Around::default() })?, mask),
            Inputs::Split(parts) => {
                let [q, k, v] = &**parts;
                let normal = norm.forward(x)?;
                attention(&q.forward(&normal)?, &k.forward(&normal)?, &v.forward(&normal)?, self.heads, self.scale, mask)
            }
        }
    }

    /// [`Self::attend`] with queries, keys and values side by side.
    fn attend_qkv(&self, qkv: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        if let (Some(precision), None) = (self.precision, mask)
            && let Some(context) = packed_self_attention(qkv, self.heads, self.scale, precision)?
        {
            return Ok(context);
        }
        attention_qkv(qkv, self.heads, self.scale, mask)
    }
}

impl Mlp {
    /// Reads `fc1` and `fc2`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub(crate) fn load(config: &BlockConfig, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            fc1: Linear::load(config.width, config.mlp_width, vb.pp("fc1"))?,
            activation: config.activation,
            fc2: Linear::load(config.mlp_width, config.width, vb.pp("fc2"))?,
        })
    }

    /// `x` `(.., width)` and what the layers make of it, normalised.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub(crate) fn forward_add(&self, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
        mlp((&self.fc1, &self.fc2), x, Some(norm), self.activation)
    }

    /// See [`Linear::pack`].
    pub(crate) fn pack(&mut self, precision: Precision) -> Result<()> {
        self.fc1.pack(precision)?;
        self.fc2.pack(precision)
    }
}

/// What scores of a head are multiplied with: the inverse root of its width.
pub(crate) fn attention_scale(width: usize, heads: usize) -> f64 {
    ((width / heads) as f64).powf(-0.5)
}

//! The pre-norm transformer block of BLIP's and CLIP's vision transformers and of CLIP's text transformer.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::layers::{LayerNorm, Linear};
use crate::ops::{attention, attention_packed, gelu, quick_gelu, tanh_gelu};

/// The activation of an MLP, by its name in transformers (`hidden_act`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// The exact, erf form.
    #[serde(rename = "gelu")]
    Gelu,
    /// `x · σ(1.702 x)`, of OpenAI's CLIP.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// The tanh form, of SigLIP.
    #[serde(rename = "gelu_pytorch_tanh")]
    TanhGelu,
}

impl Activation {
    /// Element by element.
    ///
    /// # Errors
    /// The tensor library failed.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gelu => gelu(x),
            Self::QuickGelu => quick_gelu(x),
            Self::TanhGelu => tanh_gelu(x),
        }
    }
}

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
        let x = (x + self.attention.forward(&self.layer_norm1.forward(x)?, mask)?)?;
        &x + self.mlp.forward(&self.layer_norm2.forward(&x)?)?
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
        Ok(Self { heads: config.heads, scale: attention_scale(d, config.heads), inputs, output })
    }

    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let mixed = match &self.inputs {
            Inputs::Fused(qkv) => attention_packed(&qkv.forward(x)?, self.heads, self.scale, mask)?,
            Inputs::Split(parts) => {
                let [q, k, v] = &**parts;
                attention(&q.forward(x)?, &k.forward(x)?, &v.forward(x)?, self.heads, self.scale, mask)?
            }
        };
        self.output.forward(&mixed)
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

    /// `(.., width)` to the same shape.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&self.activation.forward(&self.fc1.forward(x)?)?)
    }
}

/// What scores of a head are multiplied with: the inverse root of its width.
pub(crate) fn attention_scale(width: usize, heads: usize) -> f64 {
    ((width / heads) as f64).powf(-0.5)
}

//! The activation of an MLP.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::gated::{quick_gelu, tanh_gelu};
use super::gelu::gelu;

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

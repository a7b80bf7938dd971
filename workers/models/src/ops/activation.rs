//! The activation of an MLP.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::gated::{quick_gelu, quick_gelu_of, tanh_gelu, tanh_gelu_of};
use super::gelu::{gelu, gelu_of};

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

    /// Of some numbers, in place.
    #[inline(always)]
    pub(super) fn apply(self, numbers: &mut [f32]) {
        match self {
            Self::Gelu => numbers.iter_mut().for_each(|x| *x = gelu_of(*x)),
            Self::QuickGelu => numbers.iter_mut().for_each(|x| *x = quick_gelu_of(*x)),
            Self::TanhGelu => numbers.iter_mut().for_each(|x| *x = tanh_gelu_of(*x)),
        }
    }
}

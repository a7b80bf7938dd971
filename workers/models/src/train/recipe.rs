//! Everything but the data that decides what a run ends in.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::augment::Augmentation;
use super::optimizer::AdamWConfig;
use super::schedule::Schedule;
use crate::med::Parts;

/// What a model is trained to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Writes captions: language-model loss.
    Captioner,
    /// Scores pairs: contrastive and matching loss.
    Filter,
    /// Both on one vision transformer: all three losses, unweighted, as in BLIP's pre-training. Its text transformers share all but
    /// self-attention.
    Med,
    /// Scores pairs by two encoders alone: contrastive loss within a batch.
    Clip,
}

impl Role {
    /// The parts that a MED of this role has.
    #[must_use]
    pub fn parts(self) -> Parts {
        match self {
            Self::Captioner => Parts::CAPTIONER,
            Self::Filter => Parts::FILTER,
            Self::Med => Parts::FULL,
            Self::Clip => Parts { decoder: false, encoder: false },
        }
    }
}

/// How the weights of a finished model are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoredDType {
    /// 32 bits: what was trained.
    F32,
    /// 16 bits: half the size, rounded to 11 significant bits.
    #[default]
    F16,
}

/// Everything but the data that decides what a run ends in.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// What the model becomes.
    pub role: Role,
    /// Keys all randomness.
    pub seed: u64,
    /// The learning rate over the run.
    pub schedule: Schedule,
    /// The optimiser.
    pub optimizer: AdamWConfig,
    /// Batches whose gradients make one step.
    pub accumulate: usize,
    /// Number type of the passes; weights, moments and losses stay f32.
    pub dtype: DType,
    /// Decay of the momentum encoders (BLIP: 0.995); 0 trains without them, by contrast within the batch.
    pub momentum: f64,
    /// Features of earlier batches that are kept for contrast (BLIP: 57,600).
    pub queue: usize,
    /// Share of what the momentum encoders find similar in the targets of contrast (BLIP: 0.4).
    pub alpha: f64,
    /// Steps over which that share rises from 0.
    pub alpha_ramp: u64,
    /// Label smoothing of the language-model loss.
    pub label_smoothing: f32,
    /// Text that the captioner is given and need not write.
    pub prompt: String,
    /// Tokens of a text at most, first and last included; longer ones are cut.
    pub max_tokens: usize,
    /// Image augmentation.
    pub augmentation: Augmentation,
}

impl Recipe {
    /// The share of soft targets at a step, counted from 0.
    pub(super) fn alpha_at(&self, step: u64) -> f64 {
        match self.alpha_ramp {
            0 => self.alpha,
            ramp => self.alpha * (step as f64 / ramp as f64).min(1.0),
        }
    }
}

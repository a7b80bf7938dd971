//! A CLIP on disk, in the Hugging Face layout.

use std::path::Path;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;

use super::{Clip, ClipConfig, ClipScorer, ClipTokenizer};
use crate::error::{ModelError, Result};
use crate::ops::Precision;

/// Whether the config of a checkpoint directory is that of a CLIP or SigLIP; if it is not, or cannot be read, it may be a BLIP.
#[must_use]
pub fn is_clip(dir: &Path) -> bool {
    ClipConfig::from_dir(dir).is_ok()
}

impl ClipScorer {
    /// Opens the model, stored as `dtype` and packed if that is wanted ([`Clip::pack`]), and the tokenizer of a checkpoint directory.
    ///
    /// # Errors
    /// A file is missing or unreadable, or the weights do not fit the config.
    pub fn open(dir: &Path, device: &Device, dtype: DType, packed: Option<Precision>) -> Result<Self> {
        let config = ClipConfig::from_dir(dir)?;
        let tokenizer = ClipTokenizer::from_dir(dir, config.family)?;
        let path = dir.join("model.safetensors");
        let weights = std::fs::read(&path).map_err(|source| ModelError::Io { path, source })?;
        let mut clip = Clip::load(&config, VarBuilder::from_slice_safetensors(&weights, dtype, device)?)?;
        packed.map_or(Ok(()), |precision| clip.pack(precision))?;
        Self::new(clip, tokenizer)
    }
}

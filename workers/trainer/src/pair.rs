//! Pairs in memory.

use std::sync::Arc;

use capfilt_models::preprocess::{Pixels, Preprocessor};
use capfilt_models::train::shrink;
use capfilt_schemas::Origin;
use image::RgbImage;

use crate::TrainerError;

/// A text of an image and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairText {
    /// The text as it is stored; models clean it themselves.
    pub text: String,
    /// Who wrote it.
    pub origin: Origin,
}

/// One image with its texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainPair {
    /// Keys every random choice about the pair.
    pub sample_id: String,
    /// At least one text.
    pub texts: Vec<PairText>,
    /// RGB8, square, `side × side`, row by row.
    pub pixels: Arc<[u8]>,
}

impl TrainPair {
    /// A pair from a decoded image, resized straight to `side × side` as models see it.
    ///
    /// # Errors
    ///
    /// The image has no pixels.
    pub fn new(sample_id: String, texts: Vec<PairText>, image: &RgbImage, side: usize) -> Result<Self, TrainerError> {
        Ok(Self { sample_id, texts, pixels: shrink(image, side)?.into() })
    }
}

/// Pixels of a [`TrainPair`] as a model sees them when it is not trained.
///
/// # Errors
///
/// They are no square of the size that the model takes.
pub(crate) fn prepared(preprocessor: &Preprocessor, sample_id: &str, pixels: &[u8]) -> Result<Pixels, TrainerError> {
    let side = preprocessor.side() as u32;
    let image = RgbImage::from_raw(side, side, pixels.to_vec())
        .ok_or_else(|| TrainerError::Image { sample_id: sample_id.to_owned(), reason: format!("it is not {side}x{side}") })?;
    Ok(preprocessor.prepare(&image)?)
}

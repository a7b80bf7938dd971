//! From examples to what a step takes of them: augmented, normalised pixels and clean texts. Ahead of the model, on all cores.

use image::RgbImage;
use rayon::prelude::*;

use super::augment::Augmentation;
use crate::error::{ModelError, Result};
use crate::preprocess::{Pixels, Preprocessor};
use crate::tokenizer::{MAX_WORDS, clean_caption};

/// One image with one of its texts.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Name of the image; keys its augmentation, and examples of the same name are never each other's negatives.
    pub sample_id: &'a str,
    /// How often the image was seen before; keys its augmentation.
    pub epoch: u64,
    /// The text, as it is; for a MED it is cleaned as captions are for scoring.
    pub text: &'a str,
    /// RGB8 of the model's image size, row by row.
    pub pixels: &'a [u8],
}

/// Makes [`Prepared`] of examples. It knows nothing that a step changes.
#[derive(Debug, Clone)]
pub struct Preparer {
    pub(super) seed: u64,
    pub(super) augmentation: Augmentation,
    pub(super) preprocessor: Preprocessor,
    /// Whether texts are cleaned as BLIP's are.
    pub(super) clean: bool,
}

/// Examples as [`super::Trainer::step`] takes them.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Names of the images.
    pub(super) images: Vec<String>,
    /// Their texts.
    pub(super) texts: Vec<String>,
    pub(super) pixels: Vec<Pixels>,
}

impl Preparer {
    /// Prepares the examples of a step.
    ///
    /// # Errors
    ///
    /// There is none, or an image has another size than the model takes.
    pub fn prepare(&self, examples: &[Example<'_>]) -> Result<Prepared> {
        if examples.is_empty() {
            return Err(ModelError::Input("a step needs at least one example".to_owned()));
        }
        Ok(Prepared {
            images: examples.iter().map(|example| example.sample_id.to_owned()).collect(),
            texts: examples
                .iter()
                .map(|example| match self.clean {
                    true => clean_caption(example.text, MAX_WORDS),
                    false => example.text.to_owned(),
                })
                .collect(),
            pixels: examples.par_iter().map(|example| self.pixels(example)).collect::<Result<_>>()?,
        })
    }

    fn pixels(&self, example: &Example<'_>) -> Result<Pixels> {
        let side = self.preprocessor.side();
        let pixels = self.augmentation.apply(example.pixels, side, self.seed, example.sample_id, example.epoch)?;
        let square = side as u32;
        let image = RgbImage::from_raw(square, square, pixels)
            .ok_or_else(|| ModelError::Input(format!("image {} is not {side}x{side}", example.sample_id)))?;
        self.preprocessor.prepare(&image)
    }
}

impl Prepared {
    /// Examples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }
}

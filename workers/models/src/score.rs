//! The filter: how well each text fits its image.

use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::error::{ModelError, Result};
use crate::med::Med;
use crate::moments::ImageMoments;
use crate::preprocess::Pixels;
use crate::text::CrossCache;
use crate::tokenizer::{FirstToken, MAX_WORDS, TextBatch, TextTokenizer, clean_caption};

/// Texts are padded to a multiple of this many tokens, so that a text is computed at a length that depends on itself alone.
const LENGTH_STEP: usize = 8;

/// Images that a CPU works on together: enough to read the weights once for many texts.
const CPU_BATCH: usize = 16;

/// The first token of a text for the image-grounded encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ItmToken {
    /// `[ENC]`, as BLIP was trained.
    #[default]
    Enc,
    /// `[CLS]`, as Hugging Face's `BlipForImageTextRetrieval` and BLIP's own demo do.
    Cls,
}

/// What is told of the ITC features of an image and a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Itc {
    /// Their cosine.
    #[default]
    Cosine,
    /// By how many standard deviations it lies above the text's cosines with other images ([`ImageMoments`]).
    Standardized,
}

impl Itc {
    /// Whether it is the cosine.
    #[must_use]
    pub const fn is_cosine(&self) -> bool {
        matches!(self, Self::Cosine)
    }
}

/// The scores of one text for one image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredText {
    /// Logits of the ITM head: no match, match.
    pub logits: [f32; 2],
    /// Probability of a match by the ITM head: softmax of the logits.
    pub itm: f32,
    /// Cosine of the ITC features; of a scorer that is [standardized](FilterScorer::standardized), by how many standard deviations it lies above those of
    /// the text with other images.
    pub itc: f32,
}

/// What a vision transformer sees of images: `(b, patches, d)`.
#[derive(Debug, Clone)]
pub struct Patches(Tensor);

impl Patches {
    /// Those of the images with these numbers, which are at least one.
    ///
    /// # Errors
    /// There are not so many, or the device fails.
    pub fn select(&self, images: &[usize]) -> Result<Self> {
        let images: Vec<u32> = images.iter().map(|image| *image as u32).collect();
        Ok(Self(self.0.index_select(&Tensor::new(images, self.0.device())?, 0)?))
    }
}

/// Scores texts against images.
#[derive(Debug, Clone)]
pub struct FilterScorer {
    med: Med,
    tokenizer: TextTokenizer,
    first_token: ItmToken,
    max_length: usize,
    moments: Option<ImageMoments>,
}

/// A text ready for both encoders; they differ in the first token only.
#[derive(Clone)]
struct Encoded {
    itc: Vec<u32>,
    itm: Vec<u32>,
}

impl FilterScorer {
    /// Tokens of a text at most, first and last included (BLIP's retrieval models: 35).
    pub const MAX_LENGTH: usize = 35;

    /// A scorer from a model with an encoder and its tokenizer.
    ///
    /// # Errors
    /// The model has no encoder, or no token `[ENC]` within its vocabulary.
    pub fn new(med: Med, tokenizer: TextTokenizer, first_token: ItmToken) -> Result<Self> {
        if !med.parts().encoder {
            return Err(ModelError::MissingPart { wanted: "scoring", missing: "text_encoder" });
        }
        let text = &med.config().text_config;
        let enc = tokenizer.first_id(FirstToken::Enc);
        if first_token == ItmToken::Enc && enc as usize >= text.vocab_size {
            return Err(ModelError::Config(format!(
                "[ENC] would be token {enc}, outside the vocabulary of {}; score with [CLS]",
                text.vocab_size
            )));
        }
        let max_length = Self::MAX_LENGTH.min(text.max_position_embeddings);
        Ok(Self { med, tokenizer, first_token, max_length, moments: None })
    }

    /// Tells ITC from now on as standard deviations above the mean of a text's cosines.
    #[must_use]
    pub fn standardized(self, moments: ImageMoments) -> Self {
        Self { moments: Some(moments), ..self }
    }

    /// Tells ITC from now on as `itc` says, by the moments that the scorer's checkpoint holds.
    ///
    /// # Errors
    /// It is to be standardized, and the checkpoint holds none: only filters that were trained here do.
    pub fn telling(self, itc: Itc, checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        Ok(match itc {
            Itc::Cosine => Self { moments: None, ..self },
            Itc::Standardized => self.standardized(checkpoint.image_moments(device)?),
        })
    }

    /// Scores `texts[i]` against `images[i]`; each image is encoded once. Texts are cleaned first ([`clean_caption`]).
    ///
    /// A score does not depend on the other images and texts: on a CPU bit for bit, on a GPU up to rounding in the matrix product.
    ///
    /// # Errors
    /// There are not as many lists of texts as images, an image has another size than the model takes, or the device fails.
    pub fn score<S: AsRef<str> + Sync>(&self, images: &[Pixels], texts: &[Vec<S>]) -> Result<Vec<Vec<ScoredText>>> {
        if images.len() != texts.len() {
            return Err(ModelError::Input(format!("{} images but {} lists of texts", images.len(), texts.len())));
        }
        match images {
            [] => Ok(Vec::new()),
            images => self.score_patches(&self.patches(images)?, texts),
        }
    }

    /// What the vision transformer sees of images, for [`Self::score_patches`]: the same for all members of a model.
    ///
    /// # Errors
    /// There is no image, or one has another size than the model takes.
    pub fn patches(&self, images: &[Pixels]) -> Result<Patches> {
        Ok(Patches(self.med.patches(&Pixels::stack(images, self.med.device())?)?))
    }

    /// [`Self::score`] from [`Self::patches`].
    ///
    /// # Errors
    /// As [`Self::score`].
    pub fn score_patches<S: AsRef<str> + Sync>(&self, images: &Patches, texts: &[Vec<S>]) -> Result<Vec<Vec<ScoredText>>> {
        let count = images.0.dim(0)?;
        if count != texts.len() {
            return Err(ModelError::Input(format!("{count} images but {} lists of texts", texts.len())));
        }
        let together = if self.med.device().is_cpu() { CPU_BATCH } else { count.max(1) };
        let mut scores = Vec::with_capacity(count);
        for (number, texts) in texts.chunks(together).enumerate() {
            scores.extend(self.score_together(&images.0.narrow(0, number * together, texts.len())?, texts)?);
        }
        Ok(scores)
    }

    fn encode(&self, text: &str) -> Result<Encoded> {
        let clean = clean_caption(text, MAX_WORDS);
        let itc = self.tokenizer.encode(&clean, FirstToken::Cls, self.max_length)?;
        let mut itm = itc.clone();
        if self.first_token == ItmToken::Enc {
            itm[0] = self.tokenizer.first_id(FirstToken::Enc);
        }
        Ok(Encoded { itc, itm })
    }

    /// Scores images, by their patches, that are in the model together: their texts in groups of equal padded length.
    fn score_together<S: AsRef<str> + Sync>(&self, images: &Tensor, texts: &[Vec<S>]) -> Result<Vec<Vec<ScoredText>>> {
        let texts_of = |image: usize| texts[image].iter().map(move |text| (image, text.as_ref()));
        let texts_of_all: Vec<(usize, &str)> = (0..texts.len()).flat_map(texts_of).collect();
        let rows = texts_of_all.par_iter().map(|&(image, text)| Ok((image, self.encode(text)?))).collect::<Result<Vec<_>>>()?;
        let mut scores: Vec<Vec<ScoredText>> = texts.iter().map(|texts| Vec::with_capacity(texts.len())).collect();
        if rows.is_empty() {
            return Ok(scores);
        }
        let states = self.med.encode_each(images)?;
        let (cross, features) = (self.med.encoder_cross_cache(&states)?, self.med.image_features(&states)?);
        drop(states);
        let width = |row: usize| self.padded(rows[row].1.itc.len());
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| width(row));
        let mut scored = vec![None; rows.len()];
        for group in order.chunk_by(|&a, &b| width(a) == width(b)) {
            let of_group: Vec<&(usize, Encoded)> = group.iter().map(|&row| &rows[row]).collect();
            for (&row, score) in group.iter().zip(self.score_rows(&features, &cross, &of_group, width(group[0]))?) {
                scored[row] = Some(score);
            }
        }
        for ((image, _), score) in rows.iter().zip(scored) {
            scores[*image].extend(score);
        }
        Ok(scores)
    }

    /// Texts, each with the number of its image, against the features `(b, p)` and the keys and values of the images.
    fn score_rows(
        &self,
        features: &Tensor,
        cross: &CrossCache,
        rows: &[&(usize, Encoded)],
        width: usize,
    ) -> Result<Vec<ScoredText>> {
        let (pad, device) = (self.tokenizer.pad_id(), self.med.device());
        let images: Vec<u32> = rows.iter().map(|(image, _)| *image as u32).collect();
        let images = Tensor::new(images, device)?;
        let itm_rows: Vec<&[u32]> = rows.iter().map(|(_, text)| text.itm.as_slice()).collect();
        let (ids, mask) = TextBatch::pad(&itm_rows, width, pad).tensors(device)?;
        let logits = self.med.itm_logits_cached(&ids, &mask, &cross.select(&images)?)?;
        let logits = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;

        let itc_rows: Vec<&[u32]> = rows.iter().map(|(_, text)| text.itc.as_slice()).collect();
        let (ids, mask) = TextBatch::pad(&itc_rows, width, pad).tensors(device)?;
        let texts = self.med.text_features(&ids, &mask)?;
        let cosines = (&texts * features.index_select(&images, 0)?)?.sum(D::Minus1)?;
        let cosines = match &self.moments {
            Some(moments) => moments.standardized(&texts, &cosines)?,
            None => cosines,
        };
        let cosines = cosines.to_dtype(DType::F32)?.to_vec1::<f32>()?;

        let scored = |pair: &[f32], itc| {
            let [apart, together] = *pair else {
                return Err(ModelError::Config(format!("an ITM head of {} classes, there must be 2", pair.len())));
            };
            // Softmax of two numbers, class 1.
            let itm = (1.0 / (1.0 + f64::from(apart - together).exp())) as f32;
            Ok(ScoredText { logits: [apart, together], itm, itc })
        };
        logits.iter().zip(cosines).map(|(pair, itc)| scored(pair, itc)).collect()
    }

    fn padded(&self, length: usize) -> usize {
        length.next_multiple_of(LENGTH_STEP).min(self.max_length)
    }
}

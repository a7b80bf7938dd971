//! The filter: how well each text fits its image.

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};
use crate::med::Med;
use crate::preprocess::Pixels;
use crate::text::CrossCache;
use crate::tokenizer::{FirstToken, MAX_WORDS, TextBatch, TextTokenizer, clean_caption};

/// Texts are padded to a multiple of this many tokens, so that a text is computed at a length that depends on itself alone.
const LENGTH_STEP: usize = 8;

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

/// The scores of one text for one image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredText {
    /// Logits of the ITM head: no match, match.
    pub logits: [f32; 2],
    /// Probability of a match by the ITM head: softmax of the logits.
    pub itm: f32,
    /// Cosine of the ITC features.
    pub itc: f32,
}

/// Scores texts against images.
#[derive(Debug, Clone)]
pub struct FilterScorer {
    med: Med,
    tokenizer: TextTokenizer,
    first_token: ItmToken,
    max_length: usize,
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
        Ok(Self { med, tokenizer, first_token, max_length })
    }

    /// The model.
    #[must_use]
    pub fn med(&self) -> &Med {
        &self.med
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
        let encoded = texts
            .par_iter()
            .map(|texts| texts.iter().map(|text| self.encode(text.as_ref())).collect())
            .collect::<Result<Vec<Vec<Encoded>>>>()?;
        if self.med.device().is_cpu() {
            images.par_iter().zip(&encoded).map(|(image, texts)| self.score_image(image, texts)).collect()
        } else {
            self.score_batch(images, &encoded)
        }
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

    /// One image and its texts, in groups of equal padded length.
    fn score_image(&self, image: &Pixels, texts: &[Encoded]) -> Result<Vec<ScoredText>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let states = self.med.encode_images(std::slice::from_ref(image))?;
        let cross = self.med.encoder_cross_cache(&states)?;
        let mut scores = vec![ScoredText { logits: [0.0; 2], itm: 0.0, itc: 0.0 }; texts.len()];
        let mut left: Vec<usize> = (0..texts.len()).collect();
        while let Some(&first) = left.first() {
            let width = self.padded(texts[first].itc.len());
            let (group, rest): (Vec<usize>, Vec<usize>) =
                left.into_iter().partition(|&i| self.padded(texts[i].itc.len()) == width);
            let rows: Vec<&Encoded> = group.iter().map(|&i| &texts[i]).collect();
            for (i, score) in group.into_iter().zip(self.score_rows(&states, &cross, &rows, width)?) {
                scores[i] = score;
            }
            left = rest;
        }
        Ok(scores)
    }

    /// All images at once: every image gets as many rows as the one with the most texts.
    fn score_batch(&self, images: &[Pixels], texts: &[Vec<Encoded>]) -> Result<Vec<Vec<ScoredText>>> {
        let most = texts.iter().map(Vec::len).max().unwrap_or(0);
        if most == 0 {
            return Ok(vec![Vec::new(); images.len()]);
        }
        let states = self.med.encode_images(images)?;
        let cross = self.med.encoder_cross_cache(&states)?;
        let filler = self.encode("")?;
        let rows: Vec<&Encoded> =
            texts.iter().flat_map(|texts| texts.iter().chain(std::iter::repeat(&filler)).take(most)).collect();
        let longest = rows.iter().map(|row| row.itc.len()).max().unwrap_or(0);
        let scores = self.score_rows(&states, &cross, &rows, self.padded(longest))?;
        Ok(scores.chunks(most).zip(texts).map(|(scores, texts)| scores[..texts.len()].to_vec()).collect())
    }

    /// Rows are image-major, equally many per image.
    fn score_rows(&self, states: &Tensor, cross: &CrossCache, rows: &[&Encoded], width: usize) -> Result<Vec<ScoredText>> {
        let (pad, device) = (self.tokenizer.pad_id(), self.med.device());
        let itm_rows: Vec<&[u32]> = rows.iter().map(|row| row.itm.as_slice()).collect();
        let (ids, mask) = TextBatch::pad(&itm_rows, width, pad).tensors(device)?;
        let logits = self.med.itm_logits_cached(&ids, &mask, cross)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;

        let itc_rows: Vec<&[u32]> = rows.iter().map(|row| row.itc.as_slice()).collect();
        let (ids, mask) = TextBatch::pad(&itc_rows, width, pad).tensors(device)?;
        let texts = self.med.text_features(&ids, &mask)?;
        let images = self.med.image_features(states)?;
        let (count, width) = images.dims2()?;
        let texts = texts.reshape((count, rows.len() / count, width))?;
        let cosines = texts.broadcast_mul(&images.unsqueeze(1)?)?.sum(D::Minus1)?;
        let cosines = cosines.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;

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

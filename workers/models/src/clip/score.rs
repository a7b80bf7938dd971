//! How well texts fit their images by the cosine of their features.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::{Clip, ClipTokenizer};
use crate::error::{ModelError, Result};
use crate::preprocess::Pixels;
use crate::tokenizer::TextBatch;

/// Texts are padded to a multiple of this many tokens, so that a text is computed at a length that depends on itself alone.
const LENGTH_STEP: usize = 8;

/// Images that a GPU encodes together; a CPU divides them itself.
const GPU_BATCH: usize = 256;

/// Texts that go through the text transformer together on a CPU thread.
const CPU_CHUNK: usize = 16;

/// CLIPScore of a cosine: `2.5 · max(cosine, 0)` (Hessel et al. 2021, arXiv 2104.08718, section 3).
#[must_use]
pub fn clip_score(cosine: f32) -> f32 {
    2.5 * cosine.max(0.0)
}

/// Scores texts against images.
#[derive(Debug, Clone)]
pub struct ClipScorer {
    clip: Clip,
    tokenizer: ClipTokenizer,
}

impl ClipScorer {
    /// A scorer from a model and its tokenizer.
    ///
    /// # Errors
    /// The tokenizer has more tokens than the model.
    pub fn new(clip: Clip, tokenizer: ClipTokenizer) -> Result<Self> {
        let (size, vocab) = (tokenizer.size(), clip.config().text.vocab_size);
        if size > vocab {
            return Err(ModelError::Config(format!("the tokenizer has {size} tokens, the model only {vocab}")));
        }
        Ok(Self { clip, tokenizer })
    }

    /// The cosine of `texts[i]`, each, with `images[i]`. Each image is encoded once; a text beyond the context length is cut before its
    /// last token.
    ///
    /// A cosine does not depend on the other images and texts: on a CPU bit for bit, on a GPU up to rounding in the matrix product.
    ///
    /// # Errors
    /// There are not as many lists of texts as images, an image has another size than the model takes, or the device fails.
    pub fn score<S: AsRef<str> + Sync>(&self, images: &[Pixels], texts: &[Vec<S>]) -> Result<Vec<Vec<f32>>> {
        if images.len() != texts.len() {
            return Err(ModelError::Input(format!("{} images but {} lists of texts", images.len(), texts.len())));
        }
        if images.is_empty() {
            return Ok(Vec::new());
        }
        let flat: Vec<&str> = texts.iter().flatten().map(AsRef::as_ref).collect();
        let image_features = self.image_features(images)?;
        let text_features = self.text_features(&flat)?;
        let mut next = text_features.iter();
        let scores_of =
            |(image, texts): (&Vec<f32>, &Vec<S>)| next.by_ref().take(texts.len()).map(|text| cosine(image, text)).collect();
        Ok(image_features.iter().zip(texts).map(scores_of).collect())
    }

    /// The features of images, of length 1, in their order.
    ///
    /// # Errors
    /// An image has another size than the model takes, or the device fails.
    pub fn image_features(&self, images: &[Pixels]) -> Result<Vec<Vec<f32>>> {
        let together = if self.clip.device().is_cpu() { images.len().max(1) } else { GPU_BATCH };
        let mut features = Vec::with_capacity(images.len());
        for images in images.chunks(together) {
            features.extend(rows(&self.clip.encode_images(images)?)?);
        }
        Ok(features)
    }

    /// The features of texts, of length 1, in their order.
    ///
    /// # Errors
    /// The tokenizer or the device fails.
    pub fn text_features(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let longest = self.clip.config().text.max_position_embeddings;
        let ids = texts.par_iter().map(|text| self.tokenizer.encode(text, longest)).collect::<Result<Vec<_>>>()?;
        let width = |row: &Vec<u32>| row.len().next_multiple_of(LENGTH_STEP).min(longest);
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&i| width(&ids[i]));
        let chunk = if self.clip.device().is_cpu() { CPU_CHUNK } else { ids.len().max(1) };
        let groups: Vec<&[usize]> =
            order.chunk_by(|&a, &b| width(&ids[a]) == width(&ids[b])).flat_map(|group| group.chunks(chunk)).collect();
        let encode = |group: &&[usize]| {
            let rows_of: Vec<&[u32]> = group.iter().map(|&i| ids[i].as_slice()).collect();
            let batch = TextBatch::pad(&rows_of, width(&ids[group[0]]), self.tokenizer.pad_id());
            let (ids, _) = batch.tensors(self.clip.device())?;
            rows(&self.clip.encode_texts(&ids)?)
        };
        let encoded = match self.clip.device().is_cpu() {
            true => groups.par_iter().map(encode).collect::<Result<Vec<_>>>()?,
            false => groups.iter().map(encode).collect::<Result<Vec<_>>>()?,
        };
        let mut features = vec![Vec::new(); ids.len()];
        for (&i, row) in order.iter().zip(encoded.into_iter().flatten()) {
            features[i] = row;
        }
        Ok(features)
    }
}

fn rows(features: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(features.to_dtype(DType::F32)?.to_vec2()?)
}

/// The cosine of two features of length 1.
#[must_use]
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

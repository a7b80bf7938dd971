//! The captioner: texts of many images grow together, step by step, with cached keys and values.

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::error::{ModelError, Result};
use crate::med::Med;
use crate::preprocess::Pixels;
use crate::sampling::{Sampling, Strategy};
use crate::search::{Hypothesis, Search};
use crate::text::{CrossCache, SelfCache};
use crate::tokenizer::TextTokenizer;

/// Images that a CPU works on together: enough to read the weights once for many rows, few enough for what is kept of each image (BLIP-base
/// at 384 pixels: its states in tiles, 4 MB, 2 in bf16; keys and values of 43 MB where the model is not packed).
const CPU_BATCH: usize = 64;

/// A caption.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Caption {
    /// The text, prompt cut off.
    pub text: String,
    /// The token ids, prompt first and `[SEP]` last unless the caption was cut.
    pub ids: Vec<u32>,
    /// For beams: log-probability of the tokens after the prompt, with the repetition penalty applied, divided by their number to the
    /// power of the length penalty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
}

/// Writes captions for images.
#[derive(Debug, Clone)]
pub struct Captioner {
    med: Med,
    tokenizer: TextTokenizer,
    sampling: Sampling,
    prompt: Vec<u32>,
    /// What the prompt decodes to; cut off from every caption.
    prefix: String,
}

impl Captioner {
    /// A captioner from a model with a decoder, its tokenizer and how to draw.
    ///
    /// # Errors
    /// The model has no decoder, or the settings make no sense for it.
    pub fn new(med: Med, tokenizer: TextTokenizer, sampling: Sampling) -> Result<Self> {
        sampling.check()?;
        if !med.parts().decoder {
            return Err(ModelError::MissingPart { wanted: "captioning", missing: "text_decoder" });
        }
        let longest = med.config().text_config.max_position_embeddings;
        if sampling.max_length > longest {
            return Err(ModelError::Input(format!(
                "max_length {} is more than the {longest} positions of the model",
                sampling.max_length
            )));
        }
        let vocab = med.config().text_config.vocab_size;
        if sampling.strategy == Strategy::Beam && 2 * sampling.beams() >= vocab {
            return Err(ModelError::Input(format!("{} beams are too many for {vocab} tokens", sampling.beams())));
        }
        let prompt = tokenizer.prompt(&sampling.prompt)?;
        if prompt.len() >= sampling.max_length {
            return Err(ModelError::Input(format!(
                "the prompt {:?} takes {} of max_length {} tokens; nothing is left for a caption",
                sampling.prompt,
                prompt.len(),
                sampling.max_length
            )));
        }
        let prefix = tokenizer.decode(&prompt)?;
        Ok(Self { med, tokenizer, sampling, prompt, prefix })
    }

    /// `sampling.captions` captions for each image; beams with the best first.
    ///
    /// Every random choice is keyed by `seed`, the image's key (its sample id), the number of the caption and the position in it. So a
    /// caption does not depend on the other images: on a CPU bit for bit, on a GPU up to rounding in the matrix product.
    ///
    /// # Errors
    /// There are not as many keys as images, an image has another size than the model takes, or the device fails.
    pub fn write(&self, images: &[Pixels], keys: &[&str], seed: u64) -> Result<Vec<Vec<Caption>>> {
        if images.len() != keys.len() {
            return Err(ModelError::Input(format!("{} images but {} keys", images.len(), keys.len())));
        }
        let together = if self.med.device().is_cpu() { CPU_BATCH } else { images.len().max(1) };
        let mut captions = Vec::with_capacity(images.len());
        for (images, keys) in images.chunks(together).zip(keys.chunks(together)) {
            for written in self.decode(images, keys, seed)? {
                captions.push(written.into_iter().map(|written| self.caption_of(written)).collect::<Result<Vec<_>>>()?);
            }
        }
        Ok(captions)
    }

    /// The texts of [`Self::write`].
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn caption(&self, images: &[Pixels], keys: &[&str], seed: u64) -> Result<Vec<Vec<String>>> {
        let written = self.write(images, keys, seed)?;
        Ok(written.into_iter().map(|of_image| of_image.into_iter().map(|caption| caption.text).collect()).collect())
    }

    /// The token ids of [`Self::write`], image-major.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn generate(&self, images: &[Pixels], keys: &[&str], seed: u64) -> Result<Vec<Vec<u32>>> {
        Ok(self.write(images, keys, seed)?.into_iter().flatten().map(|caption| caption.ids).collect())
    }

    fn caption_of(&self, written: Hypothesis) -> Result<Caption> {
        let text = self.tokenizer.decode(&written.ids)?;
        let text = text.strip_prefix(&self.prefix).unwrap_or(&text).trim().to_owned();
        Ok(Caption { text, ids: written.ids, score: written.score })
    }

    /// The captions of images that are in the model together.
    fn decode(&self, images: &[Pixels], keys: &[&str], seed: u64) -> Result<Vec<Vec<Hypothesis>>> {
        let states = self.med.encode_images(images)?;
        let mut batch = Batch {
            searches: keys
                .iter()
                .enumerate()
                .map(|(image, key)| (image, Search::new(&self.sampling, &self.prompt, self.tokenizer.sep_id(), seed, key)))
                .collect(),
            images: self.med.decoder_cross_cache(&states)?,
            tokens: self.med.decoder_self_cache(images.len(), self.sampling.max_length)?,
        };
        drop(states);
        let mut written: Vec<Vec<Hypothesis>> = vec![Vec::new(); images.len()];
        // One row an image until the texts part.
        let mut fresh = self.prompt.repeat(images.len());
        while !fresh.is_empty() {
            let rows = batch.tokens.rows();
            let ids = Tensor::from_vec(fresh, (rows, ()), self.med.device())?;
            let logits = self.med.decode_step(&ids, &mut batch.tokens, &batch.images)?;
            let vocab = logits.dim(1)?;
            let mut logits: Vec<f32> = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            let per_image = rows / batch.searches.len() * vocab;
            batch
                .searches
                .par_iter_mut()
                .zip(logits.par_chunks_mut(per_image))
                .filter(|((_, search), _)| !search.is_done())
                .try_for_each(|((_, search), logits)| search.step(logits, vocab))?;
            fresh = batch.go_on(&mut written)?;
        }
        Ok(written)
    }
}

/// The images that are still in the model.
struct Batch<'a> {
    /// Each with its number.
    searches: Vec<(usize, Search<'a>)>,
    images: CrossCache,
    /// Rows are image-major, equally many per image.
    tokens: SelfCache,
}

impl Batch<'_> {
    /// Makes the rows of the next step out of those of this one and returns their newest tokens; none when all is written.
    ///
    /// Finished images leave when they are enough to pay for the copy; until then they go along, and what comes of them is not looked
    /// at.
    fn go_on(&mut self, written: &mut [Vec<Hypothesis>]) -> Result<Vec<u32>> {
        const WORTH_A_COPY: usize = 4; // one image in four
        let before = self.searches.len();
        let per_image = self.tokens.rows() / before;
        let open = self.searches.iter().filter(|(_, search)| !search.is_done()).count();
        // The number that each image had in this step.
        let mut places: Vec<usize> = (0..before).collect();
        if (before - open) * WORTH_A_COPY >= before {
            let mut place = 0;
            while place < self.searches.len() {
                if self.searches[place].1.is_done() {
                    let (image, search) = self.searches.swap_remove(place);
                    written[image] = search.finish();
                    places.swap_remove(place);
                } else {
                    place += 1;
                }
            }
            if places.is_empty() {
                return Ok(Vec::new());
            }
            self.images.keep(&places)?;
        }
        let (mut parents, mut fresh) = (Vec::new(), Vec::new());
        for ((_, search), place) in self.searches.iter().zip(places) {
            for (row, id) in search.next() {
                // After the first step, all texts go on from the prompt's row.
                parents.push((place * per_image + row.min(per_image - 1)) as u32);
                fresh.push(id);
            }
        }
        self.tokens.keep(&parents)?;
        Ok(fresh)
    }
}

//! The captioner: nucleus sampling in batches, with cached keys and values.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::error::{ModelError, Result};
use crate::med::Med;
use crate::preprocess::Pixels;
use crate::random::Stream;
use crate::sampling::Sampling;
use crate::text::{CrossCache, SelfCache};
use crate::tokenizer::TextTokenizer;

/// Images that one CPU thread decodes together: enough to read the weights once for many rows, fixed so that results never depend on
/// the number of threads.
const CPU_CHUNK: usize = 16;

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

    /// The model.
    #[must_use]
    pub fn med(&self) -> &Med {
        &self.med
    }

    /// `sampling.captions` captions for each image, prompt cut off.
    ///
    /// Every random choice is keyed by `seed`, the image's key (its sample id), the number of the caption and the position in it. So a
    /// caption does not depend on the other images: on a CPU bit for bit, on a GPU up to rounding in the matrix product.
    ///
    /// # Errors
    /// There are not as many keys as images, an image has another size than the model takes, or the device fails.
    pub fn caption(&self, images: &[Pixels], keys: &[&str], seed: u64) -> Result<Vec<Vec<String>>> {
        let ids = self.generate(images, keys, seed)?;
        ids.chunks(self.sampling.captions).map(|rows| rows.iter().map(|ids| self.text(ids)).collect()).collect()
    }

    /// The token ids of the captions, prompt first and `[SEP]` last unless the caption was cut: image-major, `captions` per image.
    ///
    /// # Errors
    /// As [`Self::caption`].
    pub fn generate(&self, images: &[Pixels], keys: &[&str], seed: u64) -> Result<Vec<Vec<u32>>> {
        if images.len() != keys.len() {
            return Err(ModelError::Input(format!("{} images but {} keys", images.len(), keys.len())));
        }
        // A GPU takes everything at once; CPU threads take a chunk each.
        let chunk = if self.med.device().is_cpu() { CPU_CHUNK } else { images.len().max(1) };
        let parts: Vec<Vec<Vec<u32>>> = images
            .par_chunks(chunk)
            .zip(keys.par_chunks(chunk))
            .map(|(images, keys)| self.decode(images, keys, seed))
            .collect::<Result<_>>()?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// Generates for one chunk of images.
    fn decode(&self, images: &[Pixels], keys: &[&str], seed: u64) -> Result<Vec<Vec<u32>>> {
        let per_image = self.sampling.captions;
        let states = self.med.encode_images(images)?;
        let mut batch = Batch::start(self, &states, images.len() * per_image)?;
        let mut streams: Vec<Stream> = keys
            .iter()
            .flat_map(|key| {
                (0..per_image as u64).map(|number| Stream::new("caption", seed, &[key.as_bytes(), &number.to_le_bytes()]))
            })
            .collect();
        let mut texts = vec![Text { ids: self.prompt.clone(), done: false }; streams.len()];

        loop {
            let logits = batch.step(self, &texts)?;
            for (logits, &row) in logits.iter().zip(&batch.rows) {
                let text = &mut texts[row];
                if !text.done {
                    let uniform = streams[row].uniform_at(text.ids.len() as u64);
                    let id = self.sampling.choose(logits, &text.ids, self.tokenizer.sep_id(), uniform)?;
                    text.ids.push(id);
                    text.done = id == self.tokenizer.sep_id() || text.ids.len() >= self.sampling.max_length;
                }
            }
            if texts.iter().all(|text| text.done) {
                return Ok(texts.into_iter().map(|text| text.ids).collect());
            }
            batch.drop_finished(self, &texts)?;
        }
    }

    fn text(&self, ids: &[u32]) -> Result<String> {
        let text = self.tokenizer.decode(ids)?;
        Ok(text.strip_prefix(&self.prefix).unwrap_or(&text).trim().to_owned())
    }
}

/// A text being written.
#[derive(Clone)]
struct Text {
    ids: Vec<u32>,
    done: bool,
}

/// The rows that are still in the model, with their caches.
struct Batch {
    /// For each row of the model's batch, its number among all texts.
    rows: Vec<usize>,
    images: CrossCache,
    tokens: SelfCache,
}

impl Batch {
    fn start(captioner: &Captioner, states: &Tensor, rows: usize) -> Result<Self> {
        Ok(Self {
            rows: (0..rows).collect(),
            images: captioner.med.decoder_cross_cache(states)?,
            tokens: captioner.med.decoder_self_cache(rows, captioner.sampling.max_length)?,
        })
    }

    /// Feeds the tokens that the model has not seen and returns the logits after the last, one vector per row.
    fn step(&mut self, captioner: &Captioner, texts: &[Text]) -> Result<Vec<Vec<f32>>> {
        let seen = self.tokens.length();
        let fresh = if seen == 0 { captioner.prompt.len() } else { 1 };
        // A finished row that waits for the other captions of its image is fed padding; its output is not looked at.
        let pad = captioner.tokenizer.pad_id();
        let ids: Vec<u32> = self
            .rows
            .iter()
            .flat_map(|&row| (seen..seen + fresh).map(move |i| texts[row].ids.get(i).copied().unwrap_or(pad)))
            .collect();
        let ids = Tensor::from_vec(ids, (self.rows.len(), fresh), captioner.med.device())?;
        let logits = captioner.med.decode_step(&ids, &mut self.tokens, &self.images)?;
        Ok(logits.to_dtype(DType::F32)?.to_vec2()?)
    }

    /// Takes images whose captions are all finished out of the batch, when they are enough to pay for the copy.
    fn drop_finished(&mut self, captioner: &Captioner, texts: &[Text]) -> Result<()> {
        const WORTH_A_COPY: usize = 4; // one image in four
        let per_image = captioner.sampling.captions;
        let images = self.rows.len() / per_image;
        let open: Vec<usize> =
            (0..images).filter(|image| self.rows[image * per_image..][..per_image].iter().any(|&row| !texts[row].done)).collect();
        if (images - open.len()) * WORTH_A_COPY < images {
            return Ok(());
        }
        let kept: Vec<usize> = open.iter().flat_map(|image| image * per_image..(image + 1) * per_image).collect();
        let index = |list: &[usize]| {
            let list: Vec<u32> = list.iter().map(|&i| i as u32).collect();
            Tensor::new(list, captioner.med.device())
        };
        self.images = self.images.select(&index(&open)?)?;
        self.tokens = self.tokens.select(&index(&kept)?)?;
        self.rows = kept.into_iter().map(|i| self.rows[i]).collect();
        Ok(())
    }
}

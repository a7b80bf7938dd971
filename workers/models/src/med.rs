//! The multimodal mixture of encoder-decoder (MED) of BLIP (arXiv 2201.12086), in the weight layout of Hugging Face's
//! `BlipForConditionalGeneration` and `BlipForImageTextRetrieval`.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;

use crate::config::{MedConfig, TextConfig};
use crate::error::{ModelError, Result};
use crate::layers::{Around, LayerNorm, Linear, l2_normalize};
use crate::ops::{Activation, Precision};
use crate::preprocess::Pixels;
use crate::text::{CrossCache, SelfCache, TextModel, causal_mask, padding_mask};
use crate::vision::{VisionFamily, VisionModel};

/// Which text parts a MED has. The vision transformer is always there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// The image-grounded decoder with its language-model head: a captioner.
    pub decoder: bool,
    /// The text encoder with the ITC projections and the ITM head: a filter.
    pub encoder: bool,
}

impl Parts {
    /// A captioner: `BlipForConditionalGeneration`.
    pub const CAPTIONER: Self = Self { decoder: true, encoder: false };
    /// A filter: `BlipForImageTextRetrieval`.
    pub const FILTER: Self = Self { decoder: false, encoder: true };
    /// Both on one vision transformer, as in pre-training.
    pub const FULL: Self = Self { decoder: true, encoder: true };
}

/// A MED with its weights on a device.
#[derive(Debug, Clone)]
pub struct Med {
    config: MedConfig,
    device: Device,
    dtype: DType,
    vision: VisionModel,
    decoder: Option<Decoder>,
    encoder: Option<Encoder>,
}

/// The decoder with its language-model head: `text_decoder.*`.
#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    pub(crate) bert: TextModel,
    transform: Linear,
    layer_norm: LayerNorm,
    vocabulary: Linear,
}

#[derive(Debug, Clone)]
struct Encoder {
    bert: TextModel,
    vision_proj: Linear,
    text_proj: Linear,
    itm_head: Linear,
}

impl Med {
    /// Builds the parts from a source of tensors: a file, or the variables of a trainer.
    ///
    /// # Errors
    /// The config is unusable, or a tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(config: &MedConfig, vb: VarBuilder<'_>, parts: Parts) -> Result<Self> {
        let config = config.clone().checked()?;
        let text = &config.text_config;
        let (d_v, d, shared) = (config.vision_config.hidden_size, text.hidden_size, config.image_text_hidden_size);
        let decoder = match parts.decoder {
            true => Some(Decoder::load(text, vb.pp("text_decoder"))?),
            false => None,
        };
        let encoder = match parts.encoder {
            true => Some(Encoder {
                bert: TextModel::load(text, vb.pp("text_encoder"))?,
                vision_proj: Linear::load(d_v, shared, vb.pp("vision_proj"))?,
                text_proj: Linear::load(d, shared, vb.pp("text_proj"))?,
                itm_head: Linear::load(d, 2, vb.pp("itm_head"))?,
            }),
            false => None,
        };
        Ok(Self {
            vision: VisionModel::load(&config.vision_config, VisionFamily::Blip, vb.pp("vision_model"))?,
            decoder,
            encoder,
            device: vb.device().clone(),
            dtype: vb.dtype(),
            config,
        })
    }

    /// Multiplies from now on in tiles, where the processor has instructions for this precision; elsewhere nothing changes. The model must be
    /// in main memory, in f32: what lies between the products stays so. It can no longer be trained. The
    /// projections of ITC and the head of ITM stay as they are.
    ///
    /// # Errors
    /// The model is on another device.
    pub fn pack(&mut self, precision: Precision) -> Result<()> {
        self.vision.pack(precision)?;
        if let Some(decoder) = &mut self.decoder {
            decoder.bert.pack(precision)?;
            decoder.transform.pack(precision)?;
            decoder.vocabulary.pack(precision)?;
        }
        if let Some(encoder) = &mut self.encoder {
            encoder.bert.pack(precision)?;
        }
        Ok(())
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &MedConfig {
        &self.config
    }

    /// The device that holds the weights.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The parts that are there.
    #[must_use]
    pub fn parts(&self) -> Parts {
        Parts { decoder: self.decoder.is_some(), encoder: self.encoder.is_some() }
    }

    /// Normalised pixels `(b, 3, s, s)` to image states `(b, 1 + patches, d_v)`, after the last layer norm.
    ///
    /// # Errors
    /// The images have another size than the config says.
    pub fn encode_image(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(self.vision.forward(pixels)?)
    }

    /// What the transformer sees of normalised pixels `(b, 3, s, s)`, for [`Self::encode_patches`] and [`Self::patch_features`]. Without gradients.
    ///
    /// # Errors
    /// As [`Self::encode_image`].
    pub(crate) fn patches(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(self.vision.patches(pixels)?.detach())
    }

    /// [`Self::encode_image`] from [`Self::patches`].
    ///
    /// # Errors
    /// Shapes do not fit.
    pub(crate) fn encode_patches(&self, patches: &Tensor) -> Result<Tensor> {
        Ok(self.vision.forward_patches(patches)?)
    }

    /// [`Self::encode_image`] for prepared images. On a CPU each image is encoded by itself, several at a time, so that its states do not
    /// depend on the others.
    ///
    /// # Errors
    /// There is no image, or one has another size than the config says.
    pub fn encode_images(&self, images: &[Pixels]) -> Result<Tensor> {
        self.encode_each(&self.patches(&Pixels::stack(images, &self.device)?)?)
    }

    /// [`Self::encode_images`] from [`Self::patches`].
    ///
    /// # Errors
    /// Shapes do not fit.
    pub(crate) fn encode_each(&self, patches: &Tensor) -> Result<Tensor> {
        let images = patches.dim(0)?;
        if !self.device.is_cpu() || images < 2 {
            return self.encode_patches(patches);
        }
        let states = (0..images).into_par_iter().map(|image| self.encode_patches(&patches.narrow(0, image, 1)?));
        Ok(Tensor::cat(&states.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// ITC features `(b, p)` of image states `(b, n, d_v)`: class token, projected, of length 1.
    ///
    /// # Errors
    /// There is no encoder part, or shapes do not fit.
    pub fn image_features(&self, image_states: &Tensor) -> Result<Tensor> {
        let encoder = self.encoder("image features")?;
        Ok(l2_normalize(&encoder.vision_proj.forward(&first(image_states)?)?)?)
    }

    /// [`Self::image_features`] from [`Self::patches`], where no other states of the images are wanted.
    ///
    /// # Errors
    /// There is no encoder part, or shapes do not fit.
    pub(crate) fn patch_features(&self, patches: &Tensor) -> Result<Tensor> {
        let state = self.vision.forward_patches_first(patches)?;
        Ok(l2_normalize(&self.encoder("image features")?.vision_proj.forward(&state)?)?)
    }

    /// ITC features `(b, p)` of texts: ids and mask `(b, t)`, `[CLS]` first; projected, of length 1. No image is seen.
    ///
    /// # Errors
    /// There is no encoder part, or shapes do not fit.
    pub fn text_features(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let encoder = self.encoder("text features")?;
        let mask = padding_mask(mask, self.dtype)?;
        let state = encoder.bert.forward_first(ids, Some(&mask), None)?;
        Ok(l2_normalize(&encoder.text_proj.forward(&state)?)?)
    }

    /// ITM logits `(rows, 2)`, class 1 = match, of texts `(rows, t)` against their image states `(b, n, d_v)`.
    ///
    /// `rows` is `b`, or `b·k` with the `k` texts of an image side by side.
    ///
    /// # Errors
    /// There is no encoder part, or shapes do not fit.
    pub fn itm_logits(&self, ids: &Tensor, mask: &Tensor, image_states: &Tensor) -> Result<Tensor> {
        self.itm_logits_cached(ids, mask, &self.encoder_cross_cache(image_states)?)
    }

    /// [`Self::itm_logits`] with the cache of the images already there.
    ///
    /// # Errors
    /// There is no encoder part, or shapes do not fit.
    pub fn itm_logits_cached(&self, ids: &Tensor, mask: &Tensor, images: &CrossCache) -> Result<Tensor> {
        let encoder = self.encoder("image-text matching")?;
        let mask = padding_mask(mask, self.dtype)?;
        Ok(encoder.itm_head.forward(&encoder.bert.forward_first(ids, Some(&mask), Some(images))?)?)
    }

    /// The cache of image states `(b, n, d_v)` for the image-grounded encoder.
    ///
    /// # Errors
    /// There is no encoder part, or shapes do not fit.
    pub fn encoder_cross_cache(&self, image_states: &Tensor) -> Result<CrossCache> {
        let encoder = self.encoder("image-text matching")?;
        Ok(encoder.bert.cross_cache(image_states)?)
    }

    /// Next-token logits `(rows, t, vocab)` of whole texts `(rows, t)`, `[DEC]` first, given image states `(b, n, d_v)`;
    /// `rows` is `b` or `b·k`, image-major. Padding (`mask` 0) is hidden.
    ///
    /// # Errors
    /// There is no decoder part, or shapes do not fit.
    pub fn lm_logits(&self, ids: &Tensor, mask: &Tensor, image_states: &Tensor) -> Result<Tensor> {
        self.lm_logits_cached(ids, mask, &self.decoder_cross_cache(image_states)?)
    }

    /// [`Self::lm_logits`] with the cache of the images already there.
    ///
    /// # Errors
    /// There is no decoder part, or shapes do not fit.
    pub fn lm_logits_cached(&self, ids: &Tensor, mask: &Tensor, images: &CrossCache) -> Result<Tensor> {
        let decoder = self.decoder("a language model")?;
        let causal = causal_mask(ids.dim(1)?, self.dtype, ids.device())?;
        let mask = padding_mask(mask, self.dtype)?.broadcast_add(&causal)?;
        let states = decoder.bert.forward(ids, Some(&mask), Some(images))?;
        Ok(decoder.logits(&states)?)
    }

    /// The cache of image states `(b, n, d_v)` for the decoder.
    ///
    /// # Errors
    /// There is no decoder part, or shapes do not fit.
    pub fn decoder_cross_cache(&self, image_states: &Tensor) -> Result<CrossCache> {
        let decoder = self.decoder("captioning")?;
        Ok(decoder.bert.cross_cache(image_states)?)
    }

    /// An empty cache for decoding `rows` texts of at most `max_length` tokens.
    ///
    /// # Errors
    /// There is no decoder part, or no memory.
    pub fn decoder_self_cache(&self, rows: usize, max_length: usize) -> Result<SelfCache> {
        let decoder = self.decoder("captioning")?;
        Ok(decoder.bert.self_cache(rows, max_length)?)
    }

    /// Logits `(rows, vocab)` after the last of the new tokens `(rows, t)`; earlier tokens are in the cache.
    ///
    /// # Errors
    /// There is no decoder part, the cache is full, or shapes do not fit.
    pub fn decode_step(&self, ids: &Tensor, cache: &mut SelfCache, images: &CrossCache) -> Result<Tensor> {
        let decoder = self.decoder("captioning")?;
        let states = decoder.bert.forward_cached(ids, cache, images)?;
        let last = states.narrow(1, states.dim(1)? - 1, 1)?.squeeze(1)?;
        Ok(decoder.logits(&last)?)
    }

    fn decoder(&self, wanted: &'static str) -> Result<&Decoder> {
        self.decoder.as_ref().ok_or(ModelError::MissingPart { wanted, missing: "text_decoder" })
    }

    fn encoder(&self, wanted: &'static str) -> Result<&Encoder> {
        self.encoder.as_ref().ok_or(ModelError::MissingPart { wanted, missing: "text_encoder" })
    }
}

impl Decoder {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub(crate) fn load(config: &TextConfig, vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        let (d, vocab) = (config.hidden_size, config.vocab_size);
        let bert = TextModel::load(config, vb.pp("bert"))?;
        let head = vb.pp("cls.predictions");
        // Tied to the word embeddings unless the file says otherwise (the public checkpoints store a copy).
        let weight = match head.contains_tensor("decoder.weight") {
            true => head.get((vocab, d), "decoder.weight")?,
            false => bert.word_embeddings().clone(),
        };
        let bias = head.get_with_hints(vocab, "bias", Init::Const(0.0))?;
        Ok(Self {
            transform: Linear::load(d, d, head.pp("transform.dense"))?,
            layer_norm: LayerNorm::load(d, config.layer_norm_eps, head.pp("transform.LayerNorm"))?,
            vocabulary: Linear::new(weight, bias)?,
            bert,
        })
    }

    /// `(.., d)` to `(.., vocab)`.
    pub(crate) fn logits(&self, states: &Tensor) -> candle_core::Result<Tensor> {
        let hidden = self.transform.forward_with(states, Around { activation: Some(Activation::Gelu), ..Around::default() })?;
        self.vocabulary.forward(&self.layer_norm.forward(&hidden)?)
    }
}

/// The state of the first token: `(b, n, d)` to `(b, d)`.
fn first(states: &Tensor) -> candle_core::Result<Tensor> {
    states.narrow(1, 0, 1)?.squeeze(1)
}

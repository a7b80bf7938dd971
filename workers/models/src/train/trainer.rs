//! One model in training: batches in, changed weights out.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::augment::Augmentation;
use super::losses::{HardNegatives, Matches, itc_loss, itm_loss, lm_loss, similarities};
use super::optimizer::{AdamW, AdamWConfig};
use super::schedule::Schedule;
use crate::checkpoint::Checkpoint;
use crate::config::MedConfig;
use crate::error::{ModelError, Result};
use crate::med::{Med, Parts};
use crate::parameters::fresh_tensors;
use crate::preprocess::{Pixels, Preprocessor};
use crate::tokenizer::{FirstToken, MAX_WORDS, TextTokenizer, clean_caption};

/// Name of the contrastive temperature among the trained variables. It is no part of a checkpoint.
pub(super) const TEMPERATURE: &str = "temperature";

/// Temperature of a run's first step, and the range that it is held in (`models/blip_pretrain.py`).
const FIRST_TEMPERATURE: f32 = 0.07;
const TEMPERATURE_RANGE: (f32, f32) = (0.001, 0.5);

/// What a model is trained to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Writes captions: language-model loss.
    Captioner,
    /// Scores pairs: contrastive and matching loss.
    Filter,
    /// Both on one vision transformer: all three losses, unweighted, as in BLIP's pre-training.
    Med,
}

impl Role {
    /// The parts that a model of this role has.
    #[must_use]
    pub fn parts(self) -> Parts {
        match self {
            Self::Captioner => Parts::CAPTIONER,
            Self::Filter => Parts::FILTER,
            Self::Med => Parts::FULL,
        }
    }
}

/// How the weights of a finished model are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
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
    /// Label smoothing of the language-model loss.
    pub label_smoothing: f32,
    /// Text that the captioner is given and need not write.
    pub prompt: String,
    /// Tokens of a text at most, first and last included; longer ones are cut.
    pub max_tokens: usize,
    /// Image augmentation.
    pub augmentation: Augmentation,
}

/// One image with one of its texts.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Name of the image; keys its augmentation, and examples of the same name are never each other's negatives.
    pub sample_id: &'a str,
    /// How often the image was seen before; keys its augmentation.
    pub epoch: u64,
    /// The text, as it is; it is cleaned as captions are for scoring.
    pub text: &'a str,
    /// RGB8 of the model's image size, row by row.
    pub pixels: &'a [u8],
}

/// Losses of one step; those that the role does not have are `None`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Losses {
    /// Language-model loss in nats per token, label smoothing included.
    pub lm: Option<f32>,
    /// Contrastive loss in nats.
    pub itc: Option<f32>,
    /// Matching loss in nats.
    pub itm: Option<f32>,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Losses of its batch, before the update.
    pub losses: Losses,
    /// Learning rate.
    pub rate: f64,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Contrastive temperature after the update.
    pub temperature: Option<f32>,
}

/// Width for which BERT's spread of fresh weights was chosen.
const REFERENCE_WIDTH: f64 = 768.0;

/// Fresh weights for every part of the role.
///
/// A spread of 0.02 suits a width of 768: a matrix then keeps about a third of its input's variance. In a narrow model the same spread
/// lets signals die out from layer to layer (at width 128, cross-attention adds 5 % to a text's states, and matching does not start to
/// learn), so weights are drawn wider by the root of the ratio of widths.
fn drawn(config: &MedConfig, recipe: &Recipe) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = fresh_tensors(config, recipe.role.parts(), recipe.seed, &Device::Cpu)?;
    for (name, tensor) in &mut tensors {
        let of_vision = name.starts_with("vision_model.");
        let width = if of_vision { config.vision_config.hidden_size } else { config.text_config.hidden_size };
        let factor = (REFERENCE_WIDTH / width as f64).sqrt();
        if tensor.rank() > 1 && factor > 1.0 {
            *tensor = (&*tensor * factor)?;
        }
    }
    Ok(tensors)
}

/// A model in training on the CPU, in f32.
#[derive(Debug)]
pub struct Trainer {
    pub(super) recipe: Recipe,
    pub(super) config: MedConfig,
    pub(super) tokenizer: TextTokenizer,
    pub(super) optimizer: AdamW,
    med: Med,
    preprocessor: Preprocessor,
    /// Leading tokens that the language model need not write.
    prompt_tokens: usize,
}

impl Trainer {
    /// A fresh model for this config and tokenizer (the text of a `tokenizer.json`).
    ///
    /// # Errors
    ///
    /// The config, the tokenizer or the recipe is unusable.
    pub fn fresh(config: &MedConfig, tokenizer_json: String, recipe: Recipe) -> Result<Self> {
        let config = config.clone().checked()?;
        let tokenizer = TextTokenizer::from_json(tokenizer_json, &config.text_config, Path::new("tokenizer.json"))?;
        let tensors = drawn(&config, &recipe)?;
        let preprocessor = Preprocessor::new(config.vision_config.image_size);
        Self::new(config, tensors, tokenizer, preprocessor, recipe)
    }

    /// Goes on from a checkpoint. Parts that the role does not need are left out; of those that the checkpoint lacks, a text transformer
    /// starts as a copy of the one that is there, and the rest is drawn afresh.
    ///
    /// BLIP trains encoder and decoder as one transformer but for their self-attention. The copy brings a filter the cross-attention of a
    /// captioner; from random weights, matching begins to learn only after hundreds of steps.
    ///
    /// # Errors
    ///
    /// The checkpoint or the recipe is unusable.
    pub fn from_checkpoint(checkpoint: &Checkpoint, recipe: Recipe) -> Result<Self> {
        const ENCODER: &str = "text_encoder.";
        const DECODER: &str = "text_decoder.bert.";
        let config = checkpoint.config()?.clone();
        let stored = checkpoint.tensors(&Device::Cpu)?;
        let copied = |name: &str| {
            let twin = match name.strip_prefix(ENCODER) {
                Some(rest) => format!("{DECODER}{rest}"),
                None => format!("{ENCODER}{}", name.strip_prefix(DECODER)?),
            };
            stored.get(&twin).cloned()
        };
        let mut tensors = drawn(&config, &recipe)?;
        for (name, tensor) in &mut tensors {
            if let Some(known) = stored.get(name).cloned().or_else(|| copied(name)) {
                *tensor = known;
            }
        }
        // The untied weight of the language-model head is there only in files that have it.
        if recipe.role.parts().decoder {
            tensors.extend(stored.into_iter().filter(|(name, _)| name.starts_with("text_decoder.")));
        }
        Self::new(config, tensors, checkpoint.tokenizer()?, checkpoint.preprocessor()?, recipe)
    }

    fn new(
        config: MedConfig,
        tensors: BTreeMap<String, Tensor>,
        tokenizer: TextTokenizer,
        preprocessor: Preprocessor,
        recipe: Recipe,
    ) -> Result<Self> {
        recipe.schedule.check()?;
        let longest = config.text_config.max_position_embeddings;
        let prompt_tokens = tokenizer.prompt(&recipe.prompt)?.len();
        if recipe.max_tokens > longest || recipe.max_tokens < prompt_tokens + 2 {
            return Err(ModelError::Config(format!(
                "texts of {} tokens do not fit between the prompt of {prompt_tokens} tokens and the {longest} positions of the model",
                recipe.max_tokens
            )));
        }
        let mut variables = tensors
            .into_iter()
            .map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let tensors: HashMap<String, Tensor> =
            variables.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone())).collect();
        let med = Med::load(&config, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), recipe.role.parts())?;
        if recipe.role.parts().encoder {
            variables.insert(TEMPERATURE.to_owned(), Var::new(FIRST_TEMPERATURE, &Device::Cpu)?);
        }
        let optimizer = AdamW::new(variables, recipe.optimizer)?;
        Ok(Self { recipe, config, tokenizer, optimizer, med, preprocessor, prompt_tokens })
    }

    /// Steps made so far, those of earlier processes included.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Side of the images that it takes.
    #[must_use]
    pub fn image_size(&self) -> usize {
        self.config.vision_config.image_size
    }

    /// One update on one batch.
    ///
    /// # Errors
    ///
    /// The batch is empty, an image has another size than the model takes, or [`ModelError::Training`] when the loss is no longer
    /// finite.
    pub fn step(&mut self, examples: &[Example<'_>]) -> Result<StepReport> {
        let (losses, total) = self.losses(examples)?;
        let step = self.optimizer.steps();
        let rate = self.recipe.schedule.rate(step);
        let gradients = total.backward()?;
        let gradient_norm = self.optimizer.step(&gradients, rate)?;
        let temperature = self.hold_temperature()?;
        Ok(StepReport { step: step + 1, losses, rate, gradient_norm, temperature })
    }

    /// The losses of a batch and their sum.
    pub(super) fn losses(&self, examples: &[Example<'_>]) -> Result<(Losses, Tensor)> {
        if examples.is_empty() {
            return Err(ModelError::Input("a batch needs at least one example".to_owned()));
        }
        let pixels = examples.par_iter().map(|example| self.pixels(example)).collect::<Result<Vec<_>>>()?;
        let texts: Vec<String> = examples.iter().map(|example| clean_caption(example.text, MAX_WORDS)).collect();
        let states = self.med.encode_images(&pixels)?;

        let mut losses = Losses::default();
        let mut terms = Vec::new();
        if self.recipe.role.parts().decoder {
            let lm = self.lm(&states, &texts)?;
            losses.lm = Some(lm.to_scalar()?);
            terms.push(lm);
        }
        if self.recipe.role.parts().encoder {
            let images: Vec<&str> = examples.iter().map(|example| example.sample_id).collect();
            let (itc, itm) = self.itc_itm(&states, &images, &texts)?;
            (losses.itc, losses.itm) = (Some(itc.to_scalar()?), Some(itm.to_scalar()?));
            terms.extend([itc, itm]);
        }
        let mut total = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for term in &terms {
            total = (total + term)?;
        }
        if !total.to_scalar::<f32>()?.is_finite() {
            let reason = format!("the loss is not finite ({losses:?}); lower the learning rate");
            return Err(ModelError::Training { step: self.optimizer.steps(), reason });
        }
        Ok((losses, total))
    }

    fn pixels(&self, example: &Example<'_>) -> Result<Pixels> {
        let side = self.image_size();
        let pixels = self.recipe.augmentation.apply(example.pixels, side, self.recipe.seed, example.sample_id, example.epoch)?;
        let square = side as u32;
        let image = RgbImage::from_raw(square, square, pixels)
            .ok_or_else(|| ModelError::Input(format!("image {} is not {side}x{side}", example.sample_id)))?;
        self.preprocessor.prepare(&image)
    }

    fn lm(&self, states: &Tensor, texts: &[String]) -> Result<Tensor> {
        let texts: Vec<String> = texts.iter().map(|text| format!("{}{text}", self.recipe.prompt)).collect();
        let batch = self.tokenizer.encode_batch(&texts, FirstToken::Dec, self.recipe.max_tokens)?;
        let (ids, mask) = batch.tensors(states.device())?;
        let logits = self.med.lm_logits(&ids, &mask, states)?;
        lm_loss(&logits, &ids, &mask, self.prompt_tokens, self.recipe.label_smoothing)
    }

    /// Contrastive and matching loss.
    fn itc_itm(&self, states: &Tensor, images: &[&str], texts: &[String]) -> Result<(Tensor, Tensor)> {
        let device = states.device();
        let matches = Matches::new(images, &texts.iter().map(String::as_str).collect::<Vec<_>>());
        let (ids, mask) = self.tokenizer.encode_batch(texts, FirstToken::Cls, self.recipe.max_tokens)?.tensors(device)?;
        let temperature = self.variable(TEMPERATURE)?;
        let similarities =
            similarities(&self.med.image_features(states)?, &self.med.text_features(&ids, &mask)?, temperature.as_tensor())?;
        let itc = itc_loss(&similarities, &matches)?;

        let negatives = HardNegatives::draw(&similarities.detach(), &matches, self.recipe.seed, self.optimizer.steps())?;
        let size = texts.len();
        let positives = (0..size).map(|i| (i, i, true));
        let wrong_texts = negatives.text_for_image.iter().enumerate().filter_map(|(i, text)| Some((i, (*text)?, false)));
        let wrong_images = negatives.image_for_text.iter().enumerate().filter_map(|(i, image)| Some(((*image)?, i, false)));
        let rows: Vec<(usize, usize, bool)> = positives.chain(wrong_texts).chain(wrong_images).collect();
        let column =
            |pick: fn(&(usize, usize, bool)) -> usize| Tensor::from_iter(rows.iter().map(|row| pick(row) as u32), device);
        let (of_images, of_texts) = (column(|row| row.0)?, column(|row| row.1)?);
        let labels: Vec<bool> = rows.iter().map(|row| row.2).collect();
        let (ids, mask) = self.tokenizer.encode_batch(texts, FirstToken::Enc, self.recipe.max_tokens)?.tensors(device)?;
        let images = self.med.encoder_cross_cache(states)?.select(&of_images)?;
        let logits = self.med.itm_logits_cached(&ids.index_select(&of_texts, 0)?, &mask.index_select(&of_texts, 0)?, &images)?;
        Ok((itc, itm_loss(&logits, &labels)?))
    }

    fn variable(&self, name: &str) -> Result<&Var> {
        match self.optimizer.slots().get(name) {
            Some(slot) => Ok(&slot.variable),
            None => Err(ModelError::Input(format!("this model does not train {name}"))),
        }
    }

    /// Keeps the temperature in its range and returns it.
    fn hold_temperature(&self) -> Result<Option<f32>> {
        if !self.recipe.role.parts().encoder {
            return Ok(None);
        }
        let variable = self.variable(TEMPERATURE)?;
        let value: f32 = variable.as_tensor().to_scalar()?;
        let held = value.clamp(TEMPERATURE_RANGE.0, TEMPERATURE_RANGE.1);
        if held != value {
            variable.set(&Tensor::new(held, &Device::Cpu)?)?;
        }
        Ok(Some(held))
    }
}

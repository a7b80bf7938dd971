//! The objectives of a MED: ITC, ITM and LM on one pass of the vision transformer (`forward` of `models/blip_pretrain.py`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;

use super::feature_maps::{FeatureMaps, TrunkId};
use super::groups::TextGroups;
use super::losses::{HardNegatives, Key, Matches, contrastive_loss, itm_loss, lm_loss, similarities, soft_targets};
use super::momentum::{Momentum, MomentumFeatures};
use super::words::known_words;
use super::{Losses, Pretrained, Recipe};
use crate::checkpoint::Checkpoint;
use crate::config::MedConfig;
use crate::error::{ModelError, Result};
use crate::med::{Med, Parts};
use crate::parameters::fresh_tensors;
use crate::preprocess::{Pixels, Preprocessor};
use crate::text::CrossCache;
use crate::tokenizer::{FirstToken, TextTokenizer};
use crate::trunk::{self, TRUNK};
use crate::weights::Weights;

/// Name of the contrastive temperature among the trained variables. It is no part of a checkpoint.
pub(super) const TEMPERATURE: &str = "temperature";
/// Temperature of a run's first step, and the range that it is held in (`models/blip_pretrain.py`).
const FIRST_TEMPERATURE: f32 = 0.07;
const TEMPERATURE_RANGE: (f32, f32) = (0.001, 0.5);

/// Width for which BERT's spread of fresh weights was chosen.
const REFERENCE_WIDTH: f64 = 768.0;

/// The word embeddings of the text transformers; where both are there, the second is tied to the first.
const WORDS: [&str; 2] =
    ["text_encoder.embeddings.word_embeddings.weight", "text_decoder.bert.embeddings.word_embeddings.weight"];

const ENCODER: &str = "text_encoder.";
const DECODER: &str = "text_decoder.bert.";

/// The name of the encoder's tensor that a decoder's is the same as, in a MED that has both: all but self-attention
/// (`tie_encoder_decoder_weights`).
fn tied(name: &str) -> Option<String> {
    let rest = name.strip_prefix(DECODER)?;
    (!rest.contains(".attention.")).then(|| format!("{ENCODER}{rest}"))
}

/// Fresh weights for every part of the role.
///
/// A spread of 0.02 suits a width of 768: a matrix then keeps about a third of its input's variance. In a narrow model the same spread
/// lets signals die out from layer to layer (at width 128, cross-attention adds 5 % to a text's states, and matching does not start to
/// learn), so weights are drawn wider by the root of the ratio of widths.
fn drawn(config: &MedConfig, recipe: &Recipe, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = fresh_tensors(config, recipe.role.parts(), recipe.seed, device)?;
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

/// Where a MED in training starts.
pub(super) struct Start {
    pub(super) config: MedConfig,
    pub(super) tokenizer: TextTokenizer,
    pub(super) preprocessor: Preprocessor,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

impl Start {
    /// Fresh weights but for those that are given.
    pub(super) fn fresh(
        config: &MedConfig,
        tokenizer_json: String,
        pretrained: Pretrained<'_>,
        recipe: &Recipe,
        device: &Device,
    ) -> Result<Self> {
        let config = config.clone().checked()?;
        let mut tensors = drawn(&config, recipe, device)?;
        match (config.vision_config.trunk, pretrained.trunk) {
            (Some(kind), Some(folder)) => tensors.extend(trunk::pretrained(kind, Weights::open(folder)?, device)?),
            (None, None) => {}
            (Some(_), None) => return Err(ModelError::Config("a trunk is not trained here: it needs weights".to_owned())),
            (None, Some(_)) => {
                return Err(ModelError::Config("there are weights for a trunk, but the model has none".to_owned()));
            }
        }
        let tokenizer = TextTokenizer::from_json(tokenizer_json, &config.text_config, Path::new("tokenizer.json"))?;
        let table = WORDS.into_iter().find(|table| tensors.contains_key(*table));
        if let Some(drawn) = table.and_then(|table| tensors.get_mut(table))
            && let Some(folder) = pretrained.words
        {
            *drawn = known_words(folder, &tokenizer, drawn, recipe.seed)?;
        }
        Ok(Self { tokenizer, preprocessor: Preprocessor::new(config.vision_config.image_size), tensors, config })
    }

    /// Parts that the role does not need are left out; of those that the checkpoint lacks, a text transformer starts as a copy of the one
    /// that is there, and the rest is drawn afresh.
    pub(super) fn from_checkpoint(checkpoint: &Checkpoint, recipe: &Recipe, device: &Device) -> Result<Self> {
        let config = checkpoint.config()?.clone();
        let stored = checkpoint.tensors(device)?;
        let copied = |name: &str| {
            let twin = match name.strip_prefix(ENCODER) {
                Some(rest) => format!("{DECODER}{rest}"),
                None => format!("{ENCODER}{}", name.strip_prefix(DECODER)?),
            };
            stored.get(&twin).cloned()
        };
        let mut tensors = drawn(&config, recipe, device)?;
        for (name, tensor) in &mut tensors {
            if let Some(known) = stored.get(name).cloned().or_else(|| copied(name)) {
                *tensor = known;
            }
        }
        // The untied weight of the language-model head is there only in files that have it.
        if recipe.role.parts().decoder {
            tensors.extend(stored.into_iter().filter(|(name, _)| name.starts_with("text_decoder.")));
        }
        Ok(Self { config, tokenizer: checkpoint.tokenizer()?, preprocessor: checkpoint.preprocessor()?.stretching(), tensors })
    }
}

/// A MED in training.
#[derive(Debug)]
pub(super) struct MedObjective {
    pub(super) config: MedConfig,
    pub(super) tokenizer: TextTokenizer,
    pub(super) preprocessor: Preprocessor,
    parts: Parts,
    /// What is not trained: the trunk.
    frozen: BTreeMap<String, Tensor>,
    /// Where the trunk's feature maps are kept, if they are.
    feature_maps: Option<(TrunkId, Arc<FeatureMaps>)>,
    /// In f32; of another number type it is made anew for each batch.
    med: Med,
    momentum: Option<Momentum>,
    /// Leading tokens that the language model need not write.
    prompt_tokens: usize,
}

impl MedObjective {
    /// The model, and the variables that it is made of.
    pub(super) fn new(start: Start, recipe: &Recipe, device: &Device) -> Result<(Self, BTreeMap<String, Var>)> {
        let Start { config, tokenizer, preprocessor, tensors } = start;
        let parts = recipe.role.parts();
        let longest = config.text_config.max_position_embeddings;
        let prompt_tokens = tokenizer.prompt(&recipe.prompt)?.len();
        if recipe.max_tokens > longest || recipe.max_tokens < prompt_tokens + 2 {
            return Err(ModelError::Config(format!(
                "texts of {} tokens do not fit between the prompt of {prompt_tokens} tokens and the {longest} positions of the model",
                recipe.max_tokens
            )));
        }
        let both = parts == Parts::FULL;
        let (frozen, trained): (BTreeMap<_, _>, BTreeMap<_, _>) =
            tensors.into_iter().partition(|(name, _)| name.starts_with(TRUNK));
        let mut variables = trained
            .into_iter()
            .filter(|(name, _)| !both || tied(name).is_none())
            .map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        if parts.encoder {
            variables.insert(TEMPERATURE.to_owned(), Var::from_tensor(&Tensor::new(FIRST_TEMPERATURE, device)?)?);
        }
        let med = load(&config, named(&variables, &frozen, parts), parts, DType::F32, device)?;
        let momentum = match recipe.momentum > 0.0 && parts.encoder {
            true => Some(Momentum::new(&config, (&variables, &frozen), recipe.momentum, recipe.queue, (recipe.seed, device))?),
            false => None,
        };
        let feature_maps = None;
        Ok((Self { config, tokenizer, preprocessor, parts, frozen, feature_maps, med, momentum, prompt_tokens }, variables))
    }

    /// From now on the trunk's feature maps are kept.
    pub(super) fn keep_feature_maps(&mut self, maps: Arc<FeatureMaps>) -> Result<()> {
        if !self.frozen.is_empty() {
            self.feature_maps = Some((TrunkId::of(&self.frozen)?, maps));
        }
        Ok(())
    }

    /// What the transformer sees of images.
    fn patches(&self, med: &Med, pixels: &[Pixels], images: &[String], device: &Device) -> Result<Tensor> {
        match &self.feature_maps {
            Some((trunk, maps)) => maps.of(*trunk, (pixels, images, device), |missing| {
                let missing: Vec<Pixels> = missing.iter().map(|place| pixels[*place].clone()).collect();
                med.patches(&Pixels::stack(&missing, device)?)
            }),
            None => med.patches(&Pixels::stack(pixels, device)?),
        }
    }

    /// Before a batch: the momentum encoders follow.
    pub(super) fn follow(&mut self, variables: &BTreeMap<String, Var>) -> Result<()> {
        self.momentum.as_mut().map_or(Ok(()), |momentum| momentum.follow(variables))
    }

    /// The losses of a batch and their sum; `images` names those that `pixels` are of, `texts` are clean. `number` counts batches, `step` updates.
    pub(super) fn losses(
        &mut self,
        recipe: &Recipe,
        variables: &BTreeMap<String, Var>,
        (pixels, images, texts): (&[Pixels], &[String], &[String]),
        (number, step): (u64, u64),
        device: &Device,
    ) -> Result<(Losses, Tensor)> {
        let cast;
        let med = match recipe.dtype {
            DType::F32 => &self.med,
            other => {
                cast = load(&self.config, named(variables, &self.frozen, self.parts), self.parts, other, device)?;
                &cast
            }
        };
        let patches = self.patches(med, pixels, images, device)?;
        let states = med.encode_patches(&patches)?;
        // Cross-attention has the same weights in both text transformers, where there are both.
        let cross = if self.parts.encoder { med.encoder_cross_cache(&states)? } else { med.decoder_cross_cache(&states)? };
        let mut losses = Losses::default();
        let mut terms = Vec::new();
        if self.parts.decoder {
            let texts: Vec<String> = texts.iter().map(|text| format!("{}{text}", recipe.prompt)).collect();
            let lm = self.lm(med, &cross, &texts, recipe)?;
            losses.lm = Some(lm.to_scalar()?);
            terms.push(lm);
        }
        if self.parts.encoder {
            let keys: Vec<Key> = images.iter().zip(texts).map(|(image, text)| Key::new(image, text)).collect();
            let temperature = temperature(variables)?.as_tensor();
            let encoded = self.encode(texts, FirstToken::Cls, recipe)?;
            let groups = self.groups(encoded.iter(), device)?;
            let of_texts = groups.forward(|group| med.text_features(&group.ids, &group.mask))?;
            let of_images = med.image_features(&states)?;
            let theirs = match &self.momentum {
                Some(momentum) => momentum.features(&patches, &groups, &keys)?,
                None => MomentumFeatures::of_batch(&of_images, &of_texts, &keys),
            };
            let matches = Matches::new(&keys, &theirs.keys);
            let image_to_text = similarities(&of_images, &theirs.texts, temperature)?;
            let text_to_image = similarities(&of_texts, &theirs.images, temperature)?;
            let truth = matches.targets(device)?;
            let size = keys.len();
            let (for_images, for_texts) = match (&self.momentum, recipe.alpha_at(step)) {
                (Some(_), alpha) if alpha > 0.0 => {
                    let first_rows = |features: &Tensor| Ok::<_, ModelError>(features.narrow(0, 0, size)?);
                    let by_images = similarities(&first_rows(&theirs.images)?, &theirs.texts, temperature)?;
                    let by_texts = similarities(&first_rows(&theirs.texts)?, &theirs.images, temperature)?;
                    (soft_targets(&by_images, &truth, alpha)?, soft_targets(&by_texts, &truth, alpha)?)
                }
                _ => (truth.clone(), truth),
            };
            let both = (contrastive_loss(&image_to_text, &for_images)? + contrastive_loss(&text_to_image, &for_texts)?)?;
            let itc = (both * 0.5)?;

            let in_batch = |scores: &Tensor| Ok::<_, ModelError>(scores.detach().narrow(1, 0, size)?);
            let negatives =
                HardNegatives::draw(&in_batch(&image_to_text)?, &in_batch(&text_to_image)?, &matches, recipe.seed, number)?;
            let itm = self.itm(med, &cross, texts, &negatives, recipe)?;
            (losses.itc, losses.itm) = (Some(itc.to_scalar()?), Some(itm.to_scalar()?));
            terms.extend([itc, itm]);
            if let Some(momentum) = &mut self.momentum {
                momentum.enqueue(&theirs)?;
            }
        }
        let mut total = Tensor::zeros((), DType::F32, device)?;
        for term in &terms {
            total = (total + term)?;
        }
        Ok((losses, total))
    }

    /// Language-model loss over all tokens of the texts.
    fn lm(&self, med: &Med, cross: &CrossCache, texts: &[String], recipe: &Recipe) -> Result<Tensor> {
        let encoded = self.encode(texts, FirstToken::Dec, recipe)?;
        // The first token and the prompt are given.
        let written = |row: usize| encoded[row].len().saturating_sub(self.prompt_tokens.max(1));
        let all = (0..encoded.len()).map(written).sum::<usize>().max(1);
        let mut sum = Tensor::zeros((), DType::F32, med.device())?;
        for group in self.groups(encoded.iter(), med.device())?.groups() {
            let of_group: usize = group.rows.iter().map(|row| written(*row)).sum();
            if of_group == 0 {
                continue;
            }
            let images = Tensor::from_iter(group.rows.iter().map(|row| *row as u32), med.device())?;
            let logits = med.lm_logits_cached(&group.ids, &group.mask, &cross.select(&images)?)?.to_dtype(DType::F32)?;
            let loss = lm_loss(&logits, &group.ids, &group.mask, self.prompt_tokens, recipe.label_smoothing)?;
            sum = (sum + (loss * (of_group as f64 / all as f64))?)?;
        }
        Ok(sum)
    }

    /// Matching loss of each pair, of each image with a wrong text, and of each text with a wrong image.
    fn itm(&self, med: &Med, cross: &CrossCache, texts: &[String], negatives: &HardNegatives, recipe: &Recipe) -> Result<Tensor> {
        let device = med.device();
        let positives = (0..texts.len()).map(|i| (i, i, true));
        let wrong_texts = negatives.text_for_image.iter().enumerate().filter_map(|(i, text)| Some((i, (*text)?, false)));
        let wrong_images = negatives.image_for_text.iter().enumerate().filter_map(|(i, image)| Some(((*image)?, i, false)));
        let rows: Vec<(usize, usize, bool)> = positives.chain(wrong_texts).chain(wrong_images).collect();
        let labels: Vec<bool> = rows.iter().map(|row| row.2).collect();
        let encoded = self.encode(texts, FirstToken::Enc, recipe)?;
        let logits = self.groups(rows.iter().map(|row| &encoded[row.1]), device)?.forward(|group| {
            let images = Tensor::from_iter(group.rows.iter().map(|row| rows[*row].0 as u32), device)?;
            med.itm_logits_cached(&group.ids, &group.mask, &cross.select(&images)?)
        })?;
        itm_loss(&logits.to_dtype(DType::F32)?, &labels)
    }

    fn encode(&self, texts: &[String], first: FirstToken, recipe: &Recipe) -> Result<Vec<Vec<u32>>> {
        texts.iter().map(|text| self.tokenizer.encode(text, first, recipe.max_tokens)).collect()
    }

    fn groups<'a>(&self, encoded: impl Iterator<Item = &'a Vec<u32>>, device: &Device) -> Result<TextGroups> {
        TextGroups::new(&encoded.map(Vec::as_slice).collect::<Vec<_>>(), self.tokenizer.pad_id(), device)
    }

    /// After an update: the temperature is kept in its range, and told.
    pub(super) fn hold(&self, variables: &BTreeMap<String, Var>) -> Result<Option<f32>> {
        if !self.parts.encoder {
            return Ok(None);
        }
        let variable = temperature(variables)?;
        let value: f32 = variable.as_tensor().to_scalar()?;
        let held = value.clamp(TEMPERATURE_RANGE.0, TEMPERATURE_RANGE.1);
        if held != value {
            variable.set(&Tensor::new(held, variable.device())?)?;
        }
        Ok(Some(held))
    }

    /// What a state holds beside variables and moments.
    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.momentum.as_ref().map_or(Ok(Vec::new()), Momentum::state)
    }

    /// Goes on from [`Self::state`].
    pub(super) fn restore(&mut self, saved: &HashMap<String, Tensor>) -> Result<()> {
        self.momentum.as_mut().map_or(Ok(()), |momentum| momentum.restore(saved))
    }

    /// The tensors of a checkpoint, in Hugging Face's layout: what is tied is there under both names.
    pub(super) fn tensors(&self, variables: &BTreeMap<String, Var>) -> BTreeMap<String, Tensor> {
        let mut tensors = named(variables, &self.frozen, self.parts);
        tensors.remove(TEMPERATURE);
        tensors
    }
}

fn temperature(variables: &BTreeMap<String, Var>) -> Result<&Var> {
    variables.get(TEMPERATURE).ok_or_else(|| ModelError::Input("this model does not train a temperature".to_owned()))
}

/// The variables under all names that they have in a model with these parts, and what is not trained.
fn named(variables: &BTreeMap<String, Var>, frozen: &BTreeMap<String, Tensor>, parts: Parts) -> BTreeMap<String, Tensor> {
    let mut tensors = frozen.clone();
    tensors.extend(variables.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone())));
    if parts == Parts::FULL {
        let twins = variables.iter().filter_map(|(name, variable)| {
            let twin = format!("{DECODER}{}", name.strip_prefix(ENCODER)?);
            tied(&twin).map(|_| (twin, variable.as_tensor().clone()))
        });
        tensors.extend(twins);
    }
    tensors
}

/// The model of these tensors, in this number type but for the trunk: gradients go through the cast.
fn load(config: &MedConfig, tensors: BTreeMap<String, Tensor>, parts: Parts, dtype: DType, device: &Device) -> Result<Med> {
    let cast = |name: &str, tensor: Tensor| if name.starts_with(TRUNK) { Ok(tensor) } else { tensor.to_dtype(dtype) };
    let tensors = tensors.into_iter().map(|(name, tensor)| Ok((name.clone(), cast(&name, tensor)?)));
    let tensors = tensors.collect::<Result<HashMap<String, Tensor>>>()?;
    Med::load(config, VarBuilder::from_tensors(tensors, dtype, device), parts)
}

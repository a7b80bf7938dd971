//! One model in training: batches in, changed weights out.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::clip::{self, ClipObjective};
use super::med::{self, MedObjective};
use super::optimizer::AdamW;
use super::{FeatureMaps, Prepared, Preparer, Recipe, Role};
use crate::checkpoint::Checkpoint;
use crate::clip::ClipConfig;
use crate::config::MedConfig;
use crate::error::{ModelError, Result};
use crate::preprocess::{Pixels, Preprocessor};

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

impl Losses {
    /// Adds the losses of a batch, times its share.
    fn add(&mut self, other: &Self, share: f32) {
        for (sum, new) in [(&mut self.lm, other.lm), (&mut self.itc, other.itc), (&mut self.itm, other.itm)] {
            *sum = new.map(|new| sum.unwrap_or(0.0) + share * new);
        }
    }
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Losses of its batches, before the update.
    pub losses: Losses,
    /// Learning rate.
    pub rate: f64,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Contrastive temperature after the update.
    pub temperature: Option<f32>,
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer {
    pub(super) recipe: Recipe,
    pub(super) optimizer: AdamW,
    pub(super) objective: Objective,
    pub(super) device: Device,
}

/// What is trained, and by which losses.
#[derive(Debug)]
pub(super) enum Objective {
    Med(Box<MedObjective>),
    Clip(Box<ClipObjective>),
}

/// Folders with weights that a fresh MED begins with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pretrained<'a> {
    /// Those of its trunk, which stay as they are: of timm, or of `efficientnet_lite_pytorch`.
    pub trunk: Option<&'a Path>,
    /// A BERT with its vocabulary, whose word embeddings it begins with.
    pub words: Option<&'a Path>,
}

impl Pretrained<'_> {
    fn is_none(self) -> bool {
        self.trunk.is_none() && self.words.is_none()
    }
}

/// The config of a fresh model.
#[derive(Debug, Clone, PartialEq)]
pub enum Architecture {
    /// A captioner, a filter, or both.
    Med(MedConfig),
    /// A CLIP.
    Clip(ClipConfig),
}

impl Trainer {
    /// A fresh model for this config and tokenizer (the text of a `tokenizer.json`), which begins with what is pretrained.
    ///
    /// # Errors
    ///
    /// The config, the tokenizer or the recipe is unusable.
    pub fn fresh(
        config: &Architecture,
        tokenizer_json: String,
        pretrained: Pretrained<'_>,
        recipe: Recipe,
        device: &Device,
    ) -> Result<Self> {
        let (objective, variables) = match (config, recipe.role) {
            (Architecture::Clip(config), Role::Clip) if pretrained.is_none() => {
                Objective::clip(clip::Start::fresh(config, tokenizer_json, &recipe, device)?, device)?
            }
            (Architecture::Med(config), Role::Captioner | Role::Filter | Role::Med) => {
                Objective::med(med::Start::fresh(config, tokenizer_json, pretrained, &recipe, device)?, &recipe, device)?
            }
            (_, role) => return Err(ModelError::Config(format!("no model of this kind becomes a {role:?}"))),
        };
        Self::new(objective, variables, recipe, device)
    }

    /// Goes on from a checkpoint. Parts that the role does not need are left out; of those that the checkpoint lacks, a text transformer
    /// starts as a copy of the one that is there, and the rest is drawn afresh.
    ///
    /// The copy brings a filter the cross-attention of a captioner; from random weights, matching begins to learn only after hundreds of
    /// steps.
    ///
    /// # Errors
    ///
    /// The checkpoint or the recipe is unusable.
    pub fn from_checkpoint(checkpoint: &Checkpoint, recipe: Recipe, device: &Device) -> Result<Self> {
        let (objective, variables) = match recipe.role {
            Role::Clip => Objective::clip(clip::Start::from_checkpoint(checkpoint, device)?, device)?,
            Role::Captioner | Role::Filter | Role::Med => {
                Objective::med(med::Start::from_checkpoint(checkpoint, &recipe, device)?, &recipe, device)?
            }
        };
        Self::new(objective, variables, recipe, device)
    }

    fn new(objective: Objective, variables: BTreeMap<String, Var>, recipe: Recipe, device: &Device) -> Result<Self> {
        recipe.schedule.check()?;
        if recipe.accumulate == 0 {
            return Err(ModelError::Config("a step is made of at least 1 batch".to_owned()));
        }
        let optimizer = AdamW::new(variables, recipe.optimizer)?;
        Ok(Self { recipe, optimizer, objective, device: device.clone() })
    }

    /// Keeps the feature maps of a frozen trunk, where images are not augmented, and takes those that are there.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn keep_feature_maps(&mut self, maps: Arc<FeatureMaps>) -> Result<()> {
        match &mut self.objective {
            Objective::Med(med) if self.recipe.augmentation.is_none() => med.keep_feature_maps(maps),
            _ => Ok(()),
        }
    }

    /// Steps made so far, those of earlier processes included.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Prepares examples for this model.
    #[must_use]
    pub fn preparer(&self) -> Preparer {
        Preparer {
            seed: self.recipe.seed,
            augmentation: self.recipe.augmentation,
            preprocessor: self.objective.preprocessor().clone(),
            // CLIP's tokenizer takes texts as they are.
            clean: matches!(self.objective, Objective::Med(_)),
        }
    }

    /// One update. The examples are cut into as many batches as the recipe accumulates; the gradient is that of the mean of their losses.
    ///
    /// # Errors
    ///
    /// There are fewer examples than batches, or [`ModelError::Training`] when the loss is no longer finite.
    pub fn step(&mut self, examples: &Prepared) -> Result<StepReport> {
        awake(|| self.step_here(examples))
    }

    fn step_here(&mut self, examples: &Prepared) -> Result<StepReport> {
        let step = self.optimizer.steps();
        let (batches, held) = (self.recipe.accumulate, examples.len());
        if held < batches {
            return Err(ModelError::Input(format!("a step of {batches} batches needs as many examples at least, got {held}")));
        }
        let variables = self.variables();
        self.objective.follow(&variables)?;
        let mut losses = Losses::default();
        let mut gradients: Option<Vec<Tensor>> = None;
        for batch in 0..batches {
            let range = batch * held / batches..(batch + 1) * held / batches;
            let (of_batch, total) = self.losses(examples, range, &variables, batch)?;
            losses.add(&of_batch, 1.0 / batches as f32);
            let found = self.optimizer.gradients(&(total * (1.0 / batches as f64))?.backward()?)?;
            gradients = Some(match gradients {
                None => found,
                Some(sums) => sums.iter().zip(&found).map(|(sum, new)| Ok((sum + new)?)).collect::<Result<_>>()?,
            });
        }
        let rate = self.recipe.schedule.rate(step);
        let gradient_norm = self.optimizer.step(&gradients.unwrap_or_default(), rate)?;
        let temperature = self.objective.hold(&variables)?;
        Ok(StepReport { step: step + 1, losses, rate, gradient_norm, temperature })
    }

    /// The losses of one batch of a step, and their sum. The queue takes its features.
    pub(super) fn losses(
        &mut self,
        examples: &Prepared,
        range: Range<usize>,
        variables: &BTreeMap<String, Var>,
        batch: usize,
    ) -> Result<(Losses, Tensor)> {
        let step = self.optimizer.steps();
        let number = step * self.recipe.accumulate as u64 + batch as u64;
        let (pixels, images, texts) = (&examples.pixels[range.clone()], &examples.images[range.clone()], &examples.texts[range]);
        let (recipe, device) = (&self.recipe, &self.device);
        let (losses, total) = match &mut self.objective {
            Objective::Med(med) => med.losses(recipe, variables, (pixels, images, texts), (number, step), device)?,
            Objective::Clip(clip) => clip.losses(recipe, variables, (&Pixels::stack(pixels, device)?, images, texts))?,
        };
        if !total.to_scalar::<f32>()?.is_finite() {
            let reason = format!("the loss is not finite ({losses:?}); lower the learning rate");
            return Err(ModelError::Training { step, reason });
        }
        Ok((losses, total))
    }

    /// The variables by name: handles, not copies.
    pub(super) fn variables(&self) -> BTreeMap<String, Var> {
        self.optimizer.slots().iter().map(|(name, slot)| (name.clone(), slot.variable.clone())).collect()
    }
}

/// Does some work on one of the threads that divide it, while the others look out for pieces of it all the time: those of a step are so small and so many
/// that to wake a thread for each would cost as much as they do.
fn awake<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let done = AtomicBool::new(false);
    let done = &done;
    rayon::scope(|scope| {
        let own = rayon::current_thread_index();
        scope.spawn_broadcast(move |_, thread| {
            while Some(thread.index()) != own && !done.load(Ordering::Acquire) {
                if rayon::yield_now() != Some(rayon::Yield::Executed) {
                    std::thread::yield_now();
                }
            }
        });
        // The others stop also when the work panics.
        let _done = Done(done);
        work()
    })
}

struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

type Made = (Objective, BTreeMap<String, Var>);

impl Objective {
    fn med(start: med::Start, recipe: &Recipe, device: &Device) -> Result<Made> {
        let (objective, variables) = MedObjective::new(start, recipe, device)?;
        Ok((Self::Med(Box::new(objective)), variables))
    }

    fn clip(start: clip::Start, device: &Device) -> Result<Made> {
        let (objective, variables) = ClipObjective::new(start, device)?;
        Ok((Self::Clip(Box::new(objective)), variables))
    }

    fn preprocessor(&self) -> &Preprocessor {
        match self {
            Self::Med(med) => &med.preprocessor,
            Self::Clip(clip) => &clip.preprocessor,
        }
    }

    /// Before a step.
    fn follow(&mut self, variables: &BTreeMap<String, Var>) -> Result<()> {
        match self {
            Self::Med(med) => med.follow(variables),
            Self::Clip(_) => Ok(()),
        }
    }

    /// After an update.
    fn hold(&self, variables: &BTreeMap<String, Var>) -> Result<Option<f32>> {
        match self {
            Self::Med(med) => med.hold(variables),
            Self::Clip(clip) => clip.hold(variables),
        }
    }

    /// What the next step depends on beside variables, moments and its number.
    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        match self {
            Self::Med(med) => med.state(),
            Self::Clip(clip) => Ok(clip.state()),
        }
    }

    /// Goes on from [`Self::state`].
    pub(super) fn restore(&mut self, saved: &HashMap<String, Tensor>) -> Result<()> {
        match self {
            Self::Med(med) => med.restore(saved),
            Self::Clip(clip) => clip.restore(saved),
        }
    }

    /// Writes the model as a checkpoint.
    pub(super) fn save(&self, dir: &Path, variables: &BTreeMap<String, Var>, dtype: DType) -> Result<Checkpoint> {
        match self {
            Self::Med(med) => {
                Checkpoint::save(dir, &med.config, &med.tensors(variables), dtype, med.tokenizer.json(), &med.preprocessor)
            }
            Self::Clip(clip) => {
                let tensors = clip.tensors(variables);
                Checkpoint::save_clip(dir, &clip.config, &tensors, dtype, &clip.tokenizer_json, &clip.preprocessor)
            }
        }
    }

    /// What a state must have been written with.
    pub(super) fn fingerprint(&self) -> [String; 2] {
        match self {
            Self::Med(med) => [format!("{:?}", med.config), med.tokenizer.json().to_owned()],
            Self::Clip(clip) => [format!("{:?}", clip.config), clip.tokenizer_json.clone()],
        }
    }
}

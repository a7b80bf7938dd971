//! Settings of a training run.

use std::num::NonZeroUsize;

use capfilt_models::ModelError;
use capfilt_models::clip::{ClipConfig, ClipFamily, ClipTextConfig, ClipVision, ResNetConfig};
use capfilt_models::config::{MedConfig, TextConfig, VisionConfig};
use capfilt_models::device::{DType, built_for, check_name};
use capfilt_models::special;
use capfilt_models::train::{AdamWConfig, Augmentation, Recipe, Role, Schedule, StoredDType};
use capfilt_models::trunk::TrunkKind;
use serde::{Deserialize, Serialize};

use crate::TrainerError;
use crate::sampler::Mixture;

/// What a run starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// Fresh weights: a new model learns more from a cleaner dataset than an old one does (BLIP, table 13).
    Fresh,
    /// The weights of the parent model; parts that it lacks are drawn afresh.
    Parent,
    /// The same, where the parent is the MED that was pre-trained on the same pairs.
    Med,
}

/// The number type of the passes through a model in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainDType {
    /// Single precision.
    F32,
    /// Half of it, with its range; for GPUs.
    Bf16,
}

impl TrainDType {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// `[worker.trainer]`: where models train and are evaluated, and with how much memory. Another kind of processor or GPU changes the last bits of a model.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainerWorkerConfig {
    /// Where models train and are evaluated: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Memory for images as the model sees them; those beyond it are decoded each time. As much again holds what a frozen trunk makes of them, where
    /// images are not augmented.
    pub memory_mib: u64,
    /// Room for that in the working folder, where the next training finds it.
    pub feature_maps_mib: u64,
    /// Steps after which the state of a training is saved, rounded up to whole log lines; 0 never saves.
    pub checkpoint_every: u64,
    /// Members of a model that are trained at a time on a CPU, each with weights and moments of its own; as many as there are threads, if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub members_at_once: Option<NonZeroUsize>,
}

impl TrainerWorkerConfig {
    /// Checks that the device's name is one.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self) -> Result<(), ModelError> {
        check_name(&self.device)
    }

    /// Checks that this build can work on the device.
    ///
    /// # Errors
    /// The feature that the program must be built with.
    pub fn check_build(&self) -> Result<(), ModelError> {
        built_for(&self.device)
    }
}

impl Default for TrainerWorkerConfig {
    fn default() -> Self {
        Self { device: "cpu".to_owned(), memory_mib: 2048, feature_maps_mib: 4096, checkpoint_every: 500, members_at_once: None }
    }
}

/// Sizes of a fresh model; one width for images and texts, and feed-forward parts four times as wide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSize {
    /// Side of its images in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Width of the hidden states (BLIP base: 768).
    pub width: usize,
    /// Attention heads (BLIP base: 12).
    pub heads: usize,
    /// Blocks of the vision transformer (BLIP base: 12).
    pub vision_layers: usize,
    /// Blocks of the text transformer (BLIP base: 12).
    pub text_layers: usize,
    /// Width of the contrastive space (BLIP base: 256).
    pub projection: usize,
    /// Longest text that it has positions for (BLIP base: 512).
    pub positions: usize,
    /// What stands before the vision transformer: the feature map of a frozen network, with its weights from `trunk_weights`, takes the place of the
    /// patches. `efficientnet_lite0` to `efficientnet_lite4`; for captioners, filters and MEDs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trunk: Option<TrunkKind>,
    /// In place of the vision transformer, for a CLIP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resnet: Option<ResNetSize>,
}

/// Sizes of CLIP's modified ResNet; the heads of its attention pool are 64 wide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResNetSize {
    /// Bottleneck blocks of the four stages (RN50: 3, 4, 6, 3).
    pub layers: [usize; 4],
    /// Channels after the stem (RN50: 64); the last stage has 32 times as many.
    pub width: usize,
}

impl Default for ModelSize {
    /// About two million weights: trains in minutes on two CPU cores.
    fn default() -> Self {
        let tiny = MedConfig::tiny(special::TOKENS.len());
        Self {
            image_size: tiny.vision_config.image_size,
            patch_size: tiny.vision_config.patch_size,
            width: tiny.vision_config.hidden_size,
            heads: tiny.vision_config.num_attention_heads,
            vision_layers: tiny.vision_config.num_hidden_layers,
            text_layers: tiny.text_config.num_hidden_layers,
            projection: tiny.image_text_hidden_size,
            positions: tiny.text_config.max_position_embeddings,
            trunk: None,
            resnet: None,
        }
    }
}

impl ModelSize {
    /// The architecture of a CLIP with a vocabulary of `vocab_size`, whose last token ends a text.
    pub(crate) fn clip(&self, vocab_size: usize) -> ClipConfig {
        let Self { image_size, patch_size, width, heads, .. } = *self;
        let vision = match &self.resnet {
            Some(ResNetSize { layers, width }) => {
                ClipVision::ResNet(ResNetConfig { layers: *layers, width: *width, heads: (width / 2).max(1), image_size })
            }
            None => ClipVision::Vit(VisionConfig {
                hidden_size: width,
                intermediate_size: 4 * width,
                num_hidden_layers: self.vision_layers,
                num_attention_heads: heads,
                image_size,
                patch_size,
                ..VisionConfig::clip()
            }),
        };
        let text = ClipTextConfig {
            vocab_size,
            hidden_size: width,
            intermediate_size: 4 * width,
            num_hidden_layers: self.text_layers,
            num_attention_heads: heads,
            max_position_embeddings: self.positions,
            eos_token_id: vocab_size.saturating_sub(1) as u32,
            ..ClipTextConfig::clip()
        };
        ClipConfig { family: ClipFamily::Clip, vision, text, projection_dim: self.projection }
    }

    /// The architecture, with the vocabulary and special tokens of `parent`, or of a vocabulary of `vocab_size` made by
    /// [`train_wordpiece`](capfilt_models::tokenizer::train_wordpiece).
    pub(crate) fn config(&self, parent: Option<&MedConfig>, vocab_size: usize) -> MedConfig {
        let mut config = MedConfig::tiny(vocab_size);
        if let Some(parent) = parent {
            let theirs = &parent.text_config;
            config.text_config = TextConfig {
                vocab_size: theirs.vocab_size,
                bos_token_id: theirs.bos_token_id,
                pad_token_id: theirs.pad_token_id,
                sep_token_id: theirs.sep_token_id,
                enc_token_id: theirs.enc_token_id,
                ..config.text_config
            };
        }
        let vision = &mut config.vision_config;
        (vision.image_size, vision.patch_size, vision.trunk) = (self.image_size, self.patch_size, self.trunk);
        (vision.hidden_size, vision.intermediate_size) = (self.width, 4 * self.width);
        (vision.num_attention_heads, vision.num_hidden_layers) = (self.heads, self.vision_layers);
        let text = &mut config.text_config;
        (text.hidden_size, text.intermediate_size) = (self.width, 4 * self.width);
        (text.num_attention_heads, text.num_hidden_layers) = (self.heads, self.text_layers);
        text.max_position_embeddings = self.positions;
        config.image_text_hidden_size = self.projection;
        config
    }
}

/// Members that a model may have: each costs a training of its own.
const MOST_MEMBERS: usize = 20;

/// What a model with one member leaves out of its settings.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_one(number: &usize) -> bool {
    *number == 1
}

/// Everything but the pairs that decides what a run ends in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// `captioner` (LM loss), `filter` (ITC and ITM losses), `med` (all three) or `clip` (contrast within the batch).
    pub role: Role,
    /// `fresh`, `parent` or `med`.
    pub init: Init,
    /// Size of a fresh model.
    pub model: ModelSize,
    /// Where the weights of a fresh model's trunk lie: the digest of files in the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trunk_weights: Option<String>,
    /// The same of a BERT and its vocabulary, whose word embeddings a fresh model begins with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub word_weights: Option<String>,
    /// Size of the vocabulary that a fresh model without parent learns from its texts. With a parent, its tokenizer is kept.
    pub vocab_size: usize,
    /// Steps of the run. Exactly one of `steps` and `epochs` is set.
    pub steps: Option<u64>,
    /// Length of the run in passes over the pairs.
    pub epochs: Option<f64>,
    /// Members of the model: where there are several, each is trained on the pairs of all folds but one, and judges those of that one. A model
    /// takes pairs that it was trained on for better than they are. Not for captioners.
    #[serde(skip_serializing_if = "is_one")]
    pub folds: usize,
    /// How often that is done, with another split into folds and other randomness each time. Scores are means over the members that have not seen what
    /// they judge, one of each split.
    #[serde(skip_serializing_if = "is_one")]
    pub repeats: usize,
    /// Pairs in a step.
    pub batch: usize,
    /// Batches that a step's pairs are cut into, one after the other on the device; contrast is within each of them, and with the queue.
    pub accumulate: usize,
    /// Number type of the passes through the model, `f32` or `bf16`; weights, moments and losses stay f32.
    pub dtype: TrainDType,
    /// Decay of the momentum encoders, which contrast is made with; 0 trains without them.
    pub momentum: f64,
    /// Features of earlier pairs that contrast is made with; no more than the run has pairs.
    pub queue: usize,
    /// Share of what the momentum encoders find similar in the targets of contrast.
    pub alpha: f64,
    /// Epochs over which that share rises from 0.
    pub alpha_ramp_epochs: f64,
    /// Highest learning rate.
    pub peak_lr: f64,
    /// Learning rate at the start of the warm-up and at the end.
    pub min_lr: f64,
    /// Steps in which the learning rate rises.
    pub warmup_steps: u64,
    /// Decoupled weight decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Decay of the two moments of `AdamW`.
    pub betas: [f64; 2],
    /// Largest norm of the gradients.
    pub max_grad_norm: f64,
    /// Keys all randomness.
    pub seed: u64,
    /// Label smoothing of the LM loss.
    pub label_smoothing: f32,
    /// What a captioner is given before it writes.
    pub prompt: String,
    /// Tokens of a text at most.
    pub max_tokens: usize,
    /// How often a human-annotated pair is drawn for one draw of another.
    pub human_weight: f64,
    /// How often a text of the web is drawn among the texts of its image; 0 leaves them out.
    pub web_weight: f64,
    /// How often a synthetic text is drawn among the texts of its image; 0 leaves them out.
    pub synthetic_weight: f64,
    /// Shards whose pairs are mixed. No more are read at a time where the images do not all fit into memory.
    pub shuffle_shards: usize,
    /// Least share of the image's area that a random crop keeps; 1 switches cropping off.
    pub crop_min_area: f64,
    /// Whether half of the images are mirrored. Wrong wherever texts say left or right.
    pub flip: bool,
    /// Strength of random distortions of the images (RandAugment, arXiv 1909.13719, with BLIP's list), 0 to 1; 0 switches them off.
    pub distort: f64,
    /// Steps that one line of the training log sums up.
    pub log_every: u64,
    /// How the finished weights are stored.
    pub stored_dtype: StoredDType,
}

impl Default for TrainConfig {
    /// BLIP's settings where it has them (`configs/pretrain.yaml`, `models/blip_pretrain.py`; the crop is that of its fine-tuning). Its gradients
    /// are not clipped.
    fn default() -> Self {
        Self {
            role: Role::Captioner,
            init: Init::Fresh,
            model: ModelSize::default(),
            trunk_weights: None,
            word_weights: None,
            vocab_size: 2_000,
            steps: None,
            epochs: None,
            folds: 1,
            repeats: 1,
            batch: 64,
            accumulate: 1,
            dtype: TrainDType::F32,
            momentum: 0.995,
            queue: 57_600,
            alpha: 0.4,
            alpha_ramp_epochs: 2.0,
            peak_lr: 3e-4,
            min_lr: 1e-6,
            warmup_steps: 100,
            weight_decay: 0.05,
            betas: [0.9, 0.999],
            max_grad_norm: 1.0,
            seed: 0,
            label_smoothing: 0.1,
            prompt: "a picture of ".to_owned(),
            max_tokens: 30,
            human_weight: 1.0,
            web_weight: 1.0,
            synthetic_weight: 1.0,
            shuffle_shards: 16,
            crop_min_area: 0.5,
            flip: false,
            distort: 0.5,
            log_every: 10,
            stored_dtype: StoredDType::F16,
        }
    }
}

impl TrainConfig {
    /// Checks the settings that do not depend on the pairs.
    ///
    /// # Errors
    ///
    /// [`TrainerError::Config`] names the first setting that makes no sense.
    pub fn check(&self) -> Result<(), TrainerError> {
        let fail = |what: String| Err(TrainerError::Config(what));
        if self.steps.is_some() == self.epochs.is_some() {
            return fail("set exactly one of `steps` and `epochs`".to_owned());
        }
        if self.steps == Some(0) || self.epochs.is_some_and(|epochs| !(epochs.is_finite() && epochs > 0.0)) {
            return fail("a run needs more than 0 `steps` or `epochs`".to_owned());
        }
        if self.role == Role::Clip && (self.members() > 1 || self.init == Init::Med) {
            return fail("a CLIP has no `folds` or `repeats`, and starts \"fresh\" or from a \"parent\"".to_owned());
        }
        if self.role != Role::Clip && self.model.resnet.is_some() {
            return fail("`model.resnet` is for CLIPs alone; a MED has a vision transformer".to_owned());
        }
        if self.role == Role::Clip && (self.model.trunk.is_some() || self.word_weights.is_some()) {
            return fail("`model.trunk` and `word_weights` are for captioners, filters and MEDs".to_owned());
        }
        if self.init == Init::Fresh && self.model.trunk.is_some() != self.trunk_weights.is_some() {
            return fail("`model.trunk` and `trunk_weights` go together: a trunk is not trained here".to_owned());
        }
        if self.role == Role::Med && self.init == Init::Med {
            return fail("`init` is \"med\" for the MED itself; use \"fresh\" or \"parent\"".to_owned());
        }
        if !(1..=MOST_MEMBERS).contains(&self.members()) {
            let Self { folds, repeats, .. } = self;
            return fail(format!(
                "`folds` {folds} times `repeats` {repeats} are the members of a model, allowed are 1 to {MOST_MEMBERS}"
            ));
        }
        if self.role == Role::Captioner && self.members() > 1 {
            return fail(
                "`folds` and `repeats` are for filters, and for the MED that they start from; one captioner writes all captions"
                    .to_owned(),
            );
        }
        let contrasts = self.role != Role::Captioner;
        if self.accumulate == 0 || !self.batch.is_multiple_of(self.accumulate) {
            return fail(format!("`accumulate` {} does not cut `batch` {} into equal batches", self.accumulate, self.batch));
        }
        if self.batch / self.accumulate < if contrasts { 2 } else { 1 } {
            let size = self.batch / self.accumulate;
            return fail(format!(
                "`batch` makes batches of {size}, which are too small; contrastive losses need at least 2 pairs"
            ));
        }
        if self.log_every == 0 {
            return fail("`log_every` is 0; every log line sums up at least one step".to_owned());
        }
        let finite = [
            ("weight_decay", self.weight_decay, 0.0..=1.0),
            ("beta 1", self.betas[0], 0.0..=0.9999),
            ("beta 2", self.betas[1], 0.0..=0.99999),
            ("max_grad_norm", self.max_grad_norm, 1e-6..=1e6),
            ("label_smoothing", f64::from(self.label_smoothing), 0.0..=0.9),
            ("momentum", self.momentum, 0.0..=0.999_999),
            ("alpha", self.alpha, 0.0..=1.0),
            ("alpha_ramp_epochs", self.alpha_ramp_epochs, 0.0..=1e6),
            ("human_weight", self.human_weight, 0.0..=1e6),
            ("web_weight", self.web_weight, 0.0..=1e6),
            ("synthetic_weight", self.synthetic_weight, 0.0..=1e6),
            ("crop_min_area", self.crop_min_area, 0.01..=1.0),
            ("distort", self.distort, 0.0..=1.0),
        ];
        if let Some((name, value, range)) = finite.iter().find(|(_, value, range)| !range.contains(value)) {
            return fail(format!("`{name}` is {value}, allowed is {} to {}", range.start(), range.end()));
        }
        Ok(())
    }

    /// Members that the model has.
    pub(crate) const fn members(&self) -> usize {
        self.folds.saturating_mul(self.repeats)
    }

    pub(crate) fn mixture(&self) -> Mixture {
        Mixture { human: self.human_weight, web: self.web_weight, synthetic: self.synthetic_weight }
    }

    /// Steps of a run over `pairs` pairs.
    pub(crate) fn total_steps(&self, pairs: usize) -> u64 {
        match (self.steps, self.epochs) {
            (Some(steps), _) => steps,
            (None, epochs) => (epochs.unwrap_or(1.0) * pairs as f64 / self.batch as f64).ceil().max(1.0) as u64,
        }
    }

    /// The recipe of a run of `steps` steps over `pairs` pairs. A warm-up longer than a tenth of a short run is cut to that, and a queue
    /// that would hold a pair twice to whole batches of the pairs.
    pub(crate) fn recipe(&self, steps: u64, pairs: usize) -> Recipe {
        let (batch, epoch) = (self.batch / self.accumulate, pairs as f64 / self.batch as f64);
        Recipe {
            accumulate: self.accumulate,
            dtype: self.dtype.dtype(),
            momentum: self.momentum,
            queue: self.queue.min(pairs) / batch * batch,
            alpha: self.alpha,
            alpha_ramp: (self.alpha_ramp_epochs * epoch).ceil() as u64,
            role: self.role,
            seed: self.seed,
            schedule: Schedule { peak: self.peak_lr, floor: self.min_lr, warmup_steps: self.warmup_steps.min(steps / 10), steps },
            optimizer: AdamWConfig {
                betas: self.betas,
                weight_decay: self.weight_decay,
                max_grad_norm: self.max_grad_norm,
                ..AdamWConfig::default()
            },
            label_smoothing: self.label_smoothing,
            prompt: self.prompt.clone(),
            max_tokens: self.max_tokens,
            augmentation: Augmentation { min_area: self.crop_min_area, flip: self.flip, distort: self.distort },
        }
    }
}

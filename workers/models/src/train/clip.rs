//! The objective of CLIP: symmetric contrast of images and texts within a batch (arXiv 2103.00020, figure 3).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarBuilder};

use super::losses::{Key, Matches, contrastive_loss};
use super::{Losses, Recipe};
use crate::checkpoint::Checkpoint;
use crate::clip::{Clip, ClipConfig, ClipFamily, ClipTokenizer, ClipVision};
use crate::error::{ModelError, Result};
use crate::parameters::{Parameter, asked_for};
use crate::preprocess::Preprocessor;
use crate::random::Stream;
use crate::tokenizer::TextBatch;

/// The logarithm of the scale that cosines are multiplied with; trained.
const LOGIT_SCALE: &str = "logit_scale";
/// The scale is never more (section 2.5 of the paper).
const MAX_SCALE: f32 = 100.0;
/// What a batch changes and no gradient does.
const RUNNING: [&str; 2] = [".running_mean", ".running_var"];

/// Where a CLIP in training starts.
pub(super) struct Start {
    pub(super) config: ClipConfig,
    pub(super) tokenizer_json: String,
    pub(super) preprocessor: Preprocessor,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

impl Start {
    pub(super) fn fresh(config: &ClipConfig, tokenizer_json: String, recipe: &Recipe, device: &Device) -> Result<Self> {
        let config = config.clone().checked()?;
        let tensors = parameters(&config)?.into_iter().map(|parameter| {
            let tensor = Tensor::from_vec(drawn(&parameter, &config, recipe.seed), parameter.shape, device)?;
            Ok((parameter.name, tensor))
        });
        let tensors = tensors.collect::<Result<_>>()?;
        Ok(Self { preprocessor: Preprocessor::new(config.image_size()), tensors, config, tokenizer_json })
    }

    pub(super) fn from_checkpoint(checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        Ok(Self {
            config: checkpoint.clip_config()?.clone(),
            tokenizer_json: checkpoint.clip_tokenizer()?.json()?,
            preprocessor: checkpoint.preprocessor()?.stretching(),
            tensors: checkpoint.tensors(device)?,
        })
    }
}

/// Every tensor of a CLIP.
fn parameters(config: &ClipConfig) -> Result<Vec<Parameter>> {
    Ok(asked_for(u64::MAX, |vb| Clip::load(config, vb))?.list)
}

/// A fresh tensor by the rules of OpenAI's `clip/model.py` (`initialize_parameters`), drawn from a stream of its own.
fn drawn(parameter: &Parameter, config: &ClipConfig, seed: u64) -> Vec<f32> {
    let (name, shape) = (parameter.name.as_str(), &parameter.shape);
    let count = shape.iter().product();
    if let Init::Const(value) = parameter.init {
        // A residual block of a ResNet starts as nothing.
        let value = if name.ends_with("bn3.weight") { 0.0 } else { value };
        return vec![value as f32; count];
    }
    let in_text = name.starts_with("text_");
    let (width, layers) = match &config.vision {
        ClipVision::Vit(vision) if !in_text => (vision.hidden_size, vision.num_hidden_layers),
        ClipVision::ResNet(vision) if !in_text => (32 * vision.width, 0),
        _ => (config.text.hidden_size, config.text.num_hidden_layers),
    };
    let root = (width as f64).powf(-0.5);
    // Of what goes into a residual sum: as many times smaller as there are sums.
    let share = (2.0 * layers.max(1) as f64).powf(-0.5);
    let fan_in: usize = shape.iter().skip(1).product();
    let spread = match name {
        _ if name.ends_with("token_embedding.weight") => 0.02,
        _ if in_text && name.contains("position_embedding") => 0.01,
        _ if name.ends_with("out_proj.weight") || name.ends_with("fc2.weight") => root * share,
        _ if name.ends_with("fc1.weight") => (2.0 * width as f64).powf(-0.5),
        // The default of convolutions in PyTorch.
        _ if shape.len() == 4 => (3.0 * fan_in as f64).powf(-0.5),
        _ => root,
    };
    let mut stream = Stream::new("fresh weight", seed, &[name.as_bytes()]);
    (0..count).map(|_| (spread * stream.normal()) as f32).collect()
}

/// A CLIP in training.
#[derive(Debug)]
pub(super) struct ClipObjective {
    pub(super) config: ClipConfig,
    pub(super) tokenizer_json: String,
    pub(super) preprocessor: Preprocessor,
    tokenizer: ClipTokenizer,
    /// In f32; of another number type it is made anew for each batch.
    clip: Clip,
    /// Running means and variances.
    running: BTreeMap<String, Var>,
}

impl ClipObjective {
    /// The model, and the variables that it is made of.
    pub(super) fn new(start: Start, device: &Device) -> Result<(Self, BTreeMap<String, Var>)> {
        let Start { config, tokenizer_json, preprocessor, tensors } = start;
        if config.family != ClipFamily::Clip {
            return Err(ModelError::Config("a SigLIP is trained by another loss; start from a CLIP".to_owned()));
        }
        let tokenizer = ClipTokenizer::from_json(&tokenizer_json, None, config.family, Path::new("tokenizer.json"))?;
        if tokenizer.size() > config.text.vocab_size {
            return Err(ModelError::Config(format!(
                "the tokenizer has {} tokens, the model {}",
                tokenizer.size(),
                config.text.vocab_size
            )));
        }
        let variables = tensors.into_iter().map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?)));
        let variables = variables.collect::<Result<BTreeMap<String, Var>>>()?;
        let (running, variables): (BTreeMap<_, _>, BTreeMap<_, _>) =
            variables.into_iter().partition(|(name, _)| RUNNING.iter().any(|end| name.ends_with(end)));
        let clip = load(&config, &variables, &running, DType::F32, device)?;
        Ok((Self { config, tokenizer_json, preprocessor, tokenizer, clip, running }, variables))
    }

    /// The loss of a batch: pixels `(b, 3, s, s)`, the names of the images and their texts.
    pub(super) fn losses(
        &self,
        recipe: &Recipe,
        variables: &BTreeMap<String, Var>,
        (pixels, images, texts): (&Tensor, &[String], &[String]),
    ) -> Result<(Losses, Tensor)> {
        let device = pixels.device();
        let cast;
        let clip = match recipe.dtype {
            DType::F32 => &self.clip,
            other => {
                cast = load(&self.config, variables, &self.running, other, device)?;
                &cast
            }
        };
        let longest = recipe.max_tokens.min(self.config.text.max_position_embeddings);
        let rows = texts.iter().map(|text| self.tokenizer.encode(text, longest)).collect::<Result<Vec<_>>>()?;
        let ids = TextBatch::pad(&rows, 0, self.tokenizer.pad_id());
        let ids = Tensor::from_vec(ids.ids, (rows.len(), ids.width), device)?;
        let (of_images, of_texts) = (clip.image_features(pixels)?, clip.encode_texts(&ids)?);
        let keys: Vec<Key> = images.iter().zip(texts).map(|(image, text)| Key::new(image, text)).collect();
        let truth = Matches::new(&keys, &keys).targets(device)?;
        let scale = scale(variables)?.as_tensor().exp()?;
        let scores = of_images.matmul(&of_texts.t()?)?.broadcast_mul(&scale)?;
        let both = (contrastive_loss(&scores, &truth)? + contrastive_loss(&scores.t()?.contiguous()?, &truth)?)?;
        let itc = (both * 0.5)?;
        Ok((Losses { itc: Some(itc.to_scalar()?), ..Losses::default() }, itc))
    }

    /// After an update: the scale is kept in its range; the temperature, which is its inverse, is told.
    pub(super) fn hold(&self, variables: &BTreeMap<String, Var>) -> Result<Option<f32>> {
        let variable = scale(variables)?;
        let value: f32 = variable.as_tensor().to_scalar()?;
        let held = value.clamp(0.0, MAX_SCALE.ln());
        if held != value {
            variable.set(&Tensor::new(held, variable.device())?)?;
        }
        Ok(Some((-held).exp()))
    }

    /// What a state holds beside variables and moments.
    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        self.running.iter().map(|(name, value)| (format!("running/{name}"), value.as_tensor().clone())).collect()
    }

    /// Goes on from [`Self::state`].
    pub(super) fn restore(&mut self, saved: &HashMap<String, Tensor>) -> Result<()> {
        for (name, value) in &self.running {
            let key = format!("running/{name}");
            let found = saved.get(&key).filter(|tensor| tensor.dims() == value.dims());
            value.set(found.ok_or_else(|| ModelError::Input(format!("the training state has no {key} of this model")))?)?;
        }
        Ok(())
    }

    /// The tensors of a checkpoint.
    pub(super) fn tensors(&self, variables: &BTreeMap<String, Var>) -> BTreeMap<String, Tensor> {
        let all = variables.iter().chain(&self.running);
        all.map(|(name, value)| (name.clone(), value.as_tensor().clone())).collect()
    }
}

fn scale(variables: &BTreeMap<String, Var>) -> Result<&Var> {
    variables.get(LOGIT_SCALE).ok_or_else(|| ModelError::Input("this model does not train a scale".to_owned()))
}

/// The model of these variables, in this number type: gradients go through the cast.
fn load(
    config: &ClipConfig,
    variables: &BTreeMap<String, Var>,
    running: &BTreeMap<String, Var>,
    dtype: DType,
    device: &Device,
) -> Result<Clip> {
    let trained = variables.iter().map(|(name, variable)| Ok((name.clone(), variable.as_tensor().to_dtype(dtype)?)));
    let mut tensors = trained.collect::<Result<HashMap<String, Tensor>>>()?;
    // A batch changes these in place.
    tensors.extend(running.iter().map(|(name, value)| (name.clone(), value.as_tensor().clone())));
    Clip::load(config, VarBuilder::from_tensors(tensors, dtype, device))
}

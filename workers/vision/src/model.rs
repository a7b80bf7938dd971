//! The models that a stage works with: loaded once, kept on a thread of their own until others are asked for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use capfilt_models::ModelError;
use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::clip::{ClipScorer, is_clip};
use capfilt_models::device::{DType, Device, device};
use capfilt_models::generate::Captioner;
use capfilt_models::med::Med;
use capfilt_models::ops::Precision;
use capfilt_models::preprocess::Preprocessor;
use capfilt_models::sampling::Sampling;
use capfilt_models::score::{FilterScorer, ItmToken};
use capfilt_runtime::{ModelThread, StageError, Work};
use capfilt_schemas::Digest;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

/// `[worker.vision]`: what changes the speed of captioning and scoring, and not a byte of their output.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisionWorkerConfig {
    /// Where models run: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
}

impl Default for VisionWorkerConfig {
    fn default() -> Self {
        Self { device: "cpu".to_owned() }
    }
}

/// The number type in which a model computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NumberType {
    /// Single precision.
    F32,
    /// Half of it, with the range of single precision.
    Bf16,
    /// Half of it, with more digits and less range.
    F16,
}

impl NumberType {
    /// What is named, or else what suits the device: `f32` on a CPU, `bf16` on a GPU. `f32` is left out, as it was from tasks when there
    /// was no choice.
    pub(crate) fn settle(named: Option<Self>, worker: &VisionWorkerConfig) -> Option<Self> {
        let usual = if worker.device == "cpu" { Self::F32 } else { Self::Bf16 };
        Some(named.unwrap_or(usual)).filter(|dtype| *dtype != Self::F32)
    }

    /// How the models compute; in `f32` if nothing is named.
    pub(crate) fn of(named: Option<Self>, device: &Device) -> Numbers {
        match named {
            None | Some(Self::F32) => Numbers { stored: DType::F32, packed: None },
            // A CPU keeps single precision between products, which are what costs time.
            Some(Self::Bf16) if device.is_cpu() => Numbers { stored: DType::F32, packed: Some(Precision::Bf16) },
            Some(Self::Bf16) => Numbers { stored: DType::BF16, packed: None },
            Some(Self::F16) => Numbers { stored: DType::F16, packed: None },
        }
    }
}

/// A number type, as a device has it.
#[derive(Clone, Copy)]
pub(crate) struct Numbers {
    stored: DType,
    packed: Option<Precision>,
}

impl Numbers {
    fn med(self, checkpoint: &Checkpoint, device: &Device) -> Result<Med, ModelError> {
        let mut med = checkpoint.med(device, self.stored)?;
        self.packed.map_or(Ok(()), |precision| med.pack(precision))?;
        Ok(med)
    }
}

/// A loaded model and the image transforms that belong to it.
pub(crate) struct Loaded<M> {
    pub(crate) thread: ModelThread<M>,
    pub(crate) preprocessors: Arc<[Preprocessor]>,
}

impl<M> Clone for Loaded<M> {
    fn clone(&self) -> Self {
        Self { thread: self.thread.clone(), preprocessors: Arc::clone(&self.preprocessors) }
    }
}

/// Holds at most one model.
pub(crate) struct ModelSlot<M> {
    name: &'static str,
    config: VisionWorkerConfig,
    slot: Mutex<Option<(String, Loaded<M>)>>,
}

impl<M: 'static> ModelSlot<M> {
    pub(crate) fn new(name: &'static str, config: VisionWorkerConfig) -> Self {
        Self { name, config, slot: Mutex::new(None) }
    }

    /// The model that a task names, made by `make` from the folders of its checkpoint and of `others` when another one (or none) was
    /// there.
    pub(crate) async fn get(
        &self,
        work: &Work,
        others: &[Digest],
        make: impl FnOnce(&[PathBuf], &Device) -> capfilt_models::Result<(M, Vec<Preprocessor>)> + Send + 'static,
    ) -> Result<Loaded<M>, StageError> {
        let digest = work.model()?;
        let key = format!("{digest} {}", work.task.params);
        let mut slot = self.slot.lock().await;
        if let Some((_, loaded)) = slot.as_ref().filter(|(there, _)| *there == key) {
            return Ok(loaded.clone());
        }
        *slot = None;
        let mut folders = vec![work.model_folder(&digest).await?];
        for other in others {
            folders.push(work.model_folder(other).await?);
        }
        let device_name = self.config.device.clone();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let load = move || {
            let made = device(&device_name).and_then(|device| make(&folders, &device));
            let (model, preprocessors) = made.map_err(|e| StageError::caused(e, false))?;
            let _ = sender.send(preprocessors);
            Ok(model)
        };
        let thread = ModelThread::spawn(self.name, load).await?;
        let preprocessors = receiver.await.map_err(|_| StageError::Cancelled)?.into();
        let loaded = Loaded { thread, preprocessors };
        *slot = Some((key, loaded.clone()));
        Ok(loaded)
    }
}

/// A captioner and its image transform, from a checkpoint folder.
pub(crate) fn captioner(
    folder: &Path,
    sampling: Sampling,
    dtype: Option<NumberType>,
    device: &Device,
) -> Result<(Captioner, Preprocessor), ModelError> {
    let checkpoint = Checkpoint::open(folder)?;
    let captioner = Captioner::new(NumberType::of(dtype, device).med(&checkpoint, device)?, checkpoint.tokenizer()?, sampling)?;
    Ok((captioner, checkpoint.preprocessor()?))
}

/// A filter and its image transform, from a checkpoint folder.
pub(crate) fn filter(
    folder: &Path,
    first_token: ItmToken,
    dtype: Option<NumberType>,
    device: &Device,
) -> Result<(FilterScorer, Preprocessor), ModelError> {
    let checkpoint = Checkpoint::open(folder)?;
    let filter =
        FilterScorer::new(NumberType::of(dtype, device).med(&checkpoint, device)?, checkpoint.tokenizer()?, first_token)?;
    Ok((filter, checkpoint.preprocessor()?))
}

/// A CLIP and its image transform, from a checkpoint folder.
pub(crate) fn clip(folder: &Path, dtype: Option<NumberType>, device: &Device) -> Result<(ClipScorer, Preprocessor), ModelError> {
    let Numbers { stored, packed } = NumberType::of(dtype, device);
    let scorer = ClipScorer::open(folder, device, stored, packed)?;
    let preprocessor = Preprocessor::from_dir(folder)?;
    let (made, taken) = (preprocessor.side(), scorer.clip().config().image_size());
    if made != taken {
        let what = format!("{} prepares images of side {made}, its model takes {taken}", folder.display());
        return Err(ModelError::Config(what));
    }
    Ok((scorer, preprocessor))
}

/// Checks that `folder` holds a checkpoint that can play `role` (`captioner`, `filter` or `clip`): every file, every tensor in its place,
/// and, of a captioner or a filter, every number finite.
///
/// # Errors
/// What is missing or does not fit, by name.
pub fn check_checkpoint(folder: &Path, role: &str) -> Result<(), ModelError> {
    if role == "clip" {
        return clip(folder, None, &Device::Cpu).map(|_| ());
    }
    if is_clip(folder) {
        return Err(ModelError::Config(format!("{} is a CLIP model; name it in `models.clip`", folder.display())));
    }
    let checkpoint = Checkpoint::open(folder)?;
    checkpoint.tokenizer()?;
    checkpoint.preprocessor()?;
    let parts = checkpoint.parts();
    if role == "captioner" && !parts.decoder {
        return Err(ModelError::MissingPart { wanted: "a captioner", missing: "text_decoder" });
    }
    if role == "filter" && !parts.encoder {
        return Err(ModelError::MissingPart { wanted: "a filter", missing: "text_encoder" });
    }
    for (name, tensor) in checkpoint.tensors(&Device::Cpu)? {
        if !tensor.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(ModelError::Config(format!(
                "the tensor {name} of {} holds numbers that are not finite",
                folder.display()
            )));
        }
    }
    Ok(())
}

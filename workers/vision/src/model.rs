//! The model that a stage works with: loaded once, kept on a thread of its own until another is asked for.

use std::path::Path;
use std::sync::Arc;

use capfilt_models::checkpoint::{Checkpoint, Family};
use capfilt_models::device::{DType, Device, device};
use capfilt_models::preprocess::Preprocessor;
use capfilt_models::{ModelError, files};
use capfilt_runtime::{ModelThread, StageError, Work};
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

/// A loaded model and the image transform that belongs to it.
pub(crate) struct Loaded<M> {
    pub(crate) thread: ModelThread<M>,
    pub(crate) preprocessor: Arc<Preprocessor>,
}

impl<M> Clone for Loaded<M> {
    fn clone(&self) -> Self {
        Self { thread: self.thread.clone(), preprocessor: Arc::clone(&self.preprocessor) }
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

    /// The model that a task names, made by `make` from its checkpoint when another one (or none) was there.
    pub(crate) async fn get(
        &self,
        work: &Work,
        make: impl FnOnce(&Checkpoint, &Device) -> capfilt_models::Result<M> + Send + 'static,
    ) -> Result<Loaded<M>, StageError> {
        let digest = work.model()?;
        let key = format!("{digest} {}", work.task.params);
        let mut slot = self.slot.lock().await;
        if let Some((_, loaded)) = slot.as_ref().filter(|(there, _)| *there == key) {
            return Ok(loaded.clone());
        }
        *slot = None;
        let folder = work.model_folder(&digest).await?;
        let device_name = self.config.device.clone();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let load = move || {
            let load = || {
                let checkpoint = Checkpoint::open(&folder)?;
                let preprocessor = checkpoint.preprocessor()?;
                Ok((make(&checkpoint, &device(&device_name)?)?, preprocessor))
            };
            let (model, preprocessor) = load().map_err(|e: ModelError| StageError::caused(e, false))?;
            let _ = sender.send(preprocessor);
            Ok(model)
        };
        let thread = ModelThread::spawn(self.name, load).await?;
        let preprocessor = Arc::new(receiver.await.map_err(|_| StageError::Cancelled)?);
        let loaded = Loaded { thread, preprocessor };
        *slot = Some((key, loaded.clone()));
        Ok(loaded)
    }
}

/// Checks that `folder` holds a checkpoint, and one that can play `role` (`captioner` or `filter`) if a role is given: every file, every
/// tensor in its place, and every number finite. One tensor is in memory at a time.
///
/// # Errors
/// What is missing or does not fit, by name.
pub fn check_checkpoint(folder: &Path, role: Option<&str>) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(folder)?;
    match checkpoint.family() {
        Family::Blip(..) => drop(checkpoint.tokenizer()?),
        Family::Clip(_) => drop(checkpoint.clip_tokenizer()?),
    }
    checkpoint.preprocessor()?;
    let parts = checkpoint.parts();
    if role == Some("captioner") && !parts.decoder {
        return Err(ModelError::MissingPart { wanted: "a captioner", missing: "text_decoder" });
    }
    if role == Some("filter") && !parts.encoder {
        return Err(ModelError::MissingPart { wanted: "a filter", missing: "text_encoder" });
    }
    let weights = checkpoint.weights();
    for (name, _) in weights.tensors() {
        let tensor = weights.read(name, &Device::Cpu)?.to_dtype(DType::F32)?;
        if !tensor.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(ModelError::Config(format!(
                "the tensor {name} of {} holds numbers that are not finite",
                folder.display()
            )));
        }
    }
    Ok(())
}

/// The files of a checkpoint in the layout of the store: those of [`files`](capfilt_models::files) that decide what its model does.
///
/// # Errors
/// The checkpoint cannot be opened.
pub fn stored_files(folder: &Path) -> Result<Vec<&'static str>, ModelError> {
    let mut names = vec![files::CONFIG, files::WEIGHTS, files::TOKENIZER, files::PREPROCESSOR];
    // How CLIP's texts are padded; BLIP's padding is in its config.
    if matches!(Checkpoint::open(folder)?.family(), Family::Clip(_)) && folder.join(files::TOKENIZER_CONFIG).is_file() {
        names.push(files::TOKENIZER_CONFIG);
    }
    Ok(names)
}

/// Writes the checkpoint in `folder`, of whatever format, into a new or empty folder as transformers saves one: `config.json`,
/// `model.safetensors`, `tokenizer.json` and `preprocessor_config.json`.
///
/// # Errors
/// It cannot be opened, or the folder not be written.
pub fn write_checkpoint(folder: &Path, target: &Path) -> Result<(), ModelError> {
    Checkpoint::open(folder)?.write(target)
}

/// The number type in which models run on a device.
pub(crate) fn dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

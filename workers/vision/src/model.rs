//! The models that a stage works with: loaded once, kept on a thread of their own until others are asked for.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use capfilt_models::checkpoint::{Checkpoint, Family};
use capfilt_models::clip::ClipScorer;
use capfilt_models::device::{DType, Device, built_for, check_name, device};
use capfilt_models::generate::Captioner;
use capfilt_models::med::{Med, Parts};
use capfilt_models::ops::{Precision, is_fast, multiplies};
use capfilt_models::preprocess::Preprocessor;
use capfilt_models::sampling::Sampling;
use capfilt_models::score::{FilterScorer, Itc, ItmToken};
use capfilt_models::{ModelError, files};
use capfilt_runtime::{ModelThread, StageError, Work};
use capfilt_schemas::Digest;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

/// `[worker.vision]`: where models run. Another kind of processor or GPU changes the last bits of the same number type, and so now and then a
/// word: workers of one run should be alike.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisionWorkerConfig {
    /// Where models run: `cpu`, `cuda` or `cuda:N`.
    pub device: String,
}

impl VisionWorkerConfig {
    /// Checks that the device's name is one.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self) -> Result<(), ModelError> {
        check_name(&self.device)
    }

    /// Checks that the device computes in this number type, if one is named.
    ///
    /// # Errors
    /// It does not, and what to use instead.
    pub fn check_dtype(&self, named: Option<NumberType>) -> Result<(), ModelError> {
        NumberType::of(named, self.device == "cpu").map(drop)
    }

    /// Checks that this build can work on the device.
    ///
    /// # Errors
    /// The feature that the program must be built with.
    pub fn check_build(&self) -> Result<(), ModelError> {
        built_for(&self.device)
    }
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
    /// Products as sums of three products of halves, about as exact as `f32`; on CPUs alone.
    Bf16x3,
    /// Half of it, with more digits and less range; on GPUs alone.
    F16,
    /// Products of 8-bit integers, 32 of them with one scale; on CPUs alone, and never chosen unless named.
    Int8,
}

impl NumberType {
    /// What is named, or else what suits the device: `bf16` on a GPU, `bf16x3` on a CPU with AMX, `f32` on another. `f32` is left out, as
    /// it was from tasks when there was no choice.
    pub(crate) fn settle(named: Option<Self>, worker: &VisionWorkerConfig) -> Option<Self> {
        let usual = match worker.device.as_str() {
            "cpu" if is_fast(Precision::Bf16x3) => Self::Bf16x3,
            "cpu" => Self::F32,
            _ => Self::Bf16,
        };
        Some(named.unwrap_or(usual)).filter(|dtype| *dtype != Self::F32)
    }

    /// How the models compute; in `f32` if nothing is named.
    ///
    /// # Errors
    /// The device does not compute so: a result must be what its task names.
    pub(crate) fn of(named: Option<Self>, on_cpu: bool) -> Result<Numbers, ModelError> {
        // A CPU keeps single precision between products, which are what costs time.
        let packed = |name: &str, precision, instructions: &str| match multiplies(precision) {
            true => Ok(Numbers { stored: DType::F32, packed: Some(precision) }),
            false => Err(ModelError::Input(format!("dtype is {name}, but this processor has no {instructions}; use f32"))),
        };
        let halves = "AMX, nor AVX-512 with instructions for bfloat16";
        let for_cpus = |name: &str| Err(ModelError::Input(format!("dtype is {name}, which is for CPUs; use f32, bf16 or f16")));
        match (named.unwrap_or(Self::F32), on_cpu) {
            (Self::F32, on_cpu) => Ok(Numbers { stored: DType::F32, packed: on_cpu.then_some(Precision::F32) }),
            (Self::Bf16, true) => packed("bf16", Precision::Bf16, halves),
            (Self::Bf16x3, true) => packed("bf16x3", Precision::Bf16x3, halves),
            (Self::Int8, true) => packed("int8", Precision::Int8, "AVX-512 VNNI"),
            (Self::Bf16x3, false) => for_cpus("bf16x3"),
            (Self::Int8, false) => for_cpus("int8"),
            (Self::Bf16, false) => Ok(Numbers { stored: DType::BF16, packed: None }),
            (Self::F16, false) => Ok(Numbers { stored: DType::F16, packed: None }),
            // candle's products in f16 differ with the number of rows: a caption would hang on its batch.
            (Self::F16, true) => {
                Err(ModelError::Input("dtype is f16, which is for GPUs; use f32, bf16x3, bf16 or int8".to_owned()))
            }
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
    let captioner =
        Captioner::new(NumberType::of(dtype, device.is_cpu())?.med(&checkpoint, device)?, checkpoint.tokenizer()?, sampling)?;
    Ok((captioner, checkpoint.preprocessor()?))
}

/// A filter and its image transform, from a checkpoint folder.
pub(crate) fn filter(
    folder: &Path,
    (first_token, itc): (ItmToken, Itc),
    dtype: Option<NumberType>,
    device: &Device,
) -> Result<(FilterScorer, Preprocessor), ModelError> {
    let checkpoint = Checkpoint::open(folder)?;
    let filter = FilterScorer::new(
        NumberType::of(dtype, device.is_cpu())?.med(&checkpoint, device)?,
        checkpoint.tokenizer()?,
        first_token,
    )?;
    Ok((filter.telling(itc, &checkpoint, device)?, checkpoint.preprocessor()?))
}

/// A CLIP and its image transform, from a checkpoint folder.
pub(crate) fn clip(folder: &Path, dtype: Option<NumberType>, device: &Device) -> Result<(ClipScorer, Preprocessor), ModelError> {
    let Numbers { stored, packed } = NumberType::of(dtype, device.is_cpu())?;
    let checkpoint = Checkpoint::open(folder)?;
    let mut clip = checkpoint.clip(device, stored)?;
    packed.map_or(Ok(()), |precision| clip.pack(precision))?;
    Ok((ClipScorer::new(clip, checkpoint.clip_tokenizer()?)?, checkpoint.preprocessor()?))
}

/// Whether `folder` holds a CLIP, and no captioner or filter.
///
/// # Errors
/// It holds no checkpoint.
pub(crate) fn is_clip(folder: &Path) -> Result<bool, ModelError> {
    Ok(matches!(Checkpoint::open(folder)?.family(), Family::Clip(_)))
}

/// What the checkpoint in `folder` is, for people.
///
/// # Errors
/// It holds no checkpoint.
pub fn kind_of(folder: &Path) -> Result<&'static str, ModelError> {
    Ok(match Checkpoint::open(folder)?.family() {
        Family::Blip(_, Parts { decoder: true, encoder: true }) => "captioner and filter (BLIP)",
        Family::Blip(_, Parts { decoder: true, .. }) => "captioner (BLIP)",
        Family::Blip(..) => "filter (BLIP)",
        Family::Vqa(_) => "answers questions (BLIP)",
        Family::Clip(_) => "CLIP",
    })
}

/// Checks that `folder` holds a checkpoint, and one that can play `role` (`captioner`, `filter` or `clip`) if a role is given: every file, every
/// tensor in its place, and every number finite. One tensor is in memory at a time.
///
/// # Errors
/// What is missing or does not fit, by name.
pub fn check_checkpoint(folder: &Path, role: Option<&str>) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(folder)?;
    match checkpoint.family() {
        Family::Blip(..) | Family::Vqa(_) => drop(checkpoint.tokenizer()?),
        Family::Clip(_) => drop(checkpoint.clip_tokenizer()?),
    }
    checkpoint.preprocessor()?;
    let is = |what: &str| Err(ModelError::Config(format!("{} is {what}", folder.display())));
    match (role, checkpoint.family()) {
        (None, _) | (Some("clip"), Family::Clip(_)) => {}
        (Some("clip"), Family::Blip(..) | Family::Vqa(_)) => return is("no CLIP model"),
        (Some(_), Family::Clip(_)) => return is("a CLIP model; name it in `models.clip`"),
        (Some(_), Family::Vqa(_)) => return is("a BLIP that answers questions, neither a captioner nor a filter"),
        (Some(role), Family::Blip(_, parts)) => {
            if role == "captioner" && !parts.decoder {
                return Err(ModelError::MissingPart { wanted: "a captioner", missing: "text_decoder" });
            }
            if role == "filter" && !parts.encoder {
                return Err(ModelError::MissingPart { wanted: "a filter", missing: "text_encoder" });
            }
        }
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
    if folder.join(files::IMAGE_MOMENTS).is_file() {
        names.push(files::IMAGE_MOMENTS);
    }
    Ok(names)
}

/// Whether [`write_checkpoint`] writes a file of this name.
#[must_use]
pub fn is_checkpoint_file(name: &OsStr) -> bool {
    let written =
        [files::CONFIG, files::WEIGHTS, files::TOKENIZER, files::PREPROCESSOR, files::TOKENIZER_CONFIG, files::IMAGE_MOMENTS];
    written.iter().any(|file| name == *file)
}

/// Writes the checkpoint in `folder`, of whatever format, into a new or empty folder as transformers saves one: `config.json`,
/// `model.safetensors`, `tokenizer.json` and `preprocessor_config.json`.
///
/// # Errors
/// It cannot be opened, or the folder not be written.
pub fn write_checkpoint(folder: &Path, target: &Path) -> Result<(), ModelError> {
    Checkpoint::open(folder)?.write(target)
}

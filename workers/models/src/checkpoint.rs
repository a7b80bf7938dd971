//! A checkpoint on disk: a config, weights, a vocabulary and the preparation of images in one directory, as Hugging Face transformers
//! lays it out, or as BLIP's own `.pth` files came.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::clip::{Clip, ClipConfig, ClipFamily, ClipTokenizer, ClipVision, openclip};
use crate::config::MedConfig;
use crate::error::{ModelError, Result, TensorProblem, TensorProblems};
use crate::files::{CONFIG, Files, IMAGE_MOMENTS, OPEN_CLIP_CONFIG, PREPROCESSOR, TOKENIZER_CONFIG, WEIGHTS, read_text};
use crate::med::{Med, Parts};
use crate::moments::ImageMoments;
use crate::original::{infer_config, is_original, translate};
use crate::parameters::{Asked, asked_for};
use crate::preprocess::{self, Preprocessor};
use crate::tokenizer::{self, TextTokenizer};
use crate::vqa::Vqa;
use crate::weights::{Weights, write_file};

const WORDS: &str = "text_decoder.bert.embeddings.word_embeddings.weight";
/// The untied copy of the word embeddings that some files have for the language-model head.
const HEAD_WEIGHT: &str = "text_decoder.cls.predictions.decoder.weight";
const BIAS: &str = "text_decoder.cls.predictions.bias";
/// The same under the name of the head, which some files have.
const HEAD_BIAS: &str = "text_decoder.cls.predictions.decoder.bias";
/// Constants that older files carry along, and what batch norms count in training.
const CONSTANTS: [&str; 3] = [".position_ids", "attn_mask", ".num_batches_tracked"];
/// Tensors by which OpenCLIP's layout, and one with the text side below `text`, are told.
const OPEN_CLIP_FIRST: &str = "visual.conv1.weight";
const OPEN_CLIP_CUSTOM_TEXT: &str = "text.token_embedding.weight";
/// Heads of a filter.
const FILTER_HEADS: [&str; 3] = ["itm_head.", "vision_proj.", "text_proj."];

/// What a checkpoint holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Family {
    /// A MED: a captioner, a filter, or both.
    Blip(MedConfig, Parts),
    /// A BLIP that answers questions.
    Vqa(MedConfig),
    /// A CLIP or SigLIP.
    Clip(ClipConfig),
}

/// An opened checkpoint: its config, and where its tensors lie, checked against each other. The numbers stay on disk.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    family: Family,
    weights: Arc<Weights>,
    /// BLIP's own files came without the preparation of images, which was always the same.
    original: bool,
}

impl Checkpoint {
    /// Opens a checkpoint directory and compares every tensor of its weights with what its config asks for.
    ///
    /// The family is the `model_type` of `config.json`; the weights are those that [`Files::pick`] names. The names of BLIP's own files and
    /// those of OpenCLIP become those of transformers, and without a `config.json` BLIP's are told by their shapes. The parts of a MED
    /// are those that the weights have: `text_decoder.*` makes a captioner, `text_encoder.*` a filter, both a full MED, or, without the
    /// heads of a filter, a model that answers questions.
    ///
    /// # Errors
    /// A file is unreadable, the config is unusable, or tensors are missing, unknown, misshapen or in another format than F32, F16,
    /// BF16: all of them are named.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = Config::of(dir)?;
        let mut weights = Weights::open(dir)?;
        let original = is_original(&weights);
        if original {
            weights = weights.rename(translate)?;
        }
        let family = match config {
            Config::Clip(config) => Family::Clip(config),
            Config::Blip(config) => blip(config, &weights)?,
            Config::None if original => blip(infer_config(&weights, dir)?, &weights)?,
            Config::None => blip(MedConfig::from_dir(dir)?, &weights)?,
        };
        // A config that asks for more than twice what is there does not fit: the tensors until then show it.
        let numbers = weights.numbers().saturating_mul(2).saturating_add(1 << 24);
        let asked = match &family {
            Family::Blip(config, parts) => asked_for(numbers, |vb| Med::load(config, vb, *parts))?,
            Family::Vqa(config) => asked_for(numbers, |vb| Vqa::load(config, vb))?,
            Family::Clip(config) => asked_for(numbers, |vb| Clip::load(config, vb))?,
        };
        if weights.get(OPEN_CLIP_FIRST).is_some() {
            let custom_text = weights.get(OPEN_CLIP_CUSTOM_TEXT).is_some();
            weights = weights.rearrange(asked.list.iter().map(|p| (p.name.clone(), openclip::source(&p.name, custom_text))));
        }
        if weights.get(HEAD_BIAS).is_some() {
            // transformers takes this one where a file has both.
            weights.remove(BIAS);
            weights = weights.rename(|name| Some(if name == HEAD_BIAS { BIAS } else { name }.to_owned()))?;
        }
        same_image_size(&family, &weights)?;
        let problems = compare(asked, &family, &weights);
        if !problems.is_empty() {
            return Err(ModelError::Tensors { path: weights.path().to_owned(), problems: TensorProblems(problems) });
        }
        let constants: Vec<String> =
            weights.tensors().map(|(name, _)| name.to_owned()).filter(|name| is_constant(name)).collect();
        for name in constants {
            weights.remove(&name);
        }
        if weights.get(HEAD_WEIGHT) == weights.get(WORDS) {
            // Two names of the same bytes.
            weights.remove(HEAD_WEIGHT);
        }
        Ok(Self { dir: dir.to_owned(), family, weights: Arc::new(weights), original })
    }

    /// What it holds.
    #[must_use]
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// The config of a MED.
    ///
    /// # Errors
    /// It is another model.
    pub fn config(&self) -> Result<&MedConfig> {
        match &self.family {
            Family::Blip(config, _) => Ok(config),
            Family::Vqa(_) | Family::Clip(_) => Err(self.is_no("captioner or filter")),
        }
    }

    /// The config of a CLIP.
    ///
    /// # Errors
    /// It is another model.
    pub fn clip_config(&self) -> Result<&ClipConfig> {
        match &self.family {
            Family::Clip(config) => Ok(config),
            Family::Blip(..) | Family::Vqa(_) => Err(self.is_no("CLIP")),
        }
    }

    /// The parts of a MED that the weights have; none for another model.
    #[must_use]
    pub fn parts(&self) -> Parts {
        match self.family {
            Family::Blip(_, parts) => parts,
            Family::Vqa(_) | Family::Clip(_) => Parts { decoder: false, encoder: false },
        }
    }

    fn is_no(&self, wanted: &str) -> ModelError {
        ModelError::Config(format!("{} holds no {wanted}", self.dir.display()))
    }

    /// The MED with all its parts on a device; use f32 on a CPU.
    ///
    /// # Errors
    /// It is another model, the device has no memory, or does not know the number type.
    pub fn med(&self, device: &Device, dtype: DType) -> Result<Med> {
        Med::load(self.config()?, self.weights.builder(dtype, device), self.parts())
    }

    /// The CLIP on a device; use f32 on a CPU.
    ///
    /// # Errors
    /// It is another model, the device has no memory, or does not know the number type.
    pub fn clip(&self, device: &Device, dtype: DType) -> Result<Clip> {
        match &self.family {
            Family::Clip(config) => Clip::load(config, self.weights.builder(dtype, device)),
            Family::Blip(..) | Family::Vqa(_) => Err(self.is_no("CLIP")),
        }
    }

    /// The model that answers questions, on a device; use f32 on a CPU.
    ///
    /// # Errors
    /// It is another model, the device has no memory, or does not know the number type.
    pub fn vqa(&self, device: &Device, dtype: DType) -> Result<Vqa> {
        match &self.family {
            Family::Vqa(config) => Vqa::load(config, self.weights.builder(dtype, device)),
            Family::Blip(..) | Family::Clip(_) => Err(self.is_no("model that answers questions")),
        }
    }

    /// The weights under their names in Hugging Face's layout: all that the config asks for, perhaps with an untied language-model
    /// head, and nothing else.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Every tensor as f32, by name, to start training from.
    ///
    /// # Errors
    /// A file became unreadable, or the device has no memory.
    pub fn tensors(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let read = |name: &str| Ok((name.to_owned(), self.weights.read(name, device)?.to_dtype(DType::F32)?));
        self.weights.tensors().map(|(name, _)| read(name)).collect()
    }

    /// The tokenizer of a BLIP.
    ///
    /// # Errors
    /// It is another model, the tokenizer is missing, or as [`TextTokenizer::from_dir`].
    pub fn tokenizer(&self) -> Result<TextTokenizer> {
        let config = match &self.family {
            Family::Blip(config, _) | Family::Vqa(config) => config,
            Family::Clip(_) => return Err(self.is_no("BLIP")),
        };
        TextTokenizer::from_dir(&self.dir, &config.text_config).map_err(|e| self.without_tokenizer(e, "BLIP has one for all"))
    }

    /// The tokenizer of a CLIP.
    ///
    /// # Errors
    /// It is another model, the tokenizer is missing, or as [`ClipTokenizer::from_dir`].
    pub fn clip_tokenizer(&self) -> Result<ClipTokenizer> {
        let Family::Clip(config) = &self.family else { return Err(self.is_no("CLIP")) };
        ClipTokenizer::from_dir(&self.dir, config.family)
            .map_err(|e| self.without_tokenizer(e, "or its vocab.json and merges.txt"))
    }

    fn without_tokenizer(&self, error: ModelError, hint: &str) -> ModelError {
        match error {
            ModelError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                let dir = self.dir.display();
                let what = format!("{dir} has no tokenizer.json; put there that of the model's repository ({hint})");
                ModelError::Tokenizer { what, source: None }
            }
            other => other,
        }
    }

    /// How the image features of what a filter judges are spread.
    ///
    /// # Errors
    /// Nobody knows: it was not trained here; or the file is damaged.
    pub fn image_moments(&self, device: &Device) -> Result<ImageMoments> {
        ImageMoments::read(&self.dir.join(IMAGE_MOMENTS), self.config()?.image_text_hidden_size, device)
    }

    /// The image transform.
    ///
    /// # Errors
    /// As [`Preprocessor::from_dir`], or it makes images of another size than the model takes.
    pub fn preprocessor(&self) -> Result<Preprocessor> {
        let taken = match &self.family {
            Family::Blip(config, _) | Family::Vqa(config) => config.vision_config.image_size,
            Family::Clip(config) => config.image_size(),
        };
        if !preprocess::file(&self.dir).exists() {
            let open_clip = self.dir.join(OPEN_CLIP_CONFIG);
            match self.family {
                Family::Blip(..) | Family::Vqa(_) if self.original => return Ok(Preprocessor::new(taken)),
                Family::Clip(_) if open_clip.exists() => {
                    return Preprocessor::from_open_clip(&read_text(&open_clip)?, taken, &open_clip);
                }
                _ => {}
            }
        }
        let preprocessor = Preprocessor::from_dir(&self.dir)?;
        let made = preprocessor.side();
        if made != taken {
            return Err(ModelError::Config(format!(
                "{} makes images of side {made}, config.json says {taken}",
                preprocess::file(&self.dir).display()
            )));
        }
        Ok(preprocessor)
    }

    /// The sha256 of the checkpoint in hexadecimal: over name, length and content of each of its files that is there.
    ///
    /// # Errors
    /// A file is unreadable.
    pub fn digest(&self) -> Result<String> {
        let mut paths = vec![self.dir.join(CONFIG), self.dir.join(OPEN_CLIP_CONFIG)];
        paths.extend(self.weights.files().map(Path::to_owned));
        paths.extend([tokenizer::file(&self.dir), preprocess::file(&self.dir), self.dir.join(IMAGE_MOMENTS)]);
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        for path in paths.iter().filter(|path| path.exists()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            let io = |source| ModelError::Io { path: path.clone(), source };
            let mut file = File::open(path).map_err(io)?;
            hash.update(file.metadata().map_err(io)?.len().to_le_bytes());
            loop {
                match file.read(&mut buffer).map_err(io)? {
                    0 => break,
                    read => hash.update(&buffer[..read]),
                }
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }

    /// Writes the checkpoint into a new or empty directory as transformers would: one `model.safetensors` with the numbers as they are
    /// stored, `config.json`, `tokenizer.json` and `preprocessor_config.json`. What only training or older programs need is left out.
    /// Same checkpoint, same bytes.
    ///
    /// # Errors
    /// The directory has files or cannot be written, a file is unreadable, or the tokenizer is missing.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let (config_path, tokenizer_path, preprocessor_path) =
            (self.dir.join(CONFIG), tokenizer::file(&self.dir), preprocess::file(&self.dir));
        let json_error = |source| ModelError::Json { path: config_path.clone(), source };
        let mut config = match (config_path.exists(), &self.family) {
            (true, _) => serde_json::from_str::<Value>(&read_text(&config_path)?).map_err(json_error)?,
            (false, Family::Blip(config, _) | Family::Vqa(config)) => serde_json::to_value(config).map_err(json_error)?,
            (false, Family::Clip(config)) => config.to_hugging_face()?,
        };
        if let Value::Object(fields) = &mut config {
            fields.entry("architectures").or_insert_with(|| json!([self.architecture()]));
            fields.entry("model_type").or_insert_with(|| json!("blip"));
        }
        let preprocessor = match preprocessor_path.exists() && preprocessor_path.ends_with(PREPROCESSOR) {
            true => read_text(&preprocessor_path)?,
            false => self.preprocessor()?.to_json(),
        };
        let tokenizer = match &self.family {
            Family::Blip(..) | Family::Vqa(_) => self.tokenizer()?.json().to_owned(),
            Family::Clip(_) if tokenizer_path.exists() => read_text(&tokenizer_path)?,
            Family::Clip(_) => {
                let vocabulary = self.dir.join("vocab.json");
                ClipTokenizer::json_from_merges(&read_text(&vocabulary)?, &read_text(&self.dir.join("merges.txt"))?, &vocabulary)?
            }
        };
        empty_directory(dir)?;
        self.weights.write(&dir.join(WEIGHTS))?;
        write_texts(dir, (CONFIG, &format!("{config:#}")), &tokenizer, &preprocessor)?;
        let settings = self.dir.join(TOKENIZER_CONFIG);
        if matches!(self.family, Family::Clip(_)) && settings.exists() {
            let path = dir.join(TOKENIZER_CONFIG);
            std::fs::write(&path, read_text(&settings)?).map_err(|source| ModelError::Io { path, source })?;
        }
        let moments = self.dir.join(IMAGE_MOMENTS);
        if moments.exists() {
            std::fs::copy(&moments, dir.join(IMAGE_MOMENTS)).map_err(|source| ModelError::Io { path: moments, source })?;
        }
        Ok(())
    }

    /// The class of transformers that opens it.
    fn architecture(&self) -> &'static str {
        match &self.family {
            Family::Blip(_, parts) if parts.decoder => "BlipForConditionalGeneration",
            Family::Blip(..) => "BlipForImageTextRetrieval",
            Family::Vqa(_) => "BlipForQuestionAnswering",
            Family::Clip(config) if config.family == ClipFamily::Siglip => "SiglipModel",
            Family::Clip(_) => "CLIPModel",
        }
    }

    /// Writes a checkpoint into a new or empty directory, weights stored as `dtype`, and opens it. Same arguments, same bytes.
    ///
    /// # Errors
    /// The directory has files, cannot be written, or the tensors do not fit the config.
    pub fn save(
        dir: &Path,
        config: &MedConfig,
        tensors: &BTreeMap<String, Tensor>,
        dtype: DType,
        tokenizer_json: &str,
        preprocessor: &Preprocessor,
    ) -> Result<Self> {
        let config = config.clone().checked()?;
        let json_error = |source| ModelError::Json { path: dir.join(CONFIG), source };
        let text = serde_json::to_string_pretty(&config).map_err(json_error)?;
        empty_directory(dir)?;
        write_tensors(&dir.join(WEIGHTS), tensors, dtype)?;
        write_texts(dir, (CONFIG, &text), tokenizer_json, &preprocessor.to_json())?;
        Self::open(dir)
    }

    /// [`Self::save`] for a CLIP. One with a ResNet is written in OpenCLIP's layout.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_clip(
        dir: &Path,
        config: &ClipConfig,
        tensors: &BTreeMap<String, Tensor>,
        dtype: DType,
        tokenizer_json: &str,
        preprocessor: &Preprocessor,
    ) -> Result<Self> {
        let config = config.clone().checked()?;
        empty_directory(dir)?;
        let preprocessor = preprocessor.to_json();
        match config.to_open_clip() {
            Some(text) => {
                write_tensors(&dir.join(WEIGHTS), &openclip::arrange(tensors)?, dtype)?;
                write_texts(dir, (OPEN_CLIP_CONFIG, &format!("{text:#}")), tokenizer_json, &preprocessor)?;
            }
            None => {
                write_tensors(&dir.join(WEIGHTS), tensors, dtype)?;
                write_texts(dir, (CONFIG, &format!("{:#}", config.to_hugging_face()?)), tokenizer_json, &preprocessor)?;
            }
        }
        Self::open(dir)
    }
}

/// Writes tensors as this number type.
fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>, dtype: DType) -> Result<()> {
    let stored = tensors
        .iter()
        .map(|(name, tensor)| {
            let tensor = tensor.detach().to_device(&Device::Cpu)?;
            Ok((name.as_str(), tensor.to_dtype(dtype)?.contiguous()?))
        })
        .collect::<Result<Vec<_>>>()?;
    write_file(path, stored)
}

/// Makes a directory for a checkpoint: one is written once, into a directory of its own.
fn empty_directory(dir: &Path) -> Result<()> {
    let io = |source| ModelError::Io { path: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(io)?;
    if std::fs::read_dir(dir).map_err(io)?.next().is_some() {
        return Err(ModelError::Input(format!(
            "{} is not empty; a checkpoint is written once, into a directory of its own",
            dir.display()
        )));
    }
    Ok(())
}

fn write_texts(dir: &Path, (name, config): (&str, &str), tokenizer: &str, preprocessor: &str) -> Result<()> {
    for (path, text) in [(dir.join(name), config), (tokenizer::file(dir), tokenizer), (preprocess::file(dir), preprocessor)] {
        std::fs::write(&path, text).map_err(|source| ModelError::Io { path, source })?;
    }
    Ok(())
}

/// What the config of a directory says.
enum Config {
    Blip(MedConfig),
    Clip(ClipConfig),
    /// There is none, but there are weights.
    None,
}

impl Config {
    fn of(dir: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            model_type: Option<String>,
        }
        let path = dir.join(CONFIG);
        if !path.exists() {
            return match () {
                () if dir.join(OPEN_CLIP_CONFIG).exists() => Ok(Self::Clip(ClipConfig::from_dir(dir)?)),
                () if Files::of_folder(dir).is_ok() => Ok(Self::None),
                () => Ok(Self::Blip(MedConfig::from_dir(dir)?)),
            };
        }
        let text = read_text(&path)?;
        let head: Head = serde_json::from_str(&text).map_err(|source| ModelError::Json { path: path.clone(), source })?;
        match head.model_type.as_deref() {
            None | Some("blip") => Ok(Self::Blip(MedConfig::from_dir(dir)?)),
            Some("clip" | "siglip") => Ok(Self::Clip(ClipConfig::from_dir(dir)?)),
            Some(other) => {
                let what = format!("{} has the model_type {other:?}; known are blip, clip and siglip", path.display());
                Err(ModelError::Config(what))
            }
        }
    }
}

/// Which BLIP the weights make.
fn blip(config: MedConfig, weights: &Weights) -> Result<Family> {
    let has = |prefix: &str| weights.tensors().any(|(name, _)| name.starts_with(prefix));
    let parts = Parts { decoder: has("text_decoder."), encoder: has("text_encoder.") };
    match (parts.decoder, parts.encoder) {
        (true, true) if !FILTER_HEADS.iter().any(|head| has(head)) => Ok(Family::Vqa(config)),
        (false, false) => Err(ModelError::Config(format!(
            "{} has neither text_decoder nor text_encoder tensors: it is no BLIP checkpoint",
            weights.path().display()
        ))),
        _ => Ok(Family::Blip(config, parts)),
    }
}

fn is_constant(name: &str) -> bool {
    CONSTANTS.iter().any(|constant| name.ends_with(constant))
}

/// Position embeddings are made for images of one size: a config with another is told so in terms of images.
fn same_image_size(family: &Family, weights: &Weights) -> Result<()> {
    let (vision, name, others) = match family {
        Family::Blip(config, _) | Family::Vqa(config) => (&config.vision_config, "vision_model.embeddings.position_embedding", 1),
        Family::Clip(ClipConfig { vision: ClipVision::Vit(vision), family, .. }) => {
            (vision, "vision_model.embeddings.position_embedding.weight", usize::from(*family == ClipFamily::Clip))
        }
        Family::Clip(_) => return Ok(()),
    };
    let Some(&[.., positions, _]) = weights.get(name).map(|stored| stored.shape()) else { return Ok(()) };
    if positions == vision.num_patches() + others || positions < others {
        return Ok(());
    }
    let side = (positions - others).isqrt() * vision.patch_size;
    Err(ModelError::Config(format!(
        "{} has position embeddings for images of side {side}, config.json says image_size {}; set it, and the size in \
         preprocessor_config.json, to {side}",
        weights.path().display(),
        vision.image_size
    )))
}

/// What is wrong with the tensors of a checkpoint, by name.
fn compare(asked: Asked, family: &Family, weights: &Weights) -> Vec<TensorProblem> {
    let mut wanted: BTreeMap<String, Vec<usize>> =
        asked.list.into_iter().map(|parameter| (parameter.name, parameter.shape)).collect();
    if let Family::Blip(config, Parts { decoder: true, .. }) | Family::Vqa(config) = family {
        let text = &config.text_config;
        if weights.get(HEAD_WEIGHT).is_some() {
            wanted.insert(HEAD_WEIGHT.to_owned(), vec![text.vocab_size, text.hidden_size]);
        }
    }
    let mut problems = BTreeMap::new();
    for (name, expected) in &wanted {
        let name = name.clone();
        let problem = match weights.get(&name) {
            None => TensorProblem::Missing { name: name.clone(), expected: expected.clone() },
            Some(stored) if stored.shape() != expected => {
                TensorProblem::Shape { name: name.clone(), expected: expected.clone(), found: stored.shape().to_vec() }
            }
            Some(stored) if !matches!(stored.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                TensorProblem::Format { name: name.clone(), found: format!("{:?}", stored.dtype()) }
            }
            Some(_) => continue,
        };
        problems.insert(name, problem);
    }
    for (name, stored) in weights.tensors() {
        if !asked.too_much && !wanted.contains_key(name) && !is_constant(name) {
            problems.insert(name.to_owned(), TensorProblem::Unknown { name: name.to_owned(), found: stored.shape().to_vec() });
        }
    }
    problems.into_values().collect()
}

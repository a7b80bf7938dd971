//! A checkpoint on disk: `config.json`, `model.safetensors`, `tokenizer.json` and `preprocessor_config.json` in one directory, as
//! Hugging Face transformers lays it out.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};
use sha2::{Digest, Sha256};

use crate::config::MedConfig;
use crate::error::{ModelError, Result, TensorProblem, TensorProblems};
use crate::med::{Med, Parts};
use crate::parameters::parameters;
use crate::preprocess::{self, Preprocessor};
use crate::tokenizer::{self, TextTokenizer};

/// The untied copy of the word embeddings that some files have for the language-model head.
const HEAD_WEIGHT: &str = "text_decoder.cls.predictions.decoder.weight";
/// A copy of `text_decoder.cls.predictions.bias` that some files have.
const HEAD_BIAS: &str = "text_decoder.cls.predictions.decoder.bias";
/// A constant that older files carry along.
const CONSTANT: &str = ".position_ids";

/// An opened checkpoint: its config, and its weight file in memory, checked against each other.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    config: MedConfig,
    parts: Parts,
    weights: Vec<u8>,
}

impl Checkpoint {
    /// Reads a checkpoint directory and compares every tensor of the file with what `config.json` asks for.
    ///
    /// The parts are those that the file has: `text_decoder.*` makes a captioner, `text_encoder.*` a filter, both a full MED.
    ///
    /// # Errors
    /// A file is unreadable, the config is unusable, or tensors are missing, unknown, misshapen or in another format than F32, F16,
    /// BF16: all of them are named.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = MedConfig::from_dir(dir)?;
        let path = weight_file(dir);
        let weights = read(&path)?;
        let (_, header) =
            SafeTensors::read_metadata(&weights).map_err(|source| ModelError::Weights { path: path.clone(), source })?;
        let has = |prefix: &str| header.offset_keys().iter().any(|name| name.starts_with(prefix));
        let parts = Parts { decoder: has("text_decoder."), encoder: has("text_encoder.") };
        if !parts.decoder && !parts.encoder {
            return Err(ModelError::Config(format!(
                "{} has neither text_decoder nor text_encoder tensors: it is no BLIP checkpoint",
                path.display()
            )));
        }
        let problems = compare(&config, parts, &header)?;
        if !problems.is_empty() {
            return Err(ModelError::Tensors { path, problems: TensorProblems(problems) });
        }
        Ok(Self { dir: dir.to_owned(), config, parts, weights })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The config.
    #[must_use]
    pub fn config(&self) -> &MedConfig {
        &self.config
    }

    /// The parts that the weight file has.
    #[must_use]
    pub fn parts(&self) -> Parts {
        self.parts
    }

    /// The model with all its parts on a device; use f32 on a CPU.
    ///
    /// # Errors
    /// The device has no memory, or does not know the number type.
    pub fn med(&self, device: &Device, dtype: DType) -> Result<Med> {
        let vb = VarBuilder::from_slice_safetensors(&self.weights, dtype, device)?;
        Med::load(&self.config, vb, self.parts)
    }

    /// Every tensor as f32, by name, to start training from.
    ///
    /// # Errors
    /// The device has no memory.
    pub fn tensors(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let vb = VarBuilder::from_slice_safetensors(&self.weights, DType::F32, device)?;
        let mut tensors = BTreeMap::new();
        for parameter in parameters(&self.config, self.parts)? {
            let tensor = vb.get(parameter.shape, &parameter.name)?;
            tensors.insert(parameter.name, tensor);
        }
        if vb.contains_tensor(HEAD_WEIGHT) {
            let text = &self.config.text_config;
            let tensor = vb.get((text.vocab_size, text.hidden_size), HEAD_WEIGHT)?;
            tensors.insert(HEAD_WEIGHT.to_owned(), tensor);
        }
        Ok(tensors)
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// As [`TextTokenizer::from_dir`].
    pub fn tokenizer(&self) -> Result<TextTokenizer> {
        TextTokenizer::from_dir(&self.dir, &self.config.text_config)
    }

    /// The image transform.
    ///
    /// # Errors
    /// As [`Preprocessor::from_dir`], or it makes images of another size than the model takes.
    pub fn preprocessor(&self) -> Result<Preprocessor> {
        let preprocessor = Preprocessor::from_dir(&self.dir)?;
        let (made, taken) = (preprocessor.side(), self.config.vision_config.image_size);
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
        let mut hash = Sha256::new();
        let mut add = |name: &str, content: &[u8]| {
            for part in [name.as_bytes(), content] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
        };
        add("config.json", &read(&self.dir.join("config.json"))?);
        add("model.safetensors", &self.weights);
        for path in [tokenizer::file(&self.dir), preprocess::file(&self.dir)] {
            if path.exists() {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                add(&name, &read(&path)?);
            }
        }
        Ok(format!("{:x}", hash.finalize()))
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
    ) -> Result<Self> {
        let io = |path: &Path, source| ModelError::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(|e| io(dir, e))?;
        if std::fs::read_dir(dir).map_err(|e| io(dir, e))?.next().is_some() {
            return Err(ModelError::Input(format!(
                "{} is not empty; a checkpoint is written once, into a directory of its own",
                dir.display()
            )));
        }
        let config = config.clone().checked()?;
        let stored = tensors
            .iter()
            .map(|(name, tensor)| {
                let tensor = tensor.detach().to_device(&Device::Cpu)?;
                Ok((name.as_str(), tensor.to_dtype(dtype)?.contiguous()?))
            })
            .collect::<Result<Vec<_>>>()?;
        // transformers opens a file only if it says for which framework it was written.
        let info = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let path = weight_file(dir);
        let weights =
            safetensors::serialize(stored, Some(info)).map_err(|source| ModelError::Weights { path: path.clone(), source })?;
        let config_path = dir.join("config.json");
        let config_text =
            serde_json::to_string_pretty(&config).map_err(|source| ModelError::Json { path: config_path.clone(), source })?;
        let preprocessor = Preprocessor::new(config.vision_config.image_size).to_json();
        for (path, content) in [
            (config_path, config_text.as_bytes()),
            (tokenizer::file(dir), tokenizer_json.as_bytes()),
            (preprocess::file(dir), preprocessor.as_bytes()),
            (path, &weights),
        ] {
            std::fs::write(&path, content).map_err(|e| io(&path, e))?;
        }
        Self::open(dir)
    }
}

/// What is wrong with the tensors of a file, by name.
fn compare(config: &MedConfig, parts: Parts, header: &Metadata) -> Result<Vec<TensorProblem>> {
    let text = &config.text_config;
    let mut wanted: BTreeMap<String, Vec<usize>> =
        parameters(config, parts)?.into_iter().map(|parameter| (parameter.name, parameter.shape)).collect();
    let found = header.tensors();
    for (name, shape) in [(HEAD_WEIGHT, vec![text.vocab_size, text.hidden_size]), (HEAD_BIAS, vec![text.vocab_size])] {
        if found.contains_key(name) {
            wanted.insert(name.to_owned(), shape);
        }
    }
    let mut problems = BTreeMap::new();
    for (name, expected) in &wanted {
        let name = name.clone();
        let problem = match found.get(&name) {
            None => TensorProblem::Missing { name: name.clone(), expected: expected.clone() },
            Some(info) if info.shape != *expected => {
                TensorProblem::Shape { name: name.clone(), expected: expected.clone(), found: info.shape.clone() }
            }
            Some(info) if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                TensorProblem::Format { name: name.clone(), found: format!("{:?}", info.dtype) }
            }
            Some(_) => continue,
        };
        problems.insert(name, problem);
    }
    for (name, info) in &found {
        if !wanted.contains_key(name) && !name.ends_with(CONSTANT) {
            let problem = TensorProblem::Unknown { name: name.clone(), found: info.shape.clone() };
            problems.insert(name.clone(), problem);
        }
    }
    Ok(problems.into_values().collect())
}

fn weight_file(dir: &Path) -> PathBuf {
    dir.join("model.safetensors")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })
}

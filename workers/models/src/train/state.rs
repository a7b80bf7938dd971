//! The whole state of a run in one file: weights, both moments, the step, momentum encoders and queues. All randomness is keyed, so there is no
//! generator to save.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use candle_core::DType;
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use super::{StoredDType, Trainer};
use crate::checkpoint::Checkpoint;
use crate::error::{ModelError, Result};

/// What a name in the file starts with, in the order of [`crate::train::AdamW::restore`].
const KINDS: [&str; 3] = ["weights/", "first/", "second/"];

/// Key of the file's metadata: the step, a space, and the fingerprint of the run.
const STATE: &str = "capfilt_training_state";

impl Trainer {
    /// Writes everything that the next step depends on. The file appears whole or not at all.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn save_state(&self, path: &Path) -> Result<()> {
        let tensors = self.optimizer.slots().iter().flat_map(|(name, slot)| {
            let all = [slot.variable.as_tensor(), &slot.first, &slot.second];
            KINDS.into_iter().zip(all).map(move |(kind, tensor)| (format!("{kind}{name}"), tensor.clone()))
        });
        let tensors = tensors.chain(self.objective.state()?);
        // One entry only: several would be written in the order of a hash table, and so not always as the same bytes.
        let info = HashMap::from([(STATE.to_owned(), format!("{} {}", self.steps(), self.fingerprint()))]);
        let bytes = safetensors::serialize(tensors, Some(info)).map_err(|e| ModelError::no_safetensors(path, e))?;
        let part = path.with_extension("part");
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        // On the disk before it takes the place of the state before it.
        let mut file = File::create(&part).map_err(io)?;
        file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(io)?;
        std::fs::rename(&part, path).map_err(io)
    }

    /// Continues from [`Trainer::save_state`]: the steps that follow are those that would have followed there, bit for bit.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or it was written by a run with another model, tokenizer or recipe.
    pub fn load_state(&mut self, path: &Path) -> Result<()> {
        let bytes = std::fs::read(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| ModelError::no_safetensors(path, e))?;
        let info = header.metadata().as_ref().and_then(|info| info.get(STATE)).and_then(|state| state.split_once(' '));
        let Some((Ok(step), run)) = info.map(|(step, run)| (step.parse(), run)) else {
            return Err(ModelError::Input(format!("{} is no training state", path.display())));
        };
        if run != self.fingerprint() {
            return Err(ModelError::Input(format!(
                "{} belongs to a run with another model, tokenizer or recipe; remove it to start again",
                path.display()
            )));
        }
        let loaded = candle_core::safetensors::load_buffer(&bytes, &self.device)?;
        let mut saved = BTreeMap::new();
        for name in loaded.keys().filter_map(|key| key.strip_prefix(KINDS[0])) {
            let part = |kind: &str| {
                let key = format!("{kind}{name}");
                loaded.get(&key).cloned().ok_or_else(|| ModelError::Input(format!("{} lacks {key}", path.display())))
            };
            saved.insert(name.to_owned(), [part(KINDS[0])?, part(KINDS[1])?, part(KINDS[2])?]);
        }
        self.objective.restore(&loaded)?;
        self.optimizer.restore(step, &saved)
    }

    /// Writes the model as a checkpoint into a new or empty directory.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::save`].
    pub fn save_checkpoint(&self, dir: &Path, dtype: StoredDType) -> Result<Checkpoint> {
        let dtype = match dtype {
            StoredDType::F32 => DType::F32,
            StoredDType::F16 => DType::F16,
        };
        self.objective.save(dir, &self.variables(), dtype)
    }

    /// What must be the same for a state to fit: model, tokenizer and recipe.
    fn fingerprint(&self) -> String {
        let recipe = format!("{:?}", self.recipe);
        let mut hash = Sha256::new();
        for part in self.objective.fingerprint().iter().chain([&recipe]) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        format!("{:x}", hash.finalize())
    }
}

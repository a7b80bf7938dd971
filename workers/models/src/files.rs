//! Which files a checkpoint is made of, by their names: of a folder, or of a repository that is yet to be fetched; and where the members of a
//! model lie.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{ModelError, Result};

/// The config of Hugging Face's layout.
pub const CONFIG: &str = "config.json";
/// The config of OpenCLIP's layout.
pub const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";
/// How an image becomes input.
pub const PREPROCESSOR: &str = "preprocessor_config.json";
/// The same as a part of a file, as transformers 5 writes it.
pub const PROCESSOR: &str = "processor_config.json";
/// How a text becomes input.
pub const TOKENIZER: &str = "tokenizer.json";
/// What a tokenizer says besides: how texts of CLIP are padded.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// How the image features of a filter are spread, beside its weights.
pub const IMAGE_MOMENTS: &str = "image_moments.safetensors";
/// The one weight file of our own checkpoints.
pub const WEIGHTS: &str = "model.safetensors";

/// Weight files and indexes of weight files, those first that are taken first.
const WEIGHT_FILES: [&str; 6] = [
    WEIGHTS,
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
];
/// Everything else of a checkpoint.
const SMALL: [&str; 5] = [CONFIG, OPEN_CLIP_CONFIG, PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG];
/// Vocabularies that stand in for a missing `tokenizer.json`.
const VOCABULARIES: [&[&str]; 2] = [&["vocab.txt"], &["vocab.json", "merges.txt"]];
/// The longest index of shards that is read.
const MAX_INDEX_BYTES: u64 = 32 << 20;

/// Where the member of a cross-fitted model lies that judges `fold` of split `repeat`, below the model's folder: the first one in that itself, so that
/// whoever knows of no members opens it. It was trained on the other folds.
#[must_use]
pub fn member(repeat: usize, fold: usize) -> PathBuf {
    match (repeat, fold) {
        (0, 0) => PathBuf::new(),
        (0, _) => PathBuf::from(format!("fold-{fold}")),
        _ => PathBuf::from(format!("repeat-{repeat}/fold-{fold}")),
    }
}

/// The folders of the members of the model in a folder: of each split, those of its folds. The first one is that folder.
#[must_use]
pub fn member_folders(folder: &Path) -> Vec<Vec<PathBuf>> {
    let there = |place: &PathBuf| *place == folder || place.join(CONFIG).is_file();
    let of_split = |repeat| (0..).map(|fold| folder.join(member(repeat, fold))).take_while(there).collect::<Vec<_>>();
    (0..).map(of_split).take_while(|members| !members.is_empty()).collect()
}

/// The files of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Configs and vocabularies that are there.
    pub small: Vec<String>,
    /// The weight file, or the index that names its shards.
    pub weights: String,
}

impl Files {
    /// Picks the files of a checkpoint from the names of all that there are; those in folders below are none of it. Of several formats of
    /// weights one is taken: safetensors, safetensors in shards, those of OpenCLIP, `.bin`, `.bin` in shards, that of OpenCLIP, and then the only
    /// `.pth` or `.pt`.
    ///
    /// # Errors
    /// There are no weights, or several `.pth` files; the message goes on after the name of the place.
    pub fn pick<'a>(names: impl IntoIterator<Item = &'a str>) -> std::result::Result<Self, String> {
        let names: BTreeSet<&str> = names.into_iter().filter(|name| !name.contains('/')).collect();
        let there = |wanted: &&str| names.contains(wanted);
        let mut small: Vec<&str> = SMALL.into_iter().filter(there).collect();
        if !there(&PREPROCESSOR) && there(&PROCESSOR) {
            small.push(PROCESSOR);
        }
        if !there(&TOKENIZER) {
            small.extend(VOCABULARIES.into_iter().find(|files| files.iter().all(&there)).into_iter().flatten());
        }
        let torch: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(".pth") || name.ends_with(".pt")).collect();
        let weights = match (WEIGHT_FILES.into_iter().find(there), &torch[..]) {
            (Some(name), _) | (None, &[name]) => name,
            (None, []) => {
                return Err(format!("has no weights: none of {}, nor a .pth or .pt file", WEIGHT_FILES.join(", ")));
            }
            (None, _) => return Err(format!("has several weight files ({}); leave one of them there", torch.join(", "))),
        };
        Ok(Self { small: small.into_iter().map(str::to_owned).collect(), weights: weights.to_owned() })
    }

    /// [`Self::pick`] for a local folder.
    ///
    /// # Errors
    /// The folder cannot be read, or as [`Self::pick`].
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let io = |source| ModelError::Io { path: folder.to_owned(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(io)? {
            names.extend(entry.map_err(io)?.file_name().into_string());
        }
        Self::pick(names.iter().map(String::as_str)).map_err(|what| weights_error(folder, what))
    }

    /// Whether a config, the preparation of images and a vocabulary are among them: all that a checkpoint needs beside its weights.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let has = |names: &[&str]| self.small.iter().any(|file| names.contains(&file.as_str()));
        has(&[CONFIG, OPEN_CLIP_CONFIG])
            && has(&[PREPROCESSOR, PROCESSOR, OPEN_CLIP_CONFIG])
            && has(&[TOKENIZER, "vocab.txt", "merges.txt"])
    }

    /// True if `weights` is an index of shards.
    #[must_use]
    pub fn is_sharded(&self) -> bool {
        self.weights.ends_with(".index.json")
    }
}

/// Which shard holds each tensor, by an index of weight files.
///
/// # Errors
/// The index is unreadable, or names a file outside of its folder.
pub fn shard_of_tensors(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let io = |source| ModelError::Io { path: index.to_owned(), source };
    if std::fs::metadata(index).map_err(io)?.len() > MAX_INDEX_BYTES {
        return Err(weights_error(index, format!("is longer than {} MiB: that is no index of shards", MAX_INDEX_BYTES >> 20)));
    }
    let text = read_text(index)?;
    let Index { weight_map } =
        serde_json::from_str(&text).map_err(|source| ModelError::Json { path: index.to_owned(), source })?;
    let outside = |shard: &&String| shard.contains(['/', '\\']) || shard.starts_with('.') || shard.is_empty();
    if let Some(shard) = weight_map.values().find(outside) {
        return Err(weights_error(index, format!("names the shard `{shard}`, which is no file beside it")));
    }
    if weight_map.is_empty() {
        return Err(weights_error(index, "names no tensors".to_owned()));
    }
    Ok(weight_map)
}

/// The text of a file of a checkpoint.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })
}

fn weights_error(path: &Path, what: String) -> ModelError {
    ModelError::Weights { path: path.to_owned(), what, source: None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn pick(names: &[&str]) -> std::result::Result<Files, String> {
        Files::pick(names.iter().copied())
    }

    #[test]
    fn one_format_of_weights_is_taken() {
        let mut names = vec!["model.pth", "README.md", "tf_model.h5", "config.json", "vocab.txt", "optimizer.bin"];
        assert_eq!(pick(&names).unwrap().small, ["config.json", "vocab.txt"]);
        assert_eq!(pick(&names).unwrap().weights, "model.pth");
        for better in WEIGHT_FILES.into_iter().rev() {
            names.push(better);
            assert_eq!(pick(&names).unwrap().weights, better);
        }
        assert!(!pick(&names).unwrap().is_sharded());
        names.retain(|name| *name != WEIGHTS);
        assert!(pick(&names).unwrap().is_sharded());
    }

    #[test]
    fn members_are_found_by_splits() {
        let folder = tempfile::tempdir().unwrap();
        let found = || {
            let splits = member_folders(folder.path());
            splits.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(found(), [1]);
        for (repeat, fold) in [(0, 1), (1, 0), (1, 1), (3, 0)] {
            let place = folder.path().join(member(repeat, fold));
            std::fs::create_dir_all(&place).unwrap();
            std::fs::write(place.join(CONFIG), "{}").unwrap();
        }
        assert_eq!(found(), [2, 2]);
        assert_eq!(member_folders(folder.path())[1][0], folder.path().join("repeat-1/fold-0"));
    }

    #[test]
    fn a_vocabulary_stands_in_for_a_tokenizer() {
        let small = |names: &[&str]| pick(&[names, &["a.pt"]].concat()).unwrap().small;
        assert_eq!(small(&["tokenizer.json", "vocab.txt", "merges.txt", "vocab.json"]), ["tokenizer.json"]);
        assert_eq!(small(&["vocab.json", "merges.txt"]), ["vocab.json", "merges.txt"]);
        assert_eq!(small(&["vocab.json"]), [""; 0]);
    }

    #[test]
    fn a_part_of_a_checkpoint_is_not_taken_for_all_of_it() {
        let whole = |names: &[&str]| pick(&[names, &["a.pt"]].concat()).unwrap().is_whole();
        assert!(whole(&[CONFIG, PREPROCESSOR, "vocab.txt"]) && whole(&[OPEN_CLIP_CONFIG, TOKENIZER]));
        assert!(
            !whole(&[CONFIG, TOKENIZER, TOKENIZER_CONFIG]) && !whole(&[PREPROCESSOR, TOKENIZER]) && !whole(&[CONFIG, PROCESSOR])
        );
    }

    #[test]
    fn images_are_prepared_by_one_file() {
        let small = |names: &[&str]| pick(&[names, &["a.pt"]].concat()).unwrap().small;
        assert_eq!(small(&[PROCESSOR]), [PROCESSOR]);
        assert_eq!(small(&[PROCESSOR, PREPROCESSOR]), [PREPROCESSOR]);
    }

    #[test]
    fn no_weights_or_too_many_are_told() {
        assert!(pick(&["config.json"]).unwrap_err().contains("model.safetensors, model.safetensors.index.json"));
        assert!(pick(&["more/a.pth", "more/model.safetensors"]).is_err());
        assert!(pick(&["b.pth", "a.pt"]).unwrap_err().contains("several weight files (a.pt, b.pth)"));
    }

    #[test]
    fn an_index_stays_in_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("model.safetensors.index.json");
        for (text, part) in [
            (r#"{"weight_map": {"a": "../../etc/passwd"}}"#, "../../etc/passwd"),
            (r#"{"weight_map": {"a": ".."}}"#, "no file beside it"),
            (r#"{"weight_map": {}}"#, "names no tensors"),
            (r#"{"weight_map": 3}"#, "JSON"),
        ] {
            std::fs::write(&index, text).unwrap();
            let error = shard_of_tensors(&index).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        std::fs::write(&index, r#"{"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors"}}"#).unwrap();
        assert_eq!(shard_of_tensors(&index).unwrap()["a"], "x.safetensors");
    }
}

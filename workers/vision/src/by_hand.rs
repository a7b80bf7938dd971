//! Models tried by hand: image files in, captions or scores out, without a store or a task.

use std::path::Path;

use capfilt_models::ModelError;
use capfilt_models::device::device;
use capfilt_models::generate::{Caption, Captioner};
use capfilt_models::preprocess::Preprocessor;
use rayon::prelude::*;

use crate::judge::{Judge, TextScores};
use crate::model::{NumberType, VisionWorkerConfig, captioner, is_clip};
use crate::pixels::{Views, take_view, views};
use crate::{CaptionConfig, ScoreConfig};

/// A captioner for image files.
pub struct ImageCaptioner {
    captioner: Captioner,
    preprocessor: [Preprocessor; 1],
    seed: u64,
}

impl ImageCaptioner {
    /// Opens a checkpoint folder.
    ///
    /// # Errors
    /// The folder holds no captioner, or the settings make no sense for it.
    pub fn open(folder: &Path, config: &CaptionConfig, worker: &VisionWorkerConfig) -> Result<Self, ModelError> {
        if is_clip(folder)? {
            return Err(ModelError::MissingPart { wanted: "captioning", missing: "a text decoder" });
        }
        let dtype = NumberType::settle(config.dtype, worker);
        let (captioner, preprocessor) = captioner(folder, config.sampling.clone(), dtype, &device(&worker.device)?)?;
        Ok(Self { captioner, preprocessor: [preprocessor], seed: config.seed })
    }

    /// The captions of image files, given as bytes with the key of their randomness. An image that cannot be decoded has a reason in place of
    /// captions.
    ///
    /// # Errors
    /// The device fails.
    pub fn write(&self, images: &[(Vec<u8>, String)]) -> Result<Vec<Result<Vec<Caption>, String>>, ModelError> {
        answer(images.iter().map(|(bytes, _)| bytes.as_slice()).collect(), &self.preprocessor, |mut there, numbers| {
            let keys: Vec<&str> = numbers.iter().map(|i| images[*i].1.as_str()).collect();
            self.captioner.write(&take_view(&mut there), &keys, self.seed)
        })
    }
}

/// A filter, a CLIP, or both, for image files.
pub struct ImageScorer {
    judge: Judge,
    preprocessors: Vec<Preprocessor>,
}

impl ImageScorer {
    /// Opens checkpoint folders: at most one filter and one CLIP.
    ///
    /// # Errors
    /// A folder holds neither, or there are two of a kind.
    pub fn open<P: AsRef<Path>>(folders: &[P], config: &ScoreConfig, worker: &VisionWorkerConfig) -> Result<Self, ModelError> {
        let (mut clips, mut filters) = (Vec::new(), Vec::new());
        for folder in folders.iter().map(AsRef::as_ref) {
            if is_clip(folder)? { &mut clips } else { &mut filters }.push(folder);
        }
        for (kind, found) in [("filter", &filters), ("CLIP", &clips)] {
            if let [first, second, ..] = found[..] {
                let what = format!("{} and {} are both a {kind}; name one of each kind", first.display(), second.display());
                return Err(ModelError::Input(what));
            }
        }
        let dtype = NumberType::settle(config.dtype, worker);
        let device = device(&worker.device)?;
        let filters: Vec<_> = filters.iter().map(|folder| vec![folder.to_path_buf()]).collect();
        let (judge, preprocessors) =
            Judge::open(&filters, clips.first().copied(), (config.first_token, config.itc), dtype, &device)?;
        Ok(Self { judge, preprocessors })
    }

    /// What the models say of every text for every image file, given as bytes. An image that cannot be decoded has a reason in place of
    /// scores.
    ///
    /// # Errors
    /// The device fails.
    pub fn score(&self, images: &[Vec<u8>], texts: &[String]) -> Result<Vec<Result<Vec<TextScores>, String>>, ModelError> {
        answer(images.iter().map(Vec::as_slice).collect(), &self.preprocessors, |there, _| {
            let texts = vec![texts.to_vec(); there.len()];
            let ids = vec![String::new(); there.len()];
            self.judge.score(there, &texts, &ids)
        })
    }
}

/// Decodes image files, lets `work` answer for those that can be, and puts the answers in their places. `work` is given the images and
/// their numbers.
fn answer<T>(
    files: Vec<&[u8]>,
    preprocessors: &[Preprocessor],
    work: impl FnOnce(Vec<Views>, &[usize]) -> Result<Vec<T>, ModelError>,
) -> Result<Vec<Result<T, String>>, ModelError> {
    let decoded: Vec<Result<Views, String>> = files.into_par_iter().map(|bytes| views(bytes, preprocessors)).collect();
    let numbers: Vec<usize> = (0..decoded.len()).filter(|i| decoded[*i].is_ok()).collect();
    let mut reasons = Vec::with_capacity(decoded.len());
    let mut there = Vec::with_capacity(numbers.len());
    for image in decoded {
        match image {
            Ok(views) => {
                there.push(views);
                reasons.push(None);
            }
            Err(reason) => reasons.push(Some(reason)),
        }
    }
    let mut answers = if there.is_empty() { Vec::new() } else { work(there, &numbers)? }.into_iter();
    let place = |reason: Option<String>| match reason {
        Some(reason) => Some(Err(reason)),
        None => answers.next().map(Ok),
    };
    Ok(reasons.into_iter().filter_map(place).collect())
}

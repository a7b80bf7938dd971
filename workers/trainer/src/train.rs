//! One training run: from pairs to the files of a model.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::clip::{ClipFamily, ClipTokenizer};
use capfilt_models::device::{DType, Device};
use capfilt_models::files;
use capfilt_models::moments::ImageMoments;
use capfilt_models::tokenizer::{MAX_WORDS, clean_caption, train_wordpiece};
use capfilt_models::train::{Architecture, Losses, Pretrained, Recipe, Role, StepReport, Trainer};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::loader::Loader;
use crate::pair::prepared;
use crate::sampler::{Member, Sampler};
use crate::set::Entry;
use crate::{Init, TrainConfig, TrainSet, TrainerError};

/// Name of the training log, lines of JSON ([`LogLine`]), among the files of a model.
pub(crate) const LOG: &str = "training_log.jsonl";
/// Name of the settings among the files of a model.
pub(crate) const SETTINGS: &str = "training.json";

/// One line of the training log: means over the steps since the line before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    /// Steps made.
    pub step: u64,
    /// Mean losses.
    pub losses: Losses,
    /// Learning rate of the last step.
    pub rate: f64,
    /// Mean norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Contrastive temperature after the last step.
    pub temperature: Option<f32>,
}

/// Where an unfinished run is saved, and how often.
#[derive(Debug, Clone, Copy)]
pub struct Saves<'a> {
    /// The folder, one for each member of a model.
    pub folder: &'a Path,
    /// Steps between two saved states, rounded up to whole log lines; 0 never saves.
    pub every: u64,
}

/// Where a run is, told after every log line.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The newest line of the log.
    pub line: &'a LogLine,
    /// Steps of the whole run.
    pub steps: u64,
    /// Pairs a second since this process took up the run. Not in the log, which holds only what is the same on every machine.
    pub pairs_per_second: f64,
    /// Share of that time in which the model waited for pairs.
    pub waited: f64,
}

/// Trains one member of a model and returns its files, name → bytes: the checkpoint, the training log and the settings.
///
/// The result depends on the pairs as a set, the settings, the member, the parent, what it begins with and the kind of device alone. Called again
/// with the same `saves`, an unfinished run goes on from the last saved state and ends in the same bytes; a state that is damaged, or another run's,
/// is no more than lost work. `progress` may stop the run by [`ControlFlow::Break`]. The pairs' pixels must be as large as the model's images
/// (`model.image_size`, or the parent's).
///
/// # Errors
///
/// Settings that make no sense, no pairs, a failing model or file system, or [`TrainerError::Stopped`].
pub fn train(
    set: &TrainSet,
    config: &TrainConfig,
    member: Member,
    (parent, pretrained): (Option<&Checkpoint>, Pretrained<'_>),
    device: &Device,
    saves: Saves<'_>,
    mut progress: impl FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<BTreeMap<String, Vec<u8>>, TrainerError> {
    config.check()?;
    let seed = config.seed.wrapping_add(member.repeat as u64);
    let sampler = Sampler::new(set, config.mixture(), config.shuffle_shards, member, seed)?;
    let steps = config.total_steps(sampler.pairs());
    let recipe = Recipe { seed, ..config.recipe(steps, sampler.pairs()) };
    let begin = || -> Result<Trainer, TrainerError> {
        let mut trainer = start(set, config, (parent, pretrained), recipe.clone(), device)?;
        trainer.keep_feature_maps(Arc::clone(&set.feature_maps))?;
        Ok(trainer)
    };
    let mut trainer = begin()?;
    let state = saves.folder.join("state.safetensors");
    if state.exists()
        && let Err(error) = trainer.load_state(&state)
    {
        tracing::warn!(%error, "the training begins again: its saved state cannot be used");
        std::fs::remove_file(&state).map_err(|source| TrainerError::Io { path: state.clone(), source })?;
        trainer = begin()?;
    }
    let mut log = Log::open(saves.folder.join(LOG), trainer.steps())?;
    let save_every = saves.every.next_multiple_of(config.log_every);

    let (began, first, batch) = (Instant::now(), trainer.steps(), config.batch as u64);
    let mut window = Window::default();
    std::thread::scope(|scope| {
        let mut loader = Loader::start(scope, set, sampler, trainer.preparer(), first..steps, batch)?;
        while trainer.steps() < steps {
            window.add(&trainer.step(&loader.next()?)?);
            let done = trainer.steps();
            if done % config.log_every == 0 || done == steps {
                let line = std::mem::take(&mut window).line();
                log.write(&line)?;
                if saves.every > 0 && done % save_every == 0 && done < steps {
                    log.flush()?;
                    trainer.save_state(&state)?;
                }
                let elapsed = began.elapsed().as_secs_f64();
                let pairs_per_second = ((done - first) * batch) as f64 / elapsed;
                let waited = loader.waited().as_secs_f64() / elapsed;
                if progress(Progress { line: &line, steps, pairs_per_second, waited }).is_break() {
                    return Err(TrainerError::Stopped { step: done });
                }
            }
        }
        Ok(())
    })?;
    log.flush()?;
    let folder = saves.folder.join("checkpoint");
    let mut files = finished(&trainer, config, &folder, &log.path)?;
    if config.role.parts().encoder
        && let Some(moments) = image_moments(set, member, &Checkpoint::open(&folder)?, device)?
    {
        let path = folder.join(files::IMAGE_MOMENTS);
        moments.write(&path)?;
        let bytes = std::fs::read(&path).map_err(|source| TrainerError::Io { path, source })?;
        files.insert(files::IMAGE_MOMENTS.to_owned(), bytes);
    }
    Ok(files)
}

/// A trainer at step 0.
fn start(
    set: &TrainSet,
    config: &TrainConfig,
    (parent, pretrained): (Option<&Checkpoint>, Pretrained<'_>),
    recipe: Recipe,
    device: &Device,
) -> Result<Trainer, TrainerError> {
    match (config.init, parent) {
        (Init::Parent | Init::Med, Some(parent)) => Ok(Trainer::from_checkpoint(parent, recipe, device)?),
        (Init::Parent | Init::Med, None) => {
            Err(TrainerError::Config("a run that does not start fresh needs a parent model".to_owned()))
        }
        (Init::Fresh, parent) if config.role == Role::Clip => {
            let tokenizer = match parent {
                Some(parent) => parent.clip_tokenizer()?.json()?,
                None => {
                    let texts = set.entries().iter().flat_map(|entry| &entry.texts).map(|text| text.text.clone());
                    ClipTokenizer::train(&texts.collect::<Vec<_>>(), config.vocab_size)?
                }
            };
            let size = ClipTokenizer::from_json(&tokenizer, None, ClipFamily::Clip, Path::new(files::TOKENIZER))?.size();
            Ok(Trainer::fresh(&Architecture::Clip(config.model.clip(size)), tokenizer, Pretrained::default(), recipe, device)?)
        }
        (Init::Fresh, Some(parent)) => {
            let tokenizer = parent.tokenizer()?.json().to_owned();
            let parent = parent.config()?;
            let model = config.model.config(Some(parent), parent.text_config.vocab_size);
            Ok(Trainer::fresh(&Architecture::Med(model), tokenizer, pretrained, recipe, device)?)
        }
        (Init::Fresh, None) => {
            let texts = set.entries().iter().flat_map(|entry| &entry.texts);
            let texts = texts.map(|text| clean_caption(&text.text, MAX_WORDS)).chain([config.prompt.clone()]);
            let tokenizer = train_wordpiece(&texts.collect::<Vec<_>>(), config.vocab_size)?;
            Ok(Trainer::fresh(
                &Architecture::Med(config.model.config(None, config.vocab_size)),
                tokenizer,
                pretrained,
                recipe,
                device,
            )?)
        }
    }
}

/// How the features of those images are spread that a filter will judge: of its fold, which it has not seen, or of all that no person annotated.
/// Nothing where there are hardly any.
fn image_moments(
    set: &TrainSet,
    member: Member,
    checkpoint: &Checkpoint,
    device: &Device,
) -> Result<Option<ImageMoments>, TrainerError> {
    const MOST: usize = 1024;
    let entries = set.entries();
    let judged = |entry: &Entry| !entry.is_human() && (member.folds == 1 || member.judges(&entry.sample_id));
    let mut wanted: Vec<usize> = (0..entries.len()).filter(|i| judged(&entries[*i])).collect();
    // Ids are hashes: their order is a draw.
    wanted.sort_by(|a, b| entries[*a].sample_id.cmp(&entries[*b].sample_id));
    wanted.truncate(MOST);
    if wanted.len() < 2 {
        return Ok(None);
    }
    let (preprocessor, med) = (checkpoint.preprocessor()?, checkpoint.med(device, DType::F32)?);
    let batches = wanted.chunks(64).map(|wanted| {
        let pixels = set.pixels(wanted)?;
        let of_batch = wanted.par_iter().zip(&pixels);
        of_batch.map(|(&entry, pixels)| prepared(&preprocessor, &entries[entry].sample_id, pixels)).collect()
    });
    Ok(Some(ImageMoments::of(&med, batches)?))
}

/// The files of the finished model, written to `folder` on the way.
fn finished(
    trainer: &Trainer,
    config: &TrainConfig,
    folder: &Path,
    log: &Path,
) -> Result<BTreeMap<String, Vec<u8>>, TrainerError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| TrainerError::Io { path, source }
    };
    if folder.exists() {
        std::fs::remove_dir_all(folder).map_err(fail(folder))?;
    }
    trainer.save_checkpoint(folder, config.stored_dtype)?;
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(fail(folder))? {
        let entry = entry.map_err(fail(folder))?;
        let bytes = std::fs::read(entry.path()).map_err(fail(&entry.path()))?;
        files.insert(entry.file_name().to_string_lossy().into_owned(), bytes);
    }
    files.insert(LOG.to_owned(), std::fs::read(log).map_err(fail(log))?);
    let mut settings = serde_json::to_vec_pretty(config).map_err(|error| TrainerError::Config(error.to_string()))?;
    settings.push(b'\n');
    files.insert(SETTINGS.to_owned(), settings);
    Ok(files)
}

/// Sums over the steps of one log line.
#[derive(Default)]
struct Window {
    steps: u32,
    sums: [Option<f64>; 3],
    gradient_norm: f64,
    last: Option<StepReport>,
}

impl Window {
    fn add(&mut self, report: &StepReport) {
        let losses = report.losses;
        for (sum, loss) in self.sums.iter_mut().zip([losses.lm, losses.itc, losses.itm]) {
            if let Some(loss) = loss {
                *sum = Some(sum.unwrap_or(0.0) + f64::from(loss));
            }
        }
        self.gradient_norm += report.gradient_norm;
        self.steps += 1;
        self.last = Some(*report);
    }

    fn line(self) -> LogLine {
        let steps = f64::from(self.steps.max(1));
        let [lm, itc, itm] = self.sums.map(|sum| sum.map(|sum| (sum / steps) as f32));
        let last = self.last;
        LogLine {
            step: last.map_or(0, |last| last.step),
            losses: Losses { lm, itc, itm },
            rate: last.map_or(0.0, |last| last.rate),
            gradient_norm: self.gradient_norm / steps,
            temperature: last.and_then(|last| last.temperature),
        }
    }
}

/// The training log of a run that may have been stopped.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log and keeps its lines up to `step`: those after it will be written again.
    fn open(path: PathBuf, step: u64) -> Result<Self, TrainerError> {
        let fail = |source| TrainerError::Io { path: path.clone(), source };
        let mut kept = String::new();
        if step > 0 && path.exists() {
            for line in BufReader::new(File::open(&path).map_err(fail)?).lines() {
                let line = line.map_err(fail)?;
                match serde_json::from_str::<LogLine>(&line) {
                    Ok(parsed) if parsed.step <= step => kept.extend([line.as_str(), "\n"]),
                    _ => break,
                }
            }
        }
        std::fs::write(&path, kept).map_err(fail)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(fail)?;
        Ok(Self { path, file })
    }

    fn write(&mut self, line: &LogLine) -> Result<(), TrainerError> {
        let mut text = serde_json::to_string(line).map_err(|error| TrainerError::Config(error.to_string()))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|source| TrainerError::Io { path: self.path.clone(), source })
    }

    fn flush(&mut self) -> Result<(), TrainerError> {
        self.file.sync_data().map_err(|source| TrainerError::Io { path: self.path.clone(), source })
    }
}

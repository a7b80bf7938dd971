//! The members of a cross-fitted model, trained some at a time.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::device::Device;
use capfilt_models::files;
use capfilt_models::train::Pretrained;
use capfilt_runtime::Work;

use crate::train::{LOG, SETTINGS, Saves};
use crate::{Init, Member, TrainConfig, TrainSet, TrainerError, TrainerWorkerConfig, train};

/// Trains the members of a model and returns the files of all. On a CPU as many at a time as there are threads, or fewer if that is set: a small model is
/// made of products too small to be divided well.
pub(crate) fn train_members(
    pairs: &TrainSet,
    config: &TrainConfig,
    (parent, pretrained): (Option<&Path>, Pretrained<'_>),
    (device, worker): (&Device, &TrainerWorkerConfig),
    scratch: &Path,
    work: &Work,
) -> Result<BTreeMap<String, Vec<u8>>, TrainerError> {
    let (members, threads) = (config.members(), rayon::current_num_threads());
    let at_once =
        if device.is_cpu() { members.min(worker.members_at_once.map_or(threads, NonZeroUsize::get)).min(threads) } else { 1 };
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let steps: Vec<AtomicU64> = (0..members).map(|_| AtomicU64::new(0)).collect();
    let one = |number: usize| -> Result<Vec<(String, Vec<u8>)>, TrainerError> {
        let member = Member { fold: number % config.folds, folds: config.folds, repeat: number / config.folds };
        let folder = files::member(member.repeat, member.fold);
        let parent = parent.map(|parent| parent_of(member, parent, config)).transpose()?;
        let scratch = scratch.join(&folder);
        std::fs::create_dir_all(&scratch).map_err(|source| TrainerError::Io { path: scratch.clone(), source })?;
        let (mut pairs_per_second, mut waited) = (0.0, 0.0);
        let saves = Saves { folder: &scratch, every: worker.checkpoint_every };
        let trained = train(pairs, config, member, (parent.as_ref(), pretrained), device, saves, |p| {
            (pairs_per_second, waited) = (p.pairs_per_second, p.waited);
            steps[number].store(p.line.step, Ordering::Relaxed);
            let made = steps.iter().map(|steps| steps.load(Ordering::Relaxed)).sum();
            work.progress(made, members as u64 * p.steps, "steps");
            let stop = work.cancel.is_cancelled() || failed.load(Ordering::Relaxed);
            if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let percent = 100.0 * waited;
        tracing::info!(role = ?config.role, member = number, "trained {pairs_per_second:.1} pairs/s; the model waited for pairs {percent:.1} % of the time");
        if number == 0 {
            work.facts.set("log", thinned(&trained[LOG]));
        }
        Ok(trained.into_iter().map(|(name, bytes)| (folder.join(name).display().to_string(), bytes)).collect())
    };
    let some = || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.div_ceil(at_once)).build();
        let pool = pool.map_err(|e| TrainerError::Threads(e.to_string()))?;
        let mut files = BTreeMap::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= members {
                return Ok(files);
            }
            files.extend(pool.install(|| one(number)).inspect_err(|_| failed.store(true, Ordering::Relaxed))?);
        }
    };
    let trained: Vec<Result<BTreeMap<_, _>, TrainerError>> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..at_once).map(|_| scope.spawn(some)).collect();
        running.into_iter().map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    // One that fails stops the others: its error is the one to tell.
    let (trained, errors): (Vec<_>, Vec<_>) = trained.into_iter().partition(Result::is_ok);
    let mut errors: Vec<TrainerError> = errors.into_iter().filter_map(Result::err).collect();
    errors.sort_by_key(|error| matches!(error, TrainerError::Stopped { .. }));
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(trained.into_iter().flatten().flatten().collect()),
    }
}

/// Lines of a training log, no more than a chart can show, the last one among them.
fn thinned(log: &[u8]) -> Vec<serde_json::Value> {
    const MOST: usize = 200;
    let lines: Vec<serde_json::Value> =
        log.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let every = lines.len().div_ceil(MOST).max(1);
    let mut kept: Vec<_> = lines.into_iter().rev().step_by(every).collect();
    kept.reverse();
    kept
}

/// What a member starts from: the same member of the parent, which has not seen the pairs either that it will judge; or a parent without members,
/// if it was not trained here.
fn parent_of(member: Member, folder: &Path, config: &TrainConfig) -> Result<Checkpoint, TrainerError> {
    if config.init == Init::Fresh || config.members() == 1 {
        return Ok(Checkpoint::open(folder)?);
    }
    let members = files::member_folders(folder);
    let found = (members[0].len(), members.len());
    if found == (1, 1) && !folder.join(SETTINGS).exists() {
        return Ok(Checkpoint::open(folder)?);
    }
    if found.0 == config.folds && config.repeats <= found.1 {
        return Ok(Checkpoint::open(&members[member.repeat][member.fold])?);
    }
    let ((folds, repeats), TrainConfig { folds: own, repeats: times, .. }) = (found, config);
    Err(TrainerError::Config(format!(
        "`folds` is {own} and `repeats` {times}, but the model to start from has {folds} and {repeats}: its members have seen what these would judge; \
         start \"fresh\", or from a MED with as many folds and no fewer repeats"
    )))
}

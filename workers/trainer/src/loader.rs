//! Steps are prepared ahead of the model: drawn, read, decoded, augmented, while it works on those before.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use capfilt_models::train::{Example, Prepared, Preparer};

use crate::sampler::{Draw, Sampler};
use crate::{TrainSet, TrainerError};

/// Steps that wait for the model.
const AHEAD: usize = 2;

/// The steps of a run, in order.
pub(crate) struct Loader {
    steps: Receiver<Result<Prepared, TrainerError>>,
    waited: Duration,
}

impl Loader {
    /// Prepares the steps `range` of `batch` pairs each on a thread of its own, which ends with the last of them, with an error, or when
    /// the loader is dropped.
    pub(crate) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        set: &'scope TrainSet,
        mut sampler: Sampler,
        preparer: Preparer,
        range: std::ops::Range<u64>,
        batch: u64,
    ) -> Result<Self, TrainerError> {
        let (sender, steps) = sync_channel(AHEAD);
        let load = move || {
            for step in range {
                let prepared = prepare(set, &mut sampler, &preparer, step * batch..(step + 1) * batch);
                let failed = prepared.is_err();
                if sender.send(prepared).is_err() || failed {
                    break;
                }
            }
        };
        let spawned = Builder::new().name("loader".to_owned()).spawn_scoped(scope, load);
        spawned.map_err(|e| TrainerError::Threads(e.to_string()))?;
        Ok(Self { steps, waited: Duration::ZERO })
    }

    /// The next step.
    pub(crate) fn next(&mut self) -> Result<Prepared, TrainerError> {
        let began = Instant::now();
        let step = self.steps.recv();
        self.waited += began.elapsed();
        step.unwrap_or_else(|_| Err(TrainerError::Threads("the one that loads pairs is gone".to_owned())))
    }

    /// How long the model has waited for pairs, the first ones included.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }
}

fn prepare(
    set: &TrainSet,
    sampler: &mut Sampler,
    preparer: &Preparer,
    numbers: std::ops::Range<u64>,
) -> Result<Prepared, TrainerError> {
    let draws: Vec<Draw> = numbers.map(|number| sampler.draw(number, set)).collect();
    let pixels = set.pixels(&draws.iter().map(|draw| draw.pair).collect::<Vec<_>>())?;
    let examples: Vec<Example<'_>> = draws
        .iter()
        .zip(&pixels)
        .map(|(draw, pixels)| {
            let entry = &set.entries()[draw.pair];
            Example { sample_id: &entry.sample_id, epoch: draw.epoch, text: &entry.texts[draw.text].text, pixels }
        })
        .collect();
    Ok(preparer.prepare(&examples)?)
}

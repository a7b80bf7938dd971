//! The part of a plan that trains: the first models of a run that is given none, challengers, and how good they are.

use std::collections::{BTreeMap, BTreeSet};

use capfilt_schemas::{Commit, Digest, Input, RoundRecord, StageKind, TaskId};

use super::{Finish, Planner, Settled};
use crate::retrain::{self, Measured, Seen};

impl<'a> Planner<'a> {
    /// The first models of a run that is given none: trained on all texts that were found and on the clean ones. `None` until they are there.
    pub(super) fn cold_start(
        &mut self,
        samples: &Settled<'a>,
        annotated: &Settled<'a>,
        heldout: &Settled<'a>,
    ) -> Option<(Digest, Digest)> {
        self.plan.round = 0;
        if !(samples.all && annotated.all && heldout.all) {
            return None;
        }
        let built = self.build(samples.commits.iter().flat_map(|c| c.as_inputs()).collect(), annotated, heldout)?;
        self.plan.last_build = Some(built.task_id);
        if let Err(why) = self.config.retrain.wanted(rows(built), None) {
            self.plan.stuck = Some(format!("no first models were trained: {why}"));
            return None;
        }
        let trained = self.train(None, built, &mut BTreeSet::new())?;
        let models = trained.get(retrain::CAPTIONER).copied().zip(trained.get(retrain::FILTER).copied());
        if models.is_none() {
            self.plan.stuck = Some("no first captioner and filter could be trained".to_owned());
        }
        models
    }

    /// Trains on what was built, if that is wanted and it is large enough, and holds the result against the round's models. `false`
    /// while that goes on.
    pub(super) fn challenge(&mut self, finish: &mut Finish, champion: &Measured, built: &Commit, heldout: &Settled<'a>) -> bool {
        match self.config.retrain.wanted(rows(built), Some(self.seen_by(finish.record.captioner, built))) {
            Ok(true) => {}
            Ok(false) => return true,
            Err(why) => {
                let roles = [retrain::CAPTIONER, retrain::FILTER].map(|role| (role.to_owned(), why.clone()));
                finish.reasons.extend(roles);
                return true;
            }
        }
        let Some(challengers) = self.train(Some(&finish.record), built, &mut finish.rests_on) else { return false };
        let pick = |role: &str, now: Digest| challengers.get(role).copied().unwrap_or(now);
        let captioner = pick(retrain::CAPTIONER, finish.record.captioner);
        let filter = pick(retrain::FILTER, finish.record.filter);
        let clip = challengers.get(retrain::CLIP).copied();
        let Some(metrics) = self.evaluate(captioner, filter, clip, heldout, &mut finish.rests_on) else { return false };
        for role in [retrain::CAPTIONER, retrain::FILTER] {
            if self.config.stages.train.contains_key(role) && !challengers.contains_key(role) {
                finish.reasons.insert(role.to_owned(), "its challenger could not be trained".to_owned());
            }
        }
        // In a role without a challenger it is the round's own model that was measured.
        let of_challengers = |metric: &String| metric.split_once('/').is_some_and(|(role, _)| challengers.contains_key(role));
        finish.challenger_metrics =
            metrics.values.iter().filter(|(name, _)| of_challengers(name)).map(|(n, v)| (n.clone(), *v)).collect();
        for (role, model) in challengers {
            if role == retrain::CLIP {
                finish.reasons.insert(role, format!("model {} measures the version, and plays no role", model.short()));
                continue;
            }
            let verdict = self.config.retrain.verdict(&role, champion, &metrics);
            finish.reasons.insert(role.clone(), verdict.why);
            if verdict.challenger_wins {
                finish.promoted.insert(role, model);
            }
        }
        true
    }

    /// The dataset version on which a model was trained, and how much older than `version` the model is.
    fn seen_by(&self, model: Digest, version: &Commit) -> Seen {
        let of_stage = |stage| self.seen.commits.values().filter(move |c| c.task.stage == stage);
        let trained = of_stage(StageKind::Train).find(|c| c.outputs.iter().any(|o| o.digest == model));
        let built = trained.and_then(|c| of_stage(StageKind::Build).find(|b| b.as_inputs().eq(c.task.inputs.iter().copied())));
        let age_ms = trained.map_or(0, |trained| version.committed_at_ms.saturating_sub(trained.committed_at_ms));
        Seen { rows: built.map_or(0, rows), age_ms }
    }

    /// The captioner and the filter that are trained on what was built, and the CLIP, without those that were given up; `None` while that goes on,
    /// and for good where an external trainer of first models is given up.
    /// Where a MED is pre-trained, it comes first, and is what those start from that ask for it. Tells which tasks that took.
    fn train(
        &mut self,
        in_service: Option<&RoundRecord>,
        built: &Commit,
        rests_on: &mut BTreeSet<TaskId>,
    ) -> Option<BTreeMap<String, Digest>> {
        let inputs: Vec<Input> = built.as_inputs().collect();
        let stages = &self.config.stages;
        let mut one = |planner: &mut Self, role: &str, model: Option<Digest>| {
            let Some(params) = stages.train.get(role) else { return Some(None) };
            let train = planner.task(StageKind::Train, params.clone(), model, inputs.clone());
            let mut settled = Settled::none();
            let external = params.get("command").is_some_and(|c| c.as_array().is_some_and(|c| !c.is_empty()));
            // One that is given up leaves the model in service where it is.
            let own = external && !(in_service.is_some() && planner.is_dead(&train));
            let trained = if own { planner.own(train) } else { planner.settle(train, 0, &mut settled) };
            if !settled.all || (own && trained.is_none()) {
                return None;
            }
            let model = trained.and_then(|c| Some((c.task_id, c.outputs.first()?.digest)));
            Some(model.map(|(task, model)| {
                rests_on.insert(task);
                model
            }))
        };
        // The model in service gives its vocabulary, and its weights where `init` is "parent".
        let med = one(self, retrain::MED, in_service.map(|record| record.captioner))?;
        let mut trained = BTreeMap::new();
        let mut all = true;
        let roles = [
            (retrain::CAPTIONER, in_service.map(|record| record.captioner)),
            (retrain::FILTER, in_service.map(|record| record.filter)),
            (retrain::CLIP, None),
        ];
        for (role, champion) in roles {
            let from_med = stages.train.get(role).is_some_and(|params| params["init"] == retrain::MED);
            // A first version is no round's: nobody asks how good it is.
            if (from_med && med.is_none()) || (role == retrain::CLIP && in_service.is_none()) {
                continue;
            }
            match one(self, role, if from_med { med } else { champion }) {
                None => all = false,
                Some(model) => trained.extend(model.map(|model| (role.to_owned(), model))),
            }
        }
        all.then_some(trained)
    }

    /// The metrics of models on the held-out pairs; `None` while they are worked out. Tells which tasks they come from.
    pub(super) fn evaluate(
        &mut self,
        captioner: Digest,
        filter: Digest,
        clip: Option<Digest>,
        heldout: &Settled<'a>,
        rests_on: &mut BTreeSet<TaskId>,
    ) -> Option<Measured> {
        if !heldout.all {
            return None;
        }
        let inputs: Vec<Input> = heldout.commits.iter().flat_map(|c| c.as_inputs()).collect();
        let mut metrics = Measured::default();
        let mut settled = true;
        let clip = clip.map(|clip| (retrain::CLIP, clip));
        for (role, model) in [(retrain::CAPTIONER, captioner), (retrain::FILTER, filter)].into_iter().chain(clip) {
            if inputs.is_empty() {
                break;
            }
            let mut params = self.config.stages.evaluate.clone();
            params["role"] = role.into();
            let task = self.task(StageKind::Evaluate, params, Some(model), inputs.clone());
            let mut one = Settled::none();
            if let Some(commit) = self.settle(task, 0, &mut one) {
                rests_on.insert(commit.task_id);
                if let Some(known) = self.seen.metrics.get(&commit.task_id) {
                    metrics.values.extend(known.values.clone());
                    metrics.resampled.extend(known.resampled.clone());
                }
            }
            settled &= one.all;
        }
        settled.then_some(metrics)
    }
}

/// Rows that a task has written.
fn rows(commit: &Commit) -> u64 {
    commit.outputs.iter().map(|o| o.rows).sum()
}

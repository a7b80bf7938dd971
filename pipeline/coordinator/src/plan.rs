//! What a run still has to do: expected tasks − committed tasks. Pure: facts in, plan out, no I/O.

mod training;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use capfilt_schemas::{
    Commit, Digest, Input, RetryRecord, RoundRecord, RoundResult, RunId, StageKind, StatusCounts, Table, Takedown, Task, TaskId,
};
use capfilt_store::TakenDown;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::SqlConfig;
use crate::balance::{BalanceConfig, HardCap};
use crate::build::{BuildInputs, Triplet};
use crate::retrain::{self, Measured, RetrainConfig};

/// The settings of every stage of a run, as JSON that only the stage's own crate reads, and the versions of the stages' code.
#[derive(Clone, Debug, Default)]
pub struct StageParams {
    /// One set for every source.
    pub discover: Vec<Value>,
    /// For `balance`.
    pub balance: Value,
    /// For `fetch`.
    pub fetch: Value,
    /// One set for every clean, human-annotated collection.
    pub annotated: Vec<Value>,
    /// One set for every held-out collection, on which models are judged.
    pub heldout: Vec<Value>,
    /// For `caption`.
    pub caption: Value,
    /// For `score`.
    pub score: Value,
    /// For `build`.
    pub build: Value,
    /// For `train`, by role.
    pub train: BTreeMap<String, Value>,
    /// For `evaluate`.
    pub evaluate: Value,
    /// The version of each stage's code; 1 where absent.
    pub versions: BTreeMap<StageKind, u32>,
}

/// A run as the planner sees it.
#[derive(Clone, Debug)]
pub struct PlanConfig {
    /// The run. Rounds are pinned under its name: see [`RoundRecord`].
    pub run: RunId,
    /// The name under which dataset versions are kept.
    pub dataset: String,
    /// Rounds of caption, score, build and retrain. Without any the run ends with the download.
    pub rounds: u32,
    /// The captioner and the filter of the first round. A run with rounds and without these trains its first ones on what it found.
    pub models: Option<(Digest, Digest)>,
    /// Stage settings.
    pub stages: StageParams,
    /// When to train and when to promote.
    pub retrain: RetrainConfig,
    /// Failed attempts after which a task is given up.
    pub max_attempts: u32,
    /// Memory and threads of the coordinator's queries.
    pub sql: SqlConfig,
    /// Folder for the files of external trainers; it may be lost at any time.
    pub work_dir: PathBuf,
    /// Tells whether a folder holds a checkpoint that can play a role, and if not, why.
    pub check_model: fn(&Path, &str) -> Result<(), String>,
}

/// What the store says, as far as a plan depends on it.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// Tasks that are done.
    pub commits: HashMap<TaskId, Commit>,
    /// Metrics by the evaluate task that worked them out.
    pub metrics: HashMap<TaskId, Measured>,
    /// Failed attempts of tasks: how many, and whether the last could be mended by a retry.
    pub failures: HashMap<TaskId, (u32, bool)>,
    /// The rounds that have started, first round first.
    pub rounds: Vec<RoundRecord>,
    /// The results written so far.
    pub results: Vec<RoundResult>,
    /// The retries that were asked of the run, oldest first.
    pub retries: Vec<RetryRecord>,
    /// The takedowns of the store, oldest first.
    pub takedowns: Vec<Takedown>,
}

/// What the coordinator itself has to do. Each is safe to repeat.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Work off a task that needs SQL, or an external trainer.
    Own(Task),
    /// Fix the models of a round.
    StartRound(RoundRecord),
    /// Write down what a built round led to, and promote what is better.
    FinishRound(Box<Finish>),
}

/// Everything that is known when a round is over.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// The round and its models.
    pub record: RoundRecord,
    /// The commit of its build.
    pub build: TaskId,
    /// Metrics of the round's models.
    pub metrics: BTreeMap<String, f64>,
    /// Metrics of the challengers; none in a role that has none.
    pub challenger_metrics: BTreeMap<String, f64>,
    /// Role → challenger, for the roles in which it is better.
    pub promoted: BTreeMap<String, Digest>,
    /// Role → why its challenger won or lost.
    pub reasons: BTreeMap<String, String>,
    /// The tasks that all this rests on, in order.
    pub rests_on: BTreeSet<TaskId>,
}

/// How far a stage is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageProgress {
    /// Tasks known to be needed so far.
    pub tasks: u64,
    /// Of these, done.
    pub done: u64,
    /// Of these, given up.
    pub dead: u64,
    /// Rows that go into those tasks, where known.
    pub rows: u64,
    /// Rows of the tasks that are done.
    pub rows_done: u64,
}

/// How far the downloads are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Downloads {
    /// Rows by status, as the newest pass over each shard left them.
    pub statuses: StatusCounts,
    /// The shards of samples that these are in.
    pub samples: Vec<Digest>,
    /// Whether every shard has been fetched once, or given up.
    pub fetched: bool,
    /// Whether a retry that was asked for has something left to fetch.
    pub retrying: bool,
}

/// What to do next.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Tasks for workers.
    pub tasks: Vec<Task>,
    /// Things for the coordinator.
    pub actions: Vec<Action>,
    /// How far each stage is.
    pub progress: BTreeMap<StageKind, StageProgress>,
    /// Tasks that were given up.
    pub dead: Vec<TaskId>,
    /// How far the downloads are.
    pub downloads: Downloads,
    /// The round at work; 0 before the first, and while the first models are trained.
    pub round: u32,
    /// The newest build task that is done.
    pub last_build: Option<TaskId>,
    /// Whether nothing is left to do.
    pub complete: bool,
    /// Set when the run cannot go on: what failed.
    pub stuck: Option<String>,
    /// The discover tasks that are done, once none is left.
    pub found: BTreeSet<TaskId>,
}

/// Some tasks, seen together.
struct Settled<'a> {
    commits: Vec<&'a Commit>,
    /// Whether every task is done or given up.
    all: bool,
}

impl Settled<'_> {
    const fn none() -> Self {
        Self { commits: Vec::new(), all: true }
    }
}

impl PlanConfig {
    /// What the fetch settings of the run are called: the name of a fetch task without inputs.
    #[must_use]
    pub fn fetch_settings(&self) -> TaskId {
        self.task(StageKind::Fetch, self.stages.fetch.clone(), None, Vec::new()).id()
    }

    fn task(&self, stage: StageKind, params: Value, model: Option<Digest>, inputs: Vec<Input>) -> Task {
        let stage_version = self.stages.versions.get(&stage).copied().unwrap_or(1);
        Task { stage, stage_version, params, model, inputs }
    }
}

/// A plan being made.
struct Planner<'a> {
    config: &'a PlanConfig,
    seen: &'a Observation,
    plan: Plan,
}

/// Works out what is left to do.
#[must_use]
pub fn plan(config: &PlanConfig, seen: &Observation) -> Plan {
    let mut planner = Planner { config, seen, plan: Plan::default() };
    planner.walk();
    planner.plan
}

impl<'a> Planner<'a> {
    fn walk(&mut self) {
        let stages = &self.config.stages;
        let annotated = self.each(StageKind::Annotate, &stages.annotated);
        let heldout = self.each(StageKind::Annotate, &stages.heldout);
        let found = self.each(StageKind::Discover, &stages.discover);
        if !found.all {
            return;
        }
        self.plan.found = found.commits.iter().map(|c| c.task_id).collect();
        let mut candidates: Vec<Input> = found.commits.iter().flat_map(|c| c.as_inputs()).collect();
        candidates.sort_unstable();
        candidates.dedup();
        let balance = self.task(StageKind::Balance, stages.balance.clone(), None, candidates);
        let Some(balance) = self.own(balance) else { return };
        let selected: u64 = balance.outputs.iter().map(|o| o.rows).sum();
        if selected == 0 && stages.annotated.is_empty() {
            // A dataset version without a pair would pass for one.
            let rows: u64 = found.commits.iter().flat_map(|c| &c.outputs).map(|o| o.rows).sum();
            self.plan.stuck = Some(match rows {
                0 => "the sources gave no pair whose text holds a query".to_owned(),
                n => format!("balancing selected none of {n} candidates"),
            });
            return;
        }
        let samples = self.samples(balance);
        if self.config.rounds == 0 {
            self.plan.complete = samples.all;
            return;
        }
        for round in 1..=self.config.rounds {
            self.plan.round = round;
            let Some(record) = self.seen.rounds.iter().find(|r| r.round == round) else {
                // Later rounds are started by the end of the one before.
                let cold = round == 1 && self.config.models.is_none();
                let first = if cold { self.cold_start(&samples, &annotated, &heldout) } else { self.config.models };
                if round == 1
                    && let Some((captioner, filter)) = first
                {
                    self.plan.actions.push(Action::StartRound(RoundRecord { round, captioner, filter, started_at_ms: 0 }));
                }
                return;
            };
            if !self.round(record, &samples, &annotated, &heldout) {
                return;
            }
        }
        self.plan.complete = true;
    }

    /// The downloads of all selected shards: each is fetched, and then fetched again by every retry that finds rows to do in it.
    fn samples(&mut self, balance: &'a Commit) -> Settled<'a> {
        let fetch = &self.config.stages.fetch;
        let settings = self.config.fetch_settings();
        let retries: Vec<&RetryRecord> = self.seen.retries.iter().filter(|r| r.settings == settings).collect();
        let mut samples = Settled::none();
        self.plan.downloads.fetched = true;
        for selected in balance.outputs.iter().filter(|o| o.rows > 0) {
            let task = self.task(StageKind::Fetch, fetch.clone(), None, vec![selected.as_input()]);
            let mut first = Settled::none();
            let Some(mut last) = self.settle(task, selected.rows, &mut first) else {
                samples.all &= first.all;
                self.plan.downloads.fetched &= first.all;
                continue;
            };
            let mut settled = true;
            for retry in &retries {
                let again = retry.statuses.iter().filter_map(|s| last.counts.get(s.as_str())).any(|n| *n > 0);
                if !again {
                    continue;
                }
                let mut params = fetch.clone();
                params["retry"] = json!({ "name": retry.name(), "statuses": retry.statuses });
                let task = self.task(StageKind::Fetch, params, None, last.as_inputs().collect());
                let mut one = Settled::none();
                match self.settle(task, selected.rows, &mut one) {
                    Some(done) => last = done,
                    // Where a retry was given up, what was there before stands.
                    None if one.all => {}
                    None => {
                        settled = false;
                        break;
                    }
                }
            }
            self.plan.downloads.samples.extend(last.outputs.iter().map(|output| output.digest));
            for (status, rows) in &last.counts {
                *self.plan.downloads.statuses.entry(status.clone()).or_default() += rows;
            }
            // Captions of what is about to change would be in vain.
            if settled {
                samples.commits.push(last);
            } else {
                samples.all = false;
                self.plan.downloads.retrying = true;
            }
        }
        samples
    }

    /// The build of a dataset version from what is given of the web, and from the clean pairs.
    fn build(&mut self, mut inputs: Vec<Input>, annotated: &Settled<'a>, heldout: &Settled<'a>) -> Option<&'a Commit> {
        let stages = &self.config.stages;
        inputs.extend(annotated.commits.iter().flat_map(|c| c.as_inputs()));
        let mut params = json!({ "settings": stages.build.clone() });
        // Where more was selected than may stay, the build depends on how much may; elsewhere its name says nothing of it.
        if let Some(cap) = BalanceConfig::deserialize(&stages.balance).ok().and_then(|b| b.cap_after_fetch()) {
            params["cap"] = json!(cap);
        }
        // Held-out shards are inputs as well, told from the clean ones by their digests.
        let held: Vec<Input> = heldout.commits.iter().flat_map(|c| c.as_inputs()).collect();
        params["heldout"] = held.iter().map(|i| Value::from(i.digest.to_string())).collect();
        inputs.extend(held);
        let taken_down = TakenDown::of(&self.seen.takedowns);
        if !taken_down.is_empty() {
            params["taken_down"] = taken_down.digest().to_string().into();
        }
        let build = self.task(StageKind::Build, params, None, inputs);
        self.own(build)
    }

    /// Whether the round is over.
    fn round(&mut self, record: &RoundRecord, samples: &Settled<'a>, annotated: &Settled<'a>, heldout: &Settled<'a>) -> bool {
        let stages = &self.config.stages;
        let mut scored = Settled::none();
        let mut build_inputs = Vec::new();
        for fetched in &samples.commits {
            for shard in &fetched.outputs {
                let caption =
                    self.task(StageKind::Caption, stages.caption.clone(), Some(record.captioner), vec![shard.as_input()]);
                let Some(captions) = self.settle(caption, shard.rows, &mut scored) else { continue };
                let beside: Vec<Input> = [shard.as_input()].into_iter().chain(captions.as_inputs()).collect();
                let score = self.task(StageKind::Score, stages.score.clone(), Some(record.filter), beside.clone());
                if let Some(scores) = self.settle(score, shard.rows, &mut scored) {
                    build_inputs.extend(beside.into_iter().chain(scores.as_inputs()));
                }
            }
        }
        let mut rests_on = BTreeSet::new();
        let metrics = self.evaluate(record.captioner, record.filter, None, heldout, &mut rests_on);
        if !(samples.all && scored.all && annotated.all && heldout.all) {
            return false;
        }
        // What a few tasks failed at, the others make up for. Where all have failed, a dataset would say what is not so.
        let shards = samples.commits.iter().map(|fetched| fetched.outputs.len()).sum::<usize>();
        if shards > 0 && build_inputs.is_empty() {
            self.plan.stuck = Some(format!("of round {}, every caption or score task was given up", record.round));
            return false;
        }
        let Some(built) = self.build(build_inputs, annotated, heldout) else { return false };
        self.plan.last_build = Some(built.task_id);
        let Some(metrics) = metrics else { return false };
        rests_on.insert(built.task_id);
        let mut finish = Finish {
            record: record.clone(),
            build: built.task_id,
            metrics: metrics.values.clone(),
            challenger_metrics: BTreeMap::new(),
            promoted: BTreeMap::new(),
            reasons: BTreeMap::new(),
            rests_on,
        };
        // A round that another has followed was decided then; its models stay what they were.
        let followed = self.seen.rounds.iter().any(|r| r.round > record.round);
        if !followed && !self.challenge(&mut finish, &metrics, built, heldout) {
            return false;
        }
        let next = record.round + 1;
        let promoted = || finish.promoted.keys();
        let written = self.seen.results.iter().filter(|r| r.round == record.round).any(|r| match followed {
            true => finish.rests_on.iter().all(|task| r.rests_on.contains(task)),
            false => finish.rests_on.iter().eq(&r.rests_on) && promoted().eq(&r.promoted),
        });
        if !written {
            self.plan.actions.push(Action::FinishRound(Box::new(finish)));
            return false;
        }
        if !followed && next <= self.config.rounds {
            let pick = |role: &str, now: Digest| finish.promoted.get(role).copied().unwrap_or(now);
            self.plan.actions.push(Action::StartRound(RoundRecord {
                round: next,
                captioner: pick(retrain::CAPTIONER, record.captioner),
                filter: pick(retrain::FILTER, record.filter),
                started_at_ms: 0,
            }));
            return false;
        }
        true
    }

    fn task(&self, stage: StageKind, params: Value, model: Option<Digest>, inputs: Vec<Input>) -> Task {
        self.config.task(stage, params, model, inputs)
    }

    fn each(&mut self, stage: StageKind, params: &[Value]) -> Settled<'a> {
        let mut settled = Settled::none();
        for p in params {
            let task = self.task(stage, p.clone(), None, Vec::new());
            self.settle(task, 0, &mut settled);
        }
        settled
    }

    /// Expects a worker's task: its commit if it is done; otherwise it is planned, unless it was given up.
    fn settle(&mut self, task: Task, rows: u64, settled: &mut Settled<'a>) -> Option<&'a Commit> {
        let commit = self.expect(&task, rows);
        match commit {
            Some(c) => settled.commits.push(c),
            None if self.is_dead(&task) => self.plan.dead.push(task.id()),
            None => {
                settled.all = false;
                self.plan.tasks.push(task);
            }
        }
        commit
    }

    /// Expects a task of the coordinator's own. Nothing goes on without it.
    fn own(&mut self, task: Task) -> Option<&'a Commit> {
        let commit = self.expect(&task, 0);
        if commit.is_none() {
            if self.is_dead(&task) {
                self.plan.dead.push(task.id());
                self.plan.stuck = Some(format!("the {} task {} was given up", task.stage, task.id()));
            } else {
                self.plan.actions.push(Action::Own(task));
            }
        }
        commit
    }

    fn expect(&mut self, task: &Task, rows: u64) -> Option<&'a Commit> {
        let id = task.id();
        let commit = self.seen.commits.get(&id);
        let dead = commit.is_none() && self.is_dead(task);
        let progress = self.plan.progress.entry(task.stage).or_default();
        progress.tasks += 1;
        progress.done += u64::from(commit.is_some());
        progress.dead += u64::from(dead);
        let written = commit.map_or(0, |c| c.outputs.iter().map(|o| o.rows).sum());
        progress.rows_done += written;
        progress.rows += if commit.is_some() { written } else { rows };
        commit
    }

    fn is_dead(&self, task: &Task) -> bool {
        let failed = self.seen.failures.get(&task.id());
        failed.is_some_and(|(attempts, retryable)| !retryable || *attempts >= self.config.max_attempts)
    }
}

/// The inputs of a build task, told apart as [`Planner::round`] put them together.
pub(crate) fn build_inputs(task: &Task, candidates: u64, selected: u64, taken_down: TakenDown) -> BuildInputs {
    let held = task.params.get("heldout").and_then(Value::as_array);
    let held: Vec<Digest> = held.into_iter().flatten().filter_map(|d| d.as_str()?.parse().ok()).collect();
    let column = |table| task.inputs_of(table).collect::<Vec<_>>();
    let (samples, captions, scores) = (column(Table::Samples), column(Table::Captions), column(Table::Scores));
    let unjudged = if captions.is_empty() { samples.clone() } else { Vec::new() };
    let beside = samples.into_iter().zip(captions).zip(scores);
    let triplets = beside.map(|((samples, captions), scores)| Triplet { samples, captions, scores }).collect();
    let (heldout, annotated) = column(Table::Annotated).into_iter().partition(|d| held.contains(d));
    let cap = task.params.get("cap").and_then(|cap| HardCap::deserialize(cap).ok());
    BuildInputs { candidates, selected, triplets, unjudged, cap, annotated, heldout, taken_down: Arc::new(taken_down) }
}

//! The loop: observe → plan → act. It keeps nothing that a restart would miss; it may be killed and started again at any point.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use arrow::array::{Array, AsArray};
use arrow::datatypes::Float64Type;
use async_trait::async_trait;
use capfilt_schemas::{
    AliasEvent, Commit, DatasetRef, DatasetVersion, Lineage, Output, RoundRecord, RoundResult, StageKind, StatusCounts, Table,
    Task, TaskId,
};
use capfilt_store::{CommitResult, Store, TakenDown, now_ms};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use crate::plan::{Action, Finish, Observation, Plan, PlanConfig, build_inputs, plan};
use crate::retrain::Measured;
use crate::{CoordinatorError, balance, build, external, retrain};

/// How often the store is looked at while workers are busy.
const TICK: Duration = Duration::from_millis(300);
/// After this a task that is still not done is submitted again, in case the queue has lost it.
const RESUBMIT: Duration = Duration::from_secs(30);
/// Records read at the same time.
const READS: usize = 32;

/// Takes the tasks that workers shall do. It may be given the same task many times.
#[async_trait]
pub trait TaskSink: Send + Sync {
    /// Hands tasks on.
    ///
    /// # Errors
    /// What went wrong, in one line.
    async fn submit(&self, tasks: &[Task]) -> Result<(), String>;
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct RunOutcome {
    /// The last plan; its `progress` says how much was done.
    pub plan: Plan,
    /// Tasks that have been done, under this run's name, since it was called.
    pub tasks_done: u64,
    /// The newest dataset version that the run's settings lead to.
    pub dataset: Option<DatasetVersion>,
}

/// The state of a run, kept up to date from the store.
pub struct Observer {
    store: Store,
    seen: Observation,
}

impl Observer {
    /// Has seen nothing yet.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self { store, seen: Observation::default() }
    }

    /// Looks at the store. Commits never change, so each is read once.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`].
    pub async fn observe(&mut self, config: &PlanConfig) -> Result<&Observation, CoordinatorError> {
        for stage in StageKind::ALL {
            let ids = self.store.committed(*stage).await?;
            let fresh: Vec<TaskId> = ids.into_iter().filter(|id| !self.seen.commits.contains_key(id)).collect();
            let store = &self.store;
            let read = stream::iter(fresh).map(|id| async move { store.find_commit(*stage, &id).await });
            let commits: Vec<Option<Commit>> = read.buffer_unordered(READS).try_collect().await?;
            for commit in commits.into_iter().flatten() {
                if *stage == StageKind::Evaluate {
                    let metrics = self.metrics(&commit.outputs).await?;
                    self.seen.metrics.insert(commit.task_id, metrics);
                }
                self.seen.commits.insert(commit.task_id, commit);
            }
        }
        self.seen.failures.clear();
        for failure in self.store.all_failures().await? {
            let entry = self.seen.failures.entry(failure.task_id).or_insert((0, true));
            *entry = (entry.0.max(failure.attempt), entry.1 && failure.retryable);
        }
        self.seen.rounds = self.store.rounds(&config.run).await?;
        self.seen.results = self.store.round_results(&config.run).await?;
        self.seen.retries = self.store.retries(&config.run).await?;
        self.seen.takedowns = self.store.takedowns().await?;
        Ok(&self.seen)
    }

    async fn metrics(&self, outputs: &[Output]) -> Result<Measured, CoordinatorError> {
        let mut measured = Measured::default();
        for output in outputs {
            let rows = self.store.read_whole(Table::Evaluations, &output.digest).await?;
            let (names, values) = (rows.column(0).as_string::<i32>(), rows.column(1).as_primitive::<Float64Type>());
            let resampled = rows.column(2).as_list::<i32>();
            for (i, name) in names.iter().enumerate() {
                let Some(name) = name else { continue };
                measured.values.insert(name.to_owned(), values.value(i));
                if resampled.is_valid(i) {
                    let draws = resampled.value(i).as_primitive::<Float64Type>().values().to_vec();
                    measured.resampled.insert(name.to_owned(), draws);
                }
            }
        }
        Ok(measured)
    }
}

/// Works a run off: plans, hands tasks to `sink`, does the coordinator's own share, until nothing is left or nothing can go on.
/// `watch` is shown every plan.
///
/// # Errors
/// [`CoordinatorError`] if the store or the queue is gone; failed tasks are not errors, they are in the outcome's plan.
pub async fn reconcile(
    store: &Store,
    config: &PlanConfig,
    sink: &dyn TaskSink,
    watch: &(dyn Fn(&Plan) + Send + Sync),
) -> Result<RunOutcome, CoordinatorError> {
    let mut observer = Observer::new(store.clone());
    let mut submitted: HashSet<TaskId> = HashSet::new();
    let (mut since, mut done_before) = (Instant::now(), None);
    loop {
        let now = plan(config, observer.observe(config).await?);
        watch(&now);
        let done = observer.seen.commits.values().filter(|c| c.run == config.run).count() as u64;
        let begin = *done_before.get_or_insert(done);
        if now.complete || now.stuck.is_some() {
            let dataset = newest_dataset(store, config, &now).await?;
            return Ok(RunOutcome { tasks_done: done - begin, plan: now, dataset });
        }
        if since.elapsed() > RESUBMIT {
            submitted.clear();
            since = Instant::now();
        }
        let fresh: Vec<Task> = now.tasks.iter().filter(|t| submitted.insert(t.id())).cloned().collect();
        if !fresh.is_empty() {
            sink.submit(&fresh).await.map_err(CoordinatorError::Queue)?;
        }
        for action in &now.actions {
            act(store, config, action, &now, &observer.seen).await?;
        }
        if now.actions.is_empty() {
            tokio::time::sleep(TICK).await;
        }
    }
}

async fn act(
    store: &Store,
    config: &PlanConfig,
    action: &Action,
    now: &Plan,
    seen: &Observation,
) -> Result<(), CoordinatorError> {
    match action {
        Action::StartRound(record) => {
            let record = &RoundRecord { started_at_ms: now_ms(), ..in_service(store, record, seen).await? };
            if config.models.is_none() && record.round == 1 {
                first_models(store, config, record).await?;
            }
            store.start_round(&config.run, record.clone()).await?;
            let models = format!("captioner {}, filter {}", record.captioner.short(), record.filter.short());
            store.log_event(&config.run, &format!("round {} started with {models}", record.round)).await?;
        }
        Action::FinishRound(finish) => finish_round(store, config, finish, seen).await?,
        Action::Own(task) => match work(store, config, task, now, seen).await {
            Ok(commit) if task.stage == StageKind::Build => {
                publish(store, config, now.round, &commit, seen).await?;
            }
            Ok(_) => {}
            Err(error) => {
                let text = error.chain();
                let attempt = store.record_failure(&config.run, task, &text, error.is_retryable()).await?;
                tracing::error!(run = %config.run, stage = %task.stage, task = %task.id(), attempt, error = text, "task failed");
                tokio::time::sleep(TICK).await;
            }
        },
    }
    Ok(())
}

/// Models that a run without any has trained play the roles that no other does.
async fn first_models(store: &Store, config: &PlanConfig, record: &RoundRecord) -> Result<(), CoordinatorError> {
    for (role, model) in [(retrain::CAPTIONER, record.captioner), (retrain::FILTER, record.filter)] {
        if store.model_in_role(role).await?.is_none() {
            let reason = format!("run {} trained it on what was found", config.run);
            store.set_alias(role, model, "promote", &reason, &format!("{}/0/{model}", config.run), BTreeMap::new()).await?;
        }
    }
    Ok(())
}

/// The models of a round that follows another: what a person promoted or rolled back to since that one began comes first.
async fn in_service(store: &Store, record: &RoundRecord, seen: &Observation) -> Result<RoundRecord, CoordinatorError> {
    let mut record = record.clone();
    let Some(before) = seen.rounds.iter().find(|r| r.round + 1 == record.round) else { return Ok(record) };
    for (role, model) in [(retrain::CAPTIONER, &mut record.captioner), (retrain::FILTER, &mut record.filter)] {
        if let Some(event) = put_by_hand(store, role, before).await? {
            *model = event.model;
        }
    }
    Ok(record)
}

/// What a person has put into a role since a round began, if nothing came after it.
async fn put_by_hand(store: &Store, role: &str, since: &RoundRecord) -> Result<Option<AliasEvent>, CoordinatorError> {
    // Promotions by a run have a key.
    let by_hand = |event: &AliasEvent| event.key.is_empty() && event.created_at_ms >= since.started_at_ms;
    Ok(store.model_in_role(role).await?.filter(by_hand))
}

/// Does one of the coordinator's own tasks and commits it, by the same protocol as a worker.
async fn work(
    store: &Store,
    config: &PlanConfig,
    task: &Task,
    now: &Plan,
    seen: &Observation,
) -> Result<Commit, CoordinatorError> {
    let began = Instant::now();
    let (outputs, counts, facts) = match task.stage {
        StageKind::Balance => {
            let settings: balance::BalanceConfig = serde_json::from_value(task.params.clone())?;
            let inputs: Vec<_> = task.inputs_of(Table::Candidates).collect();
            let made = balance::balance(store, &config.sql, &settings, &inputs).await?;
            (made.outputs, made.counts, made.facts)
        }
        StageKind::Build => {
            let settings: build::BuildConfig = serde_json::from_value(task.params["settings"].clone())?;
            let (found, selected) = (rows(now, StageKind::Discover), rows(now, StageKind::Balance));
            let inputs = build_inputs(task, found, selected, TakenDown::of(&seen.takedowns));
            let made = build::build(store, &config.sql, &settings, inputs).await?;
            let mut facts = made.facts;
            facts["funnel"] = serde_json::to_value(&made.funnel)?;
            facts["noise_ratio"] = json!(made.noise_ratio);
            (made.shards, made.counts, facts)
        }
        StageKind::Train => {
            // Another run, or one that was killed, may have built this without a version in our name.
            let built = now.last_build.and_then(|build| seen.commits.get(&build));
            let built = built.ok_or_else(|| CoordinatorError::Task("nothing has been built to train on".to_owned()))?;
            let version = publish(store, config, now.round, built, seen).await?;
            let model = external::train(store, config, task, &version).await?;
            (vec![model], StatusCounts::from([("ok".to_owned(), 1)]), json!({}))
        }
        other => return Err(CoordinatorError::Task(format!("the coordinator does no {other} tasks"))),
    };
    let commit = Commit {
        task_id: task.id(),
        task: task.clone(),
        run: config.run.clone(),
        outputs,
        counts,
        facts,
        committed_at_ms: now_ms(),
        elapsed_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    };
    match store.commit(&commit).await? {
        CommitResult::Lost { winner } => Ok(*winner),
        CommitResult::Committed | CommitResult::AlreadyCommitted => Ok(commit),
    }
}

/// Appends the dataset version that a build led to; the same one is appended once.
async fn publish(
    store: &Store,
    config: &PlanConfig,
    round: u32,
    build: &Commit,
    seen: &Observation,
) -> Result<DatasetVersion, CoordinatorError> {
    let record = seen.rounds.iter().find(|r| r.round == round);
    let version = DatasetVersion {
        name: config.dataset.clone(),
        version: 0,
        digest: DatasetVersion::digest_of(&build.outputs),
        run: config.run.clone(),
        round,
        shards: build.outputs.clone(),
        counts: build.counts.clone(),
        noise_ratio: build.facts["noise_ratio"].as_f64(),
        funnel: serde_json::from_value(build.facts["funnel"].clone()).unwrap_or_default(),
        settings: build.task.params.get("settings").cloned().unwrap_or(Value::Null),
        takedowns: seen.takedowns.len() as u64,
        lineage: Lineage {
            build: build.task_id,
            inputs: build.task.inputs.clone(),
            captioner: record.map(|r| r.captioner),
            filter: record.map(|r| r.filter),
        },
        created_at_ms: now_ms(),
    };
    let before = store.dataset_versions(&config.dataset).await?.len();
    let there = store.append_dataset(&version).await?;
    if there.version > before as u64 {
        let message = format!("round {round} built version {} of `{}`, {}", there.version, there.name, there.digest.short());
        store.log_event(&config.run, &message).await?;
    }
    Ok(there)
}

async fn finish_round(store: &Store, config: &PlanConfig, finish: &Finish, seen: &Observation) -> Result<(), CoordinatorError> {
    let Some(build) = seen.commits.get(&finish.build) else { return Ok(()) };
    let round = finish.record.round;
    let version = publish(store, config, round, build, seen).await?;
    let mut reasons = finish.reasons.clone();
    let mut kept = BTreeSet::new();
    for role in finish.promoted.keys() {
        if let Some(event) = put_by_hand(store, role, &finish.record).await? {
            let why = format!("; it is not put in service, for a person chose {} meanwhile", event.model.short());
            reasons.entry(role.clone()).or_default().push_str(&why);
            kept.insert(role);
        }
    }
    let result = RoundResult {
        round,
        dataset: DatasetRef { version: version.version, digest: version.digest },
        metrics: finish.metrics.clone(),
        challenger_metrics: finish.challenger_metrics.clone(),
        promoted: finish.promoted.keys().cloned().collect(),
        reasons: reasons.clone(),
        rests_on: finish.rests_on.iter().copied().collect(),
        finished_at_ms: now_ms(),
    };
    for (role, why) in &reasons {
        let Some(model) = finish.promoted.get(role) else {
            let what = if role == retrain::CLIP { "trained a" } else { "keeps its" };
            store.log_event(&config.run, &format!("round {round} {what} {role}: {why}")).await?;
            continue;
        };
        if kept.contains(role) {
            store.log_event(&config.run, &format!("round {round} trained a better {role}, {}: {why}", model.short())).await?;
            continue;
        }
        let reason = format!("run {} round {round}: {why}", config.run);
        let key = format!("{}/{round}/{}", config.run, result.key());
        store.set_alias(role, *model, "promote", &reason, &key, finish.challenger_metrics.clone()).await?;
        store.log_event(&config.run, &format!("round {round} promoted a new {role}, {}: {why}", model.short())).await?;
    }
    store.finish_round(&config.run, &result).await?;
    store.log_event(&config.run, &format!("round {round} finished")).await?;
    Ok(())
}

/// The dataset version of the last round that the run's present settings lead to.
async fn newest_dataset(store: &Store, config: &PlanConfig, now: &Plan) -> Result<Option<DatasetVersion>, CoordinatorError> {
    let Some(build) = now.last_build else { return Ok(None) };
    let versions = store.dataset_versions(&config.dataset).await?;
    Ok(versions.into_iter().rev().find(|v| v.run == config.run && v.lineage.build == build))
}

fn rows(now: &Plan, stage: StageKind) -> u64 {
    now.progress.get(&stage).map_or(0, |p| p.rows_done)
}

//! The records that the store keeps as JSON. Each is created once and never changed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Digest, FetchStatus, Input, RunId, StageKind, Table, Task, TaskId};

/// Rows by status. `ok` is one of the keys.
pub type StatusCounts = BTreeMap<String, u64>;

/// One object that a task wrote.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Output {
    /// The object's table.
    pub table: Table,
    /// The object's digest, which is its name.
    pub digest: Digest,
    /// Rows in it.
    pub rows: u64,
    /// Bytes of it.
    pub bytes: u64,
}

impl Output {
    /// The object as the input of a further task.
    #[must_use]
    pub const fn as_input(&self) -> Input {
        Input { table: self.table, digest: self.digest }
    }
}

/// `commits/<stage>/<task>.json`: the task is done, and these objects are visible.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// The task's name.
    pub task_id: TaskId,
    /// The task itself, so that a commit explains itself without the run that asked for it.
    pub task: Task,
    /// The run that did the work.
    pub run: RunId,
    /// What was written, in order.
    pub outputs: Vec<Output>,
    /// Rows by status, over all outputs.
    pub counts: StatusCounts,
    /// Further facts of the stage (candidates seen, losses, …). Never read by another stage.
    pub facts: Value,
    /// When the commit was made, in milliseconds since 1970-01-01 UTC. Not part of any digest.
    pub committed_at_ms: u64,
    /// How long the work took, in milliseconds. Not part of any digest.
    pub elapsed_ms: u64,
}

impl Commit {
    /// The outputs as the inputs of a further task.
    pub fn as_inputs(&self) -> impl Iterator<Item = Input> + '_ {
        self.outputs.iter().map(Output::as_input)
    }
}

/// `failures/<task>/<n>.json`: one failed attempt.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// The task's name.
    pub task_id: TaskId,
    /// The stage.
    pub stage: StageKind,
    /// The run that tried.
    pub run: RunId,
    /// 1 for the first failure.
    pub attempt: u32,
    /// The whole error chain.
    pub error: String,
    /// Whether a further attempt may help.
    pub retryable: bool,
    /// Milliseconds since 1970-01-01 UTC.
    pub failed_at_ms: u64,
}

/// `runs/<run>/rounds/<n>.json`: which models a round of a run works with. Made once, when the round starts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RoundRecord {
    /// 1 for the first round.
    pub round: u32,
    /// Digest of the captioner's `models` object.
    pub captioner: Digest,
    /// Digest of the filter's `models` object.
    pub filter: Digest,
    /// Milliseconds since 1970-01-01 UTC; 0 in a plan.
    #[serde(default)]
    pub started_at_ms: u64,
}

/// What a finished round led to, as the report shows it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RoundResult {
    /// 1 for the first round.
    pub round: u32,
    /// The dataset version that the round built.
    pub dataset: DatasetRef,
    /// Metrics of the round's models on the held-out pairs.
    pub metrics: BTreeMap<String, f64>,
    /// Metrics of the challengers trained on the round's dataset, if any were trained.
    pub challenger_metrics: BTreeMap<String, f64>,
    /// Roles in which the challenger was promoted.
    pub promoted: Vec<String>,
    /// Why a role was given to the challenger, or was not.
    #[serde(default)]
    pub reasons: BTreeMap<String, String>,
    /// The tasks that all this rests on, in order: the build, the evaluations, the trainings.
    pub rests_on: Vec<TaskId>,
    /// Milliseconds since 1970-01-01 UTC.
    pub finished_at_ms: u64,
}

impl RoundResult {
    /// What tells a result from another of the same round: what it rests on, and what was decided.
    #[must_use]
    pub fn key(&self) -> Digest {
        let tasks = self.rests_on.iter().map(ToString::to_string);
        let parts: Vec<String> = tasks.chain(self.promoted.iter().cloned()).collect();
        Digest::of(parts.join("\n").as_bytes())
    }
}

/// `runs/<run>/retries/<n>.json`: somebody asked for the rows of some statuses to be fetched again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RetryRecord {
    /// The run.
    pub run: RunId,
    /// 1 for the first retry of the run.
    pub number: u64,
    /// Rows with one of these are fetched again. Sorted, each once.
    pub statuses: Vec<FetchStatus>,
    /// The fetch settings that it was asked under: the name of a fetch task with them and without inputs. Under others it does not count.
    pub settings: TaskId,
    /// Milliseconds since 1970-01-01 UTC.
    pub asked_at_ms: u64,
}

impl RetryRecord {
    /// What tells a retry from every other one, in the names of its tasks.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.run, self.number)
    }
}

/// `takedowns/<n>.json`: what must not be in any dataset from now on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Takedown {
    /// 1 for the first takedown of the store.
    pub number: u64,
    /// Addresses of images, without fragment. `http` and `https` are the same. Sorted, each once.
    pub urls: Vec<String>,
    /// Hosts, with all hosts below them. Sorted, each once.
    pub hosts: Vec<String>,
    /// SHA-256 of images as the server sent them (the column `sha256`). Sorted, each once.
    pub sha256: Vec<Digest>,
    /// Why, for the record.
    pub reason: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub made_at_ms: u64,
}

/// `redactions/<table>/<from>.json`: a shard was replaced by one without what was taken down. Whoever asks for the shard gets that one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Redaction {
    /// The table.
    pub table: Table,
    /// The shard replaced. Records that name it stay as they are.
    pub from: Digest,
    /// Its replacement.
    pub to: Output,
    /// The rows of `from` that were emptied; in `dataset`, left out. Ascending.
    pub rows: Vec<u32>,
    /// How many takedowns there were.
    pub takedowns: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub made_at_ms: u64,
}

/// A dataset version by number and digest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DatasetRef {
    /// 1 for the first version.
    pub version: u64,
    /// See [`DatasetVersion::digest`].
    pub digest: Digest,
}

/// How many pairs each step left over, in the order of the steps.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Funnel {
    /// `(step, pairs)`; a step's name says what the pairs have in common (`candidates`, `selected`, `fetched`, …).
    pub steps: Vec<(String, u64)>,
}

/// From what a dataset version was built.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Lineage {
    /// The build task.
    pub build: TaskId,
    /// The shards read.
    pub inputs: Vec<Input>,
    /// The captioner that wrote the synthetic texts; none before the first round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub captioner: Option<Digest>,
    /// The filter that scored; none before the first round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Digest>,
}

/// `datasets/<name>/<n>.json`: one version of a dataset, a list of kept pairs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DatasetVersion {
    /// The dataset's name.
    pub name: String,
    /// 1 for the first version.
    pub version: u64,
    /// SHA-256 over the digests of `shards` in order: two versions with the same rows have the same digest.
    pub digest: Digest,
    /// The run and round that built it.
    pub run: RunId,
    /// The round; 0 for the one that a run without models first trains on.
    pub round: u32,
    /// The `dataset` objects, in order.
    pub shards: Vec<Output>,
    /// Kept rows by origin.
    pub counts: StatusCounts,
    /// Share of judged texts, web and synthetic, that the policy threw out.
    pub noise_ratio: Option<f64>,
    /// The way of the pairs.
    pub funnel: Funnel,
    /// The `[build]` settings.
    pub settings: Value,
    /// How many takedowns were in force when it was built.
    #[serde(default)]
    pub takedowns: u64,
    /// Where it came from.
    pub lineage: Lineage,
    /// Milliseconds since 1970-01-01 UTC. Not part of the digest.
    pub created_at_ms: u64,
}

impl DatasetVersion {
    /// The digest of a list of shards.
    #[must_use]
    pub fn digest_of(shards: &[Output]) -> Digest {
        let mut all = Vec::with_capacity(shards.len() * 32);
        for shard in shards {
            all.extend_from_slice(shard.digest.as_bytes());
        }
        Digest::of(&all)
    }
}

/// `models/<role>/<n>.json`: from here on, the role is played by this model. The newest event counts.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct AliasEvent {
    /// `captioner` or `filter`.
    pub role: String,
    /// 1 for the first event of the role.
    pub number: u64,
    /// Digest of the model's `models` object.
    pub model: Digest,
    /// `import`, `promote` or `rollback`.
    pub action: String,
    /// Why: `run demo round 1: cider_d 0.41 > 0.38`.
    pub reason: String,
    /// What makes the event happen at most once (`demo/1`); empty for those made by hand.
    pub key: String,
    /// Metrics known when it was made.
    pub metrics: BTreeMap<String, f64>,
    /// Milliseconds since 1970-01-01 UTC.
    pub created_at_ms: u64,
}

//! The one place that spells paths.
//!
//! ```text
//! store.json                              format of the store
//! objects/<table>/<sha256>.parquet        shards, named by their bytes
//! commits/<stage>/<task>.json             what is visible
//! failures/<task>/<n>.json                failed attempts
//! runs/<run>/rounds/<n>.json              models of a round
//! runs/<run>/results/<n>-<key>.json       what a round led to
//! runs/<run>/retries/<n>.json             which failed downloads to try again
//! runs/<run>/events/<n>.json              what happened, for people
//! datasets/<name>/<n>.json                dataset versions
//! models/<role>/<n>.json                  who plays the role
//! takedowns/<n>.json                      what must not be in any dataset
//! redactions/<table>/<sha256>.json        which shard stands for one from which something was taken down
//! ```

use capfilt_schemas::{Digest, RoundResult, RunId, StageKind, Table, TaskId};
use object_store::path::Path;

pub(crate) fn marker() -> Path {
    Path::from("store.json")
}

pub(crate) fn objects(table: Table) -> Path {
    Path::from_iter(["objects", table.name()])
}

pub(crate) fn object(table: Table, digest: &Digest) -> Path {
    objects(table).join(format!("{digest}.parquet"))
}

pub(crate) fn commits(stage: StageKind) -> Path {
    Path::from_iter(["commits", stage.name()])
}

pub(crate) fn commit(stage: StageKind, task: &TaskId) -> Path {
    commits(stage).join(format!("{task}.json"))
}

pub(crate) fn all_failures() -> Path {
    Path::from("failures")
}

pub(crate) fn failures(task: &TaskId) -> Path {
    all_failures().join(task.to_string())
}

pub(crate) fn rounds(run: &RunId) -> Path {
    Path::from_iter(["runs", run.as_str(), "rounds"])
}

pub(crate) fn results(run: &RunId) -> Path {
    Path::from_iter(["runs", run.as_str(), "results"])
}

pub(crate) fn result(run: &RunId, result: &RoundResult) -> Path {
    results(run).join(format!("{:08}-{}.json", result.round, result.key()))
}

pub(crate) fn retries(run: &RunId) -> Path {
    Path::from_iter(["runs", run.as_str(), "retries"])
}

pub(crate) fn events(run: &RunId) -> Path {
    Path::from_iter(["runs", run.as_str(), "events"])
}

pub(crate) fn datasets() -> Path {
    Path::from("datasets")
}

pub(crate) fn dataset(name: &str) -> Path {
    datasets().join(name.to_owned())
}

pub(crate) fn model_role(role: &str) -> Path {
    Path::from_iter(["models", role])
}

pub(crate) fn takedowns() -> Path {
    Path::from("takedowns")
}

pub(crate) fn redactions(table: Table) -> Path {
    Path::from_iter(["redactions", table.name()])
}

pub(crate) fn redaction(table: Table, from: &Digest) -> Path {
    redactions(table).join(format!("{from}.json"))
}

/// Record number `n` below `folder`: eight digits, so that names sort as numbers do.
pub(crate) fn numbered(folder: &Path, n: u64) -> Path {
    folder.clone().join(format!("{n:08}.json"))
}

/// The number of a record made by [`numbered`].
pub(crate) fn number_of(path: &Path) -> Option<u64> {
    path.filename()?.strip_suffix(".json")?.parse().ok()
}

/// The digest that names an object or a commit.
pub(crate) fn digest_of(path: &Path) -> Option<Digest> {
    path.filename()?.split('.').next()?.parse().ok()
}

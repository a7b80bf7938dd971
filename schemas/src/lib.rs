//! What the data *is*: ids, Arrow tables, row statuses, tasks and the records of the store.
//!
//! This crate knows names and shapes. It never does I/O, knows no async, and never learns how a value is computed.
//!
//! The tables, in the order in which a pair passes through them (see [`Table`]):
//! `candidates` → `selected` → `samples` → `captions` → `scores` → `dataset`, with `annotated` (clean, human-written pairs)
//! joining at `dataset`, and `models` and `evaluations` coming out of training.

mod ids;
mod record;
mod status;
mod table;
mod task;

pub use ids::{Digest, DigestError, RunId, TaskId, fold, sample_id};
pub use record::{
    AliasEvent, Commit, DatasetRef, DatasetVersion, Failure, Funnel, Lineage, Output, Redaction, RetryRecord, RoundRecord,
    RoundResult, StatusCounts, Takedown,
};
pub use status::{FetchStatus, Origin, RowStatus, TextSource};
pub use table::{REMOVED_URL, Table, column};
pub use task::{Input, StageKind, Task};

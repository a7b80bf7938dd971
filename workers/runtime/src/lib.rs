//! How work *moves*: the queue, leases, the [`Stage`] contract, the worker loop, compute threads and telemetry.
//!
//! A [`Worker`] receives a task, keeps its lease, reads its inputs, hands the rows to the task's [`Stage`], writes what comes out, commits
//! and acknowledges. This crate knows no stage, no model and no HTTP; stages know no queue and no commit.

mod compute;
mod context;
mod error;
mod input;
mod lease;
mod memory;
mod queue;
mod stage;
mod telemetry;
mod worker;

pub use compute::{ModelThread, on_blocking, on_rayon};
pub use context::{Facts, Work};
pub use error::StageError;
pub use memory::MemoryQueue;
pub use queue::{Delivery, Depth, QueueError, WorkQueue};
pub use stage::{RowStream, Stage, rows};
pub use telemetry::{StageCounters, Telemetry};
pub use worker::{Worker, WorkerConfig};

//! The queue's contract.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use capfilt_schemas::{StageKind, Task, TaskId};

/// A failure of the queue itself.
#[derive(Debug, thiserror::Error)]
#[error("the work queue {what}")]
pub struct QueueError {
    /// What failed.
    pub what: String,
}

/// A task handed out under a lease.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The task.
    pub task: Arc<Task>,
    /// Its name.
    pub id: TaskId,
    /// Tells this delivery from an earlier one of the same task.
    pub receipt: u64,
}

/// How much there is to do.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Tasks that can be received now or, being delayed, later.
    pub waiting: usize,
    /// Tasks handed out under a lease.
    pub in_flight: usize,
}

/// Hands out tasks. It may lose or repeat any of them; correctness lives in the commit protocol.
#[async_trait]
pub trait WorkQueue: Send + Sync + 'static {
    /// Adds tasks. One that is waiting or in flight already is not added again.
    async fn enqueue(&self, tasks: &[Task]) -> Result<(), QueueError>;

    /// Takes the next task of a stage and hides it from others for `lease`. Waits a while for one; `None` when there is none yet.
    async fn receive(&self, stage: StageKind, lease: Duration) -> Result<Option<Delivery>, QueueError>;

    /// Hides a delivery for another `lease` from now on. `false`: the lease was lost and somebody else may be at the task.
    async fn extend(&self, delivery: &Delivery, lease: Duration) -> Result<bool, QueueError>;

    /// The task is over; a delivery whose lease was lost is left to its new owner.
    async fn ack(&self, delivery: &Delivery) -> Result<(), QueueError>;

    /// Gives the task back, to be handed out again after `after`.
    async fn retry(&self, delivery: &Delivery, after: Duration) -> Result<(), QueueError>;

    /// How much there is to do for a stage.
    async fn depth(&self, stage: StageKind) -> Result<Depth, QueueError>;
}

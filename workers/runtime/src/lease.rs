//! Keeping a lease alive while the work goes on.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::{Delivery, WorkQueue};

/// Extends a lease at every third of its length until dropped.
pub(crate) struct Lease {
    /// Cancelled when the lease was lost: the work goes on, since the commit decides, but may as well stop.
    pub(crate) lost: CancellationToken,
    _keeper: AbortOnDropHandle<()>,
}

impl Lease {
    pub(crate) fn keep(queue: Arc<dyn WorkQueue>, delivery: Delivery, length: Duration) -> Self {
        let lost = CancellationToken::new();
        let signal = lost.clone();
        let keeper = tokio::spawn(async move {
            loop {
                tokio::time::sleep(length / 3).await;
                match queue.extend(&delivery, length).await {
                    Ok(true) => {}
                    Ok(false) => {
                        tracing::warn!(task = %delivery.id, stage = %delivery.task.stage, "lease lost; another worker may be at the task");
                        signal.cancel();
                        return;
                    }
                    Err(e) => tracing::warn!(task = %delivery.id, error = %e, "cannot extend the lease; trying again"),
                }
            }
        });
        Self { lost, _keeper: AbortOnDropHandle::new(keeper) }
    }
}

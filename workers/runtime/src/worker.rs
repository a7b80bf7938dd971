//! The worker: receive, keep the lease, read, process, write, commit, acknowledge.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{AsArray, RecordBatch};
use capfilt_schemas::{Commit, Output, RunId, StageKind, StatusCounts, column};
use capfilt_store::{CommitResult, ShardWriter, Store, now_ms};
use futures::{FutureExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::compute::{on_blocking, panic_text};
use crate::lease::Lease;
use crate::{Delivery, Facts, QueueError, Stage, StageError, Telemetry, Work, WorkQueue, input};

/// A task's output is cut into shards of this many rows. Stages whose rows answer their input row by row stay below it.
const MAX_SHARD_ROWS: u64 = 100_000;

/// How a worker works. Nothing in it changes what comes out.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Folder for model files and unfinished training; it may be lost at any time.
    pub work_dir: PathBuf,
    /// Seconds after which a task of a silent worker goes to another.
    pub lease_seconds: u64,
    /// Failures after which a task is given up.
    pub max_attempts: u32,
    /// Rows decoded at a time.
    pub batch_rows: usize,
    /// Tasks of one stage at work at the same time.
    pub tasks_at_once: usize,
    /// The same for discover and fetch, which mostly wait: while one task waits for its slowest server, others go on.
    pub web_tasks_at_once: usize,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            work_dir: PathBuf::from("work"),
            lease_seconds: 60,
            max_attempts: 3,
            batch_rows: 64,
            tasks_at_once: 1,
            web_tasks_at_once: 4,
        }
    }
}

/// Works off the tasks of some stages until it is cancelled.
pub struct Worker {
    store: Store,
    run: RunId,
    queue: Arc<dyn WorkQueue>,
    stages: HashMap<StageKind, Arc<dyn Stage>>,
    config: WorkerConfig,
    telemetry: Telemetry,
}

/// What a task wrote.
struct Written {
    outputs: Vec<Output>,
    counts: StatusCounts,
}

impl Worker {
    /// A worker for `stages`, one of each kind.
    pub fn new(
        store: Store,
        run: RunId,
        queue: Arc<dyn WorkQueue>,
        stages: impl IntoIterator<Item = Arc<dyn Stage>>,
        config: WorkerConfig,
        telemetry: Telemetry,
    ) -> Self {
        let stages = stages.into_iter().map(|s| (s.kind(), s)).collect();
        Self { store, run, queue, stages, config, telemetry }
    }

    /// Works until `cancel`; tasks under way are dropped then, and done again by whoever comes next.
    ///
    /// # Errors
    /// [`QueueError`] if the queue is gone for good.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), QueueError> {
        let this = Arc::new(self);
        let mut loops = JoinSet::new();
        for stage in this.stages.keys().copied() {
            let at_once = match stage {
                StageKind::Discover | StageKind::Fetch => this.config.web_tasks_at_once,
                _ => this.config.tasks_at_once,
            };
            for _ in 0..at_once.max(1) {
                let (this, cancel) = (Arc::clone(&this), cancel.clone());
                loops.spawn(async move {
                    while !cancel.is_cancelled() {
                        let received = tokio::select! {
                            () = cancel.cancelled() => return Ok(()),
                            received = this.queue.receive(stage, this.lease()) => received?,
                        };
                        if let Some(delivery) = received {
                            this.handle(&delivery, &cancel).await?;
                        }
                    }
                    Ok(())
                });
            }
        }
        while let Some(ended) = loops.join_next().await {
            match ended {
                Ok(result) => result?,
                Err(e) => return Err(QueueError { what: format!("loop ended unexpectedly ({e})") }),
            }
        }
        Ok(())
    }

    fn lease(&self) -> Duration {
        Duration::from_secs(self.config.lease_seconds.max(3))
    }

    async fn handle(&self, delivery: &Delivery, cancel: &CancellationToken) -> Result<(), QueueError> {
        let lease = Lease::keep(Arc::clone(&self.queue), delivery.clone(), self.lease());
        let (stage, began) = (delivery.task.stage, Instant::now());
        let work = std::panic::AssertUnwindSafe(self.work(delivery, cancel)).catch_unwind();
        let result = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = lease.lost.cancelled() => return Ok(()),
            result = work => result.unwrap_or_else(|panic| Err(StageError::Panicked(panic_text(&*panic)))),
        };
        match result {
            Ok((outcome, bytes)) => {
                self.telemetry.finished(stage, outcome, bytes, began.elapsed());
                tracing::debug!(run = %self.run, %stage, task = %delivery.id, outcome, "task over");
                self.queue.ack(delivery).await
            }
            Err(error) => {
                self.telemetry.finished(stage, "failed", 0, began.elapsed());
                self.failed(delivery, &error).await
            }
        }
    }

    /// Records a failure; the task comes again after a growing pause, or never when it is hopeless.
    async fn failed(&self, delivery: &Delivery, error: &StageError) -> Result<(), QueueError> {
        let (task, chain) = (&*delivery.task, error.chain());
        let attempt = match self.store.record_failure(&self.run, task, &chain, error.is_retryable()).await {
            Ok(attempt) => attempt,
            Err(e) => {
                tracing::error!(task = %delivery.id, error = %e, "the failure of a task cannot be recorded");
                1
            }
        };
        let again = error.is_retryable() && attempt < self.config.max_attempts;
        tracing::error!(run = %self.run, stage = %task.stage, task = %delivery.id, attempt, again, error = chain, "task failed");
        if again {
            self.queue.retry(delivery, Duration::from_secs(1 << attempt.min(8))).await
        } else {
            self.queue.ack(delivery).await
        }
    }

    async fn work(&self, delivery: &Delivery, cancel: &CancellationToken) -> Result<(&'static str, u64), StageError> {
        let (task, began) = (&*delivery.task, Instant::now());
        if self.store.find_commit(task.stage, &delivery.id).await?.is_some() {
            return Ok(("repeated", 0));
        }
        let stage =
            self.stages.get(&task.stage).ok_or_else(|| StageError::Input(format!("this worker has no {} stage", task.stage)))?;
        let work = Work {
            task: Arc::clone(&delivery.task),
            id: delivery.id,
            run: self.run.clone(),
            store: self.store.clone(),
            facts: Facts::default(),
            cancel: cancel.child_token(),
            telemetry: self.telemetry.clone(),
            work_dir: self.config.work_dir.as_path().into(),
        };
        let (facts, scratch) = (work.facts.clone(), work.scratch_path());
        let rows = stage.process(work, input::read_inputs(self.store.clone(), task, self.config.batch_rows));
        let written = self.write(task.stage, rows).await?;
        let bytes = written.outputs.iter().map(|o| o.bytes).sum();
        let commit = Commit {
            task_id: delivery.id,
            task: task.clone(),
            run: self.run.clone(),
            outputs: written.outputs,
            counts: written.counts,
            facts: facts.to_value(),
            committed_at_ms: now_ms(),
            elapsed_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let outcome = match self.store.commit(&commit).await? {
            CommitResult::Committed => "committed",
            CommitResult::AlreadyCommitted => "repeated",
            CommitResult::Lost { winner } => {
                tracing::warn!(task = %delivery.id, winner = %winner.run, "another attempt with other rows was first; theirs count");
                "lost"
            }
        };
        if scratch.exists() {
            let _ = std::fs::remove_dir_all(scratch);
        }
        Ok((outcome, bytes))
    }

    async fn write(&self, stage: StageKind, mut rows: crate::RowStream) -> Result<Written, StageError> {
        let (mut outputs, mut counts) = (Vec::new(), StatusCounts::new());
        let mut shard = ShardWriter::new(stage.output())?;
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            let here = count_by_status(&batch);
            // Encoding is CPU work: it runs on a blocking thread and takes the writer along.
            let encode = move || shard.write(&batch).map(|()| shard);
            shard = on_blocking(encode).await??;
            self.telemetry.rows(stage, &here);
            for (status, n) in here {
                *counts.entry(status).or_default() += n;
            }
            if shard.rows() >= MAX_SHARD_ROWS {
                outputs.push(shard.finish(&self.store).await?);
                shard = ShardWriter::new(stage.output())?;
            }
        }
        if shard.rows() > 0 || outputs.is_empty() {
            outputs.push(shard.finish(&self.store).await?);
        }
        Ok(Written { outputs, counts })
    }
}

/// Rows by the `status` column; all `ok` where the table has none.
fn count_by_status(batch: &RecordBatch) -> StatusCounts {
    let mut counts = StatusCounts::new();
    match batch.column_by_name(column::STATUS) {
        Some(statuses) => {
            for status in statuses.as_string::<i32>().iter().flatten() {
                *counts.entry(status.to_owned()).or_default() += 1;
            }
        }
        None => _ = counts.insert("ok".to_owned(), batch.num_rows() as u64),
    }
    counts
}

//! The commit protocol: put the shards, then create the commit that names them, then acknowledge.

use std::collections::BTreeSet;

use capfilt_schemas::{Commit, Failure, StageKind, Task, TaskId};

use crate::{Created, Result, Store, layout, now_ms};

/// What came of a commit.
#[derive(Debug, Clone, PartialEq)]
pub enum CommitResult {
    /// The outputs are visible now.
    Committed,
    /// The same outputs were visible already.
    AlreadyCommitted,
    /// Another attempt was first, with other outputs; theirs count, ours are swept.
    Lost {
        /// Their commit.
        winner: Box<Commit>,
    },
}

impl Store {
    /// Makes a task's outputs visible. They must have been put before.
    ///
    /// # Errors
    /// [`StoreError::Io`](crate::StoreError::Io) or [`StoreError::Record`](crate::StoreError::Record).
    pub async fn commit(&self, commit: &Commit) -> Result<CommitResult> {
        let path = layout::commit(commit.task.stage, &commit.task_id);
        Ok(match self.create_json(&path, commit).await? {
            Created::New => CommitResult::Committed,
            Created::Exists(winner) if winner.outputs == commit.outputs => CommitResult::AlreadyCommitted,
            Created::Exists(winner) => CommitResult::Lost { winner: Box::new(winner) },
        })
    }

    /// The commit of a task, if it is done.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn find_commit(&self, stage: StageKind, task: &TaskId) -> Result<Option<Commit>> {
        self.get_json(&layout::commit(stage, task)).await
    }

    /// The names of all tasks of a stage that are done.
    ///
    /// # Errors
    /// [`StoreError::Io`](crate::StoreError::Io).
    pub async fn committed(&self, stage: StageKind) -> Result<BTreeSet<TaskId>> {
        let found = self.list(&layout::commits(stage)).await?;
        Ok(found.iter().filter_map(|m| layout::digest_of(&m.location)).map(TaskId).collect())
    }

    /// All commits of a stage, in the order of their task names.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn commits(&self, stage: StageKind) -> Result<Vec<Commit>> {
        self.list_json(&layout::commits(stage)).await
    }

    /// Records a failed attempt and tells its number.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn record_failure(&self, run: &capfilt_schemas::RunId, task: &Task, error: &str, retryable: bool) -> Result<u32> {
        let task_id = task.id();
        let made = self
            .append_json(&layout::failures(&task_id), |n| Failure {
                task_id,
                stage: task.stage,
                run: run.clone(),
                attempt: u32::try_from(n).unwrap_or(u32::MAX),
                error: error.to_owned(),
                retryable,
                failed_at_ms: now_ms(),
            })
            .await?;
        Ok(made.attempt)
    }

    /// The failed attempts of a task, oldest first.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn failures(&self, task: &TaskId) -> Result<Vec<Failure>> {
        self.list_json(&layout::failures(task)).await
    }

    /// Forgets the failed attempts of a task, so that it is tried again from the start.
    ///
    /// # Errors
    /// [`StoreError::Io`](crate::StoreError::Io).
    pub async fn forget_failures(&self, task: &TaskId) -> Result<()> {
        for meta in self.list(&layout::failures(task)).await? {
            self.delete(&meta.location).await?;
        }
        Ok(())
    }

    /// All failed attempts of all tasks, in the order of task and attempt.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub async fn all_failures(&self) -> Result<Vec<Failure>> {
        self.list_json(&layout::all_failures()).await
    }
}

//! What a run has decided and what happened in it.

use std::collections::BTreeSet;

use capfilt_schemas::{FetchStatus, RetryRecord, RoundRecord, RoundResult, RunId, TaskId};
use serde::{Deserialize, Serialize};

use crate::{Created, Result, Store, layout, now_ms};

/// One line of a run's history, for people; nothing is decided by it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RunEvent {
    /// 1 for the first.
    pub number: u64,
    /// What happened, in one sentence.
    pub message: String,
    /// Milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
}

impl Store {
    /// Fixes the models of a round, once: the first record stays, and is what is returned.
    ///
    /// # Errors
    /// [`StoreError::Io`](crate::StoreError::Io) or [`StoreError::Record`](crate::StoreError::Record).
    pub async fn start_round(&self, run: &RunId, record: RoundRecord) -> Result<RoundRecord> {
        let path = layout::numbered(&layout::rounds(run), record.round.into());
        Ok(match self.create_json(&path, &record).await? {
            Created::New => record,
            Created::Exists(first) => first,
        })
    }

    /// The rounds that a run has started, first round first.
    ///
    /// # Errors
    /// As [`start_round`](Self::start_round).
    pub async fn rounds(&self, run: &RunId) -> Result<Vec<RoundRecord>> {
        self.list_json(&layout::rounds(run)).await
    }

    /// Writes down what a round led to, once. A round that is built, judged or trained on again with other settings has another result.
    ///
    /// # Errors
    /// As [`start_round`](Self::start_round).
    pub async fn finish_round(&self, run: &RunId, result: &RoundResult) -> Result<()> {
        self.create_json(&layout::result(run, result), result).await.map(|_| ())
    }

    /// The results of a run's rounds, by round and then as they were written.
    ///
    /// # Errors
    /// As [`start_round`](Self::start_round).
    pub async fn round_results(&self, run: &RunId) -> Result<Vec<RoundResult>> {
        let mut results: Vec<RoundResult> = self.list_json(&layout::results(run)).await?;
        results.sort_by_key(|result| (result.round, result.finished_at_ms));
        Ok(results)
    }

    /// Asks for the rows of some statuses to be fetched again; `settings` is the name of a fetch task without inputs.
    ///
    /// # Errors
    /// As [`start_round`](Self::start_round).
    pub async fn ask_retry(&self, run: &RunId, statuses: &BTreeSet<FetchStatus>, settings: TaskId) -> Result<RetryRecord> {
        let make = |number| RetryRecord {
            run: run.clone(),
            number,
            statuses: statuses.iter().copied().collect(),
            settings,
            asked_at_ms: now_ms(),
        };
        self.append_json(&layout::retries(run), make).await
    }

    /// The retries that were asked of a run, oldest first.
    ///
    /// # Errors
    /// As [`start_round`](Self::start_round).
    pub async fn retries(&self, run: &RunId) -> Result<Vec<RetryRecord>> {
        self.list_json(&layout::retries(run)).await
    }

    /// Adds a line to a run's history.
    ///
    /// # Errors
    /// As [`start_round`](Self::start_round).
    pub async fn log_event(&self, run: &RunId, message: &str) -> Result<RunEvent> {
        let make = |number| RunEvent { number, message: message.to_owned(), at_ms: now_ms() };
        self.append_json(&layout::events(run), make).await
    }

    /// A run's history, oldest first.
    ///
    /// # Errors
    /// As [`start_round`](Self::start_round).
    pub async fn events(&self, run: &RunId) -> Result<Vec<RunEvent>> {
        self.list_json(&layout::events(run)).await
    }
}

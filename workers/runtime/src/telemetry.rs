//! What a worker tells about itself: metrics for machines, counters for the progress display.
//!
//! Every stage has the same metrics, all labelled `stage`: `capfilt_tasks_total{outcome}`, `capfilt_rows_total{status}`,
//! `capfilt_written_bytes_total`, `capfilt_task_duration_seconds`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capfilt_schemas::{StageKind, StatusCounts};

/// What one stage has done in this process.
#[derive(Clone, Debug, Default)]
pub struct StageCounters {
    /// Tasks committed.
    pub tasks: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Rows written, by status.
    pub rows: StatusCounts,
    /// Progress inside the tasks under way: done, of, unit.
    pub detail: Option<(u64, u64, &'static str)>,
}

/// The counters of a process. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Telemetry(Arc<Mutex<BTreeMap<StageKind, StageCounters>>>);

impl Telemetry {
    /// A copy of all counters.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<StageKind, StageCounters> {
        self.lock().clone()
    }

    pub(crate) fn rows(&self, stage: StageKind, counts: &StatusCounts) {
        let mut all = self.lock();
        let rows = &mut all.entry(stage).or_default().rows;
        for (status, n) in counts {
            *rows.entry(status.clone()).or_default() += n;
            metrics::counter!("capfilt_rows_total", "stage" => stage.name(), "status" => status.clone()).increment(*n);
        }
    }

    pub(crate) fn detail(&self, stage: StageKind, done: u64, of: u64, unit: &'static str) {
        self.lock().entry(stage).or_default().detail = Some((done, of, unit));
    }

    pub(crate) fn finished(&self, stage: StageKind, outcome: &'static str, bytes: u64, took: Duration) {
        let mut all = self.lock();
        let counters = all.entry(stage).or_default();
        counters.detail = None;
        *(if outcome == "failed" { &mut counters.failed } else { &mut counters.tasks }) += 1;
        metrics::counter!("capfilt_tasks_total", "stage" => stage.name(), "outcome" => outcome).increment(1);
        metrics::counter!("capfilt_written_bytes_total", "stage" => stage.name()).increment(bytes);
        metrics::histogram!("capfilt_task_duration_seconds", "stage" => stage.name()).record(took.as_secs_f64());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<StageKind, StageCounters>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

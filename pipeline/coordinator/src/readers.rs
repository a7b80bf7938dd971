//! Reading the shards of one table with several threads, where the order of the rows does not matter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arrow::array::RecordBatch;
use capfilt_schemas::{Digest, Table};
use capfilt_store::Store;
use futures::TryStreamExt;

use crate::scan::{Trust, open};
use crate::{CoordinatorError, Result};

/// Rows that are handed on at a time.
const BATCH_ROWS: usize = 4096;

/// Shards of one table, and the threads that read them. Part p is shard p.
#[derive(Clone)]
pub(crate) struct Readers {
    store: Store,
    table: Table,
    shards: Arc<[Digest]>,
    threads: usize,
}

impl Readers {
    pub(crate) fn new(store: &Store, table: Table, shards: &[Digest], threads: usize) -> Self {
        Self { store: store.clone(), table, shards: shards.into(), threads: threads.max(1) }
    }

    /// A state for every thread.
    pub(crate) fn states<S>(&self, make: impl FnMut() -> S) -> Vec<S> {
        std::iter::repeat_with(make).take(self.threads).collect()
    }

    /// Reads all rows, as many shards at a time as there are states. `visit` is given the state of the thread, the part, the number
    /// of the batch's first row in it, and the wanted columns. The first error ends the reading.
    pub(crate) async fn read<S, V>(
        &self,
        columns: &'static [&'static str],
        trust: Trust,
        states: Vec<S>,
        visit: V,
    ) -> Result<Vec<S>>
    where
        S: Send + 'static,
        V: Fn(&mut S, u32, u32, &RecordBatch) -> Result<()> + Send + Sync + 'static,
    {
        let job = Arc::new(Job { readers: self.clone(), columns, trust, visit, next: AtomicUsize::new(0) });
        let stop = Stop(Arc::new(AtomicBool::new(false)));
        let handle = tokio::runtime::Handle::current();
        let threads: Vec<_> = states
            .into_iter()
            .map(|mut state| {
                let (job, stopped, handle) = (Arc::clone(&job), Arc::clone(&stop.0), handle.clone());
                // Decoding is work for the processor: on threads of their own it does not hold up those that wait for the store.
                tokio::task::spawn_blocking(move || {
                    #[expect(clippy::disallowed_methods, reason = "on a thread that runs no async code")]
                    let done = handle.block_on(job.run(&mut state, &stopped));
                    stopped.fetch_or(done.is_err(), Ordering::Relaxed);
                    done.map(|()| state)
                })
            })
            .collect();
        let mut states = Vec::with_capacity(threads.len());
        let mut error = None;
        for thread in threads {
            match thread.await {
                Ok(Ok(state)) => states.push(state),
                Ok(Err(e)) => error = error.or(Some(e)),
                Err(e) => error = error.or_else(|| Some(CoordinatorError::Task(format!("a reader failed: {e}")))),
            }
        }
        error.map_or(Ok(states), Err)
    }

    /// An error about a row of a part.
    pub(crate) fn bad(&self, part: u32, problem: impl Into<String>) -> CoordinatorError {
        CoordinatorError::Rows { table: self.table, shard: self.shards[part as usize], problem: problem.into() }
    }
}

/// Stops the threads when it is dropped: nobody waits for them any more.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Job<V> {
    readers: Readers,
    columns: &'static [&'static str],
    trust: Trust,
    visit: V,
    next: AtomicUsize,
}

impl<V> Job<V> {
    async fn run<S>(&self, state: &mut S, stopped: &AtomicBool) -> Result<()>
    where
        V: Fn(&mut S, u32, u32, &RecordBatch) -> Result<()>,
    {
        let Readers { store, table, shards, .. } = &self.readers;
        while let Some((part, shard)) = Some(self.next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, shards.get(n)?))) {
            let part = u32::try_from(part).map_err(|_| CoordinatorError::Task(format!("more than {} shards", u32::MAX)))?;
            let mut rows = open(store, *table, shard, self.columns, self.trust, BATCH_ROWS).await?;
            let mut first = 0_u32;
            while let Some(batch) = rows.try_next().await? {
                if stopped.load(Ordering::Relaxed) {
                    return Ok(());
                }
                (self.visit)(state, part, first, &batch)?;
                let next = u32::try_from(batch.num_rows()).ok().and_then(|n| first.checked_add(n));
                first = next.ok_or_else(|| self.readers.bad(part, format!("has more than {} rows", u32::MAX)))?;
            }
        }
        Ok(())
    }
}

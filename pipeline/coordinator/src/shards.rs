//! Writing a stream of rows as shards of equal size, and naming shards once.

use std::collections::VecDeque;

use arrow::array::RecordBatch;
use capfilt_schemas::{Digest, Output, Table};
use capfilt_store::{ShardWriter, Store};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::{CoordinatorError, Result};

/// Shards in the order of their digests, each once.
pub(crate) fn each_once(shards: impl Iterator<Item = Digest>) -> Vec<Digest> {
    let mut shards: Vec<Digest> = shards.collect();
    shards.sort_unstable();
    shards.dedup();
    shards
}

/// Cuts rows into shards of `rows` rows each; the last may be shorter. No rows, no shard. Shards are encoded and put in the
/// background, some at a time.
pub(crate) struct Shards<'a> {
    store: &'a Store,
    table: Table,
    rows: usize,
    at_once: usize,
    /// Rows of the next shard.
    open: Vec<RecordBatch>,
    /// How many they are.
    held: usize,
    busy: VecDeque<JoinHandle<Result<Output>>>,
    done: Vec<Output>,
}

impl<'a> Shards<'a> {
    pub(crate) fn new(store: &'a Store, table: Table, rows: usize) -> Self {
        let (open, busy, done) = (Vec::new(), VecDeque::new(), Vec::new());
        Self { store, table, rows: rows.max(1), at_once: 2, open, held: 0, busy, done }
    }

    /// The same with so many shards in the background.
    pub(crate) fn at_once(self, shards: usize) -> Self {
        Self { at_once: shards.max(1), ..self }
    }

    pub(crate) async fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let mut from = 0;
        while from < batch.num_rows() {
            let n = (self.rows - self.held).min(batch.num_rows() - from);
            self.open.push(batch.slice(from, n));
            self.held += n;
            from += n;
            if self.held == self.rows {
                self.close().await?;
            }
        }
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        let (store, table, rows) = (self.store.clone(), self.table, std::mem::take(&mut self.open));
        self.held = 0;
        if self.busy.len() >= self.at_once {
            self.wait().await?;
        }
        let handle = Handle::current();
        self.busy.push_back(tokio::task::spawn_blocking(move || {
            let mut shard = ShardWriter::new(table)?;
            for batch in &rows {
                shard.write(batch)?;
            }
            #[expect(clippy::disallowed_methods, reason = "on a thread that runs no async code")]
            let output = handle.block_on(shard.finish(&store))?;
            Ok(output)
        }));
        Ok(())
    }

    /// Waits for the oldest shard.
    async fn wait(&mut self) -> Result<()> {
        if let Some(shard) = self.busy.pop_front() {
            self.done.push(shard.await.map_err(|e| CoordinatorError::Task(format!("writing a shard failed: {e}")))??);
        }
        Ok(())
    }

    pub(crate) async fn finish(mut self) -> Result<Vec<Output>> {
        if self.held > 0 {
            self.close().await?;
        }
        while !self.busy.is_empty() {
            self.wait().await?;
        }
        Ok(self.done)
    }
}

//! Writing a stream of rows as shards of equal size.

use arrow::array::RecordBatch;
use capfilt_schemas::{Output, Table};
use capfilt_store::{ShardWriter, Store};

use crate::Result;

/// Cuts rows into shards of `rows` rows each; the last may be shorter. No rows, no shard.
pub(crate) struct Shards<'a> {
    store: &'a Store,
    table: Table,
    rows: u64,
    open: Option<ShardWriter>,
    done: Vec<Output>,
}

impl<'a> Shards<'a> {
    pub(crate) fn new(store: &'a Store, table: Table, rows: usize) -> Self {
        Self { store, table, rows: rows.max(1) as u64, open: None, done: Vec::new() }
    }

    pub(crate) async fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let mut from = 0;
        while from < batch.num_rows() {
            let mut shard = match self.open.take() {
                Some(shard) => shard,
                None => ShardWriter::new(self.table)?,
            };
            let room = usize::try_from(self.rows - shard.rows()).unwrap_or(usize::MAX);
            let n = room.min(batch.num_rows() - from);
            shard.write(&batch.slice(from, n))?;
            from += n;
            if shard.rows() == self.rows {
                self.done.push(shard.finish(self.store).await?);
            } else {
                self.open = Some(shard);
            }
        }
        Ok(())
    }

    pub(crate) async fn finish(mut self) -> Result<Vec<Output>> {
        if let Some(shard) = self.open.take() {
            self.done.push(shard.finish(self.store).await?);
        }
        Ok(self.done)
    }
}

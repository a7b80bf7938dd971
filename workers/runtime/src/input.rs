//! Reading the inputs of a task as one stream of rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{Field, Schema};
use capfilt_schemas::{Digest, Table, Task, column};
use capfilt_store::Store;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;

use crate::{RowStream, StageError, on_blocking};

/// The rows of the task's inputs, as [`Stage`](crate::Stage) describes them. Decoding is done on a blocking thread, one batch ahead.
pub(crate) fn read_inputs(store: Store, task: &Task, batch_rows: usize) -> RowStream {
    // Tables in the order in which they first occur, each with its shards in order.
    let mut tables: Vec<(Table, Vec<Digest>)> = Vec::new();
    for input in &task.inputs {
        match tables.iter_mut().find(|(t, _)| *t == input.table) {
            Some((_, shards)) => shards.push(input.digest),
            None => tables.push((input.table, vec![input.digest])),
        }
    }
    let (sender, mut receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        if let Err(e) = send_rows(&store, &tables, batch_rows, &sender).await {
            let _ = sender.send(Err(e)).await;
        }
    });
    stream::poll_fn(move |cx| receiver.poll_recv(cx)).boxed()
}

type Rows = mpsc::Sender<Result<RecordBatch, StageError>>;

async fn send_rows(store: &Store, tables: &[(Table, Vec<Digest>)], batch_rows: usize, out: &Rows) -> Result<(), StageError> {
    let shards = tables.first().map_or(0, |(_, s)| s.len());
    if let Some((table, other)) = tables.iter().find(|(_, s)| s.len() != shards) {
        return Err(StageError::Input(format!("{shards} shards of the first table stand beside {} of {table}", other.len())));
    }
    for i in 0..shards {
        let mut readers = Vec::new();
        for (table, digests) in tables {
            readers.push((*table, store.read_shard(*table, &digests[i], batch_rows).await?));
        }
        let out = out.clone();
        let read = move || -> Result<(), StageError> {
            loop {
                let side_by_side: Vec<_> = readers.iter_mut().map(|(t, r)| (*t, r.next())).collect();
                if side_by_side.iter().all(|(_, b)| b.is_none()) {
                    return Ok(());
                }
                let mut batches = Vec::new();
                for (table, batch) in side_by_side {
                    let batch =
                        batch.ok_or_else(|| StageError::Input(format!("the {table} shard has fewer rows than the others")))??;
                    batches.push((table, batch));
                }
                if out.blocking_send(Ok(zip(batches)?)).is_err() {
                    return Ok(());
                }
            }
        };
        on_blocking(read).await??;
    }
    Ok(())
}

/// Columns side by side. Row i must be about the same sample in all of them.
fn zip(mut batches: Vec<(Table, RecordBatch)>) -> Result<RecordBatch, StageError> {
    if batches.len() == 1 {
        return Ok(batches.remove(0).1);
    }
    let rows = batches[0].1.num_rows();
    let ids = batches[0].1.column_by_name(column::SAMPLE_ID).cloned();
    let mut seen = BTreeMap::<String, ()>::new();
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for (table, batch) in &batches {
        let same = match (&ids, batch.column_by_name(column::SAMPLE_ID)) {
            (Some(a), Some(b)) => a.as_string::<i32>() == b.as_string::<i32>(),
            _ => true,
        };
        if batch.num_rows() != rows || !same {
            return Err(StageError::Input(format!("the rows of the {table} shard are not about the same samples")));
        }
        for (field, values) in batch.schema().fields().iter().zip(batch.columns()) {
            let fresh = seen.insert(field.name().clone(), ()).is_none();
            let name = if fresh { field.name().clone() } else { format!("{table}.{}", field.name()) };
            fields.push(Field::new(name, field.data_type().clone(), field.is_nullable()));
            columns.push(Arc::clone(values));
        }
    }
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

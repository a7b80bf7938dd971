//! The contract of a stage.

use arrow::array::RecordBatch;
use capfilt_schemas::StageKind;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};

use crate::{StageError, Work};

/// Rows on their way: batches of one table, in order.
pub type RowStream = BoxStream<'static, Result<RecordBatch, StageError>>;

/// Rows of the input tables in, rows of the output table (`kind().output()`) out.
///
/// A row that cannot be processed comes out with `status` and `error`; an `Err` item fails the whole task. Where the output table answers
/// its input row by row (`samples`, `captions`, `scores`), order and count are kept. A stage must give the same rows for the same
/// task whenever, wherever and however often it runs; what the task does not name must not change a byte.
///
/// The input holds the rows of the task's input shards: shards of one table follow one another; shards of different tables stand side by
/// side, row i beside row i, and a column name that occurred before is written `table.column` (for [`StageKind::Score`]: the columns of
/// `samples`, then `captions.sample_id`, `captions.status`, `captions.error`, `captions`). A task without inputs gets no rows.
pub trait Stage: Send + Sync + 'static {
    /// Which tasks are for this stage.
    fn kind(&self) -> StageKind;

    /// Processes one task. `work` gives its parameters, the store, a scratch folder, the model's files, and takes facts and progress.
    fn process(&self, work: Work, input: RowStream) -> RowStream;
}

/// The rows that one future makes, as a stream: for stages that work a whole task at once.
pub fn rows<F>(future: F) -> RowStream
where
    F: Future<Output = Result<RecordBatch, StageError>> + Send + 'static,
{
    stream::once(future).boxed()
}

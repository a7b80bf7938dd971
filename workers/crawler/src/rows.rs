//! The rows of one batch on their way through the download: all rows of `selected`, or, in a retry, some rows of `samples`, which come
//! back among the others as if they had been fetched then.

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::{filter_record_batch, interleave_record_batch};
use capfilt_runtime::StageError;
use capfilt_schemas::{FetchStatus, Table, column};

use crate::columns::ImageColumns;
use crate::params::RetryParams;

/// A batch, and which of its rows are fetched.
pub(crate) struct Rows {
    batch: RecordBatch,
    /// For rows of `samples`: whether they are fetched again.
    again: Option<BooleanArray>,
}

impl Rows {
    /// Rows of `samples` with the statuses of a retry, or rows of `selected` if there is none.
    pub(crate) fn new(batch: RecordBatch, retry: Option<&RetryParams>) -> Result<Self, StageError> {
        let Some(retry) = retry else { return Ok(Self { batch, again: None }) };
        let status = batch.column_by_name(column::STATUS).and_then(|c| c.as_string_opt::<i32>());
        let status = status.ok_or_else(|| StageError::Input("a retry wants rows of samples".to_owned()))?;
        let wanted = |s: Option<&str>| s.and_then(FetchStatus::parse).is_some_and(|s| retry.statuses.contains(&s));
        let again = status.iter().map(|s| Some(wanted(s))).collect();
        Ok(Self { batch, again: Some(again) })
    }

    pub(crate) fn len(&self) -> usize {
        self.batch.num_rows()
    }

    /// Whether a row is fetched.
    pub(crate) fn wants(&self, row: usize) -> bool {
        self.again.as_ref().is_none_or(|again| again.value(row))
    }

    /// The address of a row.
    pub(crate) fn url(&self, row: usize) -> &str {
        self.batch.column_by_name(column::URL).map_or("", |c| c.as_string::<i32>().value(row))
    }

    /// The hash that a row's image is expected to have.
    pub(crate) fn expected_hash(&self, row: usize) -> Option<&str> {
        let hashes = self.batch.column_by_name(column::EXPECTED_HASH)?.as_string_opt::<i32>()?;
        hashes.is_valid(row).then(|| hashes.value(row))
    }

    /// The size of the image that a row has already.
    pub(crate) fn held(&self, row: usize) -> usize {
        let images = self.batch.column_by_name(column::IMAGE).and_then(|c| c.as_binary_opt::<i32>());
        images.filter(|images| images.is_valid(row)).map_or(0, |images| images.value(row).len())
    }

    /// The rows of `samples`; `images` are those of the rows that were fetched, in their order.
    pub(crate) fn finish(&self, images: ImageColumns) -> Result<RecordBatch, StageError> {
        let fetched = |batch: &RecordBatch| {
            let mut columns = batch.columns()[..Table::Selected.schema().fields().len()].to_vec();
            columns.extend(images.finish());
            RecordBatch::try_new(Table::Samples.schema(), columns)
        };
        let Some(again) = &self.again else { return Ok(fetched(&self.batch)?) };
        let fetched = fetched(&filter_record_batch(&self.batch, again)?)?;
        let mut next = 0..fetched.num_rows();
        let from = |row| if again.value(row) { (1, next.next().unwrap_or_default()) } else { (0, row) };
        let order: Vec<(usize, usize)> = (0..self.len()).map(from).collect();
        Ok(interleave_record_batch(&[&self.batch, &fetched], &order)?)
    }
}

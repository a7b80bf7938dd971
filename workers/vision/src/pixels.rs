//! Rows of `samples` as pixels.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use capfilt_models::preprocess::{Pixels, Preprocessor};
use capfilt_runtime::{RowStream, StageError, on_rayon};
use capfilt_schemas::{FetchStatus, RowStatus, column};
use futures::{Stream, StreamExt};
use rayon::prelude::*;

/// An image of a row: pixels, or why there are none.
pub(crate) type RowPixels = Result<Pixels, (RowStatus, Option<String>)>;

/// The batches of `input` with their pixels. While the model works on one batch, the next one is decoded.
pub(crate) fn prepared(
    input: RowStream,
    preprocessor: Arc<Preprocessor>,
) -> impl Stream<Item = Result<(RecordBatch, Vec<RowPixels>), StageError>> {
    let decode = move |batch: Result<RecordBatch, StageError>| {
        let preprocessor = Arc::clone(&preprocessor);
        async move {
            let batch = batch?;
            on_rayon(move || prepare(&batch, &preprocessor).map(|pixels| (batch, pixels))).await?
        }
    };
    input.map(decode).buffered(2)
}

/// Decodes and prepares the image of every row, on the rayon pool of the caller.
fn prepare(batch: &RecordBatch, preprocessor: &Preprocessor) -> Result<Vec<RowPixels>, StageError> {
    let statuses = text_column(batch, column::STATUS)?;
    let images = batch
        .column_by_name(column::IMAGE)
        .and_then(|c| c.as_binary_opt::<i32>())
        .ok_or_else(|| StageError::Input("the input has no `image` column".to_owned()))?;
    let row = |i: usize| {
        if statuses.value(i) != FetchStatus::Ok.as_str() || images.is_null(i) {
            return Err((RowStatus::NoImage, None));
        }
        let decode = |e: String| (RowStatus::Decode, Some(e));
        let image = image::load_from_memory(images.value(i)).map_err(|e| decode(e.to_string()))?;
        preprocessor.prepare(&image.into_rgb8()).map_err(|e| decode(e.to_string()))
    };
    Ok((0..batch.num_rows()).into_par_iter().map(row).collect())
}

/// A text column of the input.
pub(crate) fn text_column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a StringArray, StageError> {
    let found = batch.column_by_name(name).and_then(|c| c.as_string_opt::<i32>());
    found.ok_or_else(|| StageError::Input(format!("the input has no text column `{name}`")))
}

/// The `status` and `error` columns that answer `rows`.
pub(crate) fn status_columns(rows: &[RowPixels]) -> (StringArray, StringArray) {
    let status = rows.iter().map(|r| r.as_ref().map_or_else(|(s, _)| s.as_str(), |_| RowStatus::Ok.as_str()));
    let error = rows.iter().map(|r| r.as_ref().err().and_then(|(_, e)| e.clone()));
    (StringArray::from_iter_values(status), error.collect())
}

/// Puts answers for the rows that have pixels back among all rows; the others get `T::default()`.
pub(crate) fn spread<T: Default>(present: &[bool], answers: Vec<T>) -> Vec<T> {
    let mut answers = answers.into_iter();
    present.iter().map(|there| if *there { answers.next().unwrap_or_default() } else { T::default() }).collect()
}

//! Rows of `samples` as pixels.

use std::io::Cursor;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use capfilt_models::preprocess::{Pixels, Preprocessor};
use capfilt_runtime::{RowStream, StageError, on_rayon};
use capfilt_schemas::{FetchStatus, RowStatus, column};
use futures::{Stream, StreamExt, stream};
use image::{DynamicImage, ImageDecoder, ImageReader, ImageResult, Limits};
use rayon::prelude::*;
use tokio::sync::mpsc;

/// An image as every model of a stage wants it.
pub(crate) type Views = Vec<Pixels>;

/// An image of a row: pixels, or why there are none.
pub(crate) type RowPixels = Result<Views, (RowStatus, Option<String>)>;

/// Rows with their images.
type Prepared = Result<(RecordBatch, Vec<RowPixels>), StageError>;

/// The batches of `input` with their pixels. They are decoded by a task of its own, so that one batch lies ready whenever the model has
/// done another, and a further one is being decoded.
pub(crate) fn prepared(mut input: RowStream, preprocessors: Arc<[Preprocessor]>) -> impl Stream<Item = Prepared> {
    let (sender, mut receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(batch) = input.next().await {
            let preprocessors = Arc::clone(&preprocessors);
            let decoded = match batch {
                Ok(batch) => on_rayon(move || prepare(&batch, &preprocessors).map(|pixels| (batch, pixels))).await.flatten(),
                Err(e) => Err(e),
            };
            // Nobody waits for rows any more if the stage was dropped.
            if sender.send(decoded).await.is_err() {
                return;
            }
        }
    });
    stream::poll_fn(move |cx| receiver.poll_recv(cx))
}

/// Decodes and prepares the image of every row, on the rayon pool of the caller.
fn prepare(batch: &RecordBatch, preprocessors: &[Preprocessor]) -> Result<Vec<RowPixels>, StageError> {
    let statuses = text_column(batch, column::STATUS)?;
    let images = batch
        .column_by_name(column::IMAGE)
        .and_then(|c| c.as_binary_opt::<i32>())
        .ok_or_else(|| StageError::Input("the input has no `image` column".to_owned()))?;
    let row = |i: usize| {
        if statuses.value(i) != FetchStatus::Ok.as_str() || images.is_null(i) {
            return Err((RowStatus::NoImage, None));
        }
        views(images.value(i), preprocessors).map_err(|e| (RowStatus::Decode, Some(e)))
    };
    Ok((0..batch.num_rows()).into_par_iter().map(row).collect())
}

/// An image file, decoded once, as every model wants it; or why it cannot be.
pub(crate) fn views(bytes: &[u8], preprocessors: &[Preprocessor]) -> Result<Views, String> {
    let image = decode(bytes).map_err(|e| e.to_string().trim_end().to_owned())?.into_rgb8();
    preprocessors.iter().map(|preprocessor| preprocessor.prepare(&image).map_err(|e| e.to_string())).collect()
}

/// Decodes an image file and turns it as it says; those of a download are turned already.
fn decode(bytes: &[u8]) -> ImageResult<DynamicImage> {
    let mut decoder = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.into_decoder()?;
    Limits::default().reserve(decoder.total_bytes())?;
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// The images as one model wants them: the first view of each, and so on; the views are taken.
pub(crate) fn take_view(images: &mut [Views]) -> Vec<Pixels> {
    images.iter_mut().map(|views| views.remove(0)).collect()
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use arrow::array::{ArrayRef, BinaryArray};

    use super::*;

    #[tokio::test]
    async fn batches_are_decoded_while_the_model_works() {
        let columns: [(&str, ArrayRef); 2] = [
            (column::STATUS, Arc::new(StringArray::from_iter_values(["timeout"]))),
            (column::IMAGE, Arc::new(BinaryArray::from_iter([None::<&[u8]>]))),
        ];
        let batch = RecordBatch::try_from_iter_with_nullable(columns.map(|(name, values)| (name, values, true))).unwrap();
        let taken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&taken);
        let input = stream::iter(std::iter::repeat_n(batch, 9)).map(move |batch| {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok(batch)
        });
        let mut rows = Box::pin(prepared(input.boxed(), [].into()));
        for seen in 1..=4 {
            assert_eq!(rows.next().await.unwrap().unwrap().1, [Err((RowStatus::NoImage, None))]);
            // The model has this batch and asks for no other; one lies ready, and the one behind it waits for its place.
            let ahead = async {
                while taken.load(Ordering::SeqCst) < seen + 2 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), ahead).await.unwrap();
        }
        assert_eq!(rows.count().await, 5);
    }

    #[test]
    fn views_are_taken_in_the_order_of_the_models() {
        let pixels = |side: usize| Pixels::new(side, vec![0.0; 3 * side * side]).unwrap();
        let mut images = vec![vec![pixels(1), pixels(2)], vec![pixels(1), pixels(2)]];
        assert_eq!(take_view(&mut images).iter().map(Pixels::side).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(take_view(&mut images).iter().map(Pixels::side).collect::<Vec<_>>(), [2, 2]);
    }
}

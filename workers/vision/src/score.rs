//! The score stage: how well the web text and every synthetic text of an image fit it (BLIP's filter, ITM and ITC).

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float32Array, Float32Builder, ListBuilder, RecordBatch};
use arrow::datatypes::{DataType, Field};
use capfilt_models::device::Device;
use capfilt_models::score::{FilterScorer, ItmToken, ScoredText};
use capfilt_runtime::{RowStream, Stage, StageError, Work};
use capfilt_schemas::{StageKind, Table, column};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::model::{Loaded, ModelSlot, VisionWorkerConfig, dtype};
use crate::pixels::{RowPixels, prepared, spread, status_columns, text_column};

/// `[score]`: how texts are scored. Part of the task's name.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScoreConfig {
    /// The first token of a text for the image-grounded encoder: `enc`, as BLIP was trained, or `cls`, as Hugging Face's class does.
    pub first_token: ItmToken,
}

/// Scores texts. Row i answers row i: the web text's scores, and those of the captions in their order.
pub struct ScoreStage {
    slot: Arc<ModelSlot<FilterScorer>>,
}

impl ScoreStage {
    /// A stage that loads its model with the first task.
    #[must_use]
    pub fn new(config: VisionWorkerConfig) -> Self {
        Self { slot: Arc::new(ModelSlot::new("filter", config)) }
    }
}

impl Stage for ScoreStage {
    fn kind(&self) -> StageKind {
        StageKind::Score
    }

    fn process(&self, work: Work, input: RowStream) -> RowStream {
        let slot = Arc::clone(&self.slot);
        let start = async move {
            let config: ScoreConfig = work.params()?;
            let make = move |checkpoint: &capfilt_models::checkpoint::Checkpoint, device: &Device| {
                FilterScorer::new(checkpoint.med(device, dtype(device))?, checkpoint.tokenizer()?, config.first_token)
            };
            let loaded = slot.get(&work, make).await?;
            let rows = prepared(input, Arc::clone(&loaded.preprocessor))
                .and_then(move |(batch, pixels)| score(loaded.clone(), batch, pixels));
            Ok::<_, StageError>(rows)
        };
        stream::once(start).try_flatten().boxed()
    }
}

/// Takes one of a text's scores.
type Pick = fn(&ScoredText) -> f32;

async fn score(loaded: Loaded<FilterScorer>, batch: RecordBatch, rows: Vec<RowPixels>) -> Result<RecordBatch, StageError> {
    let (status, error) = status_columns(&rows);
    let present: Vec<bool> = rows.iter().map(Result::is_ok).collect();
    let texts = texts_of(&batch, &present)?;
    let images: Vec<_> = rows.into_iter().flatten().collect();
    let scores = if images.is_empty() {
        Vec::new()
    } else {
        let work = move |filter: &mut FilterScorer| filter.score(&images, &texts);
        loaded.thread.call(work).await?.map_err(|e| StageError::caused(e, true))?
    };
    let scores: Vec<Vec<ScoredText>> = spread(&present, scores);
    let web = |pick: Pick| scores.iter().map(|s| s.first().map(pick)).collect::<Float32Array>();
    let synthetic = |pick: Pick| {
        let mut list = ListBuilder::new(Float32Builder::new()).with_field(Field::new("item", DataType::Float32, false));
        for row in &scores {
            for text in row.iter().skip(1) {
                list.values().append_value(pick(text));
            }
            list.append(true);
        }
        list.finish()
    };
    let (itm, itc): (Pick, Pick) = (|s| s.itm, |s| s.itc);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(text_column(&batch, column::SAMPLE_ID)?.clone()),
        Arc::new(status),
        Arc::new(error),
        Arc::new(web(itm)),
        Arc::new(web(itc)),
        Arc::new(synthetic(itm)),
        Arc::new(synthetic(itc)),
    ];
    Ok(RecordBatch::try_new(Table::Scores.schema(), columns)?)
}

/// The texts of every row that has an image: the web text first, then its captions.
fn texts_of(batch: &RecordBatch, present: &[bool]) -> Result<Vec<Vec<String>>, StageError> {
    let web = text_column(batch, column::TEXT)?;
    let captions = batch
        .column_by_name(column::CAPTIONS)
        .and_then(|c| c.as_list_opt::<i32>())
        .ok_or_else(|| StageError::Input("the input has no `captions` column".to_owned()))?;
    let row = |i: usize| {
        let synthetic = captions.value(i);
        let synthetic = synthetic.as_string::<i32>().iter().flatten().map(str::to_owned);
        [web.value(i).to_owned()].into_iter().chain(synthetic).collect()
    };
    Ok(present.iter().enumerate().filter(|(_, there)| **there).map(|(i, _)| row(i)).collect())
}

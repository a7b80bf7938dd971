//! The score stage: how well the web text and every synthetic text of an image fit it, by BLIP's filter (ITM and ITC) and, if the run
//! has one, by a CLIP.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float32Array, Float32Builder, ListBuilder, RecordBatch};
use arrow::datatypes::{DataType, Field};
use capfilt_models::device::Device;
use capfilt_models::files;
use capfilt_models::score::{Itc, ItmToken};
use capfilt_runtime::{RowStream, Stage, StageError, Work};
use capfilt_schemas::{Digest, StageKind, Table, column};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::judge::{Judge, TextScores};
use crate::model::{Loaded, ModelSlot, NumberType, VisionWorkerConfig};
use crate::pixels::{RowPixels, prepared, spread, status_columns, text_column};

/// `[score]`: how texts are scored. Part of the task's name.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScoreConfig {
    /// The first token of a text for the image-grounded encoder: `enc`, as BLIP was trained, or `cls`, as Hugging Face's class does.
    pub first_token: ItmToken,
    /// What ITC tells: `cosine`, or `standardized`, by how many standard deviations the cosine lies above those of the text with other images; for
    /// filters that were trained here.
    pub itc: Itc,
    /// The number type in which the models compute; if not given, `bf16` on a GPU, `bf16x3` on a CPU with AMX, `f32` on another.
    pub dtype: Option<NumberType>,
}

impl ScoreConfig {
    /// The parameters of the stage's tasks, for workers with these settings and the CLIP model of the run.
    #[must_use]
    pub fn params(&self, worker: &VisionWorkerConfig, clip: Option<Digest>) -> ScoreParams {
        ScoreParams { first_token: self.first_token, itc: self.itc, dtype: NumberType::settle(self.dtype, worker), clip }
    }
}

/// What a task of the stage is told. What is not there is not part of its name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreParams {
    /// As in [`ScoreConfig`].
    pub first_token: ItmToken,
    /// As in [`ScoreConfig`]; `cosine` if it is not there.
    #[serde(default, skip_serializing_if = "Itc::is_cosine")]
    pub itc: Itc,
    /// As in [`ScoreConfig`]; `f32` if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<NumberType>,
    /// The CLIP model beside the filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<Digest>,
}

/// Scores texts. Row i answers row i: the web text's scores, and those of the captions in their order. The columns of the CLIP hold nothing
/// without one.
pub struct ScoreStage {
    slot: Arc<ModelSlot<Judge>>,
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
            let params: ScoreParams = work.params()?;
            let make = move |folders: &[PathBuf], device: &Device| {
                let clip = folders.get(1).map(PathBuf::as_path);
                Judge::open(&files::member_folders(&folders[0]), clip, (params.first_token, params.itc), params.dtype, device)
            };
            let loaded = slot.get(&work, params.clip.as_slice(), make).await?;
            let rows = prepared(input, Arc::clone(&loaded.preprocessors))
                .and_then(move |(batch, pixels)| score(loaded.clone(), batch, pixels));
            Ok::<_, StageError>(rows)
        };
        stream::once(start).try_flatten().boxed()
    }
}

/// Takes one of a text's scores.
type Pick = fn(&TextScores) -> Option<f32>;

async fn score(loaded: Loaded<Judge>, batch: RecordBatch, rows: Vec<RowPixels>) -> Result<RecordBatch, StageError> {
    let (status, error) = status_columns(&rows);
    let present: Vec<bool> = rows.iter().map(Result::is_ok).collect();
    let texts = texts_of(&batch, &present)?;
    let ids = text_column(&batch, column::SAMPLE_ID)?;
    let ids: Vec<String> = (0..present.len()).filter(|i| present[*i]).map(|i| ids.value(i).to_owned()).collect();
    let images: Vec<_> = rows.into_iter().flatten().collect();
    let scores = if images.is_empty() {
        Vec::new()
    } else {
        let work = move |judge: &mut Judge| judge.score(images, &texts, &ids);
        loaded.thread.call(work).await?.map_err(|e| StageError::caused(e, true))?
    };
    let scores: Vec<Vec<TextScores>> = spread(&present, scores);
    let web = |pick: Pick| scores.iter().map(|s| s.first().and_then(pick)).collect::<Float32Array>();
    // A list is null if the model is not there.
    let synthetic = |pick: Pick, may_be_null: bool| {
        let mut list = ListBuilder::new(Float32Builder::new()).with_field(Field::new("item", DataType::Float32, false));
        for row in &scores {
            let of_captions: Vec<f32> = row.iter().skip(1).filter_map(pick).collect();
            list.values().append_slice(&of_captions);
            list.append(!may_be_null || row.first().and_then(pick).is_some());
        }
        list.finish()
    };
    let (itm, itc, clip): (Pick, Pick, Pick) = (|s| s.itm, |s| s.itc, |s| s.clip);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(text_column(&batch, column::SAMPLE_ID)?.clone()),
        Arc::new(status),
        Arc::new(error),
        Arc::new(web(itm)),
        Arc::new(web(itc)),
        Arc::new(synthetic(itm, false)),
        Arc::new(synthetic(itc, false)),
        Arc::new(web(clip)),
        Arc::new(synthetic(clip, true)),
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

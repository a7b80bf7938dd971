//! The caption stage: synthetic texts for every image of a `samples` shard (BLIP's captioner).

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListBuilder, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field};
use capfilt_models::ModelError;
use capfilt_models::device::Device;
use capfilt_models::generate::Captioner;
use capfilt_models::sampling::Sampling;
use capfilt_runtime::{RowStream, Stage, StageError, Work};
use capfilt_schemas::{StageKind, Table, column};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::model::{Loaded, ModelSlot, NumberType, VisionWorkerConfig, captioner};
use crate::pixels::{RowPixels, prepared, spread, status_columns, take_view, text_column};

/// `[caption]`: how captions are written. Part of the task's name.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CaptionConfig {
    /// Keys every random choice, together with the sample id.
    pub seed: u64,
    /// The strategy and its settings.
    pub sampling: Sampling,
    /// The number type in which the captioner computes; if not given, `bf16` on a GPU, `bf16x3` on a CPU with AMX, `f32` on another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<NumberType>,
}

impl CaptionConfig {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// The first setting that makes no sense.
    pub fn check(&self) -> Result<(), ModelError> {
        self.sampling.check()
    }

    /// The parameters of the stage's tasks, for workers with these settings.
    #[must_use]
    pub fn params(&self, worker: &VisionWorkerConfig) -> Self {
        Self { dtype: NumberType::settle(self.dtype, worker), ..self.clone() }
    }
}

/// Writes captions. Row i answers row i; a row without image gets no caption.
pub struct CaptionStage {
    slot: Arc<ModelSlot<Captioner>>,
}

impl CaptionStage {
    /// A stage that loads its model with the first task.
    #[must_use]
    pub fn new(config: VisionWorkerConfig) -> Self {
        Self { slot: Arc::new(ModelSlot::new("captioner", config)) }
    }
}

impl Stage for CaptionStage {
    fn kind(&self) -> StageKind {
        StageKind::Caption
    }

    fn process(&self, work: Work, input: RowStream) -> RowStream {
        let slot = Arc::clone(&self.slot);
        let start = async move {
            let config: CaptionConfig = work.params()?;
            let (sampling, dtype) = (config.sampling.clone(), config.dtype);
            let make = move |folders: &[PathBuf], device: &Device| {
                let (captioner, preprocessor) = captioner(&folders[0], sampling, dtype, device)?;
                Ok((captioner, vec![preprocessor]))
            };
            let loaded = slot.get(&work, &[], make).await?;
            let seed = config.seed;
            let rows = prepared(input, Arc::clone(&loaded.preprocessors))
                .and_then(move |(batch, pixels)| caption(loaded.clone(), seed, batch, pixels));
            Ok::<_, StageError>(rows)
        };
        stream::once(start).try_flatten().boxed()
    }
}

async fn caption(
    loaded: Loaded<Captioner>,
    seed: u64,
    batch: RecordBatch,
    rows: Vec<RowPixels>,
) -> Result<RecordBatch, StageError> {
    let (status, error) = status_columns(&rows);
    let present: Vec<bool> = rows.iter().map(Result::is_ok).collect();
    let ids = text_column(&batch, column::SAMPLE_ID)?.clone();
    let keys: Vec<String> =
        ids.iter().zip(&present).filter(|(_, there)| **there).map(|(id, _)| id.unwrap_or_default().to_owned()).collect();
    let images = take_view(&mut rows.into_iter().flatten().collect::<Vec<_>>());
    let texts = if images.is_empty() {
        Vec::new()
    } else {
        let work = move |captioner: &mut Captioner| {
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            captioner.caption(&images, &keys, seed)
        };
        loaded.thread.call(work).await?.map_err(|e| StageError::caused(e, true))?
    };
    let mut captions = ListBuilder::new(StringBuilder::new()).with_field(Field::new("item", DataType::Utf8, false));
    for texts in spread(&present, texts) {
        for text in &texts {
            captions.values().append_value(text);
        }
        captions.append(true);
    }
    let columns: Vec<ArrayRef> = vec![Arc::new(ids), Arc::new(status), Arc::new(error), Arc::new(captions.finish())];
    Ok(RecordBatch::try_new(Table::Captions.schema(), columns)?)
}

//! The `train` and `evaluate` stages: rows of a dataset version or of held-out pairs in, the files of a model or metrics out.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Float64Builder, ListBuilder, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, UInt32Type};
use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::device::device;
use capfilt_models::files;
use capfilt_models::score::Itc;
use capfilt_models::train::{FeatureMaps, Pretrained};
use capfilt_runtime::{RowStream, Stage, StageError, Work, on_blocking, rows};
use capfilt_schemas::{Digest, FetchStatus, Origin, StageKind, Table, column};
use capfilt_store::model_rows;
use futures::{StreamExt, TryStreamExt, stream};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::members::train_members;
use crate::set::{Entry, StoredImages};
use crate::{EvaluateConfig, Init, PairText, TrainConfig, TrainPair, TrainSet, TrainerError, TrainerWorkerConfig, evaluate};

/// Raised whenever the same dataset and settings would give another model.
pub const TRAIN_VERSION: u32 = 7;
/// Raised whenever the same model and held-out pairs would give other metrics.
pub const EVALUATE_VERSION: u32 = 7;

/// Trains a model on a dataset version. The task's model is the one in service: its tokenizer is kept, and its weights are the start if
/// the settings say so.
pub struct TrainStage(pub TrainerWorkerConfig);

/// The parameters of an evaluate task.
#[derive(Serialize, Deserialize)]
struct EvaluateParams {
    role: String,
    /// As in the parameters of a score task.
    #[serde(default)]
    itc: Itc,
    #[serde(flatten)]
    config: serde_json::Map<String, serde_json::Value>,
}

/// Measures a model in a role on held-out pairs.
pub struct EvaluateStage(pub TrainerWorkerConfig);

impl Stage for TrainStage {
    fn kind(&self) -> StageKind {
        StageKind::Train
    }

    fn process(&self, work: Work, input: RowStream) -> RowStream {
        let worker = self.0.clone();
        let files = async move {
            let config: TrainConfig = work.params()?;
            let parent = match work.task.model {
                Some(model) => Some(work.model_folder(&model).await?),
                None => None,
            };
            let (trunk, words) = (
                pretrained(&work, config.trunk_weights.as_deref()).await?,
                pretrained(&work, config.word_weights.as_deref()).await?,
            );
            let side = match &parent {
                Some(folder) if config.init != Init::Fresh => {
                    Checkpoint::open(folder).and_then(|parent| Ok(parent.preprocessor()?.side())).map_err(fail)?
                }
                _ => config.model.image_size,
            };
            let pairs = dataset_pairs(&work, input, side, (&worker, &config)).await?;
            let device = device(&worker.device).map_err(fail)?;
            let scratch = work.scratch()?;
            // Dropped with this future: a training that nobody waits for any more stops at its next log line.
            let _stop = work.cancel.clone().drop_guard();
            let task = work.clone();
            let run = move || {
                let pretrained = Pretrained { trunk: trunk.as_deref(), words: words.as_deref() };
                train_members(&pairs, &config, (parent.as_deref(), pretrained), (&device, &worker), &scratch, &task)
            };
            let files = on_blocking(run).await?.map_err(caused)?;
            let parts: Vec<_> = model_rows(&files).collect::<Result<_, _>>()?;
            Ok::<_, StageError>(stream::iter(parts.into_iter().map(Ok)))
        };
        stream::once(files).try_flatten().boxed()
    }
}

impl Stage for EvaluateStage {
    fn kind(&self) -> StageKind {
        StageKind::Evaluate
    }

    fn process(&self, work: Work, input: RowStream) -> RowStream {
        let worker = self.0.clone();
        rows(async move {
            let params: EvaluateParams = work.params()?;
            let config: EvaluateConfig = serde_json::from_value(params.config.into())?;
            let folders = files::member_folders(&work.model_folder(&work.model()?).await?).concat();
            let members: Vec<Checkpoint> =
                folders.iter().map(|folder| Checkpoint::open(folder)).collect::<Result<_, _>>().map_err(fail)?;
            let side = members[0].preprocessor().map_err(fail)?.side();
            let pairs = heldout_pairs(input, side).await?;
            let device = device(&worker.device).map_err(fail)?;
            let judge = move || evaluate(&members, Some(&params.role), &pairs, &config, params.itc, &device);
            let metrics = on_blocking(judge).await?.map_err(caused)?;
            let item = Field::new("item", DataType::Float64, false);
            let mut resampled = ListBuilder::new(Float64Builder::new()).with_field(item);
            for metric in &metrics {
                resampled.values().append_slice(&metric.resampled);
                resampled.append(!metric.resampled.is_empty());
            }
            let columns: Vec<ArrayRef> = vec![
                Arc::new(metrics.iter().map(|metric| Some(metric.name.as_str())).collect::<StringArray>()),
                Arc::new(metrics.iter().map(|metric| metric.value).collect::<Float64Array>()),
                Arc::new(resampled.finish()),
            ];
            Ok(RecordBatch::try_new(Table::Evaluations.schema(), columns)?)
        })
    }
}

/// The folder with files of the store that a setting names by their digest.
async fn pretrained(work: &Work, digest: Option<&str>) -> Result<Option<PathBuf>, StageError> {
    let Some(text) = digest else { return Ok(None) };
    let no_digest = |_| StageError::Input(format!("`{text}` is no digest of files in the store"));
    Ok(Some(work.model_folder(&text.parse().map_err(no_digest)?).await?))
}

fn fail(e: capfilt_models::ModelError) -> StageError {
    StageError::caused(e, false)
}

fn caused(e: TrainerError) -> StageError {
    let retryable = e.is_retryable();
    StageError::caused(e, retryable)
}

/// The pairs of a dataset version, an item an image, in the order of (shard, row); their images are read as they are drawn.
async fn dataset_pairs(
    work: &Work,
    mut input: RowStream,
    side: usize,
    (worker, config): (&TrainerWorkerConfig, &TrainConfig),
) -> Result<TrainSet, StageError> {
    // Of each shard: row → sample id and texts.
    let mut shards = BTreeMap::<(Table, Digest), BTreeMap<u32, (String, Vec<PairText>)>>::new();
    while let Some(batch) = input.next().await {
        let batch = batch?;
        let text = |name: &str| column_of(&batch, name).map(|c| c.as_string::<i32>().clone());
        let (ids, texts, origins) = (text(column::SAMPLE_ID)?, text(column::TEXT)?, text(column::ORIGIN)?);
        let (places, numbers) = (text(column::SHARD)?, column_of(&batch, column::ROW)?.as_primitive::<UInt32Type>().clone());
        for i in 0..batch.num_rows() {
            let origin = Origin::parse(origins.value(i));
            let shard = places.value(i).parse::<Digest>().ok();
            let (Some(origin), Some(shard)) = (origin, shard) else {
                return Err(StageError::Input(format!("row {i} of the dataset has no known origin or no shard")));
            };
            let table = if origin == Origin::Human { Table::Annotated } else { Table::Samples };
            let wanted = shards.entry((table, shard)).or_default();
            let entry = wanted.entry(numbers.value(i)).or_insert_with(|| (ids.value(i).to_owned(), Vec::new()));
            entry.1.push(PairText { text: texts.value(i).to_owned(), origin });
        }
    }
    let (mut entries, mut rows, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for (place, wanted) in shards {
        for (row, (sample_id, texts)) in wanted {
            entries.push(Entry { sample_id, texts, shard: places.len() });
            rows.push(row);
        }
        places.push(place);
    }
    let images = StoredImages {
        store: work.store.clone(),
        runtime: Handle::current(),
        shards: places,
        rows,
        side,
        memory: worker.memory_mib << 20,
        // Those of both pools, and as many that are about to be left.
        window: 4 * config.shuffle_shards,
        kept: Mutex::default(),
    };
    let (folder, most_stored) = (work.shared("feature_maps"), worker.feature_maps_mib << 20);
    let feature_maps = FeatureMaps::in_folder(images.memory, &folder, most_stored).map_err(fail)?;
    Ok(TrainSet::stored(entries, images, feature_maps))
}

/// The held-out pairs with an image, in the order of their shards.
async fn heldout_pairs(mut input: RowStream, side: usize) -> Result<Vec<TrainPair>, StageError> {
    let mut pairs = Vec::new();
    while let Some(batch) = input.next().await {
        let batch = batch?;
        let ids = column_of(&batch, column::SAMPLE_ID)?.as_string::<i32>().clone();
        let statuses = column_of(&batch, column::STATUS)?.as_string::<i32>().clone();
        let captions = column_of(&batch, column::CAPTIONS)?.as_list::<i32>().clone();
        let texts = |i: usize| {
            let texts = captions.value(i);
            let human = |t: &str| PairText { text: t.to_owned(), origin: Origin::Human };
            texts.as_string::<i32>().iter().flatten().map(human).collect::<Vec<_>>()
        };
        let here = (0..batch.num_rows())
            .filter(|i| statuses.value(*i) == FetchStatus::Ok.as_str() && !captions.value(*i).is_empty())
            .map(|i| (i, (ids.value(i).to_owned(), texts(i))))
            .collect();
        pairs.extend(tokio::task::block_in_place(|| decode(&batch, here, side))?);
    }
    Ok(pairs)
}

fn decode(batch: &RecordBatch, rows: Vec<(usize, (String, Vec<PairText>))>, side: usize) -> Result<Vec<TrainPair>, StageError> {
    let images = column_of(batch, column::IMAGE)?.as_binary::<i32>().clone();
    rows.into_par_iter()
        .map(|(i, (sample_id, texts))| {
            let image = image::load_from_memory(images.value(i))
                .map_err(|e| caused(TrainerError::Image { sample_id: sample_id.clone(), reason: e.to_string() }))?;
            TrainPair::new(sample_id, texts, &image.into_rgb8(), side).map_err(caused)
        })
        .collect()
}

fn column_of<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, StageError> {
    batch.column_by_name(name).ok_or_else(|| StageError::Input(format!("the input has no column `{name}`")))
}

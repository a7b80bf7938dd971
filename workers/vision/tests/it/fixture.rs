//! Samples of image files, small checkpoints, a small CLIP, and tasks on them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, RecordBatch, StringArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Schema};
use capfilt_runtime::{Stage, StageError, Work};
use capfilt_schemas::{Digest, RunId, StageKind, Task, column};
use capfilt_store::Store;
use futures::{StreamExt, TryStreamExt, stream};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A checkpoint of the tests: `captioner` or `filter`.
pub(crate) fn checkpoint(role: &str) -> PathBuf {
    root().join("tests/checkpoints").join(role)
}

/// Image files that differ.
pub(crate) fn image_files() -> Vec<Vec<u8>> {
    let folder = root().join("workers/crawler/fuzz/seeds/image");
    ["rgb.jpg", "grey.png", "still.gif", "palette.bmp", "progressive.jpg", "rgba.png", "exif.jpg"]
        .map(|name| std::fs::read(folder.join(name)).unwrap())
        .to_vec()
}

/// Samples with all images of [`image_files`], one that cannot be decoded and one that could not be fetched.
pub(crate) fn samples() -> RecordBatch {
    let mut images: Vec<Option<Vec<u8>>> = image_files().into_iter().map(Some).collect();
    images.insert(2, Some(b"no image at all".to_vec()));
    images.insert(4, None);
    let ids = (0..images.len()).map(|i| format!("sample-{i}"));
    let status = images.iter().map(|image| if image.is_some() { "ok" } else { "timeout" });
    let columns: Vec<(&str, ArrayRef)> = vec![
        (column::SAMPLE_ID, Arc::new(StringArray::from_iter_values(ids))),
        (column::TEXT, Arc::new(StringArray::from_iter_values((0..images.len()).map(|i| format!("a picture, number {i}"))))),
        (column::STATUS, Arc::new(StringArray::from_iter_values(status))),
        (column::IMAGE, Arc::new(BinaryArray::from_iter(images.iter().map(Option::as_deref)))),
    ];
    beside(None, &columns)
}

/// Columns beside those of a batch.
pub(crate) fn beside(batch: Option<&RecordBatch>, more: &[(&str, ArrayRef)]) -> RecordBatch {
    let mut fields: Vec<Field> = batch.into_iter().flat_map(|b| b.schema().fields().to_vec()).map(|f| (*f).clone()).collect();
    let mut columns: Vec<ArrayRef> = batch.into_iter().flat_map(|b| b.columns().to_vec()).collect();
    for (name, values) in more {
        let kind = values.data_type().clone();
        fields.push(Field::new(*name, kind.clone(), kind == DataType::Binary));
        columns.push(Arc::clone(values));
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

/// Where tasks are done.
pub(crate) struct Place {
    store: Store,
    folder: TempDir,
}

impl Place {
    pub(crate) async fn new() -> Self {
        Self { store: Store::open("memory:").await.unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    /// Puts a checkpoint into the store.
    pub(crate) async fn model(&self, folder: &Path) -> Digest {
        self.members(&[folder]).await
    }

    /// Puts checkpoints into the store as the members of one model, two for each split.
    pub(crate) async fn members(&self, folders: &[&Path]) -> Digest {
        let mut files = BTreeMap::new();
        for (number, folder) in folders.iter().enumerate() {
            for name in capfilt_store::CHECKPOINT_FILES {
                let place = capfilt_models::files::member(number / 2, number % 2).join(name).display().to_string();
                files.insert(place, std::fs::read(folder.join(name)).unwrap());
            }
        }
        self.store.put_model(&files).await.unwrap().digest
    }

    /// All rows that a stage makes of `rows`, which come in batches of `at_once`.
    pub(crate) async fn run(
        &self,
        stage: &dyn Stage,
        params: Value,
        model: Digest,
        rows: &RecordBatch,
        at_once: usize,
    ) -> Result<RecordBatch, StageError> {
        let kind: StageKind = stage.kind();
        let task = Task { stage: kind, stage_version: 1, params, model: Some(model), inputs: Vec::new() };
        let work = Work::new(task, self.store.clone(), RunId::new("test").unwrap(), self.folder.path());
        let batches: Vec<_> =
            (0..rows.num_rows()).step_by(at_once).map(|i| Ok(rows.slice(i, at_once.min(rows.num_rows() - i)))).collect();
        let made: Vec<RecordBatch> = stage.process(work, stream::iter(batches).boxed()).try_collect().await?;
        Ok(concat_batches(&kind.output().schema(), &made)?)
    }
}

/// The demo's filter with other weights in the matching head.
pub(crate) fn other_filter(folder: &Path) {
    for name in capfilt_store::CHECKPOINT_FILES {
        std::fs::copy(checkpoint("filter").join(name), folder.join(name)).unwrap();
    }
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let place = |end: usize| header + tensors["itm_head.weight"]["data_offsets"][end].as_u64().unwrap() as usize;
    bytes[place(0)..place(1)].fill(0);
    std::fs::write(path, bytes).unwrap();
}

/// A CLIP of one layer on each side with weights that move its cosines, and the tokenizer of the demo.
pub(crate) fn clip(folder: &Path) {
    const WIDTH: usize = 32;
    let side = json!({
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    });
    let with = |more: Value| {
        let mut all = side.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let config = json!({
        "model_type": "clip", "projection_dim": 16,
        "vision_config": with(json!({"image_size": 48, "patch_size": 16})),
        "text_config": with(json!({"vocab_size": 1500, "max_position_embeddings": 40, "eos_token_id": 3})),
    });
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("logit_scale".to_owned(), vec![]),
        ("visual_projection.weight".to_owned(), vec![16, WIDTH]),
        ("text_projection.weight".to_owned(), vec![16, WIDTH]),
        ("text_model.embeddings.token_embedding.weight".to_owned(), vec![1500, WIDTH]),
        ("text_model.embeddings.position_embedding.weight".to_owned(), vec![40, WIDTH]),
        ("vision_model.embeddings.class_embedding".to_owned(), vec![WIDTH]),
        ("vision_model.embeddings.patch_embedding.weight".to_owned(), vec![WIDTH, 3, 16, 16]),
        ("vision_model.embeddings.position_embedding.weight".to_owned(), vec![10, WIDTH]),
    ];
    let mut layer = |name: String, outputs: usize, inputs: Option<usize>| {
        shapes.push((format!("{name}.weight"), [outputs].into_iter().chain(inputs).collect()));
        shapes.push((format!("{name}.bias"), vec![outputs]));
    };
    for (model, norms) in [("text_model", &["final_layer_norm"][..]), ("vision_model", &["pre_layrnorm", "post_layernorm"])] {
        norms.iter().for_each(|norm| layer(format!("{model}.{norm}"), WIDTH, None));
        let block = format!("{model}.encoder.layers.0");
        ["layer_norm1", "layer_norm2"].iter().for_each(|norm| layer(format!("{block}.{norm}"), WIDTH, None));
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            layer(format!("{block}.self_attn.{projection}"), WIDTH, Some(WIDTH));
        }
        layer(format!("{block}.mlp.fc1"), 2 * WIDTH, Some(WIDTH));
        layer(format!("{block}.mlp.fc2"), WIDTH, Some(2 * WIDTH));
    }
    let mut state = 1_u32;
    let mut value = |centre: f32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        centre + 0.5 * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let centre = if name.contains("norm") && name.ends_with("weight") { 1.0 } else { 0.0 };
            let values = (0..shape.iter().product()).flat_map(|_| value(centre).to_le_bytes()).collect();
            (name, shape, values)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    let weights = safetensors::serialize(views, None).unwrap();
    let preprocessor: Value =
        serde_json::from_slice(&std::fs::read(checkpoint("filter").join("preprocessor_config.json")).unwrap()).unwrap();
    let mut preprocessor = preprocessor;
    preprocessor["size"] = json!({"height": 48, "width": 48});
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("preprocessor_config.json"), preprocessor.to_string()).unwrap();
    std::fs::write(folder.join("model.safetensors"), weights).unwrap();
    std::fs::copy(checkpoint("filter").join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
}

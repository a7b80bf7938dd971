//! A caption worker as a run has it, beside the model alone: images captioned a second from shard to shard (read, decode, prepare, generate,
//! write, commit), those of the captioner on images that lie prepared, taken in turn, and the most memory that the worker used. BLIP-base at
//! 384 px with random weights, captions of 20 new tokens, images of 640 x 480, in the number type that is usual here, or the one named:
//! `-- bf16`.
#![allow(clippy::unwrap_used, clippy::explicit_write, missing_docs)]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, BinaryArray, ListArray, RecordBatch, StringArray, UInt32Array, new_null_array};
use arrow::datatypes::DataType;
use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::config::MedConfig;
use capfilt_models::device::{DType, Device, share_threads};
use capfilt_models::generate::Captioner;
use capfilt_models::med::Parts;
use capfilt_models::ops::Precision;
use capfilt_models::parameters::fresh_tensors;
use capfilt_models::preprocess::{Pixels, Preprocessor};
use capfilt_models::sampling::Sampling;
use capfilt_models::special;
use capfilt_models::tokenizer::train_wordpiece;
use capfilt_runtime::{MemoryQueue, Stage, Telemetry, WorkQueue, Worker, WorkerConfig};
use capfilt_schemas::{Digest, RunId, StageKind, Table, Task, column};
use capfilt_store::{ShardWriter, Store};
use capfilt_tests::Figures;
use capfilt_vision::{CaptionConfig, CaptionStage, VisionWorkerConfig};
use image::codecs::jpeg::JpegEncoder;
use serde_json::json;
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 3;
/// Images of a shard.
const IMAGES: usize = 128;
const TOKENS: usize = 20;
/// What a process of this program does: make the checkpoint, or measure with batches of so many rows. Each has its own memory.
const ROLE: &str = "CAPFILT_BENCH_ROLE";

/// Makes a checkpoint, and puts it into the store.
async fn make(folder: &Path) {
    let mut config = MedConfig::base();
    let text = &mut config.text_config;
    (text.bos_token_id, text.pad_token_id, text.sep_token_id) = (special::DEC_ID, special::PAD_ID, special::SEP_ID);
    text.enc_token_id = Some(special::ENC_ID);
    let tokenizer = train_wordpiece(&["a picture of a grey heron standing in the water"], 100).unwrap();
    let tensors = fresh_tensors(&config, Parts::CAPTIONER, 1, &Device::Cpu).unwrap();
    let checkpoint = folder.join("checkpoint");
    Checkpoint::save(&checkpoint, &config, &tensors, DType::F32, &tokenizer, &Preprocessor::new(config.vision_config.image_size))
        .unwrap();
    let names = ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"];
    let files = names.map(|name| (name.to_owned(), std::fs::read(checkpoint.join(name)).unwrap()));
    let store = Store::open(folder.join("store").to_str().unwrap()).await.unwrap();
    let model = store.put_model(&BTreeMap::from(files)).await.unwrap().digest;
    std::fs::write(folder.join("model"), model.to_string()).unwrap();
}

/// A JPEG file with much to decode.
fn image(number: usize) -> Vec<u8> {
    let (width, height) = (640, 480);
    let value = |i: usize| {
        let (x, y, channel) = (i / 3 % width, i / 3 / width, i % 3);
        let wave = ((x + 13 * number) as f32 / (7.0 + channel as f32)).sin() + (y as f32 / 11.0).cos();
        (127.0 + 50.0 * wave) as u8 + (i * 7919 % 23) as u8
    };
    let pixels: Vec<u8> = (0..width * height * 3).map(value).collect();
    let mut file = Vec::new();
    JpegEncoder::new_with_quality(&mut file, 90)
        .encode(&pixels, width as u32, height as u32, image::ExtendedColorType::Rgb8)
        .unwrap();
    file
}

/// Samples of these images whose ids begin so; what captioning does not read is empty.
fn samples(images: &[Vec<u8>], prefix: &str) -> RecordBatch {
    let count = images.len();
    let texts = |make: &dyn Fn(usize) -> String| Arc::new(StringArray::from_iter_values((0..count).map(make))) as ArrayRef;
    let schema = Table::Samples.schema();
    let column = |name: &str, kind: &DataType, nullable: bool| match (name, kind) {
        (column::SAMPLE_ID, _) => texts(&|i| format!("{prefix}-{i}")),
        (column::STATUS, _) => texts(&|_| "ok".to_owned()),
        (column::IMAGE, _) => Arc::new(BinaryArray::from_iter_values(images)) as ArrayRef,
        (_, kind) if nullable => new_null_array(kind, count),
        (_, DataType::Utf8) => texts(&|_| String::new()),
        (_, DataType::UInt32) => Arc::new(UInt32Array::from_value(0, count)),
        (_, DataType::List(item)) => {
            let offsets = arrow::buffer::OffsetBuffer::from_lengths(std::iter::repeat_n(0, count));
            Arc::new(ListArray::new(Arc::clone(item), offsets, new_null_array(item.data_type(), 0), None))
        }
        other => panic!("nothing to put into {other:?}"),
    };
    let columns = schema.fields().iter().map(|f| column(f.name(), f.data_type(), f.is_nullable())).collect();
    RecordBatch::try_new(schema, columns).unwrap()
}

/// The most memory of this process so far, in MiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() >> 10
}

/// The captioner alone, in the number type of a task.
fn captioner(folder: &Path, sampling: Sampling, dtype: Option<&str>) -> Captioner {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut med = checkpoint.med(&Device::Cpu, DType::F32).unwrap();
    let precision = match dtype {
        Some("bf16") => Precision::Bf16,
        Some("bf16x3") => Precision::Bf16x3,
        Some("int8") => Precision::Int8,
        _ => Precision::F32,
    };
    med.pack(precision).unwrap();
    Captioner::new(med, checkpoint.tokenizer().unwrap(), sampling).unwrap()
}

/// Measures a worker with batches of `batch` rows.
async fn measure(folder: &Path, dtype: Option<&str>, batch: usize) {
    let checkpoint = folder.join("checkpoint");
    let store = Store::open(folder.join("store").to_str().unwrap()).await.unwrap();
    let model: Digest = std::fs::read_to_string(folder.join("model")).unwrap().parse().unwrap();
    let images: Vec<Vec<u8>> = (0..IMAGES).map(image).collect();
    let sampling = Sampling { min_length: TOKENS + 1, max_length: TOKENS + 1, prompt: String::new(), ..Sampling::default() };
    let config = CaptionConfig {
        sampling: sampling.clone(),
        dtype: dtype.map(|name| serde_json::from_value(json!(name)).unwrap()),
        ..CaptionConfig::default()
    };
    let params = json!(config.params(&VisionWorkerConfig::default()));
    let numbers = params["dtype"].as_str().unwrap_or("f32").to_owned();

    let queue = Arc::new(MemoryQueue::new());
    let stop = CancellationToken::new();
    let stage: Arc<dyn Stage> = Arc::new(CaptionStage::new(VisionWorkerConfig::default()));
    let settings = WorkerConfig { work_dir: folder.join("work"), batch_rows: batch, ..WorkerConfig::default() };
    let run = RunId::new("bench").unwrap();
    let worker = Worker::new(store.clone(), run, Arc::clone(&queue) as _, [stage], settings, Telemetry::default());
    let worker = tokio::spawn(worker.run(stop.clone()));
    // The seconds that a shard of its own takes from the queue to its commit.
    let shard = async |round: usize| {
        let mut shard = ShardWriter::new(Table::Samples).unwrap();
        shard.write(&samples(&images, &format!("sample-{batch}-{round}"))).unwrap();
        let inputs = vec![shard.finish(&store).await.unwrap().as_input()];
        let task = Task { stage: StageKind::Caption, stage_version: 1, params: params.clone(), model: Some(model), inputs };
        let began = Instant::now();
        queue.enqueue(std::slice::from_ref(&task)).await.unwrap();
        while store.find_commit(StageKind::Caption, &task.id()).await.unwrap().is_none() {
            assert!(store.failures(&task.id()).await.unwrap().is_empty());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        IMAGES as f64 / began.elapsed().as_secs_f64()
    };
    // The first one has the model loaded.
    shard(0).await;
    writeln!(std::io::stdout(), "worker: at most {} MiB in batches of {batch} in {numbers}", peak_memory()).unwrap();

    let alone = captioner(&checkpoint, sampling, params["dtype"].as_str());
    let preprocessor = Checkpoint::open(&checkpoint).unwrap().preprocessor().unwrap();
    let prepare = |file: &Vec<u8>| preprocessor.prepare(&image::load_from_memory(file).unwrap().into_rgb8()).unwrap();
    let pixels: Vec<Pixels> = images.iter().map(prepare).collect();
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        ours.push(shard(round).await);
        let began = Instant::now();
        for pixels in pixels.chunks(batch) {
            let keys: Vec<String> = (0..pixels.len()).map(|i| i.to_string()).collect();
            alone.caption(pixels, &keys.iter().map(String::as_str).collect::<Vec<_>>(), 0).unwrap();
        }
        bare.push(IMAGES as f64 / began.elapsed().as_secs_f64());
    }
    stop.cancel();
    worker.await.unwrap().unwrap();
    let unit = format!("images/s from shard to shard (batches of {batch}, {numbers})");
    Figures { name: "worker", unit: &unit, ours, peer: Some(("the captioner alone".to_owned(), bare)) }.report().unwrap();
}

fn main() {
    share_threads();
    tokio::runtime::Runtime::new().unwrap().block_on(run());
}

async fn run() {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    if let Ok(role) = std::env::var(ROLE) {
        let folder = PathBuf::from(arguments.remove(0));
        match role.parse() {
            Ok(batch) => measure(&folder, arguments.first().map(String::as_str), batch).await,
            Err(_) => make(&folder).await,
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for role in ["make", "16", "64"] {
        let mut process = Command::new(std::env::current_exe().unwrap());
        process.env(ROLE, role).arg(folder.path()).args(&arguments);
        assert!(process.status().unwrap().success());
    }
}

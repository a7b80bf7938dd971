//! The worker loop with small stages of its own.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, new_null_array};
use capfilt_runtime::{
    MemoryQueue, ModelThread, RowStream, Stage, StageError, Telemetry, Work, WorkQueue, Worker, WorkerConfig, on_rayon, rows,
};
use capfilt_schemas::{Input, RunId, StageKind, Table, Task};
use capfilt_store::{ShardWriter, Store};
use futures::StreamExt;
use metrics_util::debugging::DebuggingRecorder;
use serde_json::json;
use tokio_util::sync::CancellationToken;

fn metric(name: &str, value: f64) -> RecordBatch {
    let schema = Table::Evaluations.schema();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values([name])),
        Arc::new(Float64Array::from_iter_values([value])),
        new_null_array(schema.field(2).data_type(), 1),
    ];
    RecordBatch::try_new(schema, columns).unwrap()
}

/// Sums the values of its input rows; fails as often as its parameters ask for.
struct Sum {
    attempts: AtomicU32,
}

impl Stage for Sum {
    fn kind(&self) -> StageKind {
        StageKind::Evaluate
    }

    fn process(&self, work: Work, mut input: RowStream) -> RowStream {
        let attempt = self.attempts.fetch_add(1, Ordering::SeqCst) + 1;
        rows(async move {
            let failing = work.task.params["fail"].as_u64().unwrap_or(0);
            if u64::from(attempt) <= failing {
                let retryable = work.task.params["retryable"].as_bool().unwrap_or(true);
                return Err(StageError::Failed { message: format!("attempt {attempt}"), retryable, source: None });
            }
            assert!(!work.task.params["panic"].as_bool().unwrap_or(false), "as asked");
            let mut sum = 0.0;
            while let Some(batch) = input.next().await {
                sum += batch?.column(1).as_primitive::<arrow::datatypes::Float64Type>().values().iter().sum::<f64>();
                work.facts.add("batches", 1);
            }
            Ok(metric("sum", sum))
        })
    }
}

struct Bench {
    store: Store,
    queue: Arc<MemoryQueue>,
    telemetry: Telemetry,
    stop: CancellationToken,
    _work_dir: tempfile::TempDir,
}

async fn bench() -> Bench {
    let store = Store::open("memory:").await.unwrap();
    let queue = Arc::new(MemoryQueue::new());
    let (telemetry, stop) = (Telemetry::default(), CancellationToken::new());
    let work_dir = tempfile::tempdir().unwrap();
    let config = WorkerConfig { work_dir: work_dir.path().into(), batch_rows: 2, ..WorkerConfig::default() };
    let stage: Arc<dyn Stage> = Arc::new(Sum { attempts: AtomicU32::new(0) });
    let run = RunId::new("test").unwrap();
    let worker = Worker::new(store.clone(), run, Arc::clone(&queue) as _, [stage], config, telemetry.clone());
    tokio::spawn(worker.run(stop.clone()));
    Bench { store, queue, telemetry, stop, _work_dir: work_dir }
}

async fn shard(store: &Store, values: &[f64]) -> Input {
    let mut w = ShardWriter::new(Table::Evaluations).unwrap();
    for v in values {
        w.write(&metric("x", *v)).unwrap();
    }
    w.finish(store).await.unwrap().as_input()
}

fn task(params: serde_json::Value, inputs: Vec<Input>) -> Task {
    Task { stage: StageKind::Evaluate, stage_version: 1, params, model: None, inputs }
}

impl Bench {
    async fn until_idle(&self) {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let depth = self.queue.depth(StageKind::Evaluate).await.unwrap();
            if depth.waiting + depth.in_flight == 0 {
                return;
            }
        }
    }
}

#[tokio::test]
async fn a_task_ends_in_a_commit_with_counts_and_facts() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();
    let b = bench().await;
    let inputs = vec![shard(&b.store, &[1.0, 2.0, 3.0]).await, shard(&b.store, &[10.0]).await];
    let t = task(json!({}), inputs);
    b.queue.enqueue(std::slice::from_ref(&t)).await.unwrap();
    b.until_idle().await;
    let commit = b.store.find_commit(StageKind::Evaluate, &t.id()).await.unwrap().unwrap();
    assert_eq!(commit.counts["ok"], 1);
    assert_eq!(commit.facts["batches"], 3);
    let out = b.store.read_whole(Table::Evaluations, &commit.outputs[0].digest).await.unwrap();
    assert_eq!(out, metric("sum", 16.0));
    assert_eq!(b.telemetry.snapshot()[&StageKind::Evaluate].tasks, 1);
    let seen: std::collections::BTreeSet<String> =
        snapshotter.snapshot().into_vec().iter().map(|(key, ..)| key.key().name().to_owned()).collect();
    for name in ["capfilt_tasks_total", "capfilt_rows_total", "capfilt_written_bytes_total", "capfilt_task_duration_seconds"] {
        assert!(seen.contains(name), "{name} not among {seen:?}");
    }
    b.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn what_a_retry_could_mend_is_tried_again_up_to_the_limit() {
    for (params, commits, failures) in [
        (json!({"fail": 2}), true, 2),
        (json!({"fail": 9}), false, 3),
        (json!({"fail": 9, "retryable": false}), false, 1),
        (json!({"panic": true}), false, 3),
    ] {
        let b = bench().await;
        let t = task(params.clone(), vec![]);
        b.queue.enqueue(std::slice::from_ref(&t)).await.unwrap();
        b.until_idle().await;
        assert_eq!(b.store.find_commit(StageKind::Evaluate, &t.id()).await.unwrap().is_some(), commits, "{params}");
        assert_eq!(b.store.failures(&t.id()).await.unwrap().len(), failures, "{params}");
        b.stop.cancel();
    }
}

#[tokio::test]
async fn a_corrupt_or_missing_input_fails_the_task_and_names_it() {
    let b = bench().await;
    let good = shard(&b.store, &[1.0]).await;
    let not_parquet = b.store.put_object(Table::Evaluations, "junk".into()).await.unwrap();
    for bad in [Input { digest: not_parquet, ..good }, Input { digest: capfilt_schemas::Digest::of(b"gone"), ..good }] {
        let t = task(json!({}), vec![good, bad]);
        b.queue.enqueue(std::slice::from_ref(&t)).await.unwrap();
        b.until_idle().await;
        assert!(b.store.find_commit(StageKind::Evaluate, &t.id()).await.unwrap().is_none());
        let failures = b.store.failures(&t.id()).await.unwrap();
        assert!(failures[0].error.contains(&bad.digest.to_string()), "{}", failures[0].error);
    }
    b.stop.cancel();
}

#[tokio::test]
async fn shards_of_several_tables_stand_side_by_side() {
    struct Seen(tokio::sync::mpsc::UnboundedSender<Vec<String>>);
    impl Stage for Seen {
        fn kind(&self) -> StageKind {
            StageKind::Evaluate
        }
        fn process(&self, _: Work, mut input: RowStream) -> RowStream {
            let seen = self.0.clone();
            rows(async move {
                while let Some(batch) = input.next().await {
                    let names = batch?.schema().fields().iter().map(|f| f.name().clone()).collect();
                    seen.send(names).unwrap();
                }
                Ok(metric("done", 1.0))
            })
        }
    }
    let store = Store::open("memory:").await.unwrap();
    let caption = |ids: &[&str]| {
        let empty: Vec<Option<Vec<Option<f32>>>> = ids.iter().map(|_| Some(vec![])).collect();
        let list = || {
            let field = Table::Scores.schema().field(5).clone();
            let values = arrow::array::ListArray::from_iter_primitive::<arrow::datatypes::Float32Type, _, _>(empty.clone());
            arrow::compute::cast(&values, field.data_type()).unwrap()
        };
        let text = |s: &str| Arc::new(StringArray::from(vec![s; ids.len()])) as ArrayRef;
        let none = new_null_array(&arrow::datatypes::DataType::Float32, ids.len());
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(ids)),
            text("ok"),
            new_null_array(&arrow::datatypes::DataType::Utf8, ids.len()),
            Arc::clone(&none),
            none,
            list(),
            list(),
        ];
        let stored: Vec<usize> = (0..columns.len()).collect();
        RecordBatch::try_new(Arc::new(Table::Scores.schema().project(&stored).unwrap()), columns).unwrap()
    };
    let put = async |ids: &[&str]| {
        let mut w = ShardWriter::new(Table::Scores).unwrap();
        w.write(&caption(ids)).unwrap();
        w.finish(&store).await.unwrap().as_input()
    };
    let (a, b) = (put(&["p", "q"]).await, shard(&store, &[1.0, 2.0]).await);
    let short = shard(&store, &[1.0]).await;
    let queue = Arc::new(MemoryQueue::new());
    let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let stage: Arc<dyn Stage> = Arc::new(Seen(sender));
    let work_dir = tempfile::tempdir().unwrap();
    let config = WorkerConfig { work_dir: work_dir.path().into(), ..WorkerConfig::default() };
    let run = RunId::new("test").unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(
        Worker::new(store.clone(), run, Arc::clone(&queue) as _, [stage], config, Telemetry::default()).run(stop.clone()),
    );
    queue.enqueue(&[task(json!({}), vec![a, b])]).await.unwrap();
    let names = seen.recv().await.unwrap();
    assert_eq!(names.first().map(String::as_str), Some("sample_id"));
    assert_eq!(names[names.len() - 3..], ["metric", "value", "resampled"]);
    let uneven = task(json!({}), vec![a, short]);
    queue.enqueue(std::slice::from_ref(&uneven)).await.unwrap();
    while store.failures(&uneven.id()).await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.cancel();
}

#[tokio::test]
async fn panics_on_compute_threads_are_errors() {
    assert_eq!(on_rayon(|| 7).await.unwrap(), 7);
    assert!(matches!(on_rayon(|| panic!("boom")).await, Err(StageError::Panicked(text)) if text == "boom"));
    let model = ModelThread::spawn("model", || Ok(vec![1])).await.unwrap();
    assert!(matches!(model.call(|_| panic!("bad batch")).await, Err(StageError::Panicked(_))));
    assert_eq!(model.call(|m: &mut Vec<i32>| m.len()).await.unwrap(), 1);
    let none = ModelThread::<()>::spawn("model", || Err(StageError::fatal("no weights"))).await;
    assert!(none.is_err_and(|e| e.to_string() == "no weights"));
}

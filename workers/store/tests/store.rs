//! The same behaviour on every kind of store.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, BinaryArray, Float32Array, Float64Array, RecordBatch, StringArray, UInt32Array, new_null_array};
use capfilt_schemas::{Commit, FetchStatus, Output, Redaction, RunId, StageKind, Table, Task};
use capfilt_store::{CommitResult, IMPORTED, ShardWriter, Store, StoreError, Targets};

struct Place {
    store: Store,
    folder: Option<tempfile::TempDir>,
}

async fn places() -> Vec<Place> {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).await.unwrap();
    vec![Place { store, folder: Some(folder) }, Place { store: Store::open("memory:").await.unwrap(), folder: None }]
}

fn metrics(rows: &[(&str, f64)]) -> RecordBatch {
    let names = StringArray::from_iter_values(rows.iter().map(|r| r.0));
    let values = Float64Array::from_iter_values(rows.iter().map(|r| r.1));
    let schema = Table::Evaluations.schema();
    let resampled = new_null_array(schema.field(2).data_type(), rows.len());
    RecordBatch::try_new(schema, vec![Arc::new(names), Arc::new(values), resampled]).unwrap()
}

async fn shard(store: &Store, rows: &[(&str, f64)]) -> Output {
    let mut w = ShardWriter::new(Table::Evaluations).unwrap();
    w.write(&metrics(rows)).unwrap();
    w.finish(store).await.unwrap()
}

fn commit(params: u32, outputs: Vec<Output>) -> Commit {
    let task = Task { stage: StageKind::Evaluate, stage_version: 1, params: params.into(), model: None, inputs: vec![] };
    Commit {
        task_id: task.id(),
        task,
        run: RunId::new("r").unwrap(),
        outputs,
        counts: BTreeMap::new(),
        facts: serde_json::Value::Null,
        committed_at_ms: 1,
        elapsed_ms: 1,
    }
}

#[tokio::test]
async fn shards_do_not_depend_on_batching_and_read_back() {
    for Place { store, .. } in places().await {
        let rows: Vec<(String, f64)> = (0..1500).map(|i| (format!("m{i}"), f64::from(i))).collect();
        let rows: Vec<(&str, f64)> = rows.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let whole = shard(&store, &rows).await;
        let mut pieces = ShardWriter::new(Table::Evaluations).unwrap();
        for chunk in rows.chunks(37) {
            pieces.write(&metrics(chunk)).unwrap();
        }
        assert_eq!(pieces.finish(&store).await.unwrap(), whole);
        let back = store.read_whole(Table::Evaluations, &whole.digest).await.unwrap();
        assert_eq!(back, metrics(&rows));
        let sizes: Vec<usize> =
            store.read_shard(Table::Evaluations, &whole.digest, 400).await.unwrap().map(|b| b.unwrap().num_rows()).collect();
        assert_eq!(sizes.iter().sum::<usize>(), 1500);
        assert!(sizes.iter().all(|s| *s <= 400));
    }
}

#[tokio::test]
async fn an_optional_column_that_holds_nothing_is_not_stored_and_read_as_nulls() {
    let store = Store::open("memory:").await.unwrap();
    let schema = Table::Dataset.schema();
    let text = |value: &str| Arc::new(StringArray::from_iter_values([value, value])) as ArrayRef;
    let number = |values: [Option<f32>; 2]| Arc::new(Float32Array::from_iter(values)) as ArrayRef;
    let rows = |clip: Option<[Option<f32>; 2]>| {
        let (itm, row) = (number([Some(0.5), None]), Arc::new(UInt32Array::from_iter_values([0, 1])) as ArrayRef);
        let mut columns =
            vec![text("id"), text("a dog"), text("web"), Arc::clone(&itm), itm, text("u"), text("h"), text("s"), row];
        columns.extend(clip.map(number));
        let present: Vec<usize> = (0..columns.len()).collect();
        RecordBatch::try_new(Arc::new(schema.project(&present).unwrap()), columns).unwrap()
    };
    let put = async |batches: &[RecordBatch]| {
        let mut w = ShardWriter::new(Table::Dataset).unwrap();
        batches.iter().for_each(|batch| w.write(batch).unwrap());
        w.finish(&store).await.unwrap()
    };
    let nothing = rows(Some([None, None]));
    let without = put(&[rows(None)]).await;
    assert_eq!(put(std::slice::from_ref(&nothing)).await, without, "the bytes are those of a shard without the column");
    assert_eq!(store.read_whole(Table::Dataset, &without.digest).await.unwrap(), nothing);

    let scored = rows(Some([None, Some(0.25)]));
    let mixed = put(&[rows(None), scored.clone()]).await;
    let back = store.read_whole(Table::Dataset, &mixed.digest).await.unwrap();
    assert_eq!((back.slice(0, 2), back.slice(2, 2)), (nothing, scored));
    let short = rows(None).project(&[0, 1, 2]).unwrap();
    assert!(ShardWriter::new(Table::Dataset).unwrap().write(&short).is_err(), "the other columns must be there");
}

/// Values larger than a page of the file, so that pages are cut between rows.
#[tokio::test]
async fn shards_of_large_values_do_not_depend_on_batching() {
    let store = Store::open("memory:").await.unwrap();
    let rows = |from: u8, to: u8| {
        let names: ArrayRef = Arc::new(StringArray::from_iter_values((from..to).map(|n| format!("file {n}"))));
        let parts: ArrayRef = Arc::new(UInt32Array::from_iter_values((from..to).map(u32::from)));
        let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values((from..to).map(|n| vec![n; 90_000])));
        RecordBatch::try_new(Table::Models.schema(), vec![names, parts, bytes]).unwrap()
    };
    let mut digests = BTreeSet::new();
    for size in [1, 7, 64, 150] {
        let mut shard = ShardWriter::new(Table::Models).unwrap();
        for from in (0..150).step_by(size) {
            shard.write(&rows(from, from.saturating_add(size as u8).min(150))).unwrap();
        }
        digests.insert(shard.finish(&store).await.unwrap().digest);
    }
    assert_eq!(digests.len(), 1);
}

#[tokio::test]
async fn an_object_that_was_damaged_is_mended_by_putting_it_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).await.unwrap();
    let made = shard(&store, &[("a", 1.0)]).await;
    let path = folder.path().join(store.locate(Table::Evaluations, &made.digest).await.unwrap().0.to_string());
    std::fs::write(&path, b"nonsense").unwrap();
    assert!(store.get_object(Table::Evaluations, &made.digest).await.is_err());
    assert_eq!(shard(&store, &[("a", 1.0)]).await, made);
    assert!(store.get_object(Table::Evaluations, &made.digest).await.is_ok());
}

#[tokio::test]
async fn the_first_commit_wins() {
    for Place { store, .. } in places().await {
        let (a, b) = (shard(&store, &[("a", 1.0)]).await, shard(&store, &[("b", 2.0)]).await);
        let first = commit(1, vec![a.clone()]);
        assert_eq!(store.find_commit(StageKind::Evaluate, &first.task_id).await.unwrap(), None);
        assert_eq!(store.commit(&first).await.unwrap(), CommitResult::Committed);
        let again = Commit { committed_at_ms: 99, ..first.clone() };
        assert_eq!(store.commit(&again).await.unwrap(), CommitResult::AlreadyCommitted);
        let other = commit(1, vec![b]);
        assert_eq!(store.commit(&other).await.unwrap(), CommitResult::Lost { winner: Box::new(first.clone()) });
        assert_eq!(store.find_commit(StageKind::Evaluate, &first.task_id).await.unwrap(), Some(first.clone()));
        assert!(store.committed(StageKind::Evaluate).await.unwrap().contains(&first.task_id));
    }
}

#[tokio::test]
async fn racing_creates_have_one_winner() {
    for Place { store, .. } in places().await {
        let mut racers = tokio::task::JoinSet::new();
        for i in 0..24 {
            let store = store.clone();
            let mine = shard(&store, &[("x", f64::from(i))]).await;
            racers.spawn(async move { store.commit(&commit(7, vec![mine])).await.unwrap() });
        }
        let results: Vec<_> = racers.join_all().await;
        assert_eq!(results.iter().filter(|r| **r == CommitResult::Committed).count(), 1);
        let run = RunId::new("r").unwrap();
        let mut appends = tokio::task::JoinSet::new();
        for i in 0..16 {
            let (store, run) = (store.clone(), run.clone());
            appends.spawn(async move { store.log_event(&run, &format!("e{i}")).await.unwrap().number });
        }
        let mut numbers = appends.join_all().await;
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=16).collect::<Vec<u64>>());
    }
}

#[tokio::test]
async fn check_finds_what_is_corrupt_or_missing_and_sweep_leaves_what_is_named() {
    for Place { store, folder } in places().await {
        let (kept, lost) = (shard(&store, &[("a", 1.0)]).await, shard(&store, &[("b", 2.0)]).await);
        store.commit(&commit(1, vec![kept.clone()])).await.unwrap();
        let report = store.check().await.unwrap();
        assert!(report.is_sound(), "{:?}", report.findings);
        assert_eq!((report.objects, report.unreferenced), (1, 1));

        assert_eq!(store.sweep(Duration::from_secs(3600), false).await.unwrap().young, 1);
        assert_eq!(store.sweep(Duration::ZERO, true).await.unwrap().objects, 1);
        assert_eq!(store.sweep(Duration::ZERO, false).await.unwrap().objects, 1);
        assert!(matches!(store.get_object(lost.table, &lost.digest).await, Err(StoreError::Missing { .. })));
        store.get_object(kept.table, &kept.digest).await.unwrap();

        let Some(folder) = folder else { continue };
        let path = folder.path().join(format!("objects/evaluations/{}.parquet", kept.digest));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(store.get_object(kept.table, &kept.digest).await, Err(StoreError::Corrupt { .. })));
        assert!(store.check().await.unwrap().findings[0].problem.contains("corrupt"));
        std::fs::remove_file(&path).unwrap();
        assert!(store.check().await.unwrap().findings[0].problem.contains("missing"));
        let torn = folder.path().join("commits/fetch");
        std::fs::create_dir_all(&torn).unwrap();
        std::fs::write(torn.join(format!("{}.json", kept.digest)), "{").unwrap();
        assert_eq!(store.check().await.unwrap().findings.len(), 2);
        assert!(store.sweep(Duration::ZERO, false).await.is_err());
    }
}

#[tokio::test]
async fn models_keep_their_files_and_roles_their_history() {
    for Place { store, .. } in places().await {
        let files = BTreeMap::from([
            ("config.json".to_owned(), b"{}".to_vec()),
            ("empty".to_owned(), vec![]),
            ("model.safetensors".to_owned(), vec![7; 1000]),
        ]);
        let model = store.put_model(&files).await.unwrap();
        assert_eq!(store.get_model(&model.digest).await.unwrap(), files);
        let set = |key: &'static str, reason: &'static str| {
            store.set_alias("filter", model.digest, "promote", reason, key, BTreeMap::new())
        };
        let first = set("run/1", "first").await.unwrap();
        assert_eq!(set("run/1", "again").await.unwrap(), first);
        assert_eq!(set("run/2", "second").await.unwrap().number, 2);
        assert_eq!(store.model_in_role("filter").await.unwrap().unwrap().reason, "second");
        assert!(store.model_in_role("captioner").await.unwrap().is_none());
        assert!(store.set_alias("judge", model.digest, "promote", "", "", BTreeMap::new()).await.is_err());
        let folder = tempfile::tempdir().unwrap();
        store.write_model(&model.digest, folder.path()).await.unwrap();
        assert_eq!(std::fs::read(folder.path().join("config.json")).unwrap(), b"{}");
        for name in capfilt_store::CHECKPOINT_FILES {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        std::fs::write(folder.path().join("tokenizer.json"), "").unwrap();
        let of_folder = store.put_files(folder.path(), capfilt_store::CHECKPOINT_FILES).await.unwrap();
        let named = |name: &&str| ((*name).to_owned(), if *name == "tokenizer.json" { vec![] } else { name.as_bytes().to_vec() });
        let files: BTreeMap<String, Vec<u8>> = capfilt_store::CHECKPOINT_FILES.iter().map(named).collect();
        assert_eq!(store.put_model(&files).await.unwrap(), of_folder);
        let note = |reason: &'static str| store.set_alias(IMPORTED, of_folder.digest, "import", reason, "", BTreeMap::new());
        assert_eq!(note("by hand").await.unwrap().role, "imported");
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        assert!(
            store
                .put_files(folder.path(), capfilt_store::CHECKPOINT_FILES)
                .await
                .unwrap_err()
                .to_string()
                .contains("config.json")
        );
        let evil = store.put_model(&BTreeMap::from([("../x".to_owned(), vec![1])])).await.unwrap();
        assert!(store.write_model(&evil.digest, folder.path()).await.is_err());
    }
}

#[tokio::test]
async fn failures_are_counted_and_forgotten() {
    for Place { store, .. } in places().await {
        let task = commit(3, vec![]).task;
        let run = RunId::new("r").unwrap();
        assert_eq!(store.record_failure(&run, &task, "first", true).await.unwrap(), 1);
        assert_eq!(store.record_failure(&run, &task, "second", false).await.unwrap(), 2);
        let all = store.failures(&task.id()).await.unwrap();
        assert_eq!(all.iter().map(|f| f.error.as_str()).collect::<Vec<_>>(), ["first", "second"]);
        store.forget_failures(&task.id()).await.unwrap();
        assert!(store.all_failures().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn wrong_columns_and_bad_addresses_are_refused() {
    let store = Store::open("memory:").await.unwrap();
    let mut w = ShardWriter::new(Table::Models).unwrap();
    assert!(matches!(w.write(&metrics(&[("a", 1.0)])), Err(StoreError::Schema { .. })));
    let not_parquet = store.put_object(Table::Models, bytes::Bytes::from_static(b"hello")).await.unwrap();
    assert!(matches!(store.read_whole(Table::Models, &not_parquet).await, Err(StoreError::Parquet { .. })));
    let there = Store::open("/proc/no/store/here").await.unwrap_err().to_string();
    assert!(there.contains("/proc/no/store/here"), "{there}");
    let s3 = Store::open("s3://bucket/x").await.unwrap_err().to_string();
    assert!(s3.contains("no backend"), "{s3}");
}

#[tokio::test]
async fn a_redacted_shard_is_read_as_its_replacement_wherever_the_sweep_stopped() {
    for Place { store, folder } in places().await {
        let rows = |names: &[&'static str]| names.iter().map(|n| (*n, 1.0)).collect::<Vec<_>>();
        let [whole, less, least] =
            [shard(&store, &rows(&["a", "b"])).await, shard(&store, &rows(&["a"])).await, shard(&store, &rows(&[])).await];
        store.commit(&commit(1, vec![whole.clone()])).await.unwrap();
        let redaction = |from: &Output, to: &Output, rows: Vec<u32>| Redaction {
            table: Table::Evaluations,
            from: from.digest,
            to: to.clone(),
            rows,
            takedowns: 1,
            made_at_ms: 0,
        };
        let read = async |store: &Store| store.read_whole(Table::Evaluations, &whole.digest).await.unwrap().num_rows();
        store.redact(&redaction(&whole, &less, vec![1])).await.unwrap();
        assert_eq!(read(&store).await, 1);
        // Killed between the record and the removal: the bytes are there, and nothing is wrong with that.
        assert_eq!(shard(&store, &rows(&["a", "b"])).await, whole);
        assert_eq!(read(&store).await, 2);
        let report = store.check().await.unwrap();
        assert!(report.is_sound() && report.unreferenced == 2, "{report:?}");
        store.redact(&redaction(&whole, &less, vec![1])).await.unwrap();
        assert_eq!(read(&store).await, 1);
        // The replacement can be replaced.
        store.redact(&redaction(&less, &least, vec![0])).await.unwrap();
        assert_eq!(read(&store).await, 0);
        let (place, bytes) = store.locate(Table::Evaluations, &whole.digest).await.unwrap();
        assert!(place.to_string().contains(&least.digest.to_string()) && bytes == least.bytes);
        let report = store.check().await.unwrap();
        assert!(report.is_sound() && (report.objects, report.unreferenced) == (1, 0), "{report:?}");
        assert_eq!(store.sweep(Duration::ZERO, false).await.unwrap().objects, 0);
        assert_eq!(store.redactions(Table::Evaluations).await.unwrap().len(), 2);
        // A replacement that is lost is missed.
        let Some(folder) = folder else { continue };
        std::fs::remove_file(folder.path().join(place.to_string())).unwrap();
        assert!(matches!(store.get_object(Table::Evaluations, &whole.digest).await, Err(StoreError::Missing { .. })));
        assert!(store.check().await.unwrap().findings[0].problem.contains("missing"));
    }
}

#[tokio::test]
async fn takedowns_and_retries_are_logs() {
    for Place { store, .. } in places().await {
        let mut targets = Targets::default();
        targets.add_line("example.org").unwrap();
        assert_eq!(store.take_down(&targets, Some("why")).await.unwrap().number, 1);
        assert_eq!(store.take_down(&targets, None).await.unwrap().reason.as_deref(), Some("why"));
        targets.add_line("http://a.b/c").unwrap();
        assert_eq!(store.take_down(&targets, None).await.unwrap().number, 2);
        let down = store.taken_down().await.unwrap();
        assert!(down.count() == 2 && down.covers_url("https://www.example.org/x") && down.covers_url("https://a.b/c"));
        let (run, settings) = (RunId::new("r").unwrap(), commit(1, vec![]).task_id);
        for number in 1..=2 {
            let made = store.ask_retry(&run, &BTreeSet::from([FetchStatus::Dns]), settings).await.unwrap();
            assert_eq!((made.number, made.name()), (number, format!("r/{number}")));
        }
        assert_eq!(store.retries(&run).await.unwrap().len(), 2);
        assert!(store.check().await.unwrap().is_sound());
    }
}

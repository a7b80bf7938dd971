//! Leaves a store as a run would, without any of the stages.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, Float32Array, Float32Builder, ListBuilder, RecordBatch, StringArray, StringBuilder, UInt16Array,
    UInt32Array, UInt32Builder, UInt64Array,
};
use arrow::datatypes::{DataType, Field};
use capfilt_coordinator::SqlConfig;
use capfilt_coordinator::build::{BuildConfig, BuildInputs, Triplet, build};
use capfilt_schemas::{
    Commit, DatasetRef, DatasetVersion, Digest, Input, Lineage, Output, RoundRecord, RoundResult, RunId, StageKind, StatusCounts,
    Table, Task, sample_id,
};
use capfilt_store::{ShardWriter, Store};
use serde_json::{Value, json};

/// A pair and what the models say about it.
#[derive(Clone)]
pub(crate) struct Pair {
    pub(crate) url: String,
    pub(crate) text: String,
    pub(crate) status: String,
    pub(crate) image: Option<Vec<u8>>,
    pub(crate) web_itm: f32,
    pub(crate) captions: Vec<(String, f32)>,
}

impl Pair {
    pub(crate) fn new(url: &str, text: &str, web_itm: f32) -> Self {
        let seed = u64::from_be_bytes(Digest::of(url.as_bytes()).as_bytes()[..8].try_into().unwrap());
        let (url, text) = (url.to_owned(), text.to_owned());
        Self { url, text, status: "ok".to_owned(), image: Some(jpeg(seed, 64)), web_itm, captions: vec![] }
    }

    pub(crate) fn failed(url: &str, text: &str, status: &str) -> Self {
        Self { status: status.to_owned(), image: None, ..Self::new(url, text, 0.0) }
    }

    pub(crate) fn caption(mut self, text: &str, itm: f32) -> Self {
        self.captions.push((text.to_owned(), itm));
        self
    }

    fn id(&self) -> String {
        sample_id(&self.url, &self.text)
    }

    fn ok(&self) -> bool {
        self.image.is_some()
    }
}

/// Bytes that begin like a JPEG file.
pub(crate) fn jpeg(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xff, 0xd8, 0xff];
    bytes.extend(seed.to_be_bytes());
    bytes.resize(length, 0);
    bytes
}

pub(crate) fn metrics(cider: f64, auroc: f64) -> BTreeMap<String, f64> {
    [("captioner/cider_d", cider), ("captioner/bleu_4", cider / 2.0), ("filter/auroc", auroc), ("filter/tr_at_10", 0.5)]
        .map(|(n, v)| (n.to_owned(), v))
        .into()
}

/// Writes down a run. Times are made up: a second a task.
pub(crate) struct Recorder {
    store: Store,
    run: RunId,
    clock: u64,
    /// The shards of each table.
    pub(crate) shards: BTreeMap<Table, Digest>,
    models: [Digest; 2],
}

impl Recorder {
    /// Discovers, balances and fetches `pairs`; captions and scores are written with the first round.
    pub(crate) async fn new(store: &Store, run: &str, pairs: Vec<Pair>) -> Self {
        let models = [Digest::of(b"captioner"), Digest::of(b"filter")];
        let run = RunId::new(run).unwrap();
        let mut this = Self { store: store.clone(), run, clock: 1_700_000_000_000, shards: BTreeMap::new(), models };
        let ok = pairs.iter().filter(|p| p.ok()).count() as u64;
        let mut statuses = StatusCounts::new();
        pairs.iter().for_each(|p| *statuses.entry(p.status.clone()).or_default() += 1);
        let selected = this.put(Table::Selected, pair_columns(&pairs, true)).await;
        // Twice as many candidates as were selected.
        let mut twice = pair_columns(&pairs, false);
        twice.iter_mut().for_each(|c| *c = arrow::compute::concat(&[&**c, &**c]).unwrap());
        let candidates = this.put(Table::Candidates, twice).await;
        let facts = json!({"pages": 40, "images_seen": 1200, "source": "crawl"});
        this.commit(StageKind::Discover, None, &[], vec![candidates.clone()], StatusCounts::new(), facts).await;
        this.commit(StageKind::Balance, None, &[candidates], vec![selected.clone()], StatusCounts::new(), Value::Null).await;
        let mut columns = pair_columns(&pairs, true);
        columns.extend(image_columns(&pairs));
        let samples = this.put(Table::Samples, columns).await;
        this.commit(StageKind::Fetch, None, &[selected], vec![samples.clone()], statuses, Value::Null).await;
        let worked: StatusCounts = [("ok".to_owned(), ok), ("no_image".to_owned(), pairs.len() as u64 - ok)].into();
        let captions = this.put(Table::Captions, caption_columns(&pairs)).await;
        this.commit(
            StageKind::Caption,
            Some(models[0]),
            std::slice::from_ref(&samples),
            vec![captions.clone()],
            worked.clone(),
            Value::Null,
        )
        .await;
        let scores = this.put(Table::Scores, score_columns(&pairs)).await;
        this.commit(StageKind::Score, Some(models[1]), &[samples, captions], vec![scores], worked, Value::Null).await;
        this
    }

    pub(crate) async fn start(&mut self, round: u32) {
        let record = RoundRecord { round, captioner: self.models[0], filter: self.models[1], started_at_ms: self.clock };
        self.store.start_round(&self.run, record).await.unwrap();
        self.store.log_event(&self.run, &format!("round {round} started")).await.unwrap();
    }

    /// Builds, and writes down what came of it.
    pub(crate) async fn round(
        &mut self,
        round: u32,
        config: &BuildConfig,
        metrics: BTreeMap<String, f64>,
        challenger_metrics: BTreeMap<String, f64>,
        promoted: &[&str],
    ) {
        self.start(round).await;
        let of = |table| self.shards[&table];
        let triplet = Triplet { samples: of(Table::Samples), captions: of(Table::Captions), scores: of(Table::Scores) };
        let rows = |output: &Digest, table| {
            let store = self.store.clone();
            let digest = *output;
            async move { store.read_whole(table, &digest).await.unwrap().num_rows() as u64 }
        };
        let inputs = BuildInputs {
            candidates: rows(&of(Table::Candidates), Table::Candidates).await,
            selected: rows(&of(Table::Selected), Table::Selected).await,
            triplets: vec![triplet],
            ..BuildInputs::default()
        };
        let made = build(&self.store, &SqlConfig::default(), config, inputs).await.unwrap();
        let settings = serde_json::to_value(config).unwrap();
        let tables = [Table::Samples, Table::Captions, Table::Scores];
        let inputs: Vec<Output> = tables.iter().map(|t| Output { table: *t, digest: of(*t), rows: 0, bytes: 0 }).collect();
        let task = Task {
            stage: StageKind::Build,
            stage_version: round,
            params: json!({ "settings": settings }),
            model: None,
            inputs: inputs.iter().map(Output::as_input).collect(),
        };
        let commit = self.commit_task(task, made.shards.clone(), made.counts.clone(), made.facts).await;
        let version = DatasetVersion {
            name: "pairs".to_owned(),
            version: 0,
            digest: DatasetVersion::digest_of(&made.shards),
            run: self.run.clone(),
            round,
            shards: made.shards,
            counts: made.counts,
            noise_ratio: made.noise_ratio,
            funnel: made.funnel,
            settings,
            takedowns: 0,
            lineage: Lineage {
                build: commit.task_id,
                inputs: commit.task.inputs.clone(),
                captioner: Some(self.models[0]),
                filter: Some(self.models[1]),
            },
            created_at_ms: self.clock,
        };
        let version = self.store.append_dataset(&version).await.unwrap();
        for role in promoted {
            let message = format!("round {round} promoted a new {role}");
            self.store.log_event(&self.run, &message).await.unwrap();
        }
        let dataset = DatasetRef { version: version.version, digest: version.digest };
        let promoted = promoted.iter().map(|r| (*r).to_owned()).collect();
        let (reasons, rests_on, finished_at_ms) = (BTreeMap::new(), vec![commit.task_id], self.clock);
        let result = RoundResult { round, dataset, metrics, challenger_metrics, promoted, reasons, rests_on, finished_at_ms };
        self.store.finish_round(&self.run, &result).await.unwrap();
    }

    async fn put(&mut self, table: Table, columns: Vec<ArrayRef>) -> Output {
        let mut shard = ShardWriter::new(table).unwrap();
        let stored: Vec<usize> = (0..columns.len()).collect();
        let schema = table.schema().project(&stored).unwrap();
        shard.write(&RecordBatch::try_new(Arc::new(schema), columns).unwrap()).unwrap();
        let output = shard.finish(&self.store).await.unwrap();
        self.shards.insert(table, output.digest);
        output
    }

    async fn commit(
        &mut self,
        stage: StageKind,
        model: Option<Digest>,
        inputs: &[Output],
        outputs: Vec<Output>,
        counts: StatusCounts,
        facts: Value,
    ) {
        let inputs: Vec<Input> = inputs.iter().map(Output::as_input).collect();
        let task = Task { stage, stage_version: 1, params: Value::Null, model, inputs };
        self.commit_task(task, outputs, counts, facts).await;
    }

    async fn commit_task(&mut self, task: Task, outputs: Vec<Output>, counts: StatusCounts, facts: Value) -> Commit {
        self.clock += 2000;
        let commit = Commit {
            task_id: task.id(),
            task,
            run: self.run.clone(),
            outputs,
            counts,
            facts,
            committed_at_ms: self.clock,
            elapsed_ms: 1000,
        };
        self.store.commit(&commit).await.unwrap();
        commit
    }
}

fn texts(values: impl Iterator<Item = String>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn numbers(lists: impl Iterator<Item = Vec<u32>>) -> ArrayRef {
    let mut list = ListBuilder::new(UInt32Builder::new()).with_field(Field::new("item", DataType::UInt32, false));
    lists.for_each(|l| list.append_value(l.into_iter().map(Some)));
    Arc::new(list.finish())
}

fn scores(lists: impl Iterator<Item = Vec<f32>>) -> ArrayRef {
    let mut list = ListBuilder::new(Float32Builder::new()).with_field(Field::new("item", DataType::Float32, false));
    lists.for_each(|l| list.append_value(l.into_iter().map(Some)));
    Arc::new(list.finish())
}

fn pair_columns(pairs: &[Pair], selected: bool) -> Vec<ArrayRef> {
    let mut columns = vec![
        texts(pairs.iter().map(Pair::id)),
        texts(pairs.iter().map(|p| p.url.clone())),
        texts(pairs.iter().map(|p| p.text.clone())),
        texts(pairs.iter().map(|_| "alt".to_owned())),
        texts(pairs.iter().map(|p| p.url.rsplit_once('/').map_or(String::new(), |u| u.0.to_owned()) + "/index.html")),
        texts(pairs.iter().map(|_| "crawl".to_owned())),
        Arc::new(StringArray::new_null(pairs.len())),
        numbers(pairs.iter().map(|_| vec![0])),
    ];
    if selected {
        columns.push(numbers(pairs.iter().map(|_| vec![0])));
    }
    columns
}

fn image_columns(pairs: &[Pair]) -> Vec<ArrayRef> {
    let hash = |p: &Pair| p.image.as_ref().map(|b| Digest::of(b));
    let side = |n: u32| -> ArrayRef { Arc::new(pairs.iter().map(|p| p.ok().then_some(n)).collect::<UInt32Array>()) };
    vec![
        texts(pairs.iter().map(|p| p.status.clone())),
        Arc::new(pairs.iter().map(|p| (!p.ok()).then_some("no luck")).collect::<StringArray>()),
        Arc::new(pairs.iter().map(|p| p.ok().then_some(200)).collect::<UInt16Array>()),
        Arc::new(pairs.iter().map(|p| p.image.as_deref()).collect::<BinaryArray>()),
        Arc::new(pairs.iter().map(|p| p.ok().then_some("jpeg")).collect::<StringArray>()),
        side(160),
        side(120),
        side(320),
        side(240),
        Arc::new(pairs.iter().map(|p| p.image.as_ref().map(|b| b.len() as u64)).collect::<UInt64Array>()),
        Arc::new(pairs.iter().map(|p| hash(p).map(|h| h.to_string())).collect::<StringArray>()),
        Arc::new(
            pairs.iter().map(|p| Some(u64::from_be_bytes(hash(p)?.as_bytes()[..8].try_into().ok()?))).collect::<UInt64Array>(),
        ),
    ]
}

fn status(pairs: &[Pair]) -> Vec<ArrayRef> {
    vec![
        texts(pairs.iter().map(Pair::id)),
        texts(pairs.iter().map(|p| if p.ok() { "ok" } else { "no_image" }.to_owned())),
        Arc::new(pairs.iter().map(|_| None::<&str>).collect::<StringArray>()),
    ]
}

fn caption_columns(pairs: &[Pair]) -> Vec<ArrayRef> {
    let mut list = ListBuilder::new(StringBuilder::new()).with_field(Field::new("item", DataType::Utf8, false));
    pairs.iter().for_each(|p| list.append_value(p.captions.iter().map(|(text, _)| Some(text))));
    let mut columns = status(pairs);
    columns.push(Arc::new(list.finish()));
    columns
}

fn score_columns(pairs: &[Pair]) -> Vec<ArrayRef> {
    let web =
        |by: f32| -> ArrayRef { Arc::new(pairs.iter().map(|p| p.ok().then_some(p.web_itm * by)).collect::<Float32Array>()) };
    let synthetic = |by: f32| scores(pairs.iter().map(|p| p.captions.iter().map(|(_, itm)| itm * by).collect()));
    let mut columns = status(pairs);
    columns.extend([web(1.0), web(0.5), synthetic(1.0), synthetic(0.5)]);
    columns
}

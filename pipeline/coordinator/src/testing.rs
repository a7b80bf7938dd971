//! Handmade shards for the tests of this crate.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, Float32Array, Float32Builder, ListBuilder, RecordBatch, StringArray, StringBuilder,
    UInt16Array, UInt32Array, UInt32Builder, UInt64Array,
};
use arrow::datatypes::{DataType, Field, Float32Type, UInt32Type};
use capfilt_schemas::{DatasetVersion, Digest, Input, Lineage, Output, RunId, Table, TaskId, column, sample_id};
use capfilt_store::{ShardWriter, Store};

use crate::SqlConfig;
use crate::build::{BuildInputs, Triplet, build};

/// A candidate.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) url: String,
    pub(crate) text: String,
    pub(crate) source: &'static str,
    pub(crate) page: String,
    pub(crate) queries: Vec<u32>,
}

impl Candidate {
    pub(crate) fn id(&self) -> String {
        sample_id(&self.url, &self.text)
    }
}

/// A row of `samples`; `image` is `None` for a failed download.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) url: String,
    pub(crate) text: String,
    pub(crate) image: Option<Image>,
    pub(crate) captions: Vec<&'static str>,
    pub(crate) web: (Option<f32>, Option<f32>),
    pub(crate) itm: Vec<f32>,
    pub(crate) itc: Vec<f32>,
    /// Of the web text and of the captions, if there is a CLIP model.
    pub(crate) clip: Option<(f32, Vec<f32>)>,
}

#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
    pub(crate) original: Vec<u8>,
    pub(crate) phash: Option<u64>,
    pub(crate) size: (u32, u32),
}

/// A row of `annotated`.
#[derive(Clone, Debug)]
pub(crate) struct Annotated {
    pub(crate) url: String,
    pub(crate) captions: Vec<&'static str>,
    pub(crate) image: Image,
}

/// An image known by `n`: its bytes and, far from those of others, its looks.
pub(crate) fn image(n: u64) -> Image {
    let phash = u64::from_be_bytes(Digest::of(&n.to_be_bytes()).as_bytes()[..8].try_into().unwrap());
    let mut bytes = vec![0xFF, 0xD8, 0xFF];
    bytes.extend(n.to_be_bytes());
    Image { original: bytes.clone(), bytes, phash: Some(phash), size: (100, 80) }
}

/// A sample with image `n`, a web text of ITM `itm` and no captions.
pub(crate) fn sample(n: u64, text: &str, itm: f32) -> Sample {
    Sample {
        url: format!("http://a/{n}.jpg"),
        text: text.to_owned(),
        image: Some(image(n)),
        captions: vec![],
        web: (Some(itm), Some(itm / 2.0)),
        itm: vec![],
        itc: vec![],
        clip: None,
    }
}

pub(crate) async fn candidates(store: &Store, rows: &[Candidate]) -> Digest {
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(rows.iter().map(Candidate::id))),
        texts(rows.iter().map(|r| r.url.as_str())),
        texts(rows.iter().map(|r| r.text.as_str())),
        texts(rows.iter().map(|r| r.source)),
        Arc::new(StringArray::from_iter(rows.iter().map(|r| (!r.page.is_empty()).then_some(r.page.as_str())))),
        texts(rows.iter().map(|_| "test")),
        // Any text will do.
        Arc::new(StringArray::from_iter(rows.iter().map(|r| (!r.page.is_empty()).then_some(r.page.as_str())))),
        numbers(rows.iter().map(|r| r.queries.clone())),
    ];
    write(store, Table::Candidates, columns).await
}

pub(crate) async fn triplet(store: &Store, rows: &[Sample]) -> Triplet {
    let ids: Vec<String> = rows.iter().map(|r| sample_id(&r.url, &r.text)).collect();
    let mut columns: Vec<ArrayRef> = vec![
        texts(ids.iter().map(String::as_str)),
        texts(rows.iter().map(|r| r.url.as_str())),
        texts(rows.iter().map(|r| r.text.as_str())),
        texts(rows.iter().map(|_| "alt")),
        Arc::new(StringArray::new_null(rows.len())),
        texts(rows.iter().map(|_| "test")),
        Arc::new(StringArray::new_null(rows.len())),
        numbers(rows.iter().map(|_| vec![0])),
        numbers(rows.iter().map(|_| vec![0])),
    ];
    columns.extend(images(&rows.iter().map(|r| r.image.as_ref()).collect::<Vec<_>>()));
    let samples = write(store, Table::Samples, columns).await;
    let state = |r: &Sample| if r.image.is_some() { "ok" } else { "no_image" };
    let none = || Arc::new(StringArray::from_iter(rows.iter().map(|_| None::<&str>))) as ArrayRef;
    let columns = vec![
        texts(ids.iter().map(String::as_str)),
        texts(rows.iter().map(state)),
        none(),
        lists(rows.iter().map(|r| r.captions.clone())),
    ];
    let captions = write(store, Table::Captions, columns).await;
    let columns = vec![
        texts(ids.iter().map(String::as_str)),
        texts(rows.iter().map(state)),
        none(),
        Arc::new(Float32Array::from_iter(rows.iter().map(|r| r.web.0))) as ArrayRef,
        Arc::new(Float32Array::from_iter(rows.iter().map(|r| r.web.1))) as ArrayRef,
        floats(rows.iter().map(|r| r.itm.clone())),
        floats(rows.iter().map(|r| r.itc.clone())),
        Arc::new(Float32Array::from_iter(rows.iter().map(|r| r.clip.as_ref().map(|c| c.0)))) as ArrayRef,
        maybe_floats(rows.iter().map(|r| r.clip.as_ref().map(|c| c.1.clone()))),
    ];
    let scores = write(store, Table::Scores, columns).await;
    Triplet { samples, captions, scores }
}

pub(crate) async fn annotated(store: &Store, rows: &[Annotated]) -> Digest {
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(rows.iter().map(|r| sample_id(&r.url, r.captions[0])))),
        texts(rows.iter().map(|r| r.url.as_str())),
        texts(rows.iter().map(|_| "people")),
        lists(rows.iter().map(|r| r.captions.clone())),
    ];
    columns.extend(images(&rows.iter().map(|r| Some(&r.image)).collect::<Vec<_>>()));
    write(store, Table::Annotated, columns).await
}

fn images(rows: &[Option<&Image>]) -> Vec<ArrayRef> {
    let ok = |r: &Option<&Image>| if r.is_some() { "ok" } else { "http_4xx" };
    let size = |side: fn(&Image) -> u32| Arc::new(UInt32Array::from_iter(rows.iter().map(|r| r.map(side)))) as ArrayRef;
    vec![
        texts(rows.iter().map(ok)),
        Arc::new(StringArray::from_iter(rows.iter().map(|_| None::<&str>))),
        Arc::new(UInt16Array::from_iter(rows.iter().map(|r| Some(if r.is_some() { 200 } else { 404 })))),
        Arc::new(BinaryArray::from_iter(rows.iter().map(|r| r.map(|i| &i.bytes)))),
        Arc::new(StringArray::from_iter(rows.iter().map(|r| r.map(|_| "jpeg")))),
        size(|i| i.size.0),
        size(|i| i.size.1),
        size(|i| i.size.0),
        size(|i| i.size.1),
        Arc::new(UInt64Array::from_iter(rows.iter().map(|r| r.map(|i| i.original.len() as u64)))),
        Arc::new(StringArray::from_iter(rows.iter().map(|r| r.map(|i| Digest::of(&i.original).to_string())))),
        Arc::new(UInt64Array::from_iter(rows.iter().map(|r| r.and_then(|i| i.phash)))),
    ]
}

fn texts<'a>(values: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn numbers(rows: impl Iterator<Item = Vec<u32>>) -> ArrayRef {
    let mut list = ListBuilder::new(UInt32Builder::new()).with_field(Arc::new(Field::new("item", DataType::UInt32, false)));
    rows.for_each(|r| list.append_value(r.into_iter().map(Some)));
    Arc::new(list.finish())
}

fn lists(rows: impl Iterator<Item = Vec<&'static str>>) -> ArrayRef {
    let mut list = ListBuilder::new(StringBuilder::new()).with_field(Arc::new(Field::new("item", DataType::Utf8, false)));
    rows.for_each(|r| list.append_value(r.into_iter().map(Some)));
    Arc::new(list.finish())
}

fn floats(rows: impl Iterator<Item = Vec<f32>>) -> ArrayRef {
    let mut list = ListBuilder::new(Float32Builder::new()).with_field(Arc::new(Field::new("item", DataType::Float32, false)));
    rows.for_each(|r| list.append_value(r.into_iter().map(Some)));
    Arc::new(list.finish())
}

fn maybe_floats(rows: impl Iterator<Item = Option<Vec<f32>>>) -> ArrayRef {
    let mut list = ListBuilder::new(Float32Builder::new()).with_field(Arc::new(Field::new("item", DataType::Float32, false)));
    rows.for_each(|r| list.append_option(r.map(|r| r.into_iter().map(Some))));
    Arc::new(list.finish())
}

async fn write(store: &Store, table: Table, columns: Vec<ArrayRef>) -> Digest {
    let mut shard = ShardWriter::new(table).unwrap();
    shard.write(&RecordBatch::try_new(table.schema(), columns).unwrap()).unwrap();
    shard.finish(store).await.unwrap().digest
}

/// A row of `selected`: sample id and `selected_for`.
pub(crate) async fn selected(store: &Store, shards: &[Output]) -> Vec<(String, Vec<u32>)> {
    let mut rows = Vec::new();
    for shard in shards {
        let batch = store.read_whole(Table::Selected, &shard.digest).await.unwrap();
        let (ids, takers) =
            (batch.column(0).as_string::<i32>(), batch.column_by_name(column::SELECTED_FOR).unwrap().as_list::<i32>());
        let takers = |i| takers.value(i).as_primitive::<UInt32Type>().values().to_vec();
        rows.extend((0..batch.num_rows()).map(|i| (ids.value(i).to_owned(), takers(i))));
    }
    rows
}

/// The same `samples` rows with other takers.
pub(crate) async fn selected_for(store: &Store, shard: &Digest, takers: impl Fn(usize) -> Vec<u32>) -> Digest {
    let rows = store.read_whole(Table::Samples, shard).await.unwrap();
    let mut columns = rows.columns().to_vec();
    columns[Table::Samples.schema().index_of(column::SELECTED_FOR).unwrap()] = numbers((0..rows.num_rows()).map(takers));
    write(store, Table::Samples, columns).await
}

/// A row of `dataset`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kept {
    pub(crate) id: String,
    pub(crate) text: String,
    pub(crate) origin: String,
    pub(crate) itm: Option<f32>,
    pub(crate) clip: Option<f32>,
    pub(crate) url: String,
    pub(crate) shard: String,
    pub(crate) row: u32,
}

pub(crate) async fn kept(store: &Store, shards: &[Output]) -> Vec<Kept> {
    let mut rows = Vec::new();
    for shard in shards {
        let b = store.read_whole(Table::Dataset, &shard.digest).await.unwrap();
        let text = |c: usize, i: usize| b.column(c).as_string::<i32>().value(i).to_owned();
        let itm = b.column(3).as_primitive::<Float32Type>();
        let clip = b.column(9).as_primitive::<Float32Type>();
        rows.extend((0..b.num_rows()).map(|i| Kept {
            id: text(0, i),
            text: text(1, i),
            origin: text(2, i),
            itm: itm.is_valid(i).then(|| itm.value(i)),
            clip: clip.is_valid(i).then(|| clip.value(i)),
            url: text(5, i),
            shard: text(7, i),
            row: b.column(8).as_primitive::<UInt32Type>().value(i),
        }));
    }
    rows
}

/// A store in a folder and one in memory.
pub(crate) async fn stores() -> (tempfile::TempDir, Vec<Store>) {
    let folder = tempfile::tempdir().unwrap();
    let file = Store::open(folder.path().to_str().unwrap()).await.unwrap();
    (folder, vec![file, Store::open("memory:").await.unwrap()])
}

/// Version `number` of the dataset `demo`, built from one shard each.
pub(crate) async fn version(
    store: &Store,
    number: u64,
    config: &crate::build::BuildConfig,
    samples: &[Sample],
    human: &[Annotated],
) -> DatasetVersion {
    let mut inputs = BuildInputs { triplets: vec![triplet(store, samples).await], ..BuildInputs::default() };
    inputs.annotated.push(annotated(store, human).await);
    let lineage = Lineage {
        build: TaskId(Digest::of(&number.to_be_bytes())),
        inputs: inputs.annotated.iter().map(|digest| Input { table: Table::Annotated, digest: *digest }).collect(),
        captioner: Some(Digest::of(b"captioner")),
        filter: Some(Digest::of(b"filter")),
    };
    let done = build(store, &SqlConfig { memory_mib: 64, ..SqlConfig::default() }, config, inputs).await.unwrap();
    DatasetVersion {
        name: "demo".to_owned(),
        version: number,
        digest: DatasetVersion::digest_of(&done.shards),
        run: RunId::new("test").unwrap(),
        round: 1,
        shards: done.shards,
        counts: done.counts,
        noise_ratio: done.noise_ratio,
        funnel: done.funnel,
        settings: serde_json::to_value(config).unwrap(),
        takedowns: 0,
        lineage,
        created_at_ms: number,
    }
}

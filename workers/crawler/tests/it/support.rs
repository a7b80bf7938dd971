//! Running one stage on one task.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, RecordBatch, StringArray, UInt32Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, UInt32Type};
use capfilt_crawler::{CrawlerWorkerConfig, Discover, DiscoverConfig, Matcher, QueryList, Web, WebConfig};
use capfilt_runtime::{Stage, StageError, Work};
use capfilt_schemas::{RunId, Table, Task, sample_id};
use capfilt_store::Store;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde_json::Value;

/// Short times, so that misbehaviour is over soon.
pub(crate) fn web() -> WebConfig {
    WebConfig { timeout: Duration::from_secs(1), retries: 1, backoff: Duration::from_millis(40), ..WebConfig::default() }
}

/// Every name leads to `address`, at full speed.
pub(crate) fn worker(address: std::net::SocketAddr) -> CrawlerWorkerConfig {
    CrawlerWorkerConfig {
        requests_per_second: 10_000.0,
        per_host: 64,
        resolve: [("*".to_owned(), address)].into(),
        ..CrawlerWorkerConfig::default()
    }
}

/// The discover stage for a query list.
pub(crate) fn discover_stage(route: &CrawlerWorkerConfig, queries: QueryList) -> Discover {
    let matcher = Arc::new(Matcher::new(&queries).unwrap());
    Discover::new(Web::new(route).unwrap(), matcher, Arc::new(queries))
}

/// What discovering makes of the first task of a config.
pub(crate) async fn discover(
    route: &CrawlerWorkerConfig,
    queries: QueryList,
    config: &DiscoverConfig,
) -> Result<(RecordBatch, Value), StageError> {
    config.check().unwrap();
    let params = config.params(&queries, "now").unwrap();
    run(&discover_stage(route, queries), &params[0], vec![]).await
}

/// What a stage makes of a task: its rows as one batch, and its facts.
pub(crate) async fn run(
    stage: &dyn Stage,
    params: &impl Serialize,
    input: Vec<RecordBatch>,
) -> Result<(RecordBatch, Value), StageError> {
    run_on(&Store::open("memory:").await.unwrap(), stage, params, input).await
}

/// The same with a store that holds something.
pub(crate) async fn run_on(
    store: &Store,
    stage: &dyn Stage,
    params: &impl Serialize,
    input: Vec<RecordBatch>,
) -> Result<(RecordBatch, Value), StageError> {
    run_in(tempfile::tempdir().unwrap().path(), store, stage, params, input).await
}

/// The same in a working folder that may have been used before.
pub(crate) async fn run_in(
    folder: &Path,
    store: &Store,
    stage: &dyn Stage,
    params: &impl Serialize,
    input: Vec<RecordBatch>,
) -> Result<(RecordBatch, Value), StageError> {
    let params = serde_json::to_value(params).unwrap();
    let task = Task { stage: stage.kind(), stage_version: 1, params, model: None, inputs: vec![] };
    let work = Work::new(task, store.clone(), RunId::new("test").unwrap(), folder);
    let facts = work.facts.clone();
    let rows = stage.process(work, stream::iter(input.into_iter().map(Ok)).boxed());
    let batches: Vec<RecordBatch> = rows.try_collect().await?;
    let whole = arrow::compute::concat_batches(&stage.kind().output().schema(), &batches)?;
    Ok((whole, facts.to_value()))
}

/// `selected` rows with these addresses, in batches of three.
pub(crate) fn selected(urls: &[String]) -> Vec<RecordBatch> {
    let texts = |values: Vec<String>| Arc::new(StringArray::from(values)) as ArrayRef;
    let batch = |urls: &[String]| {
        let n = urls.len();
        let ids = UInt32Array::from(vec![0; n]);
        let item = Arc::new(Field::new("item", DataType::UInt32, false));
        let list = Arc::new(ListArray::new(item, OffsetBuffer::from_lengths(vec![1; n]), Arc::new(ids), None)) as ArrayRef;
        let columns = vec![
            texts(urls.iter().map(|u| sample_id(u, "a cat")).collect()),
            texts(urls.to_vec()),
            texts(vec!["a cat".to_owned(); n]),
            texts(vec!["alt".to_owned(); n]),
            Arc::new(StringArray::from(vec![None::<&str>; n])) as ArrayRef,
            texts(vec!["test".to_owned(); n]),
            Arc::new(StringArray::new_null(n)) as ArrayRef,
            Arc::clone(&list),
            list,
        ];
        RecordBatch::try_new(Table::Selected.schema(), columns).unwrap()
    };
    urls.chunks(3).map(batch).collect()
}

/// A text column; `-` where it is null.
pub(crate) fn texts(batch: &RecordBatch, name: &str) -> Vec<String> {
    let column = batch.column_by_name(name).unwrap().as_string::<i32>();
    (0..column.len()).map(|i| if column.is_null(i) { "-".to_owned() } else { column.value(i).to_owned() }).collect()
}

/// `url | text | what it is | page` of each candidate.
pub(crate) fn lines(rows: &RecordBatch) -> Vec<String> {
    let columns = ["url", "text", "text_source", "page_url"].map(|name| texts(rows, name));
    (0..rows.num_rows()).map(|i| columns.iter().map(|c| c[i].as_str()).collect::<Vec<_>>().join(" | ")).collect()
}

/// The same with the numbers of its queries: `… | [0, 2]`.
pub(crate) fn matched_lines(rows: &RecordBatch) -> Vec<String> {
    let queries = rows.column_by_name("queries").unwrap().as_list::<i32>();
    let ids = |i: usize| queries.value(i).as_primitive::<UInt32Type>().values().to_vec();
    lines(rows).into_iter().enumerate().map(|(i, line)| format!("{line} | {:?}", ids(i))).collect()
}

/// These bytes, gzipped.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// A small PNG of its own for each number.
pub(crate) fn png(number: u8) -> Vec<u8> {
    let image = image::RgbImage::from_fn(64, 48, |x, y| image::Rgb([number, (x * 3) as u8, (y * 5) as u8]));
    let mut out = std::io::Cursor::new(Vec::new());
    image.write_to(&mut out, image::ImageFormat::Png).unwrap();
    out.into_inner()
}

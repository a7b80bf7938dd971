//! Images fetched a second and core from a server on loopback: request, decode, resize to 256, encode, hash.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Cursor;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, RecordBatch, StringArray, new_null_array};
use arrow::datatypes::{DataType, UInt32Type};
use axum::http::Uri;
use capfilt_crawler::{CrawlerWorkerConfig, Fetch, FetchConfig, ImageConfig, Web};
use capfilt_runtime::{Stage, Work};
use capfilt_schemas::{RunId, StageKind, Table, Task, sample_id};
use capfilt_store::Store;
use capfilt_tests::{Figures, cpu_seconds};
use futures::{StreamExt, TryStreamExt, stream};
use image::{ImageFormat, Rgb, RgbImage};

/// Different pictures, requests of one measurement, and measurements.
const PICTURES: u32 = 24;
const REQUESTS: usize = 400;
const ROUNDS: usize = 3;

/// A picture of about two megapixels with smooth parts and texture, as a JPEG.
fn picture(n: u32) -> Vec<u8> {
    let image = RgbImage::from_fn(1600, 1200, |x, y| {
        let wave = |k: u32| ((x * k + y * (n + 3)) / 16 % 200) as u8;
        let grain = ((x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503 + n)) >> 27) as u8;
        Rgb([wave(1).wrapping_add(grain), wave(2) / 2 + 40, (y / 6) as u8])
    });
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Jpeg).unwrap();
    bytes.into_inner()
}

/// Rows of `selected`.
fn selected(urls: &[String]) -> RecordBatch {
    let text = |f: &dyn Fn(&String) -> String| Arc::new(urls.iter().map(|u| Some(f(u))).collect::<StringArray>()) as ArrayRef;
    let schema = Table::Selected.schema();
    let queries = || {
        let list = ListArray::from_iter_primitive::<UInt32Type, _, _>(urls.iter().map(|_| Some(vec![Some(0)])));
        arrow::compute::cast(&list, schema.field(6).data_type()).unwrap()
    };
    let columns = vec![
        text(&|u| sample_id(u, "a picture")),
        text(&Clone::clone),
        text(&|_| "a picture".to_owned()),
        text(&|_| "list".to_owned()),
        new_null_array(&DataType::Utf8, urls.len()),
        text(&|_| "bench".to_owned()),
        queries(),
        queries(),
    ];
    RecordBatch::try_new(schema, columns).unwrap()
}

#[tokio::main]
async fn main() {
    let pictures: Arc<Vec<Vec<u8>>> = Arc::new((0..PICTURES).map(picture).collect());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = axum::Router::new().fallback(move |uri: Uri| {
        let n = uri.path()[1..].parse::<usize>().ok();
        let body = n.map(|n| pictures[n % pictures.len()].clone());
        async move { body.ok_or(axum::http::StatusCode::NOT_FOUND) }
    });
    tokio::spawn(async move { axum::serve(listener, app).await });

    let worker = CrawlerWorkerConfig { per_host: 64, requests_per_second: 1e6, ..CrawlerWorkerConfig::default() };
    let stage = Fetch::new(Web::new(&worker).unwrap());
    let config = FetchConfig { image: ImageConfig { size: 256, ..ImageConfig::default() }, ..FetchConfig::default() };
    let work_dir = tempfile::tempdir().unwrap();
    let store = Store::open("memory:").await.unwrap();
    let mut ours = Vec::new();
    for round in 0..ROUNDS {
        let urls: Vec<String> = (0..REQUESTS).map(|i| format!("http://{address}/{}", round * REQUESTS + i)).collect();
        let params = serde_json::to_value(config.params("bench")).unwrap();
        let task = Task { stage: StageKind::Fetch, stage_version: 1, params, model: None, inputs: vec![] };
        let work = Work::new(task, store.clone(), RunId::new("bench").unwrap(), work_dir.path());
        let before = cpu_seconds();
        let rows: Vec<RecordBatch> =
            stage.process(work, stream::iter([Ok(selected(&urls))]).boxed()).try_collect().await.unwrap();
        let fetched: usize = rows.iter().map(RecordBatch::num_rows).sum();
        assert_eq!(fetched, REQUESTS);
        ours.push(REQUESTS as f64 / (cpu_seconds() - before));
    }
    Figures { name: "fetch", unit: "images/s/core (2 Mpixel JPEG to 256 px; the server's share included)", ours, peer: None }
        .report()
        .unwrap();
}

//! Rows rebuilt a second: join, deduplication, filter and mix of a build over samples, captions and scores.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Instant;

use capfilt_coordinator::SqlConfig;
use capfilt_coordinator::bench::rebuild_inputs;
use capfilt_coordinator::build::{BuildConfig, build};
use capfilt_store::Store;
use capfilt_tests::Figures;

/// Images of the made-up shards, bytes of each image's pixels, and measurements.
const IMAGES: u64 = 50_000;
const IMAGE_BYTES: usize = 1_000;
const ROUNDS: usize = 3;

#[tokio::main]
async fn main() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).await.unwrap();
    let mut ours = Vec::new();
    for _ in 0..ROUNDS {
        let inputs = rebuild_inputs(&store, IMAGES, IMAGE_BYTES).await.unwrap();
        let began = Instant::now();
        build(&store, &SqlConfig::default(), &BuildConfig::default(), inputs).await.unwrap();
        ours.push(IMAGES as f64 / began.elapsed().as_secs_f64());
    }
    Figures { name: "rebuild", unit: "images rebuilt/s (one web and two synthetic texts each)", ours, peer: None }
        .report()
        .unwrap();
}

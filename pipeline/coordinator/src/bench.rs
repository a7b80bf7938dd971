//! Made-up shards in the shape of real ones, for `make bench`.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, Float32Array, ListArray, RecordBatch, StringArray, UInt16Array, UInt32Array, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use capfilt_schemas::{Digest, FetchStatus, RowStatus, Table, TextSource, sample_id};
use capfilt_store::{ShardWriter, Store};

use crate::build::{BuildInputs, Triplet};
use crate::{Result, scan};

/// Rows of a shard, as [`BalanceConfig`](crate::balance::BalanceConfig) cuts them by default.
const SHARD_ROWS: u64 = 1000;

/// What a build of `images` web images reads: samples with `image_bytes` bytes of pixels each (which a build must not touch), one
/// web text and two captions for each, scores spread evenly over 0 to 1. Every tenth image has the bytes of the one before it.
/// [`build`](crate::build::build) of it, divided by the time it takes, is the figure "rows rebuilt per second".
///
/// # Errors
/// [`CoordinatorError::Store`](crate::CoordinatorError::Store).
pub async fn rebuild_inputs(store: &Store, images: u64, image_bytes: usize) -> Result<BuildInputs> {
    let mut triplets = Vec::new();
    let mut first = 0;
    while first < images {
        let rows: Vec<u64> = (first..images.min(first + SHARD_ROWS)).collect();
        first += SHARD_ROWS;
        triplets.push(Triplet {
            samples: put(store, Table::Samples, samples(&rows, image_bytes)).await?,
            captions: put(store, Table::Captions, captions(&rows)).await?,
            scores: put(store, Table::Scores, scores(&rows)).await?,
        });
    }
    Ok(BuildInputs { candidates: images, selected: images, triplets, ..BuildInputs::default() })
}

async fn put(store: &Store, table: Table, columns: Vec<ArrayRef>) -> Result<Digest> {
    let rows: RecordBatch = scan::batch("made-up rows", &table.schema(), columns)?;
    let mut shard = ShardWriter::new(table)?;
    shard.write(&rows)?;
    Ok(shard.finish(store).await?.digest)
}

/// A number that looks like chance and is always the same (the finaliser of `SplitMix64`).
const fn mix(n: u64) -> u64 {
    let n = (n ^ n >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ n >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ n >> 31
}

fn url(n: u64) -> String {
    format!("https://www.example.org/images/{:016x}.jpg", mix(n + 1))
}

fn text(n: u64, k: u64) -> String {
    const THINGS: [&str; 8] = ["dog", "mountain", "red bicycle", "harbour", "table with fruit", "child", "tower", "boat"];
    let of = |salt: u64| THINGS[(mix(n * 7 + k * 3 + salt) % 8) as usize];
    format!("a {} beside a {} and a {}, number {}", of(1), of(2), of(3), mix(n + k) % 10_000)
}

fn id(n: u64) -> String {
    sample_id(&url(n), &text(n, 0))
}

fn texts(rows: &[u64], make: impl Fn(u64) -> String) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(rows.iter().map(|n| make(*n))))
}

fn same(rows: &[u64], value: &str) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(rows.iter().map(|_| value)))
}

fn none(rows: &[u64]) -> ArrayRef {
    Arc::new(StringArray::new_null(rows.len()))
}

/// A list of `each` items in every row.
fn list(rows: &[u64], each: usize, kind: DataType, items: ArrayRef) -> ArrayRef {
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|_| each));
    Arc::new(ListArray::new(Arc::new(Field::new("item", kind, false)), offsets, items, None))
}

fn samples(rows: &[u64], image_bytes: usize) -> Vec<ArrayRef> {
    let query =
        || list(rows, 1, DataType::UInt32, Arc::new(UInt32Array::from_iter_values(rows.iter().map(|n| (n % 100) as u32))));
    let size = |pixels| Arc::new(UInt32Array::from_value(pixels, rows.len())) as ArrayRef;
    // Images with the same bytes look the same.
    let image = |n: u64| if n % 10 == 9 { n - 1 } else { n };
    let pixels = |n: u64| (0..image_bytes as u64 / 8).flat_map(|i| mix(image(n) << 20 | i).to_le_bytes()).collect::<Vec<u8>>();
    vec![
        texts(rows, id),
        texts(rows, url),
        texts(rows, |n| text(n, 0)),
        same(rows, TextSource::Alt.as_str()),
        none(rows),
        same(rows, "bench"),
        query(),
        query(),
        same(rows, FetchStatus::Ok.as_str()),
        none(rows),
        Arc::new(UInt16Array::from_value(200, rows.len())),
        Arc::new(BinaryArray::from_iter_values(rows.iter().map(|n| pixels(*n)))),
        same(rows, "jpeg"),
        size(384),
        size(512),
        size(768),
        size(1024),
        Arc::new(UInt64Array::from_value(200_000, rows.len())),
        texts(rows, |n| Digest::of(&image(n).to_le_bytes()).to_string()),
        Arc::new(UInt64Array::from_iter_values(rows.iter().map(|n| mix(image(*n) ^ 0x5EED)))),
    ]
}

fn captions(rows: &[u64]) -> Vec<ArrayRef> {
    let both = StringArray::from_iter_values(rows.iter().flat_map(|n| [text(*n, 1), text(*n, 2)]));
    vec![texts(rows, id), same(rows, RowStatus::Ok.as_str()), none(rows), list(rows, 2, DataType::Utf8, Arc::new(both))]
}

fn scores(rows: &[u64]) -> Vec<ArrayRef> {
    let score = |n: u64, k: u64| (mix(n * 4 + k) % 10_000) as f32 / 10_000.0;
    let web = |k: u64| Arc::new(Float32Array::from_iter_values(rows.iter().map(|n| score(*n, k)))) as ArrayRef;
    let both = |k: u64| {
        let items = Float32Array::from_iter_values(rows.iter().flat_map(|n| [score(*n, k), score(*n, k + 1)]));
        list(rows, 2, DataType::Float32, Arc::new(items))
    };
    vec![texts(rows, id), same(rows, RowStatus::Ok.as_str()), none(rows), web(0), web(1), both(2), both(4)]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::SqlConfig;
    use crate::build::{BuildConfig, Policy, build};

    #[tokio::test]
    async fn the_made_up_shards_can_be_built() {
        let store = Store::open("memory:").await.unwrap();
        let inputs = rebuild_inputs(&store, 2500, 64).await.unwrap();
        assert_eq!(inputs.triplets.len(), 3);
        let done = build(&store, &SqlConfig::default(), &BuildConfig::default(), inputs).await.unwrap();
        assert_eq!(done.facts["duplicates"]["exact"], 250);
        assert!((0.4..0.6).contains(&done.noise_ratio.unwrap()));
    }
    #[tokio::test(flavor = "multi_thread")]
    async fn little_memory_makes_a_build_spill_and_changes_nothing_else() {
        let store = Store::open("memory:").await.unwrap();
        let inputs = rebuild_inputs(&store, 12_000, 16).await.unwrap();
        let sql = |memory_mib| SqlConfig { memory_mib, partitions: 2, spill_folder: None };
        for policy in [Policy::Itm, Policy::Rank] {
            let config = BuildConfig { policy, ..BuildConfig::default() };
            let small = build(&store, &sql(32), &config, inputs.clone()).await.unwrap();
            assert_eq!(small, build(&store, &sql(2048), &config, inputs.clone()).await.unwrap());
        }
    }
}

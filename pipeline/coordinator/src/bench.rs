//! Made-up shards in the shape of real ones, for `make bench`.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, Float32Array, ListArray, RecordBatch, StringArray, UInt16Array, UInt32Array, UInt64Array,
    new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use capfilt_schemas::{Digest, FetchStatus, RowStatus, Table, TextSource, sample_id};
use capfilt_store::{ShardWriter, Store};
use futures::{StreamExt, TryStreamExt};

use crate::build::{BuildInputs, Triplet};
use crate::draw::mix;
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
        none(rows),
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
    // There is no CLIP.
    let schema = Table::Scores.schema();
    let clip = schema.fields().iter().skip(7).map(|field| new_null_array(field.data_type(), rows.len()));
    let filter = vec![texts(rows, id), same(rows, RowStatus::Ok.as_str()), none(rows), web(0), web(1), both(2), both(4)];
    filter.into_iter().chain(clip).collect()
}

/// Queries of the made-up list.
pub const QUERIES: u32 = 500_000;

/// Rows of a shard of candidates.
const CANDIDATES: u64 = 100_000;

/// `rows` made-up candidates as a crawl finds them: one to six queries for a text, 3.5 on average; queries as frequent as those of
/// `MetaCLIP` (arXiv 2309.16671: the first 16,000 of 500,000 hold 94.5 % of the matches, the first holds 1 %); addresses of some
/// 70 characters and texts of some 50, five to a page; one candidate in ten has the address of an earlier one, every second of these
/// with another text. The same rows every time.
///
/// # Errors
/// [`CoordinatorError::Store`](crate::CoordinatorError::Store).
pub async fn balance_inputs(store: &Store, rows: u64) -> Result<Vec<Digest>> {
    let shards = (0..rows.div_ceil(CANDIDATES)).map(|n| n * CANDIDATES..rows.min((n + 1) * CANDIDATES));
    let handle = tokio::runtime::Handle::current();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let made = futures::stream::iter(shards).map(|rows| {
        let (store, handle) = (store.clone(), handle.clone());
        #[expect(clippy::disallowed_methods, reason = "on a thread that runs no async code")]
        let shard = tokio::task::spawn_blocking(move || handle.block_on(put(&store, Table::Candidates, candidates(rows)?)));
        async move { shard.await.map_err(|e| crate::CoordinatorError::Task(e.to_string()))? }
    });
    made.buffered(threads).try_collect().await
}

fn candidates(rows: Range<u64>) -> Result<Vec<ArrayRef>> {
    let rows: Vec<Found> = rows.map(Found::new).collect();
    let column = |of: fn(&Found) -> &str| Arc::new(StringArray::from_iter_values(rows.iter().map(of))) as ArrayRef;
    let lists = OffsetBuffer::from_lengths(rows.iter().map(|f| f.queries.len()));
    let items = UInt32Array::from_iter_values(rows.iter().flat_map(|f| f.queries.iter().copied()));
    let queries = ListArray::try_new(Arc::new(Field::new("item", DataType::UInt32, false)), lists, Arc::new(items), None);
    Ok(vec![
        column(|f| &f.id),
        column(|f| &f.url),
        column(|f| &f.text),
        column(|f| f.text_source.as_str()),
        column(|f| &f.page),
        column(|_| "bench"),
        new_null_array(&DataType::Utf8, rows.len()),
        Arc::new(queries.map_err(|e| scan::encode("made-up candidates", e))?),
    ])
}

/// One candidate.
struct Found {
    id: String,
    url: String,
    text: String,
    text_source: TextSource,
    page: String,
    queries: Vec<u32>,
}

impl Found {
    fn new(n: u64) -> Self {
        // What looks like chance in row n.
        let chance = |n: u64, salt: u64| mix(mix(n) ^ salt.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let again = n > 0 && chance(n, 1).is_multiple_of(10);
        let image = if again { chance(n, 2) % n } else { n };
        let words = if again && chance(n, 3).is_multiple_of(2) { n } else { image };
        let host = |page: u64| (chance(page, 4) % 1000 * (chance(page, 5) % 1000)) as u32;
        let page = format!("https://www.site-{:06}.example.com/blog/{}/post-{:08x}.html", host(n / 5), n / 5 % 400, n / 5);
        let name = chance(image, 6);
        let url = format!(
            "https://img.site-{:06}.example.com/wp-content/uploads/20{:02}/{:02}/{name:016x}.jpg",
            host(image / 5),
            name % 25,
            name % 12 + 1
        );
        // Queries stand in the text as words: so a text says which queries it holds.
        let mut queries: Vec<u32> = (0..1 + chance(words, 7) % 6).map(|k| query(chance(words, 8 + k))).collect();
        queries.sort_unstable();
        queries.dedup();
        let mut text = String::from("a photo of");
        for q in &queries {
            text.push_str([" the ", " a ", " and ", " with "][(q % 4) as usize]);
            text.push_str(["lake", "stone", "winter", "garden", "copper", "paper", "summer", "harbour"][(q % 8) as usize]);
            text.push_str(&q.to_string());
        }
        let text_source = if chance(n, 20).is_multiple_of(5) { TextSource::Figcaption } else { TextSource::Alt };
        Self { id: sample_id(&url, &text), url, text, text_source, page, queries }
    }
}

/// A query for a number that looks like chance: the law of Zipf and Mandelbrot, frequency ~ (rank + 35)^-1.45, inverted.
fn query(chance: u64) -> u32 {
    const SHIFT: f64 = 36.0;
    const POWER: f64 = -0.45;
    let (first, last) = (SHIFT.powf(POWER), (SHIFT + f64::from(QUERIES)).powf(POWER));
    let share = chance as f64 / 2_f64.powi(64);
    let rank = (first - share * (first - last)).powf(1.0 / POWER) - SHIFT;
    (rank as u32).min(QUERIES - 1)
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

    #[tokio::test]
    async fn the_made_up_candidates_are_as_they_are_described() {
        use crate::balance::{BalanceConfig, balance};
        let store = Store::open("memory:").await.unwrap();
        let shards = balance_inputs(&store, 20_000).await.unwrap();
        let done = balance(&store, &SqlConfig::default(), &BalanceConfig::default(), &shards).await.unwrap();
        let fact = |name: &str| done.facts[name].as_u64().unwrap();
        assert_eq!(fact("matched"), 20_000);
        assert!((17_900..18_250).contains(&fact("unique")), "{}", done.facts);
        assert!((62_000..65_000).contains(&fact("matches")), "{}", done.facts);
        let share = (0..100_000).filter(|n| query(mix(*n)) < 16_000).count();
        assert!((94_000..95_500).contains(&share), "{share}");
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

//! Which images stay: decided on sizes and hashes, before any text is looked at.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef, UInt32Type, UInt64Type};
use capfilt_schemas::{Digest, FetchStatus, Table, column};
use capfilt_store::TakenDown;
use datafusion::common::ScalarValue;
use futures::TryStreamExt;

use super::Job;
use crate::dedup::HashIndex;
use crate::scan::{self, Map, RowSet, Scan, Slice};
use crate::{CoordinatorError, Result};

/// The images that stay, and how many each step left.
#[derive(Debug, Default)]
pub(super) struct Images {
    /// Rows of the `samples` shards.
    pub(super) web: Arc<RowSet>,
    /// Rows of the `annotated` shards.
    pub(super) annotated: Arc<RowSet>,
    /// Web rows by fetch status.
    pub(super) statuses: BTreeMap<String, u64>,
    /// Web images: downloaded.
    pub(super) fetched: u64,
    /// … and of the size asked for.
    pub(super) large: u64,
    /// … and no other has the same bytes.
    pub(super) unique: u64,
    /// … and no other looks the same.
    pub(super) distinct: u64,
    /// … and not in the held-out set.
    pub(super) kept: u64,
    /// Annotated images that stay.
    pub(super) human: u64,
    /// Annotated images dropped because they are in the held-out set.
    pub(super) human_heldout: u64,
}

/// Rows by fetch status, and how many of them are large enough.
const STATUSES: &str = "
    SELECT status, count(*) AS images,
           count(*) FILTER (WHERE original_width >= $min_width AND original_height >= $min_height) AS large
    FROM web
    GROUP BY status";

/// One image for each SHA-256, the one with the smallest sample id; in the order of sample ids.
const UNIQUE: &str = "
    SELECT part, row_no, sample_id, sha256, phash
    FROM (SELECT part, row_no, sample_id, sha256, phash,
                 row_number() OVER (PARTITION BY sha256 ORDER BY sample_id, part, row_no) AS nth
          FROM web
          WHERE status = 'ok' AND original_width >= $min_width AND original_height >= $min_height)
    WHERE nth = 1
    ORDER BY sample_id, part, row_no";

/// Columns that decide over an image; the address only if something was taken down.
const COLUMNS: &[&str] = &[
    column::SAMPLE_ID,
    column::STATUS,
    column::ORIGINAL_WIDTH,
    column::ORIGINAL_HEIGHT,
    column::SHA256,
    column::PHASH,
    column::URL,
];

/// Images known by their bytes and by their looks.
struct Known {
    bytes: HashSet<[u8; 32]>,
    looks: HashIndex,
}

impl Known {
    fn new(distance: u32) -> Self {
        Self { bytes: HashSet::new(), looks: HashIndex::new(distance) }
    }

    fn add(&mut self, sha256: [u8; 32], phash: Option<u64>) {
        self.bytes.insert(sha256);
        if let Some(hash) = phash {
            self.looks.add(hash);
        }
    }

    fn has(&self, sha256: &[u8; 32], phash: Option<u64>) -> bool {
        self.bytes.contains(sha256) || phash.is_some_and(|hash| self.looks.has_near(hash))
    }
}

impl Job<'_> {
    pub(super) async fn images(&self) -> Result<Images> {
        let distance = self.config.max_phash_distance;
        let mut images = Images::default();
        let mut heldout = Known::new(distance);
        self.annotated(&self.heldout, |_, _, _, sha256, phash| heldout.add(sha256, phash)).await?;
        // What people annotated comes first and so wins over the same image from the web.
        let (mut stay, mut human) = (Known::new(distance), RowSet::default());
        let mut seen = HashSet::new();
        self.annotated(&self.annotated, |part, row, id, sha256, phash| {
            if heldout.has(&sha256, phash) {
                images.human_heldout += 1;
            } else if seen.insert(id.to_owned()) {
                // Sets may overlap: an image that two of them have under one name counts once.
                stay.add(sha256, phash);
                human.insert(part, row);
                images.human += 1;
            }
        })
        .await?;
        images.annotated = Arc::new(human);
        self.register_web()?;
        self.count(&mut images).await?;
        self.choose(&mut images, &mut stay, &heldout).await?;
        Ok(images)
    }

    /// Hands on (part, row, sample id, SHA-256, perceptual hash) of every image in annotated shards.
    async fn annotated(&self, shards: &[Digest], mut take: impl FnMut(u32, u32, &str, [u8; 32], Option<u64>)) -> Result<()> {
        let scan = Scan::of(self.store, Table::Annotated, shards, self.columns());
        let mut slices = scan.clone().rows();
        while let Some(slice) = slices.try_next().await? {
            let rows = &slice.batches[0];
            let (ids, status) = (rows.column(0).as_string::<i32>(), rows.column(1).as_string::<i32>());
            let (sha256, phash) = (rows.column(4).as_string::<i32>(), rows.column(5).as_primitive::<UInt64Type>());
            for i in 0..rows.num_rows() {
                if status.value(i) == FetchStatus::Ok.as_str() && !is_down(&self.taken_down, rows, i) {
                    let text = scan::text_at(sha256, i, || scan.bad(0, slice.part, "has an image without SHA-256"))?;
                    let sha256 = parse_sha256(text).ok_or_else(|| scan.bad(0, slice.part, bad_sha256(text)))?;
                    take(slice.part, slice.rows.value(i), ids.value(i), sha256, phash.is_valid(i).then(|| phash.value(i)));
                }
            }
        }
        Ok(())
    }

    fn columns(&self) -> &'static [&'static str] {
        if self.taken_down.is_empty() { &COLUMNS[..COLUMNS.len() - 1] } else { COLUMNS }
    }

    fn register_web(&self) -> Result<()> {
        let schema = web_schema();
        let (columns, taken_down) = (Arc::clone(&schema), Arc::clone(&self.taken_down));
        let map: Map = Arc::new(move |_, slice| web_rows(slice, &taken_down, &columns));
        Scan::of(self.store, Table::Samples, &self.samples(), self.columns()).register(&self.sql, "web", &schema, &map)
    }

    fn sizes(&self) -> [(&'static str, ScalarValue); 2] {
        let size = |pixels| ScalarValue::UInt32(Some(pixels));
        [("min_width", size(self.config.min_width)), ("min_height", size(self.config.min_height))]
    }

    async fn count(&self, images: &mut Images) -> Result<()> {
        let mut found = self.sql.query("fetch statuses", STATUSES, &self.sizes()).await?;
        while let Some(batch) = found.next().await? {
            let status = batch.column(0).as_string::<i32>();
            let (all, large) = (batch.column(1).as_primitive::<Int64Type>(), batch.column(2).as_primitive::<Int64Type>());
            for i in 0..batch.num_rows() {
                let count = all.value(i).unsigned_abs();
                images.statuses.insert(status.value(i).to_owned(), count);
                if status.value(i) == FetchStatus::Ok.as_str() {
                    images.fetched = count;
                    images.large = large.value(i).unsigned_abs();
                }
            }
        }
        Ok(())
    }

    async fn choose(&self, images: &mut Images, stay: &mut Known, heldout: &Known) -> Result<()> {
        let samples = self.samples();
        let (mut kept, mut last) = (RowSet::default(), String::new());
        let mut found = self.sql.query("unique images", UNIQUE, &self.sizes()).await?;
        while let Some(batch) = found.next().await? {
            let (part, row) = (batch.column(0).as_primitive::<UInt32Type>(), batch.column(1).as_primitive::<UInt32Type>());
            let (id, sha256) = (batch.column(2).as_string::<i32>(), batch.column(3).as_string::<i32>());
            let phash = batch.column(4).as_primitive::<UInt64Type>();
            for i in 0..batch.num_rows() {
                let bad = |problem| {
                    let shard = samples[part.value(i) as usize];
                    CoordinatorError::Rows { table: Table::Samples, shard, problem }
                };
                let text = scan::text_at(sha256, i, || bad("has an image without SHA-256".to_owned()))?;
                let bytes = parse_sha256(text).ok_or_else(|| bad(bad_sha256(text)))?;
                let look = phash.is_valid(i).then(|| phash.value(i));
                // The same pair may have been fetched twice, with other bytes each time.
                if id.value(i) == last || stay.bytes.contains(&bytes) {
                    continue;
                }
                id.value(i).clone_into(&mut last);
                images.unique += 1;
                if self.config.perceptual && look.is_some_and(|hash| stay.looks.has_near(hash)) {
                    continue;
                }
                images.distinct += 1;
                // What is left out does not stand in the way of what looks like it.
                if heldout.has(&bytes, look) {
                    continue;
                }
                if let Some(hash) = look.filter(|_| self.config.perceptual) {
                    stay.looks.add(hash);
                }
                images.kept += 1;
                kept.insert(part.value(i), row.value(i));
            }
        }
        images.web = Arc::new(kept);
        Ok(())
    }
}

fn web_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("part", DataType::UInt32, false),
        Field::new("row_no", DataType::UInt32, false),
        Field::new(column::SAMPLE_ID, DataType::Utf8, false),
        Field::new(column::STATUS, DataType::Utf8, false),
        Field::new(column::ORIGINAL_WIDTH, DataType::UInt32, true),
        Field::new(column::ORIGINAL_HEIGHT, DataType::UInt32, true),
        Field::new(column::SHA256, DataType::Utf8, true),
        Field::new(column::PHASH, DataType::UInt64, true),
    ]))
}

fn web_rows(slice: &Slice, taken_down: &TakenDown, schema: &SchemaRef) -> Result<RecordBatch> {
    let rows = &slice.batches[0];
    let mut columns = vec![scan::part_column(slice), Arc::new(slice.rows.clone()) as _];
    // All but the address.
    columns.extend(rows.columns().iter().take(schema.fields().len() - 2).cloned());
    let down = |(i, status)| if is_down(taken_down, rows, i) { Some(FetchStatus::TakenDown.as_str()) } else { status };
    columns[3] = Arc::new(rows.column(1).as_string::<i32>().iter().enumerate().map(down).collect::<StringArray>());
    scan::batch("images", schema, columns)
}

/// Whether the image in row `i` of [`COLUMNS`] was taken down.
fn is_down(taken_down: &TakenDown, rows: &RecordBatch, i: usize) -> bool {
    if taken_down.is_empty() {
        return false;
    }
    let (sha256, url) = (rows.column(4).as_string::<i32>(), rows.column(6).as_string::<i32>());
    taken_down.covers(url.value(i), sha256.is_valid(i).then(|| sha256.value(i)))
}

fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    text.parse::<Digest>().ok().map(|d| *d.as_bytes())
}

fn bad_sha256(text: &str) -> String {
    format!("has `{text}` for a SHA-256")
}

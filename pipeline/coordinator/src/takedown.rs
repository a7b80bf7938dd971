//! What was taken down, in the tables: where it is, and how its bytes go.
//!
//! A takedown itself is a record, and changes no shard: builds, downloads and exports leave out what it covers. A sweep removes the bytes:
//! a shard that holds some is written again without them and named by a redaction, which every reader follows; then the shard goes.
//! Rows keep their number and sample id, so that captions, scores and old versions still stand beside them.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, ListArray, RecordBatch, Scalar, StringArray, new_empty_array, new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::kernels::zip::zip;
use arrow::compute::{filter_record_batch, not};
use arrow::datatypes::DataType;
use capfilt_schemas::{Commit, DatasetVersion, Digest, FetchStatus, REMOVED_URL, Redaction, RowStatus, StageKind, Table, column};
use capfilt_store::{ShardWriter, Store, TakenDown, now_ms};
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use crate::scan::{self, Trust};
use crate::{CoordinatorError, Result};

/// Shards looked through at the same time.
const AT_ONCE: usize = 8;
/// Rows looked through at a time.
const LOOK_ROWS: usize = 8192;
/// Rows written again at a time: they may hold images.
const WRITE_ROWS: usize = 32;

/// Shards and rows of one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reached {
    /// Shards with such rows.
    pub shards: u64,
    /// The rows.
    pub rows: u64,
}

/// A dataset version that holds what is taken down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReachedVersion {
    /// The dataset.
    pub dataset: String,
    /// The version.
    pub version: u64,
    /// Pairs of it that are covered.
    pub pairs: u64,
}

/// Where in a store what is taken down is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reach {
    /// Images from the web.
    pub samples: Reached,
    /// Images of annotated sets.
    pub annotated: Reached,
    /// Dataset versions.
    pub versions: Vec<ReachedVersion>,
    /// SHA-256 of those images, as the servers sent them.
    #[serde(skip)]
    pub sha256: BTreeSet<Digest>,
}

/// What a sweep emptied, or would empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Redacted {
    /// By table; those without such rows are absent.
    pub tables: BTreeMap<Table, Reached>,
    /// Bytes by which the shards are smaller now.
    pub bytes: u64,
}

/// Looks for the images that `down` covers. Columns of addresses and hashes are read, images are not.
///
/// # Errors
/// [`CoordinatorError::Store`] and [`CoordinatorError::Rows`] for a shard that is damaged.
pub async fn reach(store: &Store, down: &TakenDown) -> Result<Reach> {
    let mut reach = Reach::default();
    for table in [Table::Samples, Table::Annotated] {
        let mut found = covered(store, table, down, &unredacted(store, table).await?).boxed();
        while let Some(shard) = found.try_next().await? {
            let images = shard.sha256.len() as u64;
            reach.sha256.extend(shard.sha256);
            let reached = if table == Table::Samples { &mut reach.samples } else { &mut reach.annotated };
            reached.shards += u64::from(images > 0);
            reached.rows += images;
        }
    }
    let mut pairs: HashMap<Digest, u64> = HashMap::new();
    for name in store.dataset_names().await? {
        for version in store.dataset_versions(&name).await? {
            let mut covered = 0;
            for shard in &version.shards {
                covered += match pairs.entry(shard.digest) {
                    Entry::Occupied(known) => *known.get(),
                    Entry::Vacant(unknown) => {
                        let rows = rows_covered(store, Table::Dataset, &shard.digest, down).await?.rows;
                        *unknown.insert(rows.len() as u64)
                    }
                };
            }
            if covered > 0 {
                reach.versions.push(ReachedVersion { dataset: name.clone(), version: version.version, pairs: covered });
            }
        }
    }
    Ok(reach)
}

/// How many pairs of a version are left out since it was built: covered by `down`, or swept already.
///
/// # Errors
/// As [`reach`].
pub async fn left_out(store: &Store, version: &DatasetVersion, down: &TakenDown) -> Result<u64> {
    if down.is_empty() {
        return Ok(0);
    }
    let mut gone = 0;
    for shard in &version.shards {
        let here = rows_covered(store, Table::Dataset, &shard.digest, down).await?;
        gone += (shard.rows + here.rows.len() as u64).saturating_sub(here.of);
    }
    Ok(gone)
}

/// Removes from all shards what the takedowns of the store cover; with `dry_run` only counts. It may be killed and called again at any
/// point, and calling it twice is the same as once.
///
/// In `samples` and `annotated` the image, its hashes and sizes, the address and the texts go, in `candidates` and `selected` the address
/// and the texts (where the address or its host was taken down), in `captions` and `scores` what was said about the image; the rows stay.
/// Rows of `dataset` are left out.
///
/// # Errors
/// As [`reach`], and [`CoordinatorError::Store`] where a shard cannot be written.
pub async fn redact(store: &Store, dry_run: bool) -> Result<Redacted> {
    let down = store.taken_down().await?;
    let mut sweep = Sweep { store, down, dry_run, links: HashMap::new(), found: HashMap::new(), report: Redacted::default() };
    if sweep.down.is_empty() {
        return Ok(sweep.report);
    }
    for table in Table::ALL {
        for redaction in store.redactions(*table).await? {
            sweep.links.insert((*table, redaction.from), redaction);
        }
    }
    for table in [Table::Samples, Table::Annotated, Table::Candidates, Table::Selected, Table::Dataset] {
        sweep.covered(table).await?;
    }
    for stage in [StageKind::Caption, StageKind::Score] {
        for commit in store.commits(stage).await? {
            sweep.answers(&commit).await?;
        }
    }
    Ok(sweep.report)
}

struct Sweep<'a> {
    store: &'a Store,
    down: TakenDown,
    dry_run: bool,
    /// The redactions there were before.
    links: HashMap<(Table, Digest), Redaction>,
    /// The rows that this sweep found, by the shard that has them.
    found: HashMap<(Table, Digest), Vec<u32>>,
    report: Redacted,
}

impl Sweep<'_> {
    /// Empties the rows of a table that are covered by themselves.
    async fn covered(&mut self, table: Table) -> Result<()> {
        let mut shards = Vec::new();
        for (digest, _) in self.store.shards(table).await? {
            if !self.links.contains_key(&(table, digest)) {
                shards.push(digest);
            } else if !self.dry_run {
                // A sweep was killed before it came to this.
                self.store.remove_redacted(table, &digest).await?;
            }
        }
        let (store, down) = (self.store.clone(), self.down.clone());
        let mut found = covered(&store, table, &down, &shards).boxed();
        while let Some(shard) = found.try_next().await? {
            if !shard.rows.is_empty() {
                self.rewrite(table, shard.digest, shard.rows).await?;
            }
        }
        Ok(())
    }

    /// Empties what answers the emptied rows of a `samples` shard.
    async fn answers(&mut self, commit: &Commit) -> Result<()> {
        let Some(samples) = commit.task.inputs_of(Table::Samples).next() else { return Ok(()) };
        let emptied = self.emptied(Table::Samples, samples).1;
        let mut first = 0;
        for output in &commit.outputs {
            let last = first + u32::try_from(output.rows).unwrap_or(u32::MAX);
            let (end, done) = self.emptied(output.table, output.digest);
            let rows: Vec<u32> = emptied.range(first..last).map(|row| row - first).filter(|row| !done.contains(row)).collect();
            if !rows.is_empty() {
                self.rewrite(output.table, end, rows).await?;
            }
            first = last;
        }
        Ok(())
    }

    /// The shard that stands for one now, and all rows that were emptied on the way there.
    fn emptied(&self, table: Table, from: Digest) -> (Digest, BTreeSet<u32>) {
        let (mut at, mut rows) = (from, BTreeSet::new());
        for _ in 0..=self.links.len() {
            rows.extend(self.found.get(&(table, at)).into_iter().flatten());
            let Some(link) = self.links.get(&(table, at)) else { break };
            rows.extend(&link.rows);
            at = link.to.digest;
        }
        (at, rows)
    }

    async fn rewrite(&mut self, table: Table, from: Digest, rows: Vec<u32>) -> Result<()> {
        let n = rows.len() as u64;
        if !self.dry_run {
            let before = self.store.locate(table, &from).await?.1;
            let Some(redaction) = rewritten(self.store, table, from, &rows, self.down.count()).await? else { return Ok(()) };
            self.store.redact(&redaction).await?;
            self.report.bytes += before.saturating_sub(redaction.to.bytes);
        }
        let reached = self.report.tables.entry(table).or_default();
        reached.shards += 1;
        reached.rows += n;
        self.found.insert((table, from), rows);
        Ok(())
    }
}

/// Puts a shard without what is in some of its rows. `None` if there was nothing in them.
async fn rewritten(store: &Store, table: Table, from: Digest, rows: &[u32], takedowns: u64) -> Result<Option<Redaction>> {
    let batches = store.read_shard(table, &from, WRITE_ROWS).await?;
    let wanted: BTreeSet<u32> = rows.iter().copied().collect();
    let write = move || -> Result<ShardWriter> {
        let (mut shard, mut first) = (ShardWriter::new(table)?, 0_u32);
        for batch in batches {
            let batch = batch?;
            let last = first + u32::try_from(batch.num_rows()).unwrap_or(u32::MAX);
            if wanted.range(first..last).next().is_none() {
                shard.write(&batch)?;
            } else {
                let mask: BooleanArray = (first..last).map(|row| Some(wanted.contains(&row))).collect();
                let clean = if table == Table::Dataset {
                    not(&mask).and_then(|m| filter_record_batch(&batch, &m))
                } else {
                    emptied(&batch, &mask)
                };
                shard.write(&clean.map_err(|e| scan::encode("a shard without what was taken down", e))?)?;
            }
            first = last;
        }
        Ok(shard)
    };
    let shard = tokio::task::spawn_blocking(write).await;
    let shard = shard.map_err(|e| CoordinatorError::Task(format!("writing a shard failed: {e}")))??;
    let to = shard.finish(store).await?;
    let redaction = Redaction { table, from, to, rows: rows.to_vec(), takedowns, made_at_ms: now_ms() };
    Ok((redaction.to.digest != from).then_some(redaction))
}

/// `batch` with nothing left in some rows but what keeps them in their place: the sample id, the source, and a status.
fn emptied(batch: &RecordBatch, rows: &BooleanArray) -> std::result::Result<RecordBatch, arrow::error::ArrowError> {
    let schema = batch.schema();
    // Tables with an address hold images, or are about to; others say something about one.
    let status = match schema.column_with_name(column::URL) {
        Some(_) => FetchStatus::TakenDown.as_str(),
        None => RowStatus::NoImage.as_str(),
    };
    let text = |value: &str| Arc::new(StringArray::from(vec![value])) as ArrayRef;
    let mut columns = Vec::with_capacity(batch.num_columns());
    for (field, values) in schema.fields().iter().zip(batch.columns()) {
        let nothing = match (field.name().as_str(), field.data_type()) {
            (column::SAMPLE_ID | column::SOURCE | column::TEXT_SOURCE, _) => {
                columns.push(Arc::clone(values));
                continue;
            }
            (column::URL, _) => text(REMOVED_URL),
            (column::STATUS, _) => text(status),
            (_, kind) if field.is_nullable() => new_null_array(kind, 1),
            (_, DataType::List(item)) => {
                let none = new_empty_array(item.data_type());
                Arc::new(ListArray::new(Arc::clone(item), OffsetBuffer::from_lengths([0]), none, None))
            }
            _ => text(""),
        };
        columns.push(zip(rows, &Scalar::new(nothing), values)?);
    }
    RecordBatch::try_new(schema, columns)
}

/// The rows of a shard that are covered.
struct Covered {
    digest: Digest,
    rows: Vec<u32>,
    /// Of those with an image, its SHA-256.
    sha256: Vec<Digest>,
    /// All rows of the shard.
    of: u64,
}

fn covered<'a>(
    store: &'a Store,
    table: Table,
    down: &'a TakenDown,
    shards: &[Digest],
) -> impl stream::Stream<Item = Result<Covered>> + Send + 'a {
    let look = move |digest: Digest| async move { rows_covered(store, table, &digest, down).await };
    stream::iter(shards.to_vec()).map(look).buffered(AT_ONCE)
}

async fn rows_covered(store: &Store, table: Table, digest: &Digest, down: &TakenDown) -> Result<Covered> {
    let columns: &[&str] = match table {
        Table::Candidates | Table::Selected => &[column::URL],
        _ => &[column::URL, column::SHA256],
    };
    let mut batches = scan::open(store, table, digest, columns, Trust::Ranges, LOOK_ROWS).await?;
    let mut found = Covered { digest: *digest, rows: Vec::new(), sha256: Vec::new(), of: 0 };
    while let Some(batch) = batches.try_next().await? {
        let url = batch.column(0).as_string::<i32>();
        let sha256 = batch.columns().get(1).map(|c| c.as_string::<i32>());
        for i in 0..batch.num_rows() {
            let sha256 = sha256.filter(|s| s.is_valid(i)).map(|s| s.value(i));
            if url.value(i) != REMOVED_URL && down.covers(url.value(i), sha256) {
                found.rows.push(u32::try_from(found.of + i as u64).unwrap_or(u32::MAX));
                found.sha256.extend(sha256.and_then(|s| s.parse::<Digest>().ok()));
            }
        }
        found.of += batch.num_rows() as u64;
    }
    Ok(found)
}

/// The shards of a table for which no other stands.
async fn unredacted(store: &Store, table: Table) -> Result<Vec<Digest>> {
    let redacted: BTreeSet<Digest> = store.redactions(table).await?.into_iter().map(|r| r.from).collect();
    let there = store.shards(table).await?;
    Ok(there.into_iter().map(|(digest, _)| digest).filter(|d| !redacted.contains(d)).collect())
}

#[cfg(test)]
mod tests;

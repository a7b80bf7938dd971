//! Reading some columns of some shards, row by row beside each other where several shards describe the same rows.
//!
//! How bytes are trusted: a shard without images is fetched whole and held against its digest. A shard with images (`samples`,
//! `annotated`) is read by column ranges, because a build must not move terabytes of pixels to look at hashes and texts; damage
//! there shows as unreadable Parquet or as rows that do not answer the rows of the (verified) `captions` and `scores` beside them.
//! Whoever reads pixels ([`Trust::Digest`]) has the whole shard verified.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, StringArray, UInt32Array, new_null_array};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{FieldRef, Schema, SchemaRef};
use bytes::Bytes;
use capfilt_schemas::{Digest, Table};
use capfilt_store::{Store, StoreError};
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use futures::{FutureExt, TryFutureExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use crate::sql::{MakeStream, Sql};
use crate::{CoordinatorError, Result};

/// Rows that are read, zipped and handed on at once.
const BATCH_ROWS: usize = 512;

/// How a shard's bytes are held against its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Trust {
    /// The whole shard is fetched and verified.
    Digest,
    /// Only the columns' ranges are fetched.
    Ranges,
}

impl Trust {
    /// What is due to a table: see the module's text.
    const fn of(table: Table) -> Self {
        match table {
            Table::Samples | Table::Annotated => Self::Ranges,
            _ => Self::Digest,
        }
    }
}

/// Shards of one table, and the columns wanted of them.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) table: Table,
    pub(crate) shards: Vec<Digest>,
    pub(crate) columns: &'static [&'static str],
}

/// Row-aligned shards: part p is shard p of every source, and row i of each describes the same thing. With several sources the
/// first column of each must be the sample id, which is compared.
#[derive(Clone, Debug)]
pub(crate) struct Scan {
    pub(crate) store: Store,
    pub(crate) sources: Vec<Source>,
    /// The rows wanted; all if `None`.
    pub(crate) only: Option<Arc<RowSet>>,
}

/// Some rows of one part.
pub(crate) struct Slice {
    /// The part.
    pub(crate) part: u32,
    /// The rows' numbers in their shard.
    pub(crate) rows: UInt32Array,
    /// The wanted columns, a batch a source.
    pub(crate) batches: Vec<RecordBatch>,
}

/// Turns rows as they are stored into rows of a SQL table.
pub(crate) type Map = Arc<dyn Fn(&Scan, &Slice) -> Result<RecordBatch> + Send + Sync>;

impl Scan {
    /// A scan of every row of one table's shards.
    pub(crate) fn of(store: &Store, table: Table, shards: &[Digest], columns: &'static [&'static str]) -> Self {
        Self { store: store.clone(), sources: vec![Source { table, shards: shards.to_vec(), columns }], only: None }
    }

    /// The rows of all parts, part by part.
    pub(crate) fn rows(self) -> BoxStream<'static, Result<Slice>> {
        let parts = self.parts();
        let scan = Arc::new(self);
        stream::iter(parts).then(move |part| Arc::clone(&scan).part(part)).try_flatten().boxed()
    }

    /// Makes the rows known to `sql` as the table `name`, after `map`.
    pub(crate) fn register(self, sql: &Sql, name: &'static str, schema: &SchemaRef, map: &Map) -> Result<()> {
        let count = sql.partitions();
        let scan = Arc::new(self);
        let partitions = (0..count).map(|first| {
            let (scan, map) = (Arc::clone(&scan), Arc::clone(map));
            let make = move || {
                let parts: Vec<u32> = scan.parts().skip(first).step_by(count).collect();
                let (scan, map) = (Arc::clone(&scan), Arc::clone(&map));
                let opened = Arc::clone(&scan);
                stream::iter(parts)
                    .then(move |part| Arc::clone(&opened).part(part))
                    .try_flatten()
                    .map(move |slice| map(&scan, &slice?))
                    .boxed()
            };
            Arc::new(make) as MakeStream
        });
        sql.register(name, schema, partitions.collect())
    }

    fn parts(&self) -> Range<u32> {
        0..u32::try_from(self.sources.first().map_or(0, |s| s.shards.len())).unwrap_or(u32::MAX)
    }

    async fn part(self: Arc<Self>, part: u32) -> Result<BoxStream<'static, Result<Slice>>> {
        let mut readers = Vec::with_capacity(self.sources.len());
        for s in &self.sources {
            let rows = open(&self.store, s.table, &s.shards[part as usize], s.columns, Trust::of(s.table), BATCH_ROWS).await?;
            readers.push(Reader { rows, pending: RecordBatch::new_empty(Arc::new(Schema::empty())) });
        }
        let zip = Zip { scan: self, part, readers, row: 0 };
        let slices = stream::try_unfold(zip, |mut zip| async move { Ok(zip.next().await?.map(|slice| (slice, zip))) });
        Ok(slices.try_filter(|s| futures::future::ready(!s.rows.is_empty())).boxed())
    }

    /// An error about a row of a source.
    pub(crate) fn bad(&self, source: usize, part: u32, problem: impl Into<String>) -> CoordinatorError {
        let s = &self.sources[source];
        CoordinatorError::Rows { table: s.table, shard: s.shards[part as usize], problem: problem.into() }
    }
}

struct Reader {
    rows: BoxStream<'static, Result<RecordBatch>>,
    pending: RecordBatch,
}

struct Zip {
    scan: Arc<Scan>,
    part: u32,
    readers: Vec<Reader>,
    row: u32,
}

impl Zip {
    /// As many rows as every source has at hand: row groups may be cut differently in each.
    async fn next(&mut self) -> Result<Option<Slice>> {
        for reader in &mut self.readers {
            while reader.pending.num_rows() == 0 {
                match reader.rows.next().await {
                    Some(batch) => reader.pending = batch?,
                    None => break,
                }
            }
        }
        let ready = self.readers.iter().map(|r| r.pending.num_rows());
        let n = ready.clone().min().unwrap_or(0);
        if n == 0 {
            return match ready.clone().position(|rows| rows > 0) {
                None => Ok(None),
                Some(longer) => {
                    let shorter = ready.clone().position(|rows| rows == 0).unwrap_or(0);
                    let other = &self.scan.sources[longer];
                    let problem = format!(
                        "ends at row {} while the {} shard {} goes on",
                        self.row, other.table, other.shards[self.part as usize]
                    );
                    Err(self.scan.bad(shorter, self.part, problem))
                }
            };
        }
        let mut batches = Vec::with_capacity(self.readers.len());
        for reader in &mut self.readers {
            batches.push(reader.pending.slice(0, n));
            reader.pending = reader.pending.slice(n, reader.pending.num_rows() - n);
        }
        self.same_samples(&batches)?;
        let first = self.row;
        self.row = u32::try_from(n)
            .ok()
            .and_then(|n| first.checked_add(n))
            .ok_or_else(|| self.scan.bad(0, self.part, format!("has more than {} rows", u32::MAX)))?;
        let rows = UInt32Array::from_iter_values(first..self.row);
        let slice = Slice { part: self.part, rows, batches };
        match &self.scan.only {
            None => Ok(Some(slice)),
            Some(wanted) => wanted.filter(&slice).map(Some).map_err(|e| encode("filtered rows", e)),
        }
    }

    fn same_samples(&self, batches: &[RecordBatch]) -> Result<()> {
        let Some((first, others)) = batches.split_first() else { return Ok(()) };
        for (i, other) in others.iter().enumerate() {
            let (a, b) = (first.column(0).as_string::<i32>(), other.column(0).as_string::<i32>());
            if a != b {
                let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0);
                let main = &self.scan.sources[0];
                let problem = format!(
                    "does not answer the {} shard {}: row {} is about sample {}, not {}",
                    main.table,
                    main.shards[self.part as usize],
                    self.row as usize + at,
                    b.value(at),
                    a.value(at)
                );
                return Err(self.scan.bad(i + 1, self.part, problem));
            }
        }
        Ok(())
    }
}

/// A set of (part, row): a bit a row.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowSet {
    parts: Vec<Vec<u64>>,
}

impl RowSet {
    pub(crate) fn insert(&mut self, part: u32, row: u32) {
        let (part, word) = (part as usize, row as usize / 64);
        if self.parts.len() <= part {
            self.parts.resize_with(part + 1, Vec::new);
        }
        if self.parts[part].len() <= word {
            self.parts[part].resize(word + 1, 0);
        }
        self.parts[part][word] |= 1 << (row % 64);
    }

    pub(crate) fn len(&self) -> u64 {
        self.parts.iter().flatten().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(crate) fn contains(&self, part: u32, row: u32) -> bool {
        self.parts.get(part as usize).and_then(|p| p.get(row as usize / 64)).is_some_and(|word| word >> (row % 64) & 1 == 1)
    }

    fn filter(&self, slice: &Slice) -> std::result::Result<Slice, arrow::error::ArrowError> {
        let wanted: BooleanArray = slice.rows.values().iter().map(|row| Some(self.contains(slice.part, *row))).collect();
        let rows = arrow::compute::filter(&slice.rows, &wanted)?.as_primitive().clone();
        let batches = slice.batches.iter().map(|b| filter_record_batch(b, &wanted)).collect::<std::result::Result<_, _>>()?;
        Ok(Slice { part: slice.part, rows, batches })
    }
}

impl FromIterator<(u32, u32)> for RowSet {
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(rows: I) -> Self {
        let mut set = Self::default();
        rows.into_iter().for_each(|(part, row)| set.insert(part, row));
        set
    }
}

/// The wanted columns of one shard, in the order wanted, in batches of at most `batch_rows`.
pub(crate) async fn open(
    store: &Store,
    table: Table,
    digest: &Digest,
    columns: &[&str],
    trust: Trust,
    batch_rows: usize,
) -> Result<BoxStream<'static, Result<RecordBatch>>> {
    let digest = *digest;
    let fail = move |e: ParquetError| match e {
        // What the object store said travels through the Parquet reader as it is.
        ParquetError::External(cause) => match cause.downcast::<StoreError>() {
            Ok(ours) => CoordinatorError::Store(*ours),
            Err(cause) => parquet_error(table, &digest, ParquetError::External(cause)),
        },
        other => parquet_error(table, &digest, other),
    };
    let file = match trust {
        Trust::Digest => ShardFile::Whole(store.get_object(table, &digest).await?),
        Trust::Ranges => ShardFile::ranged(store, table, &digest).await?,
    };
    let builder = ParquetRecordBatchStreamBuilder::new(file).await.map_err(fail)?;
    let schema = table.schema();
    let mut places = Vec::with_capacity(columns.len());
    let mut fields = Vec::with_capacity(columns.len());
    for name in columns {
        let wanted = schema.field_with_name(name).ok();
        fields.extend(wanted.cloned());
        match builder.schema().column_with_name(name) {
            Some((place, field)) if wanted.is_some_and(|w| w.data_type() == field.data_type()) => places.push(Some(place)),
            None if table.optional().contains(name) => places.push(None),
            _ => return Err(CoordinatorError::Rows { table, shard: digest, problem: format!("has no proper column `{name}`") }),
        }
    }
    let mut sorted: Vec<usize> = places.iter().flatten().copied().collect();
    let mask = ProjectionMask::roots(builder.parquet_schema(), sorted.iter().copied());
    let rows = builder.with_projection(mask).with_batch_size(batch_rows).build().map_err(fail)?;
    // Parquet hands columns out in the order of the file.
    sorted.sort_unstable();
    let order: Vec<Option<usize>> = places.iter().map(|p| sorted.iter().position(|s| Some(*s) == *p)).collect();
    let schema: SchemaRef = Arc::new(Schema::new(fields));
    let batches = rows.map(move |batch| {
        let batch = batch.map_err(fail)?;
        let column = |(place, field): (&Option<usize>, &FieldRef)| match place {
            Some(place) => Arc::clone(batch.column(*place)),
            None => new_null_array(field.data_type(), batch.num_rows()),
        };
        let columns = order.iter().zip(schema.fields()).map(column).collect();
        RecordBatch::try_new(Arc::clone(&schema), columns).map_err(|e| parquet_error(table, &digest, e.into()))
    });
    Ok(batches.boxed())
}

fn parquet_error(table: Table, digest: &Digest, source: ParquetError) -> CoordinatorError {
    StoreError::Parquet { table, what: digest.to_string(), source }.into()
}

/// Anything that Arrow says about rows that we made ourselves.
pub(crate) fn encode(what: &str, e: arrow::error::ArrowError) -> CoordinatorError {
    CoordinatorError::Encode { what: what.to_owned(), source: Box::new(e) }
}

/// Rows of a SQL table from their columns.
pub(crate) fn batch(what: &str, schema: &SchemaRef, columns: Vec<ArrayRef>) -> Result<RecordBatch> {
    RecordBatch::try_new(Arc::clone(schema), columns).map_err(|e| encode(what, e))
}

/// The part number, once a row.
pub(crate) fn part_column(slice: &Slice) -> ArrayRef {
    Arc::new(UInt32Array::from_value(slice.part, slice.rows.len()))
}

/// The text in a row, or an error if there is none.
pub(crate) fn text_at(column: &StringArray, i: usize, missing: impl FnOnce() -> CoordinatorError) -> Result<&str> {
    if column.is_null(i) { Err(missing()) } else { Ok(column.value(i)) }
}

/// A shard as the Parquet reader wants it.
enum ShardFile {
    Whole(Bytes),
    Ranged { store: Arc<dyn ObjectStore>, path: Path, size: u64 },
}

impl ShardFile {
    async fn ranged(store: &Store, table: Table, digest: &Digest) -> Result<Self> {
        let (path, size) = store.locate(table, digest).await?;
        Ok(Self::Ranged { store: store.object_store(), path, size })
    }
}

/// The error of a range, as our own error within the reader's.
fn ranged_error(path: &Path, source: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(StoreError::Io { verb: "read", path: path.to_string(), source }))
}

impl AsyncFileReader for ShardFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, parquet::errors::Result<Bytes>> {
        match self {
            Self::Whole(bytes) => futures::future::ready(cut(bytes, &range)).boxed(),
            Self::Ranged { store, path, .. } => store.get_range(path, range).map_err(|e| ranged_error(path, e)).boxed(),
        }
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, parquet::errors::Result<Vec<Bytes>>> {
        match self {
            Self::Whole(bytes) => futures::future::ready(ranges.iter().map(|r| cut(bytes, r)).collect()).boxed(),
            Self::Ranged { store, path, .. } => {
                async move { store.get_ranges(path, &ranges).await.map_err(|e| ranged_error(path, e)) }.boxed()
            }
        }
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, parquet::errors::Result<Arc<ParquetMetaData>>> {
        async move {
            let reader = ParquetMetaDataReader::new().with_arrow_reader_options(options);
            let metadata = match self {
                Self::Whole(bytes) => reader.parse_and_finish(bytes)?,
                Self::Ranged { size, .. } => {
                    let size = *size;
                    reader.load_and_finish(self, size).await?
                }
            };
            Ok(Arc::new(metadata))
        }
        .boxed()
    }
}

fn cut(bytes: &Bytes, range: &Range<u64>) -> parquet::errors::Result<Bytes> {
    let (start, end) = (usize::try_from(range.start)?, usize::try_from(range.end)?);
    if start > end || end > bytes.len() {
        return Err(ParquetError::EOF(format!("bytes {start} to {end} of {}", bytes.len())));
    }
    Ok(bytes.slice(start..end))
}

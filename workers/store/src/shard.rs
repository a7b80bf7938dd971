//! Shards: Parquet objects of one table, named by their bytes. The same rows always give the same bytes.

use std::sync::Arc;

use arrow::array::{Array, RecordBatch, new_null_array};
use arrow::compute::BatchCoalescer;
use arrow::datatypes::{FieldRef, Schema, SchemaRef};
use bytes::Bytes;
use capfilt_schemas::{Digest, Output, Table, column};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;

use crate::{Result, Store, StoreError};

/// Rows in a row group: few where rows are large, so that a reader of images holds few of them at a time; many elsewhere, since each
/// group costs a reader some ten microseconds a column.
const fn row_group_rows(table: Table) -> usize {
    match table {
        Table::Samples | Table::Annotated | Table::Models => 512,
        _ => 65_536,
    }
}

/// Columns whose values hardly repeat: a dictionary of them costs time and saves nothing.
const DISTINCT: [&str; 4] = [column::SAMPLE_ID, column::URL, column::TEXT, column::SHA256];

/// Rows that go to the encoder at a time. It cuts pages where a batch ends, so batches are made anew: all of this many rows, few where
/// a row is large, since a column of a batch holds 2 GiB at most.
const fn batch_rows(table: Table) -> usize {
    match table {
        Table::Models => 1,
        Table::Samples | Table::Annotated => 8,
        _ => 1024,
    }
}

/// Writes rows of one table into one shard. How the rows were batched does not matter to its bytes.
pub struct ShardWriter {
    table: Table,
    batches: BatchCoalescer,
    /// Rows of a table with optional columns: which of them are written is known at the end.
    held: Vec<RecordBatch>,
    /// Of all others.
    writer: Option<ArrowWriter<Vec<u8>>>,
    rows: u64,
}

impl ShardWriter {
    /// An empty shard.
    ///
    /// # Errors
    /// [`StoreError::Parquet`].
    pub fn new(table: Table) -> Result<Self> {
        let writer = if table.optional().is_empty() { Some(encoder(table, table.schema())?) } else { None };
        let batches = BatchCoalescer::new(table.schema(), batch_rows(table));
        Ok(Self { table, batches, held: Vec::new(), writer, rows: 0 })
    }

    /// Appends rows.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if the columns are not the table's, [`StoreError::Parquet`] if they cannot be encoded.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        same_columns(self.table, batch.schema_ref())?;
        let fail = |source: arrow::error::ArrowError| writing(self.table, source.into());
        let rows = complete(&self.table.schema(), batch).map_err(fail)?;
        self.batches.push_batch(rows).map_err(fail)?;
        self.rows += batch.num_rows() as u64;
        self.encode()
    }

    fn encode(&mut self) -> Result<()> {
        while let Some(batch) = self.batches.next_completed_batch() {
            match &mut self.writer {
                Some(writer) => writer.write(&batch).map_err(|source| writing(self.table, source))?,
                None => self.held.push(batch),
            }
        }
        Ok(())
    }

    /// Rows so far.
    #[must_use]
    pub const fn rows(&self) -> u64 {
        self.rows
    }

    /// Ends the shard and puts it. It is not visible until a commit names it.
    ///
    /// # Errors
    /// [`StoreError::Parquet`] or [`StoreError::Io`].
    pub async fn finish(mut self, store: &Store) -> Result<Output> {
        self.batches.finish_buffered_batch().map_err(|source| writing(self.table, source.into()))?;
        self.encode()?;
        let writer = match self.writer {
            Some(writer) => writer,
            None => encode_held(self.table, &self.held)?,
        };
        let bytes = writer.into_inner().map_err(|source| writing(self.table, source))?;
        let size = bytes.len() as u64;
        let digest = store.put_object(self.table, bytes.into()).await?;
        Ok(Output { table: self.table, digest, rows: self.rows, bytes: size })
    }
}

fn encoder(table: Table, schema: SchemaRef) -> Result<ArrowWriter<Vec<u8>>> {
    let mut properties = WriterProperties::builder()
        .set_created_by("capfilt".to_owned())
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(row_group_rows(table)));
    for distinct in DISTINCT {
        properties = properties.set_column_dictionary_enabled(ColumnPath::from(distinct), false);
    }
    for opaque in [column::IMAGE, column::BYTES] {
        properties = properties
            .set_column_compression(ColumnPath::from(opaque), Compression::UNCOMPRESSED)
            .set_column_dictionary_enabled(ColumnPath::from(opaque), false)
            .set_column_statistics_enabled(ColumnPath::from(opaque), parquet::file::properties::EnabledStatistics::None);
    }
    ArrowWriter::try_new(Vec::new(), schema, Some(properties.build())).map_err(|source| writing(table, source))
}

/// Encodes rows without the optional columns that hold nothing.
fn encode_held(table: Table, batches: &[RecordBatch]) -> Result<ArrowWriter<Vec<u8>>> {
    let schema = table.schema();
    let empty = |place: usize| batches.iter().all(|batch| batch.column(place).null_count() == batch.num_rows());
    let stored: Vec<usize> = (0..schema.fields().len())
        .filter(|place| !(table.optional().contains(&schema.field(*place).name().as_str()) && empty(*place)))
        .collect();
    let fail = |source: arrow::error::ArrowError| writing(table, source.into());
    let mut writer = encoder(table, Arc::new(schema.project(&stored).map_err(fail)?))?;
    for batch in batches {
        writer.write(&batch.project(&stored).map_err(fail)?).map_err(|source| writing(table, source))?;
    }
    Ok(writer)
}

impl Store {
    /// The rows of a shard in batches of at most `batch_rows`. The bytes are held against the digest first.
    ///
    /// Decoding is CPU work: an async caller reads batches on a blocking thread.
    ///
    /// # Errors
    /// As [`get_object`](Self::get_object); [`StoreError::Parquet`]; [`StoreError::Schema`].
    pub async fn read_shard(
        &self,
        table: Table,
        digest: &Digest,
        batch_rows: usize,
    ) -> Result<impl Iterator<Item = Result<RecordBatch>> + Send + use<>> {
        let bytes = self.get_object(table, digest).await?;
        read_parquet(table, &digest.to_string(), bytes, batch_rows)
    }

    /// All rows of a shard as one batch.
    ///
    /// # Errors
    /// As [`read_shard`](Self::read_shard).
    pub async fn read_whole(&self, table: Table, digest: &Digest) -> Result<RecordBatch> {
        let batches = self.read_shard(table, digest, 8192).await?.collect::<Result<Vec<_>>>()?;
        arrow::compute::concat_batches(&table.schema(), &batches).map_err(|e| StoreError::Parquet {
            table,
            what: digest.to_string(),
            source: e.into(),
        })
    }
}

/// The rows of Parquet `bytes` that should be rows of `table`; `what` names them in errors.
///
/// # Errors
/// [`StoreError::Parquet`] or [`StoreError::Schema`].
pub fn read_parquet(
    table: Table,
    what: &str,
    bytes: Bytes,
    batch_rows: usize,
) -> Result<impl Iterator<Item = Result<RecordBatch>> + Send + use<>> {
    let what = what.to_owned();
    let fail = move |source| StoreError::Parquet { table, what: what.clone(), source };
    let builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(&fail)?;
    same_columns(table, builder.schema())?;
    let reader = builder.with_batch_size(batch_rows).build().map_err(&fail)?;
    let schema = table.schema();
    Ok(reader.map(move |batch| batch.and_then(|b| complete(&schema, &b)).map_err(|e| fail(e.into()))))
}

/// Rows with all columns of their table: those that are missing hold nothing.
fn complete(schema: &SchemaRef, batch: &RecordBatch) -> std::result::Result<RecordBatch, arrow::error::ArrowError> {
    let column = |field: &FieldRef| match batch.column_by_name(field.name()) {
        Some(values) => Arc::clone(values),
        None => new_null_array(field.data_type(), batch.num_rows()),
    };
    RecordBatch::try_new(Arc::clone(schema), schema.fields().iter().map(column).collect())
}

/// Whether these are the table's columns, in order; optional ones may be missing.
fn same_columns(table: Table, found: &Schema) -> Result<()> {
    let expected = table.schema();
    let mut left = found.fields().iter().peekable();
    let same = expected.fields().iter().all(|e| {
        let there = left.next_if(|f| e.name() == f.name() && e.data_type() == f.data_type()).is_some();
        there || table.optional().contains(&e.name().as_str())
    });
    if same && left.peek().is_none() {
        return Ok(());
    }
    let names = |s: &Schema| s.fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type())).collect::<Vec<_>>().join(", ");
    Err(StoreError::Schema { table, expected: names(&expected), found: names(found) })
}

fn writing(table: Table, source: parquet::errors::ParquetError) -> StoreError {
    StoreError::Parquet { table, what: "being written".to_owned(), source }
}

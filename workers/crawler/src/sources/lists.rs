//! Lists of image addresses: text, CSV, TSV, JSON, JSONL and Parquet files, each but Parquet perhaps gzipped, read as a stream.
//!
//! Both readers of lists, the `list` source of `discover` and `download`, get Arrow batches of the columns that they ask for. Memory is
//! bounded by a batch, whatever the size of the file.

mod columns;
mod text;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, RecordBatchOptions, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use capfilt_runtime::{StageError, Work};
use capfilt_schemas::{Digest, TextSource};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use tokio::sync::mpsc;
use url::Url;

use super::{Found, FoundStream, Sender};
use crate::CrawlError;
use crate::config::{ListConfig, ListFormat};
use crate::digest::{HashKind, file_digest};
use crate::text::clean;
use crate::unpack;
use columns::{Batches, Types};

/// Most rows of a batch.
const BATCH: usize = 1024;

/// A file of a list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ListFile {
    pub(crate) path: PathBuf,
    pub(crate) format: ListFormat,
    /// The column of hashes: where Parquet has bytes in it, they are wanted in hexadecimal.
    pub(crate) hash_col: Option<String>,
}

/// A column that is wanted of a list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    /// Whether its values are wanted as text (UTF-8), whatever they are in the file; otherwise they keep their type, and get one in
    /// formats that have none.
    pub(crate) text: bool,
}

/// What a file holds.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Survey {
    pub(crate) rows: u64,
    /// Rows that cannot be read; they are not among `rows`.
    pub(crate) unreadable: u64,
    /// The wanted columns, in the order in which they are wanted.
    pub(crate) schema: SchemaRef,
}

impl ListFile {
    /// Reads the file once, and tells what it holds. The types of columns that are not text follow from all of their values: whole
    /// numbers, numbers, truth values, lists and structs of these, and text for everything else.
    ///
    /// # Errors
    /// [`CrawlError::Read`] and [`CrawlError::Format`], for a missing column and a damaged file as well.
    pub(crate) fn survey(&self, wanted: &[Wanted]) -> Result<Survey, CrawlError> {
        if self.format == ListFormat::Parquet {
            return self.survey_parquet(wanted);
        }
        let names: Vec<&str> = wanted.iter().map(|w| w.name.as_str()).collect();
        let mut types = Types::new(wanted, text::is_typed(self.format));
        let (mut rows, mut unreadable) = (0, 0);
        text::read(self, &names, &mut |row| {
            match row {
                Some(values) => {
                    rows += 1;
                    types.see(&values);
                }
                None => unreadable += 1,
            }
            Ok(true)
        })?;
        if let Some(missing) = types.without_value().filter(|_| rows > 0) {
            let what =
                format!("none of its {rows} rows has a value in `{}`; is that the name of the column?", wanted[missing].name);
            return Err(CrawlError::format(&self.path, what));
        }
        Ok(Survey { rows, unreadable, schema: types.schema(wanted) })
    }

    /// Gives all rows to `sink`, in batches of at most a thousand or so with the columns of `schema`, which is [`Survey::schema`] or one
    /// of text columns. `sink` says whether it wants more. Returns the number of rows that could not be read.
    ///
    /// # Errors
    /// [`CrawlError::Read`], [`CrawlError::Format`], and those of `sink`.
    pub(crate) fn read(
        &self,
        schema: &SchemaRef,
        sink: &mut dyn FnMut(RecordBatch) -> Result<bool, CrawlError>,
    ) -> Result<u64, CrawlError> {
        if self.format == ListFormat::Parquet {
            return self.read_parquet(schema, sink);
        }
        let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        let mut batches = Batches::new(schema, text::is_typed(self.format), &self.path)?;
        let (mut unreadable, mut more) = (0, true);
        text::read(self, &names, &mut |row| {
            match row {
                Some(values) => batches.push(values),
                None => unreadable += 1,
            }
            if batches.len() >= BATCH {
                more = sink(batches.take()?)?;
            }
            Ok(more)
        })?;
        if more && batches.len() > 0 {
            sink(batches.take()?)?;
        }
        Ok(unreadable)
    }

    fn unparquet(&self, e: &dyn std::fmt::Display) -> CrawlError {
        CrawlError::format(&self.path, format!("it is not readable Parquet ({e})"))
    }

    fn open_parquet(&self) -> Result<ParquetRecordBatchReaderBuilder<File>, CrawlError> {
        let read = |e| CrawlError::read(&self.path, e);
        let file = if unpack::is_packed(&self.path).map_err(read)? {
            // Parquet is read from its end, so a packed file is unpacked first, into a file without a name.
            let (mut packed, mut unpacked) = (unpack::open(&self.path).map_err(read)?, tempfile::tempfile().map_err(read)?);
            std::io::copy(&mut packed, &mut unpacked).map_err(|e| text::broken(&self.path, &e))?;
            unpacked
        } else {
            File::open(&self.path).map_err(read)?
        };
        ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| self.unparquet(&e))
    }

    fn survey_parquet(&self, wanted: &[Wanted]) -> Result<Survey, CrawlError> {
        let builder = self.open_parquet()?;
        let names: Vec<&str> = builder.schema().fields().iter().map(|f| f.name().as_str()).collect();
        let fields = wanted.iter().map(|w| {
            let field = builder.schema().field(text::column(&self.path, &names, &w.name)?);
            let kind = if w.text { DataType::Utf8 } else { field.data_type().clone() };
            Ok(Field::new(&w.name, kind, true))
        });
        let schema = Arc::new(Schema::new(fields.collect::<Result<Vec<_>, CrawlError>>()?));
        let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        Ok(Survey { rows, unreadable: 0, schema })
    }

    fn read_parquet(
        &self,
        schema: &SchemaRef,
        sink: &mut dyn FnMut(RecordBatch) -> Result<bool, CrawlError>,
    ) -> Result<u64, CrawlError> {
        let builder = self.open_parquet()?;
        let names: Vec<&str> = builder.schema().fields().iter().map(|f| f.name().as_str()).collect();
        let wanted = schema.fields().iter().map(|f| text::column(&self.path, &names, f.name()));
        let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.collect::<Result<Vec<_>, _>>()?);
        let reader = builder.with_projection(mask).with_batch_size(BATCH).build().map_err(|e| self.unparquet(&e))?;
        for batch in reader {
            let batch = batch.map_err(|e| self.unparquet(&e))?;
            let columns = schema.fields().iter().map(|f| {
                let values = batch.column_by_name(f.name()).ok_or_else(|| self.unparquet(&"a column is gone"))?;
                let is_hash = self.hash_col.as_ref() == Some(f.name());
                let values = if is_hash { in_hex(values) } else { Ok(Arc::clone(values)) };
                values.and_then(|values| cast(&values, f.data_type())).map_err(|e| self.unparquet(&e))
            });
            let columns = columns.collect::<Result<Vec<_>, _>>()?;
            let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
            let batch = RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options);
            if !sink(batch.map_err(|e| self.unparquet(&e))?)? {
                break;
            }
        }
        Ok(0)
    }
}

/// Hashes in hexadecimal, where they are bytes.
fn in_hex(hashes: &ArrayRef) -> Result<ArrayRef, ArrowError> {
    use DataType::{Binary, BinaryView, FixedSizeBinary, LargeBinary};
    if !matches!(hashes.data_type(), Binary | LargeBinary | BinaryView | FixedSizeBinary(_)) {
        return Ok(Arc::clone(hashes));
    }
    let bytes = cast(hashes, &Binary)?;
    // The bytes may be hexadecimal digits already.
    let of = |hash: &[u8]| match std::str::from_utf8(hash) {
        Ok(text) if text.trim().bytes().all(|b| b.is_ascii_hexdigit()) => text.to_owned(),
        _ => hex::encode(hash),
    };
    Ok(Arc::new(StringArray::from_iter(bytes.as_binary::<i32>().iter().map(|hash| hash.map(of)))))
}

/// The texts of a list, in its order; `wanted` is the digest of the file that is meant. Rows without an address or a text, and rows
/// that cannot be read, are counted and passed over.
pub(crate) fn read_list(list: ListConfig, wanted: Option<Digest>, max_text: usize, work: Work) -> FoundStream {
    let (sender, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        if let Err(e) = same_file(&list, wanted).and_then(|()| send_texts(&list, max_text, &work, &sender)) {
            let _ = sender.blocking_send(Err(StageError::from(e)));
        }
    });
    super::stream(receiver)
}

fn same_file(list: &ListConfig, wanted: Option<Digest>) -> Result<(), CrawlError> {
    let Some(wanted) = wanted else { return Ok(()) };
    let found = file_digest(&list.path)?;
    if found == wanted { Ok(()) } else { Err(CrawlError::WrongFile { what: "list", wanted, found: found.to_string() }) }
}

/// The file of a list, and its columns of addresses, texts and perhaps hashes.
fn opened(list: &ListConfig) -> Result<(ListFile, SchemaRef), CrawlError> {
    let format = list.format.or_else(|| ListFormat::of_name(&list.path)).ok_or_else(|| {
        CrawlError::format(&list.path, "its name tells no format; set `format` to parquet, csv, tsv, json or jsonl")
    })?;
    if format == ListFormat::Txt {
        return Err(CrawlError::format(&list.path, "a file of addresses alone has no texts to match with queries"));
    }
    let hash = list.verify_hash.as_ref().map(|(column, _)| column);
    let columns = [&list.url_col, &list.caption_col].into_iter().chain(hash);
    let fields: Vec<Field> = columns.map(|name| Field::new(name, DataType::Utf8, true)).collect();
    Ok((ListFile { path: list.path.clone(), format, hash_col: hash.cloned() }, Arc::new(Schema::new(fields))))
}

/// Reads the beginning of a list.
///
/// # Errors
/// [`CrawlError::Read`] and [`CrawlError::Format`], for a missing column as well.
pub(super) fn probe(list: &ListConfig) -> Result<(), CrawlError> {
    let (file, schema) = opened(list)?;
    file.read(&schema, &mut |_| Ok(false)).map(|_| ())
}

fn send_texts(list: &ListConfig, max_text: usize, work: &Work, out: &Sender) -> Result<(), CrawlError> {
    let (file, schema) = opened(list)?;
    let (mut read, mut used, mut listened) = (0, 0, true);
    let unreadable = file.read(&schema, &mut |batch| {
        let found = usable(&batch, list.verify_hash.as_ref().map(|(_, kind)| *kind), max_text);
        work.facts.add("rows_read", batch.num_rows() as u64);
        work.facts.add("rows_without_address_or_text", (batch.num_rows() - found.len()) as u64);
        read += batch.num_rows() as u64;
        used += found.len();
        listened = found.is_empty() || out.blocking_send(Ok(found)).is_ok();
        Ok(listened)
    })?;
    if unreadable > 0 {
        work.facts.add("rows_unreadable", unreadable);
    }
    if used > 0 || !listened {
        return Ok(());
    }
    // A list of which no row can be used was meant to be read otherwise.
    let (url, caption) = (&list.url_col, &list.caption_col);
    Err(CrawlError::format(
        &list.path,
        match read + unreadable {
            0 => "it holds no row".to_owned(),
            n => {
                format!(
                    "none of its {n} rows has an address in `{url}` and a text in `{caption}`; set `url_col` and `caption_col`"
                )
            }
        },
    ))
}

/// The rows with an address and a text; the columns are these two, and the hashes of a kind if there is one.
fn usable(batch: &RecordBatch, hash: Option<HashKind>, max_text: usize) -> Vec<Found> {
    let value = |column: usize, row: usize| {
        let texts = batch.column(column).as_string::<i32>();
        if texts.is_valid(row) { texts.value(row) } else { "" }
    };
    let expected = |row: usize| {
        let (kind, digest) = (hash?.name(), value(2, row).trim());
        (!digest.is_empty()).then(|| format!("{kind}:{}", digest.to_ascii_lowercase()))
    };
    let found = (0..batch.num_rows()).map(|row| {
        let (url, text) = (value(0, row).trim(), clean(value(1, row), max_text));
        (!url.is_empty() && !text.is_empty()).then(|| Found {
            url: normal(url),
            text,
            text_source: TextSource::List,
            page_url: None,
            expected_hash: expected(row),
        })
    });
    found.flatten().collect()
}

/// An address as found ones are written, so that the same ones are known for the same; what is no address stays as it is.
fn normal(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut url) => {
            url.set_fragment(None);
            url.into()
        }
        Err(_) => url.to_owned(),
    }
}

impl ListFormat {
    /// The format that a file's name tells, with or without `.gz`.
    pub(crate) fn of_name(path: &Path) -> Option<Self> {
        let name = path.to_string_lossy().to_lowercase();
        let (_, extension) = name.trim_end_matches(".gz").rsplit_once('.')?;
        Some(match extension {
            "parquet" => Self::Parquet,
            "csv" => Self::Csv,
            "tsv" => Self::Tsv,
            "json" => Self::Json,
            "jsonl" | "ndjson" => Self::Jsonl,
            "txt" => Self::Txt,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests;

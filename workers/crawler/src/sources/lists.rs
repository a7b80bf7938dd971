//! URL lists: Parquet, CSV, TSV and JSONL files, each perhaps gzipped, read as a stream.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use arrow::array::{Array, AsArray, StringArray};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use capfilt_runtime::{StageError, Work};
use capfilt_schemas::{Digest, TextSource};
use flate2::read::MultiGzDecoder;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use tokio::sync::mpsc;

use super::{Found, FoundStream, Sender};
use crate::CrawlError;
use crate::config::{ListConfig, ListFormat};
use crate::html::clean;
use crate::params::file_digest;

/// Rows sent at a time.
const BATCH: usize = 1024;
/// Longest line of a JSONL file, in bytes; a longer one is passed over. Longest row of a CSV file.
const MAX_LINE: u64 = 1 << 20;
/// What a CSV file is followed by while it is read.
const LAST_ROW: &str = "capfilt: the list ends here";

/// The texts of a list, in its order; `wanted` is the digest of the file that is meant. Rows without an address or a text, and rows that cannot be read, are counted and passed over.
pub(crate) fn read_list(list: ListConfig, wanted: Option<Digest>, max_text: usize, work: Work) -> FoundStream {
    let (sender, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut rows = Rows { out: &sender, batch: Vec::new(), max_text, work: &work, stopped: false, read: 0, used: 0 };
        match same_file(&list, wanted).and_then(|()| read(&list, &mut rows)) {
            Ok(()) => match rows.usable(&list) {
                Ok(()) => rows.flush(),
                Err(e) => _ = sender.blocking_send(Err(e.into())),
            },
            Err(e) => _ = sender.blocking_send(Err(e)),
        }
    });
    super::stream(receiver)
}

struct Rows<'a> {
    out: &'a Sender,
    batch: Vec<Found>,
    max_text: usize,
    work: &'a Work,
    /// Nobody listens any more.
    stopped: bool,
    /// Rows seen, those that cannot be read included, and rows that have an address and a text.
    read: u64,
    used: u64,
}

impl Rows<'_> {
    fn push(&mut self, url: Option<&str>, text: Option<&str>) {
        let url = url.unwrap_or("").trim();
        let text = clean(text.unwrap_or(""), self.max_text);
        self.work.facts.add("rows_read", 1);
        self.read += 1;
        if url.is_empty() || text.is_empty() {
            self.work.facts.add("rows_without_address_or_text", 1);
            return;
        }
        self.used += 1;
        self.batch.push(Found { url: url.to_owned(), text, text_source: TextSource::List, page_url: None });
        if self.batch.len() >= BATCH {
            self.flush();
        }
    }

    fn unreadable(&mut self) {
        self.work.facts.add("rows_unreadable", 1);
        self.read += 1;
    }

    /// A list of which no row can be used was meant to be read otherwise.
    fn usable(&self, list: &ListConfig) -> Result<(), CrawlError> {
        if self.used > 0 || self.stopped {
            return Ok(());
        }
        let (url, caption) = (&list.url_col, &list.caption_col);
        let what = match self.read {
            0 => "it holds no row".to_owned(),
            n => format!(
                "none of its {n} rows has an address in `{url}` and a text in `{caption}`; set `url_col` and `caption_col`"
            ),
        };
        Err(CrawlError::format(&list.path, what))
    }

    fn flush(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        if !batch.is_empty() {
            self.stopped |= self.out.blocking_send(Ok(batch)).is_err();
        }
    }
}

fn same_file(list: &ListConfig, wanted: Option<Digest>) -> Result<(), StageError> {
    let Some(wanted) = wanted else { return Ok(()) };
    let found = file_digest(&list.path)?;
    if found == wanted { Ok(()) } else { Err(CrawlError::WrongFile { what: "list", wanted, found: found.to_string() }.into()) }
}

fn read(list: &ListConfig, rows: &mut Rows<'_>) -> Result<(), StageError> {
    let name = list.path.to_string_lossy().to_lowercase();
    let zipped = name.ends_with(".gz");
    let format = match list.format {
        Some(format) => format,
        None => format_of(name.trim_end_matches(".gz")).ok_or_else(|| {
            CrawlError::format(&list.path, "its name tells no format; set `format` to parquet, csv, tsv or jsonl")
        })?,
    };
    let file = File::open(&list.path).map_err(|e| CrawlError::read(&list.path, e))?;
    if format == ListFormat::Parquet {
        let file = if zipped { unpack(&list.path, file, &rows.work.scratch()?)? } else { file };
        return Ok(read_parquet(list, file, rows)?);
    }
    let reader: Box<dyn Read> = if zipped { Box::new(MultiGzDecoder::new(BufReader::new(file))) } else { Box::new(file) };
    match format {
        ListFormat::Jsonl => read_jsonl(list, reader, rows)?,
        ListFormat::Tsv => read_csv(list, reader, b'\t', rows)?,
        _ => read_csv(list, reader, b',', rows)?,
    }
    Ok(())
}

fn format_of(name: &str) -> Option<ListFormat> {
    let (_, extension) = name.rsplit_once('.')?;
    match extension {
        "parquet" => Some(ListFormat::Parquet),
        "csv" => Some(ListFormat::Csv),
        "tsv" => Some(ListFormat::Tsv),
        "jsonl" | "ndjson" | "json" => Some(ListFormat::Jsonl),
        _ => None,
    }
}

/// Parquet is read from its end, so a packed file is unpacked first, into the task's own folder.
fn unpack(path: &Path, file: File, folder: &Path) -> Result<File, CrawlError> {
    let target: PathBuf = folder.join("list.parquet");
    let mut out = File::create(&target).map_err(|e| CrawlError::read(&target, e))?;
    std::io::copy(&mut MultiGzDecoder::new(BufReader::new(file)), &mut out).map_err(|e| broken(path, &e))?;
    File::open(&target).map_err(|e| CrawlError::read(&target, e))
}

fn read_parquet(list: &ListConfig, file: File, rows: &mut Rows<'_>) -> Result<(), CrawlError> {
    let fail = |e: &dyn std::fmt::Display| CrawlError::format(&list.path, format!("it is not readable Parquet ({e})"));
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| fail(&e))?;
    let names: Vec<&str> = builder.schema().fields().iter().map(|f| f.name().as_str()).collect();
    let wanted = [column(list, &names, &list.url_col)?, column(list, &names, &list.caption_col)?];
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
    let reader = builder.with_projection(mask).with_batch_size(BATCH).build().map_err(|e| fail(&e))?;
    for batch in reader {
        let batch = batch.map_err(|e| fail(&e))?;
        let texts = |name: &str| -> Result<StringArray, CrawlError> {
            let values = batch.column_by_name(name).ok_or_else(|| fail(&"a column is gone"))?;
            Ok(cast(values, &DataType::Utf8).map_err(|e| fail(&e))?.as_string::<i32>().clone())
        };
        let (urls, captions) = (texts(&list.url_col)?, texts(&list.caption_col)?);
        let value = |of: &StringArray, i: usize| of.is_valid(i).then(|| of.value(i).to_owned());
        for i in 0..urls.len() {
            rows.push(value(&urls, i).as_deref(), value(&captions, i).as_deref());
        }
        if rows.stopped {
            break;
        }
    }
    Ok(())
}

fn read_csv(list: &ListConfig, reader: Box<dyn Read>, delimiter: u8, rows: &mut Rows<'_>) -> Result<(), CrawlError> {
    // A quote that nothing closes swallows the rows after it, at worst all. It would swallow this further row as well.
    let last = format!("\n\"{LAST_ROW}");
    let quoting = delimiter == b',';
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .flexible(true)
        .quoting(quoting)
        .from_reader(reader.chain(if quoting { last.as_bytes() } else { b"" }));
    let header = reader.byte_headers().map_err(|e| csv_broken(&list.path, &e))?;
    let names: Vec<String> =
        header.iter().map(|n| String::from_utf8_lossy(n).trim_start_matches('\u{feff}').trim().to_owned()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| *name != LAST_ROW).collect();
    let (url, caption) = (column(list, &names, &list.url_col)?, column(list, &names, &list.caption_col)?);
    let mut record = csv::ByteRecord::new();
    let mut line = 0;
    let mut whole = !quoting;
    while !rows.stopped && reader.read_byte_record(&mut record).map_err(|e| csv_broken(&list.path, &e))? {
        whole |= record.len() == 1 && &record[0] == LAST_ROW.as_bytes();
        if whole && quoting {
            break;
        }
        line = record.position().map_or(0, csv::Position::line);
        if record.as_slice().len() as u64 > MAX_LINE {
            whole = false;
            break;
        }
        let field = |i: usize| record.get(i).map(String::from_utf8_lossy);
        rows.push(field(url).as_deref(), field(caption).as_deref());
    }
    if whole || rows.stopped {
        return Ok(());
    }
    Err(CrawlError::format(&list.path, format!("the row at line {line} does not end: is there a `\"` that nothing closes?")))
}

fn read_jsonl(list: &ListConfig, reader: Box<dyn Read>, rows: &mut Rows<'_>) -> Result<(), CrawlError> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while !rows.stopped {
        line.clear();
        let n = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(|e| broken(&list.path, &e))?;
        if n == 0 {
            break;
        }
        if n as u64 == MAX_LINE && !line.ends_with(b"\n") {
            rows.unreadable();
            skip_line(&mut reader).map_err(|e| broken(&list.path, &e))?;
            continue;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&line) {
            Ok(object) => {
                let text = |name: &str| object.get(name).and_then(serde_json::Value::as_str);
                rows.push(text(&list.url_col), text(&list.caption_col));
            }
            Err(_) => rows.unreadable(),
        }
    }
    Ok(())
}

fn skip_line(reader: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        let end = memchr::memchr(b'\n', buffer);
        let (used, done) = end.map_or((buffer.len(), buffer.is_empty()), |i| (i + 1, true));
        reader.consume(used);
        if done {
            return Ok(());
        }
    }
}

fn column(list: &ListConfig, names: &[&str], wanted: &str) -> Result<usize, CrawlError> {
    names.iter().position(|n| *n == wanted).ok_or_else(|| {
        CrawlError::format(
            &list.path,
            format!("it has no column `{wanted}`, only {}; set `url_col` and `caption_col`", names.join(", ")),
        )
    })
}

fn broken(path: &Path, e: &std::io::Error) -> CrawlError {
    CrawlError::format(path, format!("it breaks off or is damaged ({e})"))
}

fn csv_broken(path: &Path, e: &csv::Error) -> CrawlError {
    CrawlError::format(path, format!("it breaks off or is damaged ({e})"))
}

#[cfg(test)]
mod tests;

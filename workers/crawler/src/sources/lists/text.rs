//! The rows of text formats, as JSON values: the one way in which CSV cells and JSON fields are alike.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::path::Path;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::ListFile;
use crate::CrawlError;
use crate::config::ListFormat;
use crate::unpack;

/// Longest line of a text or JSONL file, in bytes; a longer one is passed over. Longest row of a CSV or JSON file.
const MAX_ROW: u64 = 1 << 20;
/// What a CSV file is followed by while it is read.
const LAST_ROW: &str = "capfilt: the list ends here";
/// The only column of a text file.
const URL: &str = "url";

/// Takes a row's values, in the order of the wanted columns, or `None` for a row that cannot be read; says whether it wants more.
pub(super) type Visit<'a> = dyn FnMut(Option<Vec<Value>>) -> Result<bool, CrawlError> + 'a;

/// Whether the values of a format have types of their own.
pub(super) const fn is_typed(format: ListFormat) -> bool {
    matches!(format, ListFormat::Json | ListFormat::Jsonl)
}

/// Reads a file of any format but Parquet. Empty lines are no rows.
pub(super) fn read(list: &ListFile, wanted: &[&str], visit: &mut Visit<'_>) -> Result<(), CrawlError> {
    let path = list.path.as_path();
    let mut reader = unpack::open(path).map_err(|e| CrawlError::read(path, e))?;
    let head = reader.fill_buf().map_err(|e| broken(path, &e))?;
    if head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]) {
        return Err(CrawlError::format(path, "it is UTF-16; save it as UTF-8"));
    }
    if head.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    match list.format {
        ListFormat::Txt => read_txt(path, reader, wanted, visit),
        ListFormat::Tsv => read_csv(path, reader, b'\t', wanted, visit),
        ListFormat::Csv => read_csv(path, reader, b',', wanted, visit),
        ListFormat::Jsonl => read_jsonl(path, reader, wanted, visit),
        ListFormat::Json => read_json(path, reader, wanted, visit),
        ListFormat::Parquet => Err(CrawlError::format(path, "parquet is no text format")),
    }
}

/// An address a line.
fn read_txt(path: &Path, mut reader: impl BufRead, wanted: &[&str], visit: &mut Visit<'_>) -> Result<(), CrawlError> {
    wanted.iter().try_for_each(|name| column(path, &[URL], name).map(drop))?;
    let mut line = Vec::new();
    while let Some(whole) = next_line(&mut reader, &mut line).map_err(|e| broken(path, &e))? {
        let address = line.trim_ascii();
        let row = (whole && !address.is_empty()).then(|| vec![text(address); wanted.len()]);
        if (row.is_some() || !whole) && !visit(row)? {
            break;
        }
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Value {
    Value::String(String::from_utf8_lossy(bytes).into_owned())
}

/// The next line without its end; whether it is not too long. `None` at the end of the file.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Option<bool>> {
    line.clear();
    let n = reader.by_ref().take(MAX_ROW).read_until(b'\n', line)?;
    if n == 0 {
        return Ok(None);
    }
    let whole = line.ends_with(b"\n") || (n as u64) < MAX_ROW;
    if !whole {
        skip_line(reader)?;
    }
    Ok(Some(whole))
}

fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
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

/// In TSV a row is a line: captions with a quote that nothing closes are common in such files. A field that is quoted as a whole loses
/// its quotes.
fn read_csv(path: &Path, reader: impl Read, delimiter: u8, wanted: &[&str], visit: &mut Visit<'_>) -> Result<(), CrawlError> {
    // A quote that nothing closes swallows the rows after it, at worst all. It would swallow this further row as well.
    let last = format!("\n\"{LAST_ROW}");
    let quoting = delimiter == b',';
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .flexible(true)
        .quoting(quoting)
        .from_reader(reader.chain(if quoting { last.as_bytes() } else { b"" }));
    let field = |bytes: &[u8]| if quoting { text(bytes) } else { text(&unquoted(bytes)) };
    let header = reader.byte_headers().map_err(|e| csv_broken(path, &e))?;
    let names: Vec<String> = header.iter().map(|n| field(n).as_str().unwrap_or_default().trim().to_owned()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| *name != LAST_ROW).collect();
    let wanted = wanted.iter().map(|name| column(path, &names, name)).collect::<Result<Vec<_>, _>>()?;
    let mut record = csv::ByteRecord::new();
    let mut line = 0;
    let mut whole = !quoting;
    while reader.read_byte_record(&mut record).map_err(|e| csv_broken(path, &e))? {
        whole |= record.len() == 1 && &record[0] == LAST_ROW.as_bytes();
        if whole && quoting {
            break;
        }
        line = record.position().map_or(0, csv::Position::line);
        if record.as_slice().len() as u64 > MAX_ROW {
            whole = false;
            break;
        }
        let row = wanted.iter().map(|i| record.get(*i).map_or(Value::Null, field)).collect();
        if !visit(Some(row))? {
            return Ok(());
        }
    }
    if whole {
        return Ok(());
    }
    Err(CrawlError::format(path, format!("the row at line {line} does not end: is there a `\"` that nothing closes?")))
}

/// What stands between the quotes of a field that begins and ends with one.
fn unquoted(field: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    let inner = field.strip_prefix(b"\"").and_then(|f| f.strip_suffix(b"\""));
    inner.map_or(field.into(), |inner| {
        let mut out = Vec::with_capacity(inner.len());
        let mut after_quote = false;
        for b in inner {
            after_quote = *b == b'"' && !after_quote;
            if !after_quote {
                out.push(*b);
            }
        }
        out.into()
    })
}

fn pick(mut object: Map<String, Value>, wanted: &[&str]) -> Vec<Value> {
    wanted.iter().map(|name| object.remove(*name).unwrap_or_default()).collect()
}

/// One object a line.
fn read_jsonl(path: &Path, mut reader: impl BufRead, wanted: &[&str], visit: &mut Visit<'_>) -> Result<(), CrawlError> {
    let mut line = Vec::new();
    while let Some(whole) = next_line(&mut reader, &mut line).map_err(|e| broken(path, &e))? {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let object = if whole { serde_json::from_slice(&line).ok() } else { None };
        if !visit(object.map(|o| pick(o, wanted)))? {
            break;
        }
    }
    Ok(())
}

/// An array of objects, of which one at a time is in memory. A file that begins with an object is read as JSONL.
fn read_json(path: &Path, mut reader: impl BufRead, wanted: &[&str], visit: &mut Visit<'_>) -> Result<(), CrawlError> {
    let first = loop {
        let buffer = reader.fill_buf().map_err(|e| broken(path, &e))?;
        let Some(first) = buffer.first().copied() else { return Ok(()) };
        if !first.is_ascii_whitespace() {
            break first;
        }
        reader.consume(1);
    };
    if first != b'[' {
        return read_jsonl(path, reader, wanted, visit);
    }
    let left = std::cell::Cell::new(MAX_ROW);
    let mut ended = Ok(true);
    let rows = Rows { wanted, visit, left: &left, ended: &mut ended };
    let mut json = serde_json::Deserializer::from_reader(Bounded { reader, left: &left });
    let read = json.deserialize_seq(rows);
    // An error of `visit` and a wish to stop come through the parser as an error of its own.
    if !ended? {
        return Ok(());
    }
    read.and_then(|()| json.end()).map_err(|e| {
        if e.is_io() { CrawlError::format(path, format!("it breaks off or is damaged ({e})")) } else { no_json(path, &e) }
    })
}

fn no_json(path: &Path, e: &serde_json::Error) -> CrawlError {
    CrawlError::format(path, format!("it is no JSON array of objects ({e}); if it holds an object a line, its format is jsonl"))
}

/// A reader that fails when a row takes too many bytes.
struct Bounded<'a, R> {
    reader: R,
    left: &'a std::cell::Cell<u64>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        match self.left.get().checked_sub(n as u64) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::other(format!("an entry is longer than {MAX_ROW} bytes"))),
        }
        Ok(n)
    }
}

struct Rows<'a, 'v> {
    wanted: &'a [&'a str],
    visit: &'a mut Visit<'v>,
    left: &'a std::cell::Cell<u64>,
    ended: &'a mut Result<bool, CrawlError>,
}

impl<'de> Visitor<'de> for Rows<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        while let Some(value) = array.next_element()? {
            self.left.set(MAX_ROW);
            let row = if let Value::Object(object) = value { Some(pick(object, self.wanted)) } else { None };
            *self.ended = (self.visit)(row);
            if !matches!(self.ended, Ok(true)) {
                return Err(serde::de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

/// The place of a column.
pub(super) fn column(path: &Path, names: &[&str], wanted: &str) -> Result<usize, CrawlError> {
    let mut places = (0..names.len()).filter(|i| names[*i] == wanted);
    match (places.next(), places.next()) {
        (Some(place), None) => Ok(place),
        (Some(_), Some(_)) => {
            Err(CrawlError::format(path, format!("it has more than one column `{wanted}`; rename one of them")))
        }
        (None, _) => Err(CrawlError::format(
            path,
            format!("it has no column `{wanted}`, only {}; set `url_col` and `caption_col`", names.join(", ")),
        )),
    }
}

pub(super) fn broken(path: &Path, e: &io::Error) -> CrawlError {
    CrawlError::format(path, format!("it breaks off or is damaged ({e})"))
}

fn csv_broken(path: &Path, e: &csv::Error) -> CrawlError {
    CrawlError::format(path, format!("it breaks off or is damaged ({e})"))
}

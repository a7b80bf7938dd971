//! The query list: the texts that candidates are gathered for. A query's id is its position in the list.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufRead;
use std::path::Path;

use arrow::array::{Array, StringArray};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use capfilt_schemas::Digest;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sha2::{Digest as _, Sha256};

use super::TableHead;
use crate::CrawlError;
use crate::matcher::words_of;
use crate::unpack;

/// Sources that are told apart; a list with more names for them has taken something else for a source.
const MOST_SOURCES: usize = 256;

/// One query, as a view into the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Query<'a> {
    /// The query as the list has it.
    pub text: &'a str,
    /// Where it comes from (`wordnet`, `unigram`, `bigram`, `title`); empty if the list does not say.
    pub source: &'a str,
}

/// Queries in order, without those that are the same words as an earlier one, and without those that hold no word.
#[derive(Clone, Debug)]
pub struct QueryList {
    texts: Vec<Box<str>>,
    sources: Vec<u8>,
    source_names: Vec<Box<str>>,
    digest: Digest,
}

impl QueryList {
    /// Reads a list: a text file with one query a line (after a tab may stand its source), perhaps gzipped, or Parquet with a column
    /// `text` and perhaps one `source`.
    ///
    /// # Errors
    /// [`CrawlError::Read`], or [`CrawlError::Format`] if it is not such a file or holds no query.
    pub fn load(path: &Path) -> Result<Self, CrawlError> {
        let read = |e| CrawlError::read(path, e);
        let mut list = Builder::default();
        if path.to_string_lossy().to_lowercase().ends_with(".parquet") {
            read_parquet(path, File::open(path).map_err(read)?, &mut list)?;
        } else {
            read_lines(path, unpack::open(path).map_err(read)?, &mut list)?;
        }
        let list = list.finish();
        if list.is_empty() {
            return Err(CrawlError::format(path, "it holds no query"));
        }
        Ok(list)
    }

    /// A list of queries without sources.
    pub fn from_texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut list = Builder::default();
        texts.into_iter().for_each(|t| list.push(t, ""));
        list.finish()
    }

    /// The number of queries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The query with an id.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<Query<'_>> {
        let i = id as usize;
        Some(Query { text: self.texts.get(i)?, source: &self.source_names[usize::from(self.sources[i])] })
    }

    /// All queries, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = Query<'_>> {
        self.texts
            .iter()
            .zip(&self.sources)
            .map(|(text, source)| Query { text, source: &self.source_names[usize::from(*source)] })
    }

    /// SHA-256 of the texts in order, each with a line end: what a task is named by, wherever the list is kept.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }
}

#[derive(Default)]
struct Builder {
    texts: Vec<Box<str>>,
    sources: Vec<u8>,
    source_names: Vec<Box<str>>,
    seen: HashSet<u128>,
    hash: Sha256,
    words: String,
}

impl Builder {
    fn push(&mut self, text: &str, source: &str) {
        let text = text.trim();
        words_of(text, &mut self.words);
        // 128 bits of the words: half a million queries fit in 8 MB, and no two differ by accident.
        let digest = Sha256::digest(self.words.as_bytes());
        let key = digest[..16].iter().fold(0_u128, |key, b| key << 8 | u128::from(*b));
        if self.words == " " || !self.seen.insert(key) {
            return;
        }
        let source = match self.source_names.iter().position(|s| **s == *source) {
            Some(known) => known,
            None if self.source_names.len() < MOST_SOURCES => {
                self.source_names.push(source.into());
                self.source_names.len() - 1
            }
            None => MOST_SOURCES - 1,
        };
        self.hash.update(text.as_bytes());
        self.hash.update(b"\n");
        self.texts.push(text.into());
        self.sources.push(source as u8);
    }

    fn finish(self) -> QueryList {
        QueryList {
            texts: self.texts,
            sources: self.sources,
            source_names: self.source_names,
            digest: Digest::from_bytes(self.hash.finalize().into()),
        }
    }
}

fn read_lines(path: &Path, mut reader: impl BufRead, list: &mut Builder) -> Result<(), CrawlError> {
    let mut line = String::new();
    let mut number = 0;
    loop {
        line.clear();
        number += 1;
        let n = reader.read_line(&mut line).map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => CrawlError::format(path, format!("line {number} is not UTF-8")),
            _ => CrawlError::read(path, e),
        })?;
        if n == 0 {
            return Ok(());
        }
        let content = line.trim_start_matches('\u{feff}').trim_end_matches(['\r', '\n']);
        let (text, source) = content.split_once('\t').unwrap_or((content, ""));
        let source = source.split('\t').next().unwrap_or("");
        if number == 1 && text == "text" && source == "source" {
            continue;
        }
        if number == 1 && (text.starts_with("[\"") || text.trim() == "[" || text.starts_with('{')) {
            let what = "it looks like JSON; write one query a line: jq -r '.[]' metadata.json > queries.txt";
            return Err(CrawlError::format(path, what));
        }
        list.push(text, source);
    }
}

fn read_parquet(path: &Path, file: File, list: &mut Builder) -> Result<(), CrawlError> {
    let fail = |e: &dyn std::fmt::Display| CrawlError::format(path, format!("it is not readable Parquet ({e})"));
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| fail(&e))?;
    TableHead::of(path, reader.metadata().file_metadata())?;
    let reader = reader.build().map_err(|e| fail(&e))?;
    for batch in reader {
        let batch = batch.map_err(|e| fail(&e))?;
        let strings = |name: &str| -> Result<Option<StringArray>, CrawlError> {
            let Some(column) = batch.column_by_name(name) else { return Ok(None) };
            let column = cast(column, &DataType::Utf8).map_err(|e| fail(&e))?;
            Ok(column.as_any().downcast_ref::<StringArray>().cloned())
        };
        let texts = strings("text")?.ok_or_else(|| CrawlError::format(path, "it has no column `text`"))?;
        let sources = strings("source")?;
        for i in (0..texts.len()).filter(|i| texts.is_valid(*i)) {
            list.push(texts.value(i), sources.as_ref().map_or("", |s| s.value(i)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;
    use std::sync::Arc;

    fn texts(list: &QueryList) -> Vec<(String, String)> {
        list.iter().map(|q| (q.text.to_owned(), q.source.to_owned())).collect()
    }

    fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
        of.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn reads_lines_with_and_without_sources() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queries.tsv");
        std::fs::write(&path, "\u{feff}Red car\tword\r\n\nblue\n!!!\nred CAR\ttitle\n  cat \ttitle\tmore\n").unwrap();
        let list = QueryList::load(&path).unwrap();
        assert_eq!(texts(&list), pairs(&[("Red car", "word"), ("blue", ""), ("cat", "title")]));
        assert_eq!(list.get(2).unwrap().text, "cat");
        assert_eq!(list.get(3), None);
        assert_eq!(list.digest(), QueryList::from_texts(["Red car", "blue", "cat"]).digest());
        assert_ne!(list.digest(), QueryList::from_texts(["blue", "Red car", "cat"]).digest());

        let zipped = folder.path().join("queries.txt.gz");
        let mut gz = flate2::write::GzEncoder::new(File::create(&zipped).unwrap(), flate2::Compression::default());
        gz.write_all(b"text\tsource\none\ta\n").unwrap();
        gz.finish().unwrap();
        assert_eq!(texts(&QueryList::load(&zipped).unwrap()), pairs(&[("one", "a")]));
    }

    #[test]
    fn reads_parquet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("queries.parquet");
        let column = Arc::new(arrow::array::LargeStringArray::from(vec![Some("one"), None, Some("two")])) as Arc<dyn Array>;
        let batch = arrow::array::RecordBatch::try_from_iter([("text", column)]).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        assert_eq!(texts(&QueryList::load(&path).unwrap()), pairs(&[("one", ""), ("two", "")]));
    }

    #[test]
    fn says_what_is_wrong_with_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let say = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            QueryList::load(&path).unwrap_err().to_string()
        };
        assert!(say("empty.txt", b"\n\n").ends_with("it holds no query"));
        assert!(say("latin.txt", b"ok\nma\xeftre\n").ends_with("line 2 is not UTF-8"));
        for json in [&b"[\"dog\", \"cat\"]"[..], b"[\n\"dog\"\n]", b"{\"dog\": 1}"] {
            assert!(say("metadata.json", json).contains("it looks like JSON"));
        }
        assert!(say("no.parquet", b"PAR1").contains("not readable Parquet"));
        assert!(matches!(QueryList::load(&folder.path().join("none")), Err(CrawlError::Read { .. })));
    }
}

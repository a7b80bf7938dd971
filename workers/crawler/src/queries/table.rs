//! The table that a list is kept in: Parquet with a row a query, and in its key-value metadata how it was made.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::{FileMetaData, KeyValue};
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};

use super::dump::PageKind;
use super::input::InputFile;
use super::pick::{QueryRow, SourceCounts};
use crate::CrawlError;

/// The version of the table's form. A reader refuses a newer one.
pub const QUERY_TABLE_VERSION: u32 = 1;
/// The key of the metadata under which the head stands, as JSON.
const HEAD: &str = "capfilt.queries";

/// The pages of dumps, by what became of them.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pages {
    /// Pages whose words were counted.
    pub articles: u64,
    /// Redirects to other pages.
    pub redirects: u64,
    /// Talk pages, templates, categories and the like.
    pub other: u64,
    /// Pages that are not well-formed XML in UTF-8.
    pub broken: u64,
    /// Pages of more than 16 MiB.
    pub too_long: u64,
    /// All words of the articles.
    pub words: u64,
}

impl Pages {
    pub(super) fn count(&mut self, kind: PageKind) {
        *match kind {
            PageKind::Article => &mut self.articles,
            PageKind::Redirect => &mut self.redirects,
            PageKind::OtherNamespace => &mut self.other,
            PageKind::Broken => &mut self.broken,
        } += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.articles += other.articles;
        self.redirects += other.redirects;
        self.other += other.other;
        self.broken += other.broken;
        self.too_long += other.too_long;
        self.words += other.words;
    }
}

/// How a table was made. It holds no folder and no time: the same files and settings give the same bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TableHead {
    /// [`QUERY_TABLE_VERSION`] of the program that wrote it.
    pub version: u32,
    /// The most queries that there might have been.
    pub budget: u64,
    /// The least uses of a word.
    pub unigram_count: u64,
    /// The least PMI of a pair of words, in bits.
    pub bigram_pmi: f64,
    /// The least uses of a pair of words.
    pub bigram_count: u64,
    /// The least views of a title.
    pub title_views: u64,
    /// Whose page views counted.
    pub wiki: String,
    /// What each source gave, in the order of the rows.
    pub sources: Vec<SourceCounts>,
    /// What was in the dumps, if there were any.
    pub pages: Option<Pages>,
    /// Synsets in WordNet's files.
    pub synsets: u64,
    /// The files that it was made of, in the order in which they were given.
    pub inputs: Vec<InputFile>,
}

impl TableHead {
    /// The head of a table, or `None` if a file is Parquet of another origin.
    ///
    /// # Errors
    /// [`CrawlError::Read`], or [`CrawlError::Format`] if the file is not Parquet or its form is newer than this program.
    pub fn load(path: &Path) -> Result<Option<Self>, CrawlError> {
        let file = File::open(path).map_err(|e| CrawlError::read(path, e))?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(file)
            .map_err(|e| CrawlError::format(path, format!("it is not readable Parquet ({e})")))?;
        Self::of(path, reader.metadata().file_metadata())
    }

    pub(super) fn of(path: &Path, metadata: &FileMetaData) -> Result<Option<Self>, CrawlError> {
        let entry = metadata.key_value_metadata().into_iter().flatten().find(|entry| entry.key == HEAD);
        let Some(text) = entry.and_then(|entry| entry.value.as_deref()) else { return Ok(None) };
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let unreadable = |e: serde_json::Error| CrawlError::format(path, format!("its metadata `{HEAD}` is not readable ({e})"));
        let Version { version } = serde_json::from_str(text).map_err(unreadable)?;
        if version > QUERY_TABLE_VERSION {
            let reason = format!(
                "it is a query table of version {version}, and this program knows {QUERY_TABLE_VERSION}; use a newer one"
            );
            return Err(CrawlError::format(path, reason));
        }
        serde_json::from_str(text).map(Some).map_err(unreadable)
    }
}

/// A list that has been built.
#[derive(Clone, PartialEq, Debug)]
pub struct QueryTable {
    /// The queries in order.
    pub rows: Vec<QueryRow>,
    /// How they came about.
    pub head: TableHead,
    /// What whoever built it should know: thresholds that nothing could reach, pages that could not be read.
    pub notes: Vec<String>,
}

impl QueryTable {
    /// Writes the table under its final name only when it is whole. Columns: `text`, `source` (`wordnet`, `unigram`, `bigram`, `title`),
    /// `count` (synsets, uses, uses, views; null for titles of a list), `pmi` (bits; bigrams only).
    ///
    /// # Errors
    /// [`CrawlError::Write`]; a file that is there is replaced only with `overwrite`.
    pub fn write(&self, path: &Path, overwrite: bool) -> Result<(), CrawlError> {
        let fail = |e: io::Error| CrawlError::write(path, e);
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(fail)?;
        // A table is as readable as any new file.
        let mode = Permissions::from_mode(0o644);
        let mut file = tempfile::Builder::new().prefix(".queries-").permissions(mode).tempfile_in(folder).map_err(fail)?;
        self.encode(file.as_file_mut()).map_err(|e| fail(io::Error::other(e)))?;
        file.as_file().sync_all().map_err(fail)?;
        if overwrite { file.persist(path) } else { file.persist_noclobber(path) }.map_err(|e| fail(e.error))?;
        Ok(())
    }

    fn encode(&self, file: &mut File) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let head = KeyValue::new(HEAD.to_owned(), serde_json::to_string(&self.head)?);
        let fields = [
            ("text", DataType::Utf8, false),
            ("source", DataType::Utf8, false),
            ("count", DataType::UInt64, true),
            ("pmi", DataType::Float64, true),
        ];
        let fields: Vec<_> = fields.into_iter().map(|(name, of, null)| Field::new(name, of, null)).collect();
        let schema = Arc::new(Schema::new(fields));
        let settings = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
            .set_key_value_metadata(Some(vec![head]))
            .build();
        let mut writer = ArrowWriter::try_new(file, Arc::clone(&schema), Some(settings))?;
        for rows in self.rows.chunks(1 << 16) {
            let columns: Vec<ArrayRef> = vec![
                Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.text))),
                Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.source.name()))),
                Arc::new(rows.iter().map(|r| (r.count > 0).then_some(r.count)).collect::<UInt64Array>()),
                Arc::new(rows.iter().map(|r| r.pmi).collect::<Float64Array>()),
            ];
            writer.write(&RecordBatch::try_new(Arc::clone(&schema), columns)?)?;
        }
        writer.close()?;
        Ok(())
    }
}

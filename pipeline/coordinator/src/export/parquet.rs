//! Parquet that Hugging Face `datasets` opens with its image feature.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, Float32Array, RecordBatch, StringArray, StructArray};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use serde_json::json;

use super::{ExportedFile, Pair, Sink, file_error, listed};
use crate::{CoordinatorError, Result};

const FOLDER: &str = "parquet";

/// Rows in a row group: what `datasets` itself uses for images, so that a reader of one row fetches little.
const GROUP_ROWS: usize = 100;

/// `parquet/00000.parquet`, …
pub(super) struct ParquetFiles {
    root: PathBuf,
    per_file: u64,
    open: Option<(ArrowWriter<File>, u64)>,
    group: Columns,
    names: Vec<String>,
}

#[derive(Default)]
struct Columns {
    image: Vec<bytes::Bytes>,
    path: Vec<String>,
    text: Vec<String>,
    origin: Vec<String>,
    sample_id: Vec<String>,
    url: Vec<String>,
    itm: Vec<Option<f32>>,
    itc: Vec<Option<f32>>,
    clip: Vec<Option<f32>>,
    sha256: Vec<String>,
}

impl ParquetFiles {
    pub(super) fn new(root: &Path, per_file: u64) -> Result<Self> {
        let folder = root.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(|e| file_error("make", &folder, e))?;
        Ok(Self { root: root.to_owned(), per_file, open: None, group: Columns::default(), names: Vec::new() })
    }

    fn fail(&self, e: impl std::error::Error + Send + Sync + 'static) -> CoordinatorError {
        CoordinatorError::Encode { what: self.names.last().cloned().unwrap_or_default(), source: Box::new(e) }
    }

    fn open(&mut self) -> Result<(ArrowWriter<File>, u64)> {
        self.names.push(format!("{FOLDER}/{:05}.parquet", self.names.len()));
        let path = self.root.join(&self.names[self.names.len() - 1]);
        let file = File::create(&path).map_err(|e| file_error("write", &path, e))?;
        let pixels = ColumnPath::from(vec!["image".to_owned(), "bytes".to_owned()]);
        let properties = WriterProperties::builder()
            .set_created_by("capfilt".to_owned())
            .set_compression(Compression::SNAPPY)
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_column_compression(pixels.clone(), Compression::UNCOMPRESSED)
            .set_column_dictionary_enabled(pixels.clone(), false)
            .set_column_statistics_enabled(pixels, EnabledStatistics::None)
            .set_key_value_metadata(Some(vec![KeyValue::new(FEATURES_KEY.to_owned(), features())]))
            .build();
        let writer = ArrowWriter::try_new(file, schema(), Some(properties)).map_err(|e| self.fail(e))?;
        Ok((writer, 0))
    }

    /// Writes the rows at hand as one row group.
    fn flush(&mut self) -> Result<()> {
        if self.group.text.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.group).batch().map_err(|e| self.fail(e))?;
        let written = match &mut self.open {
            Some((writer, _)) => writer.write(&batch).and_then(|()| writer.flush()),
            None => Ok(()),
        };
        written.map_err(|e| self.fail(e))
    }

    fn close(&mut self) -> Result<()> {
        self.flush()?;
        match self.open.take() {
            Some((writer, _)) => writer.close().map(drop).map_err(|e| self.fail(e)),
            None => Ok(()),
        }
    }
}

impl Sink for ParquetFiles {
    fn write(&mut self, pair: &Pair) -> Result<()> {
        if self.open.as_ref().is_some_and(|(_, rows)| *rows >= self.per_file) {
            self.close()?;
        }
        let (writer, rows) = match self.open.take() {
            Some(open) => open,
            None => self.open()?,
        };
        self.open = Some((writer, rows + 1));
        self.group.push(pair);
        if self.group.text.len() >= GROUP_ROWS { self.flush() } else { Ok(()) }
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<ExportedFile>> {
        self.close()?;
        self.names.iter().map(|name| listed(&self.root, name.clone())).collect()
    }
}

impl Columns {
    fn push(&mut self, pair: &Pair) {
        self.image.push(pair.picture.bytes.clone());
        self.path.push(format!("{}.{}", pair.key, pair.picture.extension));
        self.text.push(pair.text.clone());
        self.origin.push(pair.origin.clone());
        self.sample_id.push(pair.sample_id.clone());
        self.url.push(pair.url.clone());
        self.itm.push(pair.itm);
        self.itc.push(pair.itc);
        self.clip.push(pair.clip);
        self.sha256.push(pair.sha256.clone());
    }

    fn batch(self) -> std::result::Result<RecordBatch, arrow::error::ArrowError> {
        let texts = |values: Vec<String>| Arc::new(StringArray::from(values)) as ArrayRef;
        let bytes = Arc::new(BinaryArray::from_iter_values(&self.image)) as ArrayRef;
        let image = StructArray::try_new(image_fields(), vec![bytes, texts(self.path)], None)?;
        let columns = vec![
            Arc::new(image) as ArrayRef,
            texts(self.text),
            texts(self.origin),
            texts(self.sample_id),
            texts(self.url),
            Arc::new(Float32Array::from(self.itm)),
            Arc::new(Float32Array::from(self.itc)),
            Arc::new(Float32Array::from(self.clip)),
            texts(self.sha256),
        ];
        RecordBatch::try_new(schema(), columns)
    }
}

/// What an image is stored as: its file's bytes and a name.
fn image_fields() -> Fields {
    vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)].into()
}

fn schema() -> SchemaRef {
    let text = |name: &str| Field::new(name, DataType::Utf8, true);
    let score = |name: &str| Field::new(name, DataType::Float32, true);
    let fields = vec![
        Field::new("image", DataType::Struct(image_fields()), true),
        text("text"),
        text("origin"),
        text("sample_id"),
        text("url"),
        score("itm"),
        score("itc"),
        score("clip"),
        text("sha256"),
    ];
    Arc::new(Schema::new_with_metadata(fields, [(FEATURES_KEY.to_owned(), features())].into()))
}

/// Where `datasets` looks for the columns' features: in the metadata of the Arrow schema that a Parquet file carries. Arrow C++ puts
/// that metadata among the file's own as well, and so do we.
const FEATURES_KEY: &str = "huggingface";

/// The columns' features, in the words of `datasets`.
fn features() -> String {
    let value = |kind: &str| json!({"dtype": kind, "_type": "Value"});
    let features = json!({
        "image": {"_type": "Image"},
        "text": value("string"),
        "origin": value("string"),
        "sample_id": value("string"),
        "url": value("string"),
        "itm": value("float32"),
        "itc": value("float32"),
        "clip": value("float32"),
        "sha256": value("string"),
    });
    json!({"info": {"features": features}}).to_string()
}

//! Writing one shard: rows come as their downloads end, and are written in the order of the list.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use arrow::array::{Array, ArrayRef, AsArray, BinaryBuilder, Int32Builder, RecordBatch, StringArray, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::mpsc;

use super::folder::Folder;
use super::layout::{Files, Layout, Sample, Tar, TfRecord};
use super::row::Fetched;
use super::shards::{CAPTION, Shard};
use super::{DownloadConfig, OutputFormat};
use crate::CrawlError;
use crate::web::Answer;

/// A row that is done, with its number and the connection's place.
pub(super) type Done = (usize, Fetched, Option<Answer>);

/// Rows whose descriptions are worked out at once.
const CHUNK: usize = 512;
/// Bytes of images and rows after which a part of the Parquet file is ended.
const PART_BYTES: usize = 16 << 20;
const PART_ROWS: usize = 10_000;
/// Bytes of images that wait in memory for an earlier row; more of them wait in a file.
const WAITING_BYTES: usize = 32 << 20;

/// `00000_stats.json`.
#[derive(Serialize)]
pub(super) struct Stats {
    pub(super) count: u64,
    pub(super) successes: u64,
    pub(super) failed_to_download: u64,
    pub(super) failed_to_resize: u64,
    duration: f64,
    start_time: f64,
    end_time: f64,
    status_dict: BTreeMap<String, u64>,
    settings: BTreeMap<String, Value>,
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Writes a shard and puts its files in their places. `Ok(None)` if the rows ended early, since the download was stopped.
///
/// # Errors
/// [`CrawlError::Write`] above all.
pub(super) fn write(
    shard: &Shard,
    config: &DownloadConfig,
    folder: &Folder,
    results: mpsc::Receiver<Done>,
) -> Result<Option<Stats>, CrawlError> {
    let start_time = now();
    let mut writer = ShardWriter::create(shard, config, folder)?;
    let mut kept = shard.old.as_ref().map(|old| old.open(config)).transpose()?;
    let mut waiting = Waiting { results, images: HashMap::new(), in_memory: 0, spool: None, folder };
    for row in 0..shard.rows.num_rows() {
        let key = config.key(shard.id, row);
        let fetched = match (&shard.old, &mut kept) {
            (Some(old), Some(kept)) if !old.is_wanted(row) => kept.row(row, &key)?,
            _ => match waiting.row(row)? {
                Some(fetched) => fetched,
                None => return Ok(None),
            },
        };
        writer.put(row, &key, &fetched)?;
    }
    // Its files are about to be replaced.
    drop(kept);
    let mut stats = writer.finish()?;
    (stats.start_time, stats.end_time) = (start_time, now());
    stats.duration = stats.end_time - start_time;
    let name = config.shard_name(shard.id);
    if let Some(samples) = samples_file(config.output_format, &name) {
        // A retry leaves the other samples where they are; what is there of a new shard is of an attempt that was killed.
        folder.publish(&samples, shard.old.is_some())?;
    }
    if config.output_format != OutputFormat::Dummy {
        folder.publish(&format!("{name}.parquet"), false)?;
    }
    let mut json = Vec::new();
    let indented = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let written = stats.serialize(&mut serde_json::Serializer::with_formatter(&mut json, indented));
    written.map_err(|e| CrawlError::format(&config.output_folder, e.to_string()))?;
    folder.finish(&name, &json)?;
    Ok(Some(stats))
}

/// The file or folder of samples beside the Parquet file.
fn samples_file(format: OutputFormat, shard: &str) -> Option<String> {
    match format {
        OutputFormat::Files => Some(shard.to_owned()),
        OutputFormat::Webdataset => Some(format!("{shard}.tar")),
        OutputFormat::Tfrecord => Some(format!("{shard}.tfrecord")),
        OutputFormat::Parquet | OutputFormat::Dummy => None,
    }
}

/// Rows that came before their turn. Few images wait in memory, the others in a file without a name.
struct Waiting<'a> {
    results: mpsc::Receiver<Done>,
    images: HashMap<usize, (Fetched, Option<(u64, usize)>)>,
    in_memory: usize,
    spool: Option<(File, u64)>,
    folder: &'a Folder,
}

impl Waiting<'_> {
    /// Row `row`; `None` if it will not come.
    fn row(&mut self, row: usize) -> Result<Option<Fetched>, CrawlError> {
        let folder = self.folder.growing("");
        let spool = |e| CrawlError::write(&folder, e);
        loop {
            if let Some((mut fetched, place)) = self.images.remove(&row) {
                if let Ok(picture) = &mut fetched.result {
                    match (place, &self.spool) {
                        (Some((at, size)), Some((file, _))) => {
                            picture.bytes = vec![0; size];
                            file.read_exact_at(&mut picture.bytes, at).map_err(spool)?;
                        }
                        _ => self.in_memory -= picture.bytes.len(),
                    }
                }
                return Ok(Some(fetched));
            }
            let Some((number, mut fetched, _place)) = self.results.blocking_recv() else { return Ok(None) };
            if number == row {
                return Ok(Some(fetched));
            }
            let mut place = None;
            if let Ok(picture) = &mut fetched.result {
                if self.in_memory + picture.bytes.len() > WAITING_BYTES {
                    place = Some(self.put_aside(&std::mem::take(&mut picture.bytes)).map_err(spool)?);
                } else {
                    self.in_memory += picture.bytes.len();
                }
            }
            self.images.insert(number, (fetched, place));
        }
    }

    fn put_aside(&mut self, bytes: &[u8]) -> std::io::Result<(u64, usize)> {
        let (file, end) = match &mut self.spool {
            Some(spool) => spool,
            none => none.insert((tempfile::tempfile_in(self.folder.growing(""))?, 0)),
        };
        let at = *end;
        file.seek(SeekFrom::Start(at))?;
        file.write_all(bytes)?;
        *end += bytes.len() as u64;
        Ok((at, bytes.len()))
    }
}

/// The files of a shard while they grow.
struct ShardWriter<'a> {
    shard: &'a Shard,
    config: &'a DownloadConfig,
    folder: &'a Folder,
    name: String,
    layout: Option<Box<dyn Layout>>,
    parquet: Option<ArrowWriter<File>>,
    schema: SchemaRef,
    rows: Rows,
    /// The first row that is not in the Parquet file yet.
    begun: usize,
    /// The list's columns of some rows as JSON, and the first of these rows.
    listed: (usize, Vec<Map<String, Value>>),
    captions: Option<StringArray>,
    stats: Stats,
}

/// The columns that a download adds.
#[derive(Default)]
struct Rows {
    key: StringBuilder,
    status: StringBuilder,
    error: StringBuilder,
    sizes: [Int32Builder; 4],
    exif: StringBuilder,
    hash: StringBuilder,
    image: BinaryBuilder,
}

const SIZES: [&str; 4] = ["width", "height", "original_width", "original_height"];

impl<'a> ShardWriter<'a> {
    fn create(shard: &'a Shard, config: &'a DownloadConfig, folder: &'a Folder) -> Result<Self, CrawlError> {
        let name = config.shard_name(shard.id);
        let samples = samples_file(config.output_format, &name).map(|file| folder.growing(&file));
        let layout = samples.map(|path| {
            // What an earlier attempt in this run left.
            let _ = std::fs::remove_dir_all(&path);
            let layout: std::io::Result<Box<dyn Layout>> = match config.output_format {
                OutputFormat::Files => Files::create(path.clone()).map(|l| Box::new(l) as _),
                OutputFormat::Tfrecord => TfRecord::create(path.clone()).map(|l| Box::new(l) as _),
                _ => Tar::create(path.clone()).map(|l| Box::new(l) as _),
            };
            layout.map_err(|e| CrawlError::write(&path, e))
        });
        let schema = output_schema(&shard.rows.schema(), config);
        let parquet = match config.output_format {
            OutputFormat::Dummy => None,
            _ => Some(parquet_writer(&schema, config, &folder.growing(&format!("{name}.parquet")))?),
        };
        let captions = shard.rows.column_by_name(CAPTION).and_then(|c| c.as_string_opt::<i32>()).cloned();
        let count = shard.rows.num_rows() as u64;
        let stats = Stats {
            count,
            successes: 0,
            failed_to_download: 0,
            failed_to_resize: 0,
            duration: 0.0,
            start_time: 0.0,
            end_time: 0.0,
            status_dict: BTreeMap::new(),
            settings: config.settings(),
        };
        Ok(Self {
            shard,
            config,
            folder,
            name,
            layout: layout.transpose()?,
            parquet,
            schema,
            rows: Rows::default(),
            begun: 0,
            listed: (0, Vec::new()),
            captions,
            stats,
        })
    }

    fn put(&mut self, row: usize, key: &str, fetched: &Fetched) -> Result<(), CrawlError> {
        let rows = &mut self.rows;
        rows.key.append_value(key);
        rows.hash.append_option(fetched.hash.as_ref());
        rows.exif.append_option(fetched.exif.as_ref());
        let label = match &fetched.result {
            Ok(picture) => {
                self.stats.successes += 1;
                rows.status.append_value("success");
                rows.error.append_null();
                for (column, size) in rows.sizes.iter_mut().zip(picture.sizes) {
                    column.append_value(i32::try_from(size).unwrap_or(i32::MAX));
                }
                if self.config.output_format == OutputFormat::Parquet {
                    rows.image.append_value(&picture.bytes);
                }
                "success"
            }
            Err(missed) => {
                let (count, status) = if missed.of_image {
                    (&mut self.stats.failed_to_resize, "failed_to_resize")
                } else {
                    (&mut self.stats.failed_to_download, "failed_to_download")
                };
                *count += 1;
                rows.status.append_value(status);
                rows.error.append_value(&missed.message);
                rows.sizes.iter_mut().for_each(Int32Builder::append_null);
                rows.image.append_null();
                missed.label()
            }
        };
        *self.stats.status_dict.entry(label.to_owned()).or_default() += 1;
        // The samples of a folder that is there stay in it: their images come without bytes.
        if let Ok(picture) = &fetched.result
            && !picture.bytes.is_empty()
            && self.layout.is_some()
        {
            let about = self.about(row, key, fetched, picture.sizes)?;
            let caption = self.captions.as_ref().map(|c| if c.is_valid(row) { c.value(row) } else { "" });
            let extension = self.config.extension();
            let sample = Sample { key, image: &picture.bytes, extension, caption, about: &about };
            if let Some(layout) = &mut self.layout {
                layout.put(&sample).map_err(|e| CrawlError::write(&self.folder.growing(&self.name), e))?;
            }
        }
        let images = self.rows.image.values_slice().len();
        if row + 1 - self.begun >= PART_ROWS || images >= PART_BYTES {
            self.end_part(row + 1)?;
        }
        Ok(())
    }

    /// What is known of a sample, in the order of the Parquet file's columns.
    fn about(&mut self, row: usize, key: &str, fetched: &Fetched, sizes: [u32; 4]) -> Result<Vec<(String, Value)>, CrawlError> {
        if !(self.listed.0..self.listed.0 + self.listed.1.len()).contains(&row) {
            let chunk = self.shard.rows.slice(row, CHUNK.min(self.shard.rows.num_rows() - row));
            let objects = objects(&chunk).map_err(|e| CrawlError::format(&self.config.url_list, e))?;
            self.listed = (row, objects);
        }
        let mut listed = std::mem::take(&mut self.listed.1[row - self.listed.0]);
        let text = |value: &Option<String>| value.as_ref().map_or(Value::Null, |v| Value::from(v.as_str()));
        let about = self.schema.fields().iter().filter_map(|field| {
            let name = field.name().as_str();
            let value = match name {
                "key" => key.into(),
                "status" => "success".into(),
                "error_message" => Value::Null,
                "exif" => text(&fetched.exif),
                name if self.config.compute_hash.is_some_and(|kind| kind.name() == name) => text(&fetched.hash),
                name if SIZES.contains(&name) => SIZES.iter().position(|n| *n == name).map_or(Value::Null, |i| sizes[i].into()),
                name => listed.remove(name)?,
            };
            Some((name.to_owned(), value))
        });
        Ok(about.collect())
    }

    /// Writes the rows up to `end` into the Parquet file.
    fn end_part(&mut self, end: usize) -> Result<(), CrawlError> {
        let mut rows = std::mem::take(&mut self.rows);
        let listed = self.shard.rows.slice(self.begun, end - self.begun);
        self.begun = end;
        let Some(parquet) = &mut self.parquet else { return Ok(()) };
        let path = self.folder.growing(&format!("{}.parquet", self.name));
        let fail = |e: &dyn std::fmt::Display| CrawlError::format(&path, e.to_string());
        let mut made: HashMap<&str, ArrayRef> = HashMap::from([
            ("key", Arc::new(rows.key.finish()) as ArrayRef),
            ("status", Arc::new(rows.status.finish()) as ArrayRef),
            ("error_message", Arc::new(rows.error.finish()) as ArrayRef),
            ("exif", Arc::new(rows.exif.finish()) as ArrayRef),
            (self.config.extension(), Arc::new(rows.image.finish()) as ArrayRef),
        ]);
        if let Some(kind) = self.config.compute_hash {
            made.insert(kind.name(), Arc::new(rows.hash.finish()));
        }
        for (name, column) in SIZES.iter().zip(&mut rows.sizes) {
            made.insert(name, Arc::new(column.finish()));
        }
        let columns = self.schema.fields().iter().map(|field| {
            let name = field.name().as_str();
            let column = made.get(name).or_else(|| listed.column_by_name(name));
            column.cloned().ok_or_else(|| fail(&format!("no column `{name}`")))
        });
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns.collect::<Result<Vec<_>, _>>()?);
        parquet.write(&batch.map_err(|e| fail(&e))?).and_then(|()| parquet.flush()).map_err(|e| fail(&e))
    }

    fn finish(mut self) -> Result<Stats, CrawlError> {
        let end = self.shard.rows.num_rows();
        if self.begun < end {
            self.end_part(end)?;
        }
        if let Some(parquet) = self.parquet {
            let path = self.folder.growing(&format!("{}.parquet", self.name));
            parquet.close().map_err(|e| CrawlError::write(&path, std::io::Error::other(e)))?;
        }
        if let Some(layout) = self.layout {
            layout.finish().map_err(|e| CrawlError::write(&self.folder.growing(&self.name), e))?;
        }
        Ok(self.stats)
    }
}

/// The columns of the list, then those of the download. An expected hash stands where the list has it, and is the real one.
fn output_schema(listed: &Schema, config: &DownloadConfig) -> SchemaRef {
    let mut fields: Vec<Field> = listed.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect();
    let mut add = |name: &str, kind| {
        if !fields.iter().any(|f| f.name() == name) {
            fields.push(Field::new(name, kind, true));
        }
    };
    for name in ["key", "status", "error_message"] {
        add(name, DataType::Utf8);
    }
    for name in SIZES {
        add(name, DataType::Int32);
    }
    if config.extract_exif {
        add("exif", DataType::Utf8);
    }
    if let Some(kind) = config.compute_hash {
        add(kind.name(), DataType::Utf8);
    }
    if config.output_format == OutputFormat::Parquet {
        add(config.extension(), DataType::Binary);
    }
    Arc::new(Schema::new(fields))
}

fn parquet_writer(schema: &SchemaRef, config: &DownloadConfig, path: &std::path::Path) -> Result<ArrowWriter<File>, CrawlError> {
    // Images are compressed already, and no two are alike.
    let image = ColumnPath::from(config.extension());
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_column_compression(image.clone(), Compression::UNCOMPRESSED)
        .set_column_dictionary_enabled(image.clone(), false)
        .set_column_statistics_enabled(image, parquet::file::properties::EnabledStatistics::None)
        .build();
    let file = File::create(path).map_err(|e| CrawlError::write(path, e))?;
    ArrowWriter::try_new(file, Arc::clone(schema), Some(properties)).map_err(|e| CrawlError::format(path, e.to_string()))
}

/// The rows as JSON objects, with nulls.
fn objects(rows: &RecordBatch) -> Result<Vec<Map<String, Value>>, String> {
    let mut lines = Vec::new();
    let mut writer =
        arrow_json::WriterBuilder::new().with_explicit_nulls(true).build::<_, arrow_json::writer::LineDelimited>(&mut lines);
    writer.write(rows).and_then(|()| writer.finish()).map_err(|e| e.to_string())?;
    drop(writer);
    let objects = lines.split(|b| *b == b'\n').filter(|line| !line.is_empty()).map(serde_json::from_slice);
    objects.collect::<Result<_, _>>().map_err(|e| e.to_string())
}

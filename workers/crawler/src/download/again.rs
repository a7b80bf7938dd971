//! Shards that are there already, of which failed rows are downloaded again.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Int32Type};
use capfilt_schemas::FetchStatus;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::folder::Folder;
use super::row::{Fetched, Missed, Picture, status_of};
use super::shards::{Shard, URL};
use super::{DownloadConfig, OutputFormat};
use crate::CrawlError;
use crate::digest::HashKind;

/// Rows of images that are in memory at a time.
const IMAGES: usize = 64;

/// The first of the columns that a download adds to those of the list.
const KEY: &str = "key";
const SUCCESS: &str = "success";

/// What is there of a shard: its Parquet file without images, and where they are.
pub(super) struct Old {
    rows: RecordBatch,
    /// Whether each row is downloaded again.
    again: Vec<bool>,
    images: Images,
}

/// Where the images of a shard are.
enum Images {
    /// In files of their own, which stay where they are.
    Files,
    /// The file, which stays readable when another takes its place, and place and size of its members.
    Tar(PathBuf, File, HashMap<String, (u64, u64)>),
    Parquet(PathBuf),
}

/// Reads the finished shard `id`, if any of its rows failed in a way that is to be tried again.
///
/// # Errors
/// [`CrawlError::Read`] and [`CrawlError::Format`], if the shard is not as this download would have made it.
pub(super) fn read(id: u64, folder: &Folder, config: &DownloadConfig) -> Result<Option<Shard>, CrawlError> {
    let name = config.shard_name(id);
    let path = folder.path(&format!("{name}.parquet"));
    let fail = |e: &dyn std::fmt::Display| CrawlError::format(&path, e.to_string());
    let file = File::open(&path).map_err(|e| CrawlError::read(&path, e))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| fail(&e))?;
    let image = config.extension();
    let kept: Vec<usize> = (0..builder.schema().fields().len()).filter(|i| builder.schema().field(*i).name() != image).collect();
    let mask = ProjectionMask::roots(builder.parquet_schema(), kept);
    let batches = builder.with_projection(mask).build().and_then(|reader| Ok(reader.collect::<Result<Vec<_>, _>>()?));
    let batches = batches.map_err(|e| fail(&e))?;
    let Some(first) = batches.first() else { return Ok(None) };
    let rows = concat_batches(&first.schema(), &batches).map_err(|e| fail(&e))?;
    let column = |name: &str| rows.column_by_name(name).ok_or_else(|| fail(&format!("it has no column `{name}`")));
    let text = |name: &str| cast(column(name)?, &DataType::Utf8).map_err(|e| fail(&e));
    let (messages, keys) = (text("error_message")?, text(KEY)?);
    let (messages, keys) = (messages.as_string::<i32>(), keys.as_string::<i32>());
    let wanted = |row| messages.is_valid(row) && status_of(messages.value(row)).is_some_and(|s| config.retry_status.contains(&s));
    let again: Vec<bool> = (0..rows.num_rows()).map(wanted).collect();
    if !again.contains(&true) {
        return Ok(None);
    }
    // Programs that write rows as they come leave them in another order; a row is known by its key.
    let in_order = (0..rows.num_rows()).all(|row| keys.value(row) == config.key(id, row));
    if !in_order {
        let what = "its keys are not those of this number_sample_per_shard and oom_shard_count, one after the other; shards of \
                    other programs cannot be retried";
        return Err(fail(&what));
    }
    let images = match config.output_format {
        OutputFormat::Files => Images::Files,
        OutputFormat::Parquet => Images::Parquet(path.clone()),
        _ => {
            let tar = folder.path(&format!("{name}.tar"));
            let file = File::open(&tar).map_err(|e| CrawlError::read(&tar, e))?;
            let members = members(&tar, &file)?;
            Images::Tar(tar, file, members)
        }
    };
    let listed = rows.schema().index_of(KEY).map_err(|e| fail(&e))?;
    let rows_of_list = rows.project(&(0..listed).collect::<Vec<_>>()).map_err(|e| fail(&e))?;
    column(URL)?;
    Ok(Some(Shard { id, rows: rows_of_list, old: Some(Old { rows, again, images }) }))
}

/// The members of a tar file.
fn members(path: &Path, file: &File) -> Result<HashMap<String, (u64, u64)>, CrawlError> {
    let read = || -> std::io::Result<_> {
        let mut archive = tar::Archive::new(std::io::BufReader::new(file));
        let mut members = HashMap::new();
        for entry in archive.entries()? {
            let entry = entry?;
            members.insert(entry.path()?.to_string_lossy().into_owned(), (entry.raw_file_position(), entry.size()));
        }
        Ok(members)
    };
    read().map_err(|e| CrawlError::read(path, e))
}

impl Old {
    /// Whether a row is downloaded again.
    pub(super) fn is_wanted(&self, row: usize) -> bool {
        self.again[row]
    }

    /// The rows that are downloaded again.
    pub(super) fn wanted(&self) -> u64 {
        self.again.iter().filter(|a| **a).count() as u64
    }

    /// The rows that stay, to be asked for in order.
    ///
    /// # Errors
    /// [`CrawlError::Read`].
    pub(super) fn open<'a>(&'a self, config: &'a DownloadConfig) -> Result<Kept<'a>, CrawlError> {
        let source = match &self.images {
            Images::Files => Source::Files,
            Images::Tar(path, file, members) => Source::Tar(path, file, members),
            Images::Parquet(path) => {
                let fail = |e: &dyn std::fmt::Display| CrawlError::format(path, e.to_string());
                let file = File::open(path).map_err(|e| CrawlError::read(path, e))?;
                let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| fail(&e))?;
                let column = builder.schema().index_of(config.extension()).map_err(|e| fail(&e))?;
                let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
                let reader = builder.with_projection(mask).with_batch_size(IMAGES).build().map_err(|e| fail(&e))?;
                Source::Parquet(path, Box::new(reader), None)
            }
        };
        Ok(Kept { old: self, source, extension: config.extension(), hash: config.compute_hash.map(HashKind::name) })
    }
}

/// Rows of an old shard.
pub(super) struct Kept<'a> {
    old: &'a Old,
    source: Source<'a>,
    extension: &'static str,
    hash: Option<&'static str>,
}

enum Source<'a> {
    Files,
    Tar(&'a Path, &'a File, &'a HashMap<String, (u64, u64)>),
    /// The images from a row on.
    Parquet(&'a Path, Box<ParquetRecordBatchReader>, Option<(usize, Arc<dyn Array>)>),
}

impl Kept<'_> {
    /// Row `row` as it was.
    ///
    /// # Errors
    /// [`CrawlError::Read`] and [`CrawlError::Format`].
    pub(super) fn row(&mut self, row: usize, key: &str) -> Result<Fetched, CrawlError> {
        let text = |name: &str| {
            let values = self.old.rows.column_by_name(name)?.as_string_opt::<i32>()?;
            values.is_valid(row).then(|| values.value(row).to_owned())
        };
        let (exif, hash) = (text("exif"), self.hash.and_then(text));
        let status = text("status").unwrap_or_default();
        if status != SUCCESS {
            let message = text("error_message").unwrap_or_default();
            let of_image = status == "failed_to_resize";
            let missed = Missed { status: status_of(&message).unwrap_or(FetchStatus::Decode), of_image, message };
            return Ok(Fetched { result: Err(missed), exif, hash, downloaded: 0 });
        }
        let size = |name: &str| {
            let values = self.old.rows.column_by_name(name).and_then(|c| c.as_primitive_opt::<Int32Type>());
            values.and_then(|v| u32::try_from(v.value(row)).ok()).unwrap_or(0)
        };
        let sizes = ["width", "height", "original_width", "original_height"].map(size);
        let bytes = self.image(row, key)?;
        Ok(Fetched { result: Ok(Picture { bytes, sizes }), exif, hash, downloaded: 0 })
    }

    fn image(&mut self, row: usize, key: &str) -> Result<Vec<u8>, CrawlError> {
        let gone = |path: &Path| CrawlError::format(path, format!("the image of {key} is not there"));
        match &mut self.source {
            Source::Files => Ok(Vec::new()),
            Source::Tar(path, file, members) => {
                let (at, size) = *members.get(&format!("{key}.{}", self.extension)).ok_or_else(|| gone(path))?;
                let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
                file.read_exact_at(&mut bytes, at).map_err(|e| CrawlError::read(path, e))?;
                Ok(bytes)
            }
            Source::Parquet(path, reader, images) => loop {
                let next = match images.as_ref() {
                    Some((from, batch)) if row < from + batch.len() => {
                        let batch = batch.as_binary_opt::<i32>().ok_or_else(|| gone(path))?;
                        return Ok(batch.value(row - from).to_vec());
                    }
                    Some((from, batch)) => from + batch.len(),
                    None => 0,
                };
                let batch = reader.next().ok_or_else(|| gone(path))?;
                let batch = batch.map_err(|e| CrawlError::format(path, e.to_string()))?;
                *images = Some((next, Arc::clone(batch.column(0))));
            },
        }
    }
}

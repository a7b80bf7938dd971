//! From the list to shards.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::{Field, Schema, SchemaRef};

use super::DownloadConfig;
use super::again::Old;
use crate::CrawlError;
use crate::config::ListFormat;
use crate::sources::{ListFile, Wanted};

/// The column of the address in the output, and that of the caption.
pub(super) const URL: &str = "url";
pub(super) const CAPTION: &str = "caption";

/// A shard to be made.
pub(super) struct Shard {
    pub(super) id: u64,
    /// The columns of the list, under the names of the output.
    pub(super) rows: RecordBatch,
    /// What is there of it already.
    pub(super) old: Option<Old>,
}

impl Shard {
    /// The rows that are to be downloaded.
    pub(super) fn wanted(&self) -> u64 {
        self.old.as_ref().map_or(self.rows.num_rows() as u64, Old::wanted)
    }
}

/// The list, after a first reading.
pub(super) struct Input {
    parts: Vec<Part>,
    per_shard: usize,
    /// Rows that cannot be read, and that are in no shard.
    pub(super) unreadable: u64,
}

/// A file and its shards: each file begins a new one.
struct Part {
    file: ListFile,
    schema: SchemaRef,
    rows: u64,
    first: u64,
}

impl Input {
    /// Reads the list once: every problem of its files is found before anything is downloaded, the number of rows is known, and columns
    /// get their types.
    ///
    /// # Errors
    /// [`CrawlError::Read`] and [`CrawlError::Format`].
    pub(super) fn survey(config: &DownloadConfig) -> Result<Self, CrawlError> {
        let wanted: Vec<Wanted> = config
            .columns()
            .into_iter()
            .map(|name| Wanted { name: name.clone(), text: !config.save_additional_columns.contains(name) })
            .collect();
        let mut input = Self { parts: Vec::new(), per_shard: config.number_sample_per_shard, unreadable: 0 };
        let mut next = 0;
        for path in files(config)? {
            let hash_col = config.verify_hash.as_ref().map(|(column, _)| column.clone());
            let file = ListFile { path, format: config.input_format, hash_col };
            let survey = file.survey(&wanted)?;
            input.unreadable += survey.unreadable;
            let part = Part { file, schema: survey.schema, rows: survey.rows, first: next };
            next += part.rows.div_ceil(input.per_shard as u64);
            input.parts.push(part);
        }
        if next == 0 {
            return Err(CrawlError::format(&config.url_list, "it holds no row"));
        }
        Ok(input)
    }

    /// Lets the shards' numbers begin at `first` rather than 0.
    pub(super) fn begin_at(&mut self, first: u64) {
        self.parts.iter_mut().for_each(|part| part.first += first);
    }

    /// The rows of shards that are not among `done`, which has the number of rows of each.
    ///
    /// # Errors
    /// [`CrawlError::Format`] if a shard has another number of rows than the list would give it: it was made of another list, or with
    /// another `number_sample_per_shard`.
    pub(super) fn missing(&self, config: &DownloadConfig, done: &BTreeMap<u64, u64>) -> Result<u64, CrawlError> {
        let mut missing = 0;
        for part in &self.parts {
            for (id, rows) in part.shards(self.per_shard) {
                match done.get(&id) {
                    None => missing += rows,
                    Some(there) if *there == rows => {}
                    Some(there) => {
                        let what = format!(
                            "shard {} has {there} rows, but this list gives it {rows}: it was made of another list or with another \
                             number_sample_per_shard; use another output_folder, or incremental_mode extend or overwrite",
                            config.shard_name(id)
                        );
                        return Err(CrawlError::format(&config.output_folder, what));
                    }
                }
            }
        }
        Ok(missing)
    }

    /// Gives the shards that are not among `done` to `sink`, in order, until it wants no more.
    ///
    /// # Errors
    /// [`CrawlError::Read`] and [`CrawlError::Format`].
    pub(super) fn read(
        &self,
        config: &DownloadConfig,
        done: &BTreeMap<u64, u64>,
        sink: &mut dyn FnMut(Shard) -> bool,
    ) -> Result<(), CrawlError> {
        let mut more = true;
        for part in &self.parts {
            if !more || part.shards(self.per_shard).all(|(id, _)| done.contains_key(&id)) {
                continue;
            }
            let schema = output_schema(&part.schema, config);
            let fail = |e: &dyn std::fmt::Display| CrawlError::format(&part.file.path, e.to_string());
            let (mut id, mut waiting, mut rows) = (part.first, Vec::new(), 0);
            let mut close = |id: u64, waiting: &mut Vec<RecordBatch>| {
                let batches = std::mem::take(waiting);
                if done.contains_key(&id) {
                    return Ok(true);
                }
                let rows = concat_batches(&schema, &batches).map_err(|e| fail(&e))?;
                Ok::<_, CrawlError>(sink(Shard { id, rows, old: None }))
            };
            part.file.read(&part.schema, &mut |batch| {
                let mut batch = RecordBatch::try_new(Arc::clone(&schema), batch.columns().to_vec()).map_err(|e| fail(&e))?;
                while batch.num_rows() > 0 && more {
                    let taken = batch.num_rows().min(self.per_shard - rows);
                    waiting.push(batch.slice(0, taken));
                    batch = batch.slice(taken, batch.num_rows() - taken);
                    rows += taken;
                    if rows == self.per_shard {
                        more = close(id, &mut waiting)?;
                        (id, rows) = (id + 1, 0);
                    }
                }
                Ok(more)
            })?;
            if more && rows > 0 {
                more = close(id, &mut waiting)?;
            }
        }
        Ok(())
    }
}

impl Part {
    /// Numbers and rows of the shards.
    fn shards(&self, per_shard: usize) -> impl Iterator<Item = (u64, u64)> {
        let (first, rows, per_shard) = (self.first, self.rows, per_shard as u64);
        (0..rows.div_ceil(per_shard)).map(move |n| (first + n, per_shard.min(rows - n * per_shard)))
    }
}

/// The files of the list, in order.
fn files(config: &DownloadConfig) -> Result<Vec<PathBuf>, CrawlError> {
    let path = &config.url_list;
    if !path.is_dir() {
        return Ok(vec![path.clone()]);
    }
    let format = match config.input_format {
        ListFormat::Txt => "txt",
        ListFormat::Csv => "csv",
        ListFormat::Tsv => "tsv",
        ListFormat::Json => "json",
        ListFormat::Jsonl => "jsonl",
        ListFormat::Parquet => "parquet",
    };
    let ending = format!(".{format}{}", if config.gzipped { ".gz" } else { "" });
    let read = |e| CrawlError::read(path, e);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(read)? {
        let file = entry.map_err(read)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(&ending) && !name.starts_with('.') {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(CrawlError::format(path, format!("the folder has no file that ends in {ending}; set input_format")));
    }
    Ok(files)
}

/// The columns of the list under the names of the output.
fn output_schema(list: &Schema, config: &DownloadConfig) -> SchemaRef {
    let renamed = |field: &Field| {
        let hash = config.verify_hash.as_ref().filter(|(column, _)| column == field.name());
        let name = match hash {
            Some((_, kind)) => kind.name(),
            None if *field.name() == config.url_col => URL,
            None if config.caption_col.as_ref() == Some(field.name()) => CAPTION,
            None => field.name(),
        };
        field.clone().with_name(name)
    };
    Arc::new(Schema::new(list.fields().iter().map(|f| renamed(f)).collect::<Vec<_>>()))
}

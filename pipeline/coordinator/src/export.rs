//! Copying a dataset version out of the store, images and all, in the formats that trainers read.
//!
//! Images are read shard by shard, so pairs come in the order of (image shard, row, origin, text): shards are named by digests,
//! which mixes web and human-annotated shards. Everything is written into a hidden folder beside the wanted one and renamed into
//! place when complete.

mod blip;
mod card;
mod folder;
mod parquet;
mod pictures;
mod webdataset;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, PrimitiveArray};
use arrow::datatypes::{ArrowPrimitiveType, Field, Float32Type, Schema, SchemaRef, UInt32Type, UInt64Type};
use capfilt_schemas::{DatasetVersion, Digest, Lineage, Origin, StatusCounts, Table, column};
use capfilt_store::{Store, TakenDown};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::scan::{self, Map, Scan};
use crate::sql::{Sql, SqlConfig};
use crate::takedown::left_out;
use crate::{CoordinatorError, Result};
use folder::{Staging, Target};
use pictures::{Picture, Pictures};

/// A format of an export.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `webdataset/00000.tar`, …: for each pair `KEY.jpg` (or `.png`, …), `KEY.txt` and `KEY.json`.
    Webdataset,
    /// `parquet/00000.parquet`, …: Hugging Face `datasets` opens them with an image feature.
    Parquet,
    /// `blip.json`: the list of `{"image", "caption"}` that BLIP's own loader reads, with the images under `images/`.
    Blip,
}

impl Format {
    /// Every format.
    pub const ALL: &'static [Self] = &[Self::Webdataset, Self::Parquet, Self::Blip];

    /// The format's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Webdataset => "webdataset",
            Self::Parquet => "parquet",
            Self::Blip => "blip",
        }
    }
}

/// What to export, and where to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExportConfig {
    /// The folder to make. Its parent must be writable.
    pub folder: PathBuf,
    /// The formats to write; all by default.
    pub formats: Vec<Format>,
    /// Pairs in a tar or Parquet file.
    pub samples_per_file: u64,
    /// Whether the BLIP format copies the images; without, its list has `url` in place of `image`, like the lists that BLIP's
    /// authors published.
    pub blip_images: bool,
    /// Whether an export that is in the folder already is replaced, whatever it holds.
    pub overwrite: bool,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self {
            folder: PathBuf::from("export"),
            formats: Format::ALL.to_vec(),
            samples_per_file: 10_000,
            blip_images: true,
            overwrite: false,
        }
    }
}

impl ExportConfig {
    /// Refuses what would write nothing.
    ///
    /// # Errors
    /// [`CoordinatorError::Setting`].
    pub fn validate(&self) -> Result<()> {
        let bad = |setting, problem: &str| Err(CoordinatorError::Setting { setting, problem: problem.to_owned() });
        if self.formats.is_empty() {
            return bad("export.formats", "is empty; use one or more of webdataset, parquet, blip");
        }
        if self.samples_per_file == 0 {
            return bad("export.samples_per_file", "is 0; use 1 or more (10000 is usual)");
        }
        if self.folder.file_name().is_none() {
            return bad("export.folder", "is no folder that could be made; name one");
        }
        Ok(())
    }
}

/// A file of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedFile {
    /// The path below the export's folder, with `/`.
    pub path: String,
    /// Its size.
    pub bytes: u64,
}

/// `manifest.json`: what an export holds. Images under `images/` are not listed one by one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The dataset's name.
    pub dataset: String,
    /// Its version.
    pub version: u64,
    /// The version's digest.
    pub digest: Digest,
    /// Pairs.
    pub pairs: u64,
    /// Distinct images.
    pub images: u64,
    /// Pairs by origin.
    pub counts: StatusCounts,
    /// Pairs of the version that are not in here, because they were taken down after it was built.
    #[serde(default)]
    pub left_out: u64,
    /// Share of judged texts that the filter threw out.
    pub noise_ratio: Option<f64>,
    /// The formats written.
    pub formats: Vec<Format>,
    /// Pairs in a tar or Parquet file.
    pub samples_per_file: u64,
    /// Whether the BLIP format has the images.
    pub blip_images: bool,
    /// The files written.
    pub files: Vec<ExportedFile>,
    /// The `[build]` settings.
    pub settings: Value,
    /// From what the version was built.
    pub lineage: Lineage,
}

/// What an export came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExportSummary {
    /// The folder.
    pub folder: PathBuf,
    /// Whether the very export was there already; nothing was written then.
    pub already_there: bool,
    /// What the folder holds.
    pub manifest: Manifest,
}

/// A pair on its way into the files.
struct Pair {
    /// Unique in the export; without a dot, since WebDataset takes what is before the first dot for the key.
    key: String,
    sample_id: String,
    origin: String,
    text: String,
    itm: Option<f32>,
    itc: Option<f32>,
    clip: Option<f32>,
    url: String,
    sha256: String,
    picture: Arc<Picture>,
}

/// A format being written.
trait Sink: Send {
    fn write(&mut self, pair: &Pair) -> Result<()>;
    /// Ends the last file and lists all.
    fn finish(self: Box<Self>) -> Result<Vec<ExportedFile>>;
}

/// All texts, by image; `nth` counts the texts of a sample and origin from 1.
const PAIRS: &str = "
    SELECT shard, row_no, sample_id, origin, text, itm, itc, clip, url, sha256,
           row_number() OVER (PARTITION BY sample_id, origin ORDER BY text, shard, row_no) AS nth
    FROM dataset
    ORDER BY shard, row_no, origin, nth";

/// Exports a version, but for what was taken down since it was built. `progress` is told how many of the version's pairs are done, now and then.
///
/// An export of the same rows in the same formats that is complete in the folder is left as it is, unless `overwrite` is on. The same version and settings
/// give the same bytes.
///
/// # Errors
/// [`CoordinatorError::Folder`] if something else is in the folder and may not be replaced; [`CoordinatorError::File`];
/// [`CoordinatorError::Store`] and [`CoordinatorError::Rows`] for a shard that is missing or damaged, or a pair without an image.
pub async fn export(
    store: &Store,
    sql: &SqlConfig,
    version: &DatasetVersion,
    config: &ExportConfig,
    progress: impl Fn(u64) + Send,
) -> Result<ExportSummary> {
    config.validate()?;
    let mut formats = config.formats.clone();
    formats.sort_unstable();
    formats.dedup();
    let taken_down = store.taken_down().await?;
    let left_out = left_out(store, version, &taken_down).await?;
    let same = |m: &Manifest| {
        let layout = m.samples_per_file == config.samples_per_file && m.blip_images == config.blip_images;
        m.digest == version.digest && m.left_out == left_out && m.formats == formats && layout
    };
    let folder = std::path::absolute(&config.folder).map_err(|e| file_error("find", &config.folder, e))?;
    let replace = match folder::look(&folder)? {
        Target::Free => false,
        Target::Export(_) if config.overwrite => true,
        Target::Export(manifest) if same(&manifest) && folder::is_whole(&folder, &manifest) => {
            return Ok(ExportSummary { folder, already_there: true, manifest: *manifest });
        }
        Target::Export(there) => return Err(folder::in_the_way(folder, &there, version, left_out)),
    };
    let staging = Staging::open(&folder)?;
    let mut manifest = Manifest {
        dataset: version.name.clone(),
        version: version.version,
        digest: version.digest,
        pairs: 0,
        images: 0,
        counts: StatusCounts::new(),
        left_out,
        noise_ratio: version.noise_ratio,
        formats,
        samples_per_file: config.samples_per_file,
        blip_images: config.blip_images,
        files: Vec::new(),
        settings: version.settings.clone(),
        lineage: version.lineage.clone(),
    };
    let copied = copy(store, sql, version, &taken_down, &mut manifest, staging.path(), progress).await;
    let written = copied.and_then(|()| {
        write_file(&staging.path().join("README.md"), card::card(version, &manifest).as_bytes())?;
        let json = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| CoordinatorError::Encode { what: "manifest.json".to_owned(), source: Box::new(e) })?;
        write_file(&staging.path().join(folder::MANIFEST), &json)
    });
    match written {
        Ok(()) => staging.publish(&folder, replace)?,
        Err(e) => {
            staging.discard();
            return Err(e);
        }
    }
    Ok(ExportSummary { folder, already_there: false, manifest })
}

/// Moves the pairs from the store to the sinks, which write on a thread of their own.
async fn copy(
    store: &Store,
    sql: &SqlConfig,
    version: &DatasetVersion,
    taken_down: &TakenDown,
    manifest: &mut Manifest,
    folder: &Path,
    progress: impl Fn(u64) + Send,
) -> Result<()> {
    let mut sinks = Vec::new();
    for format in &manifest.formats {
        sinks.push(match format {
            Format::Webdataset => Box::new(webdataset::Tars::new(folder, manifest.samples_per_file)?) as Box<dyn Sink>,
            Format::Parquet => Box::new(parquet::ParquetFiles::new(folder, manifest.samples_per_file)?),
            Format::Blip => Box::new(blip::BlipList::new(folder, manifest.blip_images)?),
        });
    }
    let (sender, mut receiver) = mpsc::channel::<Pair>(32);
    let writer = tokio::task::spawn_blocking(move || -> Result<Vec<ExportedFile>> {
        while let Some(pair) = receiver.blocking_recv() {
            for sink in &mut sinks {
                sink.write(&pair)?;
            }
        }
        let files = sinks.into_iter().map(Sink::finish).collect::<Result<Vec<_>>>()?;
        Ok(files.concat())
    });
    let sent = send(store, sql, version, taken_down, manifest, sender, progress).await;
    let files = match writer.await {
        Ok(files) => files?,
        Err(e) => return Err(CoordinatorError::Encode { what: "the export".to_owned(), source: Box::new(e) }),
    };
    sent?;
    manifest.files = files;
    Ok(())
}

async fn send(
    store: &Store,
    sql: &SqlConfig,
    version: &DatasetVersion,
    taken_down: &TakenDown,
    manifest: &mut Manifest,
    sender: mpsc::Sender<Pair>,
    progress: impl Fn(u64) + Send,
) -> Result<()> {
    let sql = Sql::new(sql)?;
    register_dataset(store, &sql, version)?;
    let mut pictures = Pictures::new(store);
    for origin in Origin::ALL {
        manifest.counts.insert(origin.as_str().to_owned(), 0);
    }
    let mut rows = sql.query("pairs to export", PAIRS, &[]).await?;
    while let Some(batch) = rows.next().await? {
        let row_no = batch.column(1).as_primitive::<UInt32Type>();
        let nth = batch.column(10).as_primitive::<UInt64Type>();
        for i in 0..batch.num_rows() {
            let text = |c: usize| batch.column(c).as_string::<i32>().value(i).to_owned();
            if taken_down.covers(&text(8), Some(&text(9))) {
                continue;
            }
            let (sample_id, origin) = (text(2), text(3));
            let table = if origin == Origin::Human.as_str() { Table::Annotated } else { Table::Samples };
            let (picture, new) = pictures.get(table, &text(0), row_no.value(i)).await?;
            manifest.images += u64::from(new);
            manifest.pairs += 1;
            *manifest.counts.entry(origin.clone()).or_default() += 1;
            let pair = Pair {
                key: format!("{}-{origin}-{}", safe(&sample_id), nth.value(i) - 1),
                sample_id,
                origin,
                text: text(4),
                itm: number::<Float32Type>(batch.column(5), i),
                itc: number::<Float32Type>(batch.column(6), i),
                clip: number::<Float32Type>(batch.column(7), i),
                url: text(8),
                sha256: text(9),
                picture,
            };
            if sender.send(pair).await.is_err() {
                // The writer has stopped; it knows why.
                return Ok(());
            }
        }
        progress(manifest.pairs);
    }
    Ok(())
}

fn register_dataset(store: &Store, sql: &Sql, version: &DatasetVersion) -> Result<()> {
    const COLUMNS: &[&str] = &[
        column::SHARD,
        column::ROW,
        column::SAMPLE_ID,
        column::ORIGIN,
        column::TEXT,
        column::ITM,
        column::ITC,
        column::CLIP,
        column::URL,
        column::SHA256,
    ];
    let of = Table::Dataset.schema();
    // `row` is a word of SQL.
    let name = |c: &&str| if *c == column::ROW { "row_no" } else { *c }.to_owned();
    let fields: Vec<Field> =
        COLUMNS.iter().filter_map(|c| Some(of.field_with_name(c).ok()?.clone().with_name(name(c)))).collect();
    let schema: SchemaRef = Arc::new(Schema::new(fields));
    let shards: Vec<Digest> = version.shards.iter().map(|s| s.digest).collect();
    let columns = Arc::clone(&schema);
    let map: Map = Arc::new(move |_, slice| scan::batch("dataset rows", &columns, slice.batches[0].columns().to_vec()));
    Scan::of(store, Table::Dataset, &shards, COLUMNS).register(sql, "dataset", &schema, &map)
}

fn number<T: ArrowPrimitiveType>(column: &ArrayRef, i: usize) -> Option<T::Native> {
    let values: &PrimitiveArray<T> = column.as_primitive();
    values.is_valid(i).then(|| values.value(i))
}

/// A sample id as part of a file's name. Ids are hexadecimal; anything else is replaced by its digest.
fn safe(id: &str) -> String {
    let plain = !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if plain { id.to_owned() } else { Digest::of(id.as_bytes()).to_string() }
}

fn file_error(verb: &'static str, path: &Path, source: std::io::Error) -> CoordinatorError {
    CoordinatorError::File { verb, path: path.to_owned(), source }
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|e| file_error("write", path, e))
}

/// A finished file, with its size as the file system has it.
fn listed(folder: &Path, path: String) -> Result<ExportedFile> {
    let full = folder.join(&path);
    let bytes = std::fs::metadata(&full).map_err(|e| file_error("read", &full, e))?.len();
    Ok(ExportedFile { path, bytes })
}

#[cfg(test)]
mod tests;

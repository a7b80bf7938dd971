//! The folder that a download writes into: which shards are done, and how a shard comes to be there all at once.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::{DownloadConfig, IncrementalMode};
use crate::CrawlError;

/// Where shards grow.
const GROWING: &str = "_tmp";
/// A shard is done when it has this file.
const STATS: &str = "_stats.json";

/// The folder, held by this process.
pub(super) struct Folder {
    root: PathBuf,
    growing: PathBuf,
    /// Shards that are done, and their rows.
    pub(super) done: BTreeMap<u64, u64>,
    /// The lock in it dies with the process.
    _held: File,
}

impl Folder {
    /// Makes the folder or looks at it, and removes what a killed run left unfinished.
    ///
    /// # Errors
    /// [`CrawlError::Write`], [`CrawlError::Config`] if another process writes into it, and [`CrawlError::Format`] if its shards were made
    /// with other settings.
    pub(super) fn open(config: &DownloadConfig) -> Result<Self, CrawlError> {
        let root = config.output_folder.clone();
        let growing = root.join(GROWING);
        fs::create_dir_all(&growing).map_err(|e| CrawlError::write(&growing, e))?;
        let lock = growing.join("lock");
        let held = File::create(&lock).map_err(|e| CrawlError::write(&lock, e))?;
        if let Err(TryLockError::WouldBlock) = held.try_lock() {
            let reason = format!("another download writes into `{}`; wait for it or choose another folder", root.display());
            return Err(CrawlError::Config { setting: "output_folder".to_owned(), reason });
        }
        for entry in entries(&growing)? {
            if entry != lock {
                remove(&entry)?;
            }
        }
        let mut folder = Self { root, growing, done: BTreeMap::new(), _held: held };
        if config.incremental_mode == IncrementalMode::Overwrite {
            folder.clear()?;
        }
        for entry in entries(&folder.root)? {
            if let Some(shard) = shard_of(&entry).filter(|_| name(&entry).ends_with(STATS)) {
                // An unreadable file of another program's crash: the shard is made again.
                let Some(stats) = fs::read(&entry).ok().and_then(|json| serde_json::from_slice::<Stats>(&json).ok()) else {
                    continue;
                };
                if config.incremental_mode == IncrementalMode::Incremental
                    && let Some(reason) = difference(&stats.settings, &config.settings())
                {
                    remove(&folder.growing)?;
                    let what = format!(
                        "shard {} was made with {reason}; use the same settings, another output_folder, or incremental_mode extend \
                         or overwrite",
                        config.shard_name(shard)
                    );
                    return Err(CrawlError::format(&folder.root, what));
                }
                folder.done.insert(shard, stats.count);
            }
        }
        Ok(folder)
    }

    /// The number of the first shard that this run makes.
    pub(super) fn first(&self, mode: IncrementalMode) -> u64 {
        match mode {
            IncrementalMode::Extend => self.done.last_key_value().map_or(0, |(last, _)| last + 1),
            IncrementalMode::Incremental | IncrementalMode::Overwrite => 0,
        }
    }

    /// Removes shards, and nothing else.
    fn clear(&self) -> Result<(), CrawlError> {
        // The stats first: a shard without them is not done.
        let (stats, others): (Vec<_>, Vec<_>) =
            entries(&self.root)?.into_iter().filter(|e| shard_of(e).is_some()).partition(|e| name(e).ends_with(STATS));
        stats.iter().chain(&others).try_for_each(|entry| remove(entry))
    }

    /// Where a file of a shard stands when it is done.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.root.join(file)
    }

    /// Where a file or folder of a shard is written.
    pub(super) fn growing(&self, file: &str) -> PathBuf {
        self.growing.join(file)
    }

    /// Puts a written file in its place, whole. A folder of samples replaces one that is there, or `joins` it.
    pub(super) fn publish(&self, file: &str, joins: bool) -> Result<(), CrawlError> {
        let (from, to) = (self.growing(file), self.path(file));
        let publish = || {
            if !from.is_dir() {
                File::open(&from)?.sync_all()?;
                return fs::rename(&from, &to);
            }
            if !joins && to.is_dir() {
                fs::remove_dir_all(&to)?;
            }
            fs::create_dir_all(&to)?;
            for entry in fs::read_dir(&from)? {
                let entry = entry?;
                fs::rename(entry.path(), to.join(entry.file_name()))?;
            }
            fs::remove_dir(&from)
        };
        publish().map_err(|e: io::Error| CrawlError::write(&to, e))
    }

    /// Writes the file that makes a shard done.
    pub(super) fn finish(&self, shard: &str, stats: &[u8]) -> Result<(), CrawlError> {
        let file = format!("{shard}{STATS}");
        let path = self.growing(&file);
        fs::write(&path, stats).map_err(|e| CrawlError::write(&path, e))?;
        self.publish(&file, false)
    }

    /// Removes the place where shards grew, and what is unfinished.
    pub(super) fn close(&self) -> Result<(), CrawlError> {
        remove(&self.growing)
    }
}

/// What the stats of a shard are asked for. Those of other programs have no settings.
#[derive(Deserialize)]
struct Stats {
    count: u64,
    #[serde(default)]
    settings: BTreeMap<String, Value>,
}

/// The first setting that two runs do not share, and how they differ in it.
fn difference(there: &BTreeMap<String, Value>, here: &BTreeMap<String, Value>) -> Option<String> {
    if there.is_empty() {
        return None;
    }
    let name = here.keys().chain(there.keys()).find(|name| there.get(*name) != here.get(*name))?;
    let value = |of: &BTreeMap<String, Value>| of.get(name).map_or_else(|| "not set".to_owned(), Value::to_string);
    Some(format!("another `{name}`: {} there, {} here", value(there), value(here)))
}

/// The number of the shard that a file or folder belongs to by its name: `00012.tar`, `00012_stats.json`, `00012`.
fn shard_of(path: &Path) -> Option<u64> {
    let name = name(path);
    let end = name.find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len());
    let known = match &name[end..] {
        "" => path.is_dir(),
        rest => [".tar", ".parquet", ".tfrecord", STATS].contains(&rest),
    };
    if known { name[..end].parse().ok() } else { None }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What is in a folder, by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, CrawlError> {
    let list = || -> io::Result<Vec<PathBuf>> { fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect() };
    let mut entries = list().map_err(|e| CrawlError::read(folder, e))?;
    entries.sort();
    Ok(entries)
}

fn remove(path: &Path) -> Result<(), CrawlError> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(|e| CrawlError::write(path, e))
}

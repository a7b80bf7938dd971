//! Downloading a list of addresses into files for training, without a store or a run: img2dataset's flags, layouts and names on top of
//! the crawler's manners.
//!
//! ```text
//! list ─► shards ─► rows, many at work at once, at most AHEAD of them begun ─► one writer a shard: the list's order, then whole
//! ```
//!
//! A shard whose last rows wait for a slow host does not hold up the shards after it: up to [`OPEN_SHARDS`] are being written. It ends:
//! each row within the time that `Web::get` states, and no row waits for more than the rows before it.

mod again;
mod config;
pub(crate) mod exif;
mod folder;
mod layout;
mod row;
mod shards;
mod writer;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arrow::array::{Array, AsArray};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use config::{DownloadConfig, IncrementalMode, OutputFormat};

use crate::web::AHEAD;
use crate::{CrawlError, Traffic, Web};
use folder::Folder;
use row::obtain;
use shards::{Input, Shard, URL};

/// Shards being written at once.
const OPEN_SHARDS: usize = 6;
/// Shards that fail for good, one after the other, before the download ends: the disk is full, or the folder gone.
const FAILED_IN_A_ROW: usize = 3;

/// How far a download is, to be looked at from elsewhere.
#[derive(Default)]
pub struct DownloadProgress {
    rows: AtomicU64,
    shards: AtomicU64,
    traffic: Traffic,
}

impl DownloadProgress {
    /// Rows that this run has to download; 0 until the list is read.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Shards that are written.
    pub fn shards(&self) -> u64 {
        self.shards.load(Ordering::Relaxed)
    }

    /// What the downloads lead to.
    pub const fn traffic(&self) -> &Traffic {
        &self.traffic
    }
}

/// What a download came to.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct DownloadSummary {
    /// Shards written.
    pub shards: u64,
    /// Shards that were there already.
    pub shards_there: u64,
    /// Rows of the written shards, rows that a retry left as they were included.
    pub count: u64,
    /// Rows with an image.
    pub successes: u64,
    /// Rows whose address gave no bytes, or others than expected.
    pub failed_to_download: u64,
    /// Rows of whose bytes no image could be made.
    pub failed_to_resize: u64,
    /// Rows of the list that could not be read, and are in no shard.
    pub unreadable: u64,
    /// Shards that could not be written, and why.
    pub failed_shards: BTreeMap<u64, String>,
    /// Whether the download was stopped before its end.
    pub stopped: bool,
    /// How long it took.
    pub seconds: f64,
}

/// Downloads what is not downloaded yet. When `stop` is cancelled, the shards under way are dropped, and all others stay.
///
/// # Errors
/// [`CrawlError::Config`], [`CrawlError::Read`] and [`CrawlError::Format`] for a list that cannot be used, before anything is downloaded;
/// [`CrawlError::Write`] if the folder cannot be used.
pub async fn download(
    config: DownloadConfig,
    progress: Arc<DownloadProgress>,
    stop: CancellationToken,
) -> Result<DownloadSummary, CrawlError> {
    let began = Instant::now();
    config.check()?;
    let opt_outs = crate::opt_out::digests(&config.fetch.web.opt_out_lists)?;
    let web = Web::new(&config.crawler)?.without(&config.fetch.web, &opt_outs).await?;
    let config = Arc::new(config);
    // The list is read before the folder is touched: one that cannot be used must not cost the shards that `overwrite` removes.
    let opened = {
        let (config, progress, stop) = (Arc::clone(&config), Arc::clone(&progress), stop.clone());
        blocking(move || {
            let mut input = Input::survey(&config)?;
            if stop.is_cancelled() {
                return Ok(None);
            }
            let folder = Folder::open(&config)?;
            input.begin_at(folder.first(config.incremental_mode));
            let missing = input.missing(&config, &folder.done);
            if missing.is_err() {
                folder.close()?;
            }
            progress.rows.store(missing?, Ordering::Relaxed);
            Ok(Some((folder, input)))
        })
    };
    let opened = tokio::select! {
        opened = opened => opened?,
        () = stop.cancelled() => None,
    };
    let Some((folder, input)) = opened else {
        return Ok(DownloadSummary { stopped: true, ..DownloadSummary::default() });
    };
    let mut summary = DownloadSummary { unreadable: input.unreadable, ..DownloadSummary::default() };
    summary.shards_there = folder.done.len() as u64;
    let folder = Arc::new(folder);
    let shards = read_ahead(&config, &folder, input, &progress);
    let engine = Engine { config: Arc::clone(&config), web, folder: Arc::clone(&folder), progress: Arc::clone(&progress), stop };
    let ended = engine.run(shards, &mut summary).await;
    summary.stopped = engine.stop.is_cancelled();
    folder.close()?;
    ended?;
    summary.seconds = began.elapsed().as_secs_f64();
    Ok(summary)
}

/// Runs what waits for disks on a thread that may wait.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, CrawlError> + Send + 'static) -> Result<T, CrawlError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(CrawlError::Thread(e.to_string())),
    }
}

/// Reads shards while earlier ones are at work: those to be retried, then those of the list.
fn read_ahead(
    config: &Arc<DownloadConfig>,
    folder: &Arc<Folder>,
    input: Input,
    progress: &Arc<DownloadProgress>,
) -> mpsc::Receiver<Result<Shard, CrawlError>> {
    let (sender, receiver) = mpsc::channel(1);
    let (config, folder, progress) = (Arc::clone(config), Arc::clone(folder), Arc::clone(progress));
    tokio::task::spawn_blocking(move || {
        let read = || -> Result<(), CrawlError> {
            let retried = if config.retry_status.is_empty() { BTreeMap::new() } else { folder.done.clone() };
            for id in retried.keys() {
                if let Some(shard) = again::read(*id, &folder, &config)? {
                    progress.rows.fetch_add(shard.wanted(), Ordering::Relaxed);
                    if sender.blocking_send(Ok(shard)).is_err() {
                        return Ok(());
                    }
                }
            }
            input.read(&config, &folder.done, &mut |shard| sender.blocking_send(Ok(shard)).is_ok())
        };
        if let Err(e) = read() {
            let _ = sender.blocking_send(Err(e));
        }
    });
    receiver
}

/// What every row needs.
struct Engine {
    config: Arc<DownloadConfig>,
    web: Web,
    folder: Arc<Folder>,
    progress: Arc<DownloadProgress>,
    stop: CancellationToken,
}

/// A shard that has been written, or not.
type Written = (Arc<Shard>, u32, Result<Option<writer::Stats>, CrawlError>);

impl Engine {
    async fn run(
        &self,
        mut shards: mpsc::Receiver<Result<Shard, CrawlError>>,
        summary: &mut DownloadSummary,
    ) -> Result<(), CrawlError> {
        let begun = Arc::new(Semaphore::new(AHEAD));
        let mut writing: JoinSet<Written> = JoinSet::new();
        let mut again: VecDeque<(Arc<Shard>, u32)> = VecDeque::new();
        let (mut ended, mut failed_in_a_row) = (false, 0);
        loop {
            // Room for another shard, and none before the failed ones have been tried again.
            while writing.len() >= OPEN_SHARDS || (ended && again.is_empty() && !writing.is_empty()) {
                let Some(written) = writing.join_next().await else { break };
                let (shard, attempt, result) = written.map_err(|e| CrawlError::Thread(e.to_string()))?;
                match result {
                    Ok(Some(stats)) => {
                        failed_in_a_row = 0;
                        summary.shards += 1;
                        summary.count += stats.count;
                        summary.successes += stats.successes;
                        summary.failed_to_download += stats.failed_to_download;
                        summary.failed_to_resize += stats.failed_to_resize;
                    }
                    Ok(None) => {}
                    Err(e) if attempt < self.config.max_shard_retry => {
                        tracing::warn!(
                            shard = shard.id,
                            error = capfilt_store::chain(&e),
                            "a shard could not be written; trying again"
                        );
                        self.progress.rows.fetch_add(shard.wanted(), Ordering::Relaxed);
                        again.push_back((shard, attempt + 1));
                    }
                    Err(e) => {
                        tracing::error!(shard = shard.id, error = capfilt_store::chain(&e), "a shard could not be written");
                        summary.failed_shards.insert(shard.id, capfilt_store::chain(&e));
                        failed_in_a_row += 1;
                        if failed_in_a_row >= FAILED_IN_A_ROW {
                            return Err(e);
                        }
                    }
                }
            }
            let next = match again.pop_front() {
                Some(next) => Some(next),
                None if self.stop.is_cancelled() => None,
                None => shards.recv().await.transpose()?.map(|shard| (Arc::new(shard), 0)),
            };
            match next {
                Some((shard, attempt)) => self.begin(shard, attempt, &begun, &mut writing).await,
                None if writing.is_empty() && again.is_empty() => return Ok(()),
                None => ended = true,
            }
        }
    }

    /// Begins the rows of a shard, one after the other, as others end.
    async fn begin(&self, shard: Arc<Shard>, attempt: u32, begun: &Arc<Semaphore>, writing: &mut JoinSet<Written>) {
        let (sender, results) = mpsc::channel(8);
        let (config, folder, progress) = (Arc::clone(&self.config), Arc::clone(&self.folder), Arc::clone(&self.progress));
        let written = Arc::clone(&shard);
        writing.spawn_blocking(move || {
            let result = writer::write(&written, &config, &folder, results);
            progress.shards.fetch_add(u64::from(matches!(result, Ok(Some(_)))), Ordering::Relaxed);
            (written, attempt, result)
        });
        let text = |column: &str, row: usize| {
            let values = shard.rows.column_by_name(column)?.as_string_opt::<i32>()?;
            values.is_valid(row).then(|| values.value(row).to_owned())
        };
        for row in 0..shard.rows.num_rows() {
            if shard.old.as_ref().is_some_and(|old| !old.is_wanted(row)) {
                continue;
            }
            let place = tokio::select! {
                place = Arc::clone(begun).acquire_owned() => place,
                () = self.stop.cancelled() => return,
            };
            // The writer has failed: nothing that is downloaded for it would be kept.
            if sender.is_closed() {
                return;
            }
            let url = text(URL, row).unwrap_or_default();
            let expected = self.config.verify_hash.as_ref().map(|(_, kind)| (text(kind.name(), row).unwrap_or_default(), *kind));
            let (web, config, sender, stop) = (self.web.clone(), Arc::clone(&self.config), sender.clone(), self.stop.clone());
            let progress = Arc::clone(&self.progress);
            tokio::spawn(async move {
                tokio::select! {
                    (fetched, answer) = obtain(&web, &url, expected, &config, &progress.traffic) => {
                        let _ = sender.send((row, fetched, answer)).await;
                    }
                    () = stop.cancelled() => {}
                }
                drop(place);
            });
        }
    }
}

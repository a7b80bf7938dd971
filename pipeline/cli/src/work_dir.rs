//! The work folder of a run: whose it is, and what must leave it.

use std::fs::{File, TryLockError};
use std::path::Path;

use anyhow::Context as _;
use capfilt_coordinator::export::Manifest;
use capfilt_coordinator::takedown::left_out;
use capfilt_store::Store;

use crate::args::SweepArgs;
use crate::config::RunConfig;
use crate::output::{Failure, complain};

/// Takes the work folder for this process: two runs in one would overwrite each other's unfinished work. The lock dies with the process.
pub(crate) fn lock(config: &RunConfig) -> Result<File, Failure> {
    let folder = &config.worker.runtime.work_dir;
    let path = folder.join("lock");
    let open = || std::fs::create_dir_all(folder).and_then(|()| File::create(&path));
    let file = open().with_context(|| format!("cannot write `{}`", path.display()))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Failure::Usage(format!(
            "another run is at work in `{}`; wait for it, or give this one another `worker.runtime.work_dir`",
            folder.display()
        ))),
        // A file system without locks is used without them.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// Removes what was taken down from the work folder, where a config says which one it is and no run is at work in it.
pub(crate) async fn clear(store: &Store, args: &SweepArgs) -> Result<u64, Failure> {
    let path = Path::new(&args.store.store);
    if !path.is_file() {
        return Ok(0);
    }
    let config = RunConfig::load(path, &[])?;
    let folder = &config.worker.runtime.work_dir;
    if !folder.is_dir() {
        return Ok(0);
    }
    match lock(&config) {
        Ok(_alone) => remove_exports(store, folder, args.dry_run).await,
        Err(busy) => {
            complain(&format!("the work folder was left as it is: {}", busy.text()));
            Ok(0)
        }
    }
}

/// Removes the exports that were made for external trainers from a work folder, if they are older than the last takedown that reaches
/// them; they are made again where they are needed.
async fn remove_exports(store: &Store, work_dir: &Path, dry_run: bool) -> Result<u64, Failure> {
    let Ok(tasks) = std::fs::read_dir(work_dir.join("external")) else { return Ok(0) };
    let taken_down = store.taken_down().await?;
    let mut removed = 0;
    for task in tasks.flatten() {
        let export = task.path().join("export");
        let Ok(json) = std::fs::read(export.join("manifest.json")) else { continue };
        let Ok(manifest) = serde_json::from_slice::<Manifest>(&json) else { continue };
        let version = store.dataset_version(&manifest.dataset, Some(manifest.version)).await?;
        if left_out(store, &version, &taken_down).await? != manifest.left_out {
            removed += 1;
            if !dry_run {
                std::fs::remove_dir_all(&export).with_context(|| format!("cannot remove `{}`", export.display()))?;
            }
        }
    }
    Ok(removed)
}

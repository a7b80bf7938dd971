//! The folder of an export: what is in it, and how it comes to be there all at once.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use capfilt_schemas::DatasetVersion;

use super::{Manifest, file_error};
use crate::{CoordinatorError, Result};

/// Every complete export has it.
pub(super) const MANIFEST: &str = "manifest.json";

/// What is where an export should go.
pub(super) enum Target {
    /// Nothing, or an empty folder.
    Free,
    /// A complete export.
    Export(Box<Manifest>),
}

/// Looks at the wanted folder. Something that is no export is never touched.
pub(super) fn look(folder: &Path) -> Result<Target> {
    match fs::read(folder.join(MANIFEST)) {
        Ok(json) => serde_json::from_slice(&json).map(Target::Export).map_err(|e| CoordinatorError::Folder {
            folder: folder.to_owned(),
            problem: format!("its {MANIFEST} is not one of capfilt ({e}); choose another folder"),
        }),
        Err(_) => match fs::read_dir(folder) {
            Ok(mut entries) => match entries.next() {
                None => Ok(Target::Free),
                Some(_) => Err(CoordinatorError::Folder {
                    folder: folder.to_owned(),
                    problem: "it holds other files, which are left alone; choose another folder or empty this one".to_owned(),
                }),
            },
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Target::Free),
            Err(e) => Err(file_error("read", folder, e)),
        },
    }
}

/// Whether every listed file is there with its size.
pub(super) fn is_whole(folder: &Path, manifest: &Manifest) -> bool {
    manifest.files.iter().all(|f| fs::metadata(folder.join(&f.path)).is_ok_and(|m| m.len() == f.bytes))
}

/// Why an export stays as it is.
pub(super) fn in_the_way(folder: PathBuf, there: &Manifest, wanted: &DatasetVersion, left_out: u64) -> CoordinatorError {
    let what = if there.digest != wanted.digest {
        format!("it holds {}@{} ({})", there.dataset, there.version, there.digest.short())
    } else if there.left_out != left_out {
        format!("it holds {} pairs that were taken down since", left_out.saturating_sub(there.left_out))
    } else if is_whole(&folder, there) {
        let formats: Vec<_> = there.formats.iter().map(|f| f.name()).collect();
        format!("it holds the same rows in another layout ({}, {} a file)", formats.join(", "), there.samples_per_file)
    } else {
        "it holds this export, but files are missing or cut short".to_owned()
    };
    CoordinatorError::Folder { folder, problem: format!("{what}; pass `--overwrite` to replace it, or choose another folder") }
}

/// The hidden folder in which an export grows. The lock in it dies with the process, so what a killed export left is told apart from
/// what a living one is writing.
pub(super) struct Staging {
    path: PathBuf,
    lock: PathBuf,
    _held: File,
}

impl Staging {
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let path = sibling(folder, "partial");
        fs::create_dir_all(&path).map_err(|e| file_error("make", &path, e))?;
        let lock = path.join(".lock");
        let held = File::create(&lock).map_err(|e| file_error("write", &lock, e))?;
        if let Err(TryLockError::WouldBlock) = held.try_lock() {
            let problem = "another export to it is running; wait for it or choose another folder".to_owned();
            return Err(CoordinatorError::Folder { folder: folder.to_owned(), problem });
        }
        for entry in fs::read_dir(&path).map_err(|e| file_error("read", &path, e))? {
            let entry = entry.map_err(|e| file_error("read", &path, e))?.path();
            if entry != lock {
                let removed = if entry.is_dir() { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
                removed.map_err(|e| file_error("remove", &entry, e))?;
            }
        }
        Ok(Self { path, lock, _held: held })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the folder in its place; an export there is removed once the new one stands.
    pub(super) fn publish(self, folder: &Path, replace: bool) -> Result<()> {
        let old = sibling(folder, "replaced");
        if replace {
            if old.exists() {
                fs::remove_dir_all(&old).map_err(|e| file_error("remove", &old, e))?;
            }
            fs::rename(folder, &old).map_err(|e| file_error("rename", folder, e))?;
        }
        fs::rename(&self.path, folder).map_err(|e| file_error("rename", &self.path, e))?;
        // Held until now, so that nobody takes the unfinished folder for abandoned.
        let lock = folder.join(self.lock.file_name().unwrap_or_default());
        fs::remove_file(&lock).map_err(|e| file_error("remove", &lock, e))?;
        if replace {
            fs::remove_dir_all(&old).map_err(|e| file_error("remove", &old, e))?;
        }
        Ok(())
    }

    /// Removes what there is of it, as far as that goes: the next export would do it anyway.
    pub(super) fn discard(self) {
        if let Err(e) = fs::remove_dir_all(&self.path) {
            tracing::warn!(folder = %self.path.display(), "the unfinished export was left behind: {e}");
        }
    }
}

/// `.NAME.SUFFIX` beside the folder, on the same file system.
fn sibling(folder: &Path, suffix: &str) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}.{suffix}"))
}

//! What the machine gives a process: open files and disk.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// More files than this are never needed, and some systems walk over all that are allowed.
const ENOUGH_FILES: u64 = 1 << 17;
/// How much is written to measure a disk.
const TRIAL_BYTES: usize = 64 << 20;

/// Allows as many open files as the machine lets anybody have: a crawl holds many sockets, and shells often begin with 1,024.
pub(crate) fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(ENOUGH_FILES).min(ENOUGH_FILES);
    if current.is_some_and(|now| now < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}

/// Files that this process may have open; `None` if there is no limit.
pub(crate) fn file_limit() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// A folder's disk.
pub(crate) struct Disk {
    /// Bytes that can still be written.
    pub(crate) free: u64,
    /// Bytes a second, to the disk and not only to its cache.
    pub(crate) write_rate: f64,
}

impl Disk {
    /// Looks at the disk of a folder, which is made if it is not there, and writes 64 MiB to it.
    pub(crate) fn of(folder: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let stat = rustix::fs::statvfs(folder)?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let mut file = tempfile::tempfile_in(folder)?;
        let block: Vec<u8> = (0..1_u32 << 18).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
        let begin = Instant::now();
        for _ in 0..TRIAL_BYTES / block.len() {
            file.write_all(&block)?;
        }
        file.sync_all()?;
        Ok(Self { free, write_rate: TRIAL_BYTES as f64 / begin.elapsed().as_secs_f64() })
    }
}

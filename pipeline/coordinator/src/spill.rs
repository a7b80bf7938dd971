//! Bytes sorted into partitions, in memory while they fit and in one temporary file beyond that.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::{CoordinatorError, Result, SqlConfig};

/// Partitions. A billion records of 40 bytes make partitions of 40 MB.
pub(crate) const PARTITIONS: usize = 1024;

/// The partition of a number that is spread evenly, as hashes are. The order of partitions is that of the numbers.
pub(crate) const fn partition_of(n: u128) -> usize {
    (n >> (128 - PARTITIONS.ilog2())) as usize
}

/// What several threads put away by partition, to be read again one partition at a time.
pub(crate) struct Spill {
    /// Bytes that may stay in memory.
    budget: usize,
    held: AtomicUsize,
    spilled: AtomicU64,
    parts: Vec<Mutex<Part>>,
    folder: PathBuf,
    /// Made when it is needed; it has no name, so nothing is left of it however the program ends.
    file: Mutex<Option<File>>,
    chunk: usize,
}

#[derive(Default)]
struct Part {
    held: Vec<Vec<u8>>,
    /// Where chunks lie in the file, and how long they are.
    spilled: Vec<(u64, usize)>,
}

impl Spill {
    /// An empty one that keeps half of the memory of `config`, and an eighth for the chunks that `threads` writers are filling.
    pub(crate) fn new(config: &SqlConfig, threads: usize) -> Self {
        let memory = config.memory_mib << 20;
        Self {
            budget: memory / 2,
            held: AtomicUsize::new(0),
            spilled: AtomicU64::new(0),
            parts: (0..PARTITIONS).map(|_| Mutex::default()).collect(),
            folder: config.spill_folder.clone().unwrap_or_else(std::env::temp_dir),
            file: Mutex::new(None),
            chunk: (memory / 8 / threads.max(1) / PARTITIONS).clamp(512, 64 << 10),
        }
    }

    /// Puts a chunk away.
    fn put(&self, partition: usize, chunk: Vec<u8>) -> Result<()> {
        let size = chunk.len();
        if self.held.fetch_add(size, Ordering::Relaxed) + size <= self.budget {
            lock(&self.parts[partition]).held.push(chunk);
            return Ok(());
        }
        self.held.fetch_sub(size, Ordering::Relaxed);
        let at = self.append(&chunk).map_err(|source| self.fail(source))?;
        lock(&self.parts[partition]).spilled.push((at, size));
        Ok(())
    }

    fn append(&self, chunk: &[u8]) -> std::io::Result<u64> {
        let mut file = lock(&self.file);
        let file = match &mut *file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(&self.folder)?),
        };
        let at = file.seek(SeekFrom::End(0))?;
        file.write_all(chunk)?;
        self.spilled.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        Ok(at)
    }

    /// Takes a partition out, chunk by chunk, in no particular order.
    pub(crate) fn take(&self, partition: usize) -> impl Iterator<Item = Result<Vec<u8>>> + '_ {
        let Part { held, spilled } = std::mem::take(&mut *lock(&self.parts[partition]));
        let held = held.into_iter().map(|chunk| {
            self.held.fetch_sub(chunk.len(), Ordering::Relaxed);
            Ok(chunk)
        });
        held.chain(spilled.into_iter().map(|(at, size)| self.read(at, size).map_err(|source| self.fail(source))))
    }

    fn read(&self, at: u64, size: usize) -> std::io::Result<Vec<u8>> {
        let mut chunk = vec![0; size];
        if let Some(file) = &mut *lock(&self.file) {
            file.seek(SeekFrom::Start(at))?;
            file.read_exact(&mut chunk)?;
        }
        Ok(chunk)
    }

    /// Bytes written to disk so far.
    pub(crate) fn spilled(&self) -> u64 {
        self.spilled.load(Ordering::Relaxed)
    }

    fn fail(&self, source: std::io::Error) -> CoordinatorError {
        failure(&self.folder, source)
    }

    /// The error for bytes that are not what was put away.
    pub(crate) fn damaged(&self) -> CoordinatorError {
        self.fail(std::io::Error::new(std::io::ErrorKind::InvalidData, "what was read is not what was written"))
    }
}

fn failure(folder: &Path, source: std::io::Error) -> CoordinatorError {
    CoordinatorError::Spill { folder: folder.to_owned(), source }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thread's chunks, one a partition.
pub(crate) struct Chunks {
    open: Vec<Vec<u8>>,
}

impl Chunks {
    pub(crate) fn new() -> Self {
        Self { open: vec![Vec::new(); PARTITIONS] }
    }

    /// Appends what `write` writes to a partition. It is never cut: a chunk holds whole records.
    pub(crate) fn push(&mut self, to: &Spill, partition: usize, write: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let chunk = &mut self.open[partition];
        if chunk.capacity() == 0 {
            chunk.reserve_exact(to.chunk);
        }
        write(chunk);
        // Most records are shorter than a sixteenth of a chunk: so a chunk seldom outgrows what was reserved for it.
        if chunk.len() >= to.chunk - to.chunk / 16 { to.put(partition, std::mem::take(chunk)) } else { Ok(()) }
    }

    /// Hands over what is left.
    pub(crate) fn finish(self, to: &Spill) -> Result<()> {
        for (partition, mut chunk) in self.open.into_iter().enumerate() {
            if !chunk.is_empty() {
                chunk.shrink_to_fit();
                to.put(partition, chunk)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_put_in_comes_out_by_partition_from_memory_or_disk() {
        for memory_mib in [1, 64] {
            let spill = Spill::new(&SqlConfig { memory_mib, ..SqlConfig::default() }, 2);
            let mut chunks = Chunks::new();
            let number = |i: u64| u128::from(i.wrapping_mul(0x9E37_79B9_7F4A_7C15)) << 64 | u128::from(i);
            for i in 0..200_000 {
                let n = number(i);
                chunks.push(&spill, partition_of(n), |to| to.extend(n.to_le_bytes())).unwrap();
            }
            chunks.finish(&spill).unwrap();
            assert_eq!(spill.spilled() > 0, memory_mib == 1, "3.2 MB fit into one of the two");
            let (mut found, mut last) = (Vec::new(), 0);
            for partition in 0..PARTITIONS {
                let mut numbers = Vec::new();
                for chunk in spill.take(partition) {
                    numbers.extend(chunk.unwrap().chunks_exact(16).map(|b| u128::from_le_bytes(b.try_into().unwrap())));
                }
                numbers.sort_unstable();
                assert!(numbers.first().is_none_or(|first| *first >= last), "partitions are in order");
                last = numbers.last().copied().unwrap_or(last);
                found.extend(numbers);
            }
            let mut all: Vec<_> = (0..200_000).map(number).collect();
            all.sort_unstable();
            assert_eq!(found, all);
        }
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let config = SqlConfig { memory_mib: 0, partitions: 1, spill_folder: Some("/nowhere/at/all".into()) };
        let spill = Spill::new(&config, 1);
        let error = spill.put(0, vec![1]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all") && error.contains("spill_folder"), "{error}");
    }
}

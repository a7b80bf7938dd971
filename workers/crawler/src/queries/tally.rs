//! Counting more keys than memory holds: a table that is written out, sorted, when it is full, and a merge of all that was written.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

/// What an entry takes beside its key: its slot in a table that is half empty, twice while it grows, and the allocator's part.
const ENTRY_BYTES: usize = 112;
/// Sorted runs that are open at once; when there are more they become one.
const MOST_RUNS: usize = 64;
/// The smallest table: a run for each handful of keys would help nobody.
const LEAST_BYTES: usize = 1 << 16;

/// Sums by key, within a limit of memory.
pub(super) struct Tally {
    counts: HashMap<Box<str>, u64>,
    bytes: usize,
    limit: usize,
    folder: PathBuf,
    runs: Vec<Run>,
}

impl Tally {
    /// A tally that keeps about `limit` bytes in memory and the rest in files of `folder`, which vanish with it.
    pub(super) fn new(limit: usize, folder: &Path) -> Self {
        Self { counts: HashMap::new(), bytes: 0, limit: limit.max(LEAST_BYTES), folder: folder.to_owned(), runs: Vec::new() }
    }

    /// Adds to a key, and gives its sum since the last time the table was written out: at most its whole sum.
    pub(super) fn add(&mut self, key: &str, n: u64) -> io::Result<u64> {
        if let Some(sum) = self.counts.get_mut(key) {
            *sum = sum.saturating_add(n);
            return Ok(*sum);
        }
        if self.bytes + key.len() + ENTRY_BYTES > self.limit {
            self.spill()?;
        }
        self.bytes += key.len() + ENTRY_BYTES;
        self.counts.insert(key.into(), n);
        Ok(n)
    }

    fn spill(&mut self) -> io::Result<()> {
        if self.counts.is_empty() {
            return Ok(());
        }
        let mut run = RunWriter::new(&self.folder)?;
        for (key, count) in sorted(std::mem::take(&mut self.counts)) {
            run.push(&key, count)?;
        }
        self.bytes = 0;
        self.runs.push(run.finish()?);
        if self.runs.len() == MOST_RUNS {
            let mut merge = Merge::of(self.runs.drain(..).map(Sorted::Run))?;
            let mut run = RunWriter::new(&self.folder)?;
            while let Some((key, count)) = merge.next()? {
                run.push(&key, count)?;
            }
            self.runs.push(run.finish()?);
        }
        Ok(())
    }

    /// The sums of all tallies together, by the bytes of the keys.
    pub(super) fn merge(tallies: impl IntoIterator<Item = Self>) -> io::Result<Merge> {
        Merge::of(tallies.into_iter().flat_map(|t| {
            let rest = Sorted::Memory(sorted(t.counts).into_iter());
            t.runs.into_iter().map(Sorted::Run).chain([rest])
        }))
    }
}

fn sorted(counts: HashMap<Box<str>, u64>) -> Vec<(Box<str>, u64)> {
    let mut entries: Vec<_> = counts.into_iter().collect();
    entries.sort_unstable();
    entries
}

/// Keys in order with their sums, in a nameless file.
pub(super) struct Run(File);

impl Run {
    /// The entries from the first on. One reader at a time: they share the file's position.
    pub(super) fn read(&mut self) -> io::Result<RunReader> {
        let mut file = self.0.try_clone()?;
        file.rewind()?;
        Ok(RunReader { file: BufReader::with_capacity(1 << 16, file), key: String::new() })
    }
}

pub(super) struct RunWriter {
    file: BufWriter<File>,
    last: String,
}

impl RunWriter {
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        Ok(Self { file: BufWriter::with_capacity(1 << 16, tempfile::tempfile_in(folder)?), last: String::new() })
    }

    /// Writes an entry as: bytes shared with the key before it, bytes that follow, those bytes, count.
    pub(super) fn push(&mut self, key: &str, count: u64) -> io::Result<()> {
        let same = self.last.bytes().zip(key.bytes()).take_while(|(a, b)| a == b).count();
        let shared = (0..=same).rev().find(|n| key.is_char_boundary(*n)).unwrap_or(0);
        put(&mut self.file, shared as u64)?;
        put(&mut self.file, (key.len() - shared) as u64)?;
        self.file.write_all(&key.as_bytes()[shared..])?;
        put(&mut self.file, count)?;
        self.last.truncate(shared);
        self.last.push_str(&key[shared..]);
        Ok(())
    }

    pub(super) fn finish(self) -> io::Result<Run> {
        Ok(Run(self.file.into_inner().map_err(io::IntoInnerError::into_error)?))
    }
}

pub(super) struct RunReader {
    file: BufReader<File>,
    key: String,
}

impl RunReader {
    pub(super) fn next(&mut self) -> io::Result<Option<(&str, u64)>> {
        if self.file.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let (shared, rest) = (get(&mut self.file)? as usize, get(&mut self.file)? as usize);
        let mut bytes = std::mem::take(&mut self.key).into_bytes();
        bytes.resize(shared + rest, 0);
        io::Read::read_exact(&mut self.file, &mut bytes[shared..])?;
        self.key = String::from_utf8(bytes).map_err(io::Error::other)?;
        Ok(Some((&self.key, get(&mut self.file)?)))
    }
}

/// Seven bits a byte, the lowest first.
fn put(out: &mut impl Write, mut n: u64) -> io::Result<()> {
    while n > 0x7f {
        out.write_all(&[n as u8 | 0x80])?;
        n >>= 7;
    }
    out.write_all(&[n as u8])
}

fn get(from: &mut impl io::Read) -> io::Result<u64> {
    let (mut n, mut byte) = (0, [0x80]);
    for shift in (0..64).step_by(7) {
        if byte[0] < 0x80 {
            break;
        }
        from.read_exact(&mut byte)?;
        n |= u64::from(byte[0] & 0x7f) << shift;
    }
    Ok(n)
}

enum Sorted {
    Memory(std::vec::IntoIter<(Box<str>, u64)>),
    Run(Run),
}

enum Source {
    Memory(std::vec::IntoIter<(Box<str>, u64)>),
    Run(RunReader),
}

impl Source {
    fn next(&mut self) -> io::Result<Option<(Box<str>, u64)>> {
        match self {
            Self::Memory(entries) => Ok(entries.next()),
            Self::Run(run) => Ok(run.next()?.map(|(key, n)| (key.into(), n))),
        }
    }
}

/// Every key once, in the order of its bytes.
pub(super) struct Merge {
    sources: Vec<Source>,
    heads: BinaryHeap<Reverse<(Box<str>, usize, u64)>>,
}

impl Merge {
    fn of(sources: impl Iterator<Item = Sorted>) -> io::Result<Self> {
        let mut merge = Self { sources: Vec::new(), heads: BinaryHeap::new() };
        for sorted in sources {
            merge.sources.push(match sorted {
                Sorted::Memory(entries) => Source::Memory(entries),
                Sorted::Run(mut run) => Source::Run(run.read()?),
            });
            merge.advance(merge.sources.len() - 1)?;
        }
        Ok(merge)
    }

    fn advance(&mut self, source: usize) -> io::Result<()> {
        if let Some((key, n)) = self.sources[source].next()? {
            self.heads.push(Reverse((key, source, n)));
        }
        Ok(())
    }

    pub(super) fn next(&mut self) -> io::Result<Option<(Box<str>, u64)>> {
        let Some(Reverse((key, source, mut sum))) = self.heads.pop() else { return Ok(None) };
        self.advance(source)?;
        while let Some(Reverse((next, source, n))) = self.heads.peek()
            && *next == key
        {
            let source = *source;
            sum = sum.saturating_add(*n);
            self.heads.pop();
            self.advance(source)?;
        }
        Ok(Some((key, sum)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn all(mut merge: Merge) -> Vec<(String, u64)> {
        let mut out = Vec::new();
        while let Some((key, n)) = merge.next().unwrap() {
            out.push((key.into(), n));
        }
        out
    }

    #[test]
    fn many_runs_and_many_tallies_sum_up() {
        let folder = tempfile::tempdir().unwrap();
        let mut tallies = [Tally::new(0, folder.path()), Tally::new(1 << 30, folder.path())];
        // Each table of the first holds a few hundred keys: far more runs than are open at once.
        for i in 0..60_000_u64 {
            for tally in &mut tallies {
                tally.add(&format!("key {}", i * 7919 % 20_011), i).unwrap();
            }
        }
        assert!(tallies[0].runs.len() > 2 && tallies[0].runs.len() < MOST_RUNS);
        let mut expected = BTreeMap::new();
        (0..60_000).for_each(|i| *expected.entry(format!("key {}", i * 7919 % 20_011)).or_insert(0) += 2 * i);
        assert_eq!(all(Tally::merge(tallies).unwrap()), expected.into_iter().collect::<Vec<_>>());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn runs_read_back(entries in proptest::collection::btree_map("[aé猫 ]{0,6}", any::<u64>(), 0..40)) {
            let mut writer = RunWriter::new(&std::env::temp_dir()).unwrap();
            entries.iter().for_each(|(key, n)| writer.push(key, *n).unwrap());
            let mut run = writer.finish().unwrap();
            for _ in 0..2 {
                let mut reader = run.read().unwrap();
                for (key, n) in &entries {
                    prop_assert_eq!(reader.next().unwrap(), Some((key.as_str(), *n)));
                }
                prop_assert_eq!(reader.next().unwrap(), None);
            }
        }
    }
}

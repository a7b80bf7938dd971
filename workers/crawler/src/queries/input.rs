//! Files that lists are made of: opened whatever they are packed with, hashed while they are read, with an eye on how far that is.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use capfilt_schemas::Digest;
use flate2::read::MultiGzDecoder;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::bz2::ParallelBz2;
use crate::CrawlError;

/// Told, from any thread, how many bytes have been read of how many.
pub type OnProgress = Box<dyn Fn(u64, u64) + Send + Sync>;

/// The longest line that is looked at; what is longer is no word, title or count.
const LONGEST_LINE: usize = 1 << 16;

/// A file that a list was made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InputFile {
    /// What it was read as: `dump`, `word_counts`, `page_views`, `titles` or `wordnet`.
    pub kind: String,
    /// Its name, without folders.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its bytes as they are on disk.
    pub sha256: Digest,
}

/// How far all files together are read, by their sizes on disk.
pub(super) struct Meter {
    read: AtomicU64,
    of: u64,
    report: OnProgress,
}

impl Meter {
    /// A meter for these files.
    pub(super) fn new(paths: &[&Path], report: OnProgress) -> Result<Arc<Self>, CrawlError> {
        let mut of = 0;
        for path in paths {
            let about = std::fs::metadata(path).map_err(|e| CrawlError::read(path, e))?;
            if about.is_dir() {
                return Err(CrawlError::format(path, "it is a folder; name its files"));
            }
            of += about.len();
        }
        Ok(Arc::new(Self { read: AtomicU64::new(0), of, report }))
    }

    fn add(&self, bytes: usize) {
        let read = self.read.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        (self.report)(read, self.of);
    }
}

/// A file as it is on disk, hashed as it passes.
pub(super) struct Tracked {
    file: File,
    hash: Sha256,
    bytes: u64,
    meter: Arc<Meter>,
    seal: Arc<OnceLock<(u64, Digest)>>,
}

impl Read for Tracked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        if n == 0 && !buffer.is_empty() {
            let digest = Digest::from_bytes(self.hash.clone().finalize().into());
            let _ = self.seal.set((self.bytes, digest));
        }
        self.hash.update(&buffer[..n]);
        self.bytes += n as u64;
        self.meter.add(n);
        Ok(n)
    }
}

/// An open file, unpacked: bzip2 (of one or many streams; those are unpacked side by side), gzip, or as it is; told by its first bytes.
pub(super) struct Input {
    kind: &'static str,
    path: PathBuf,
    reader: Box<dyn Read + Send>,
    seal: Arc<OnceLock<(u64, Digest)>>,
}

impl Input {
    pub(super) fn open(kind: &'static str, path: &Path, threads: usize, meter: &Arc<Meter>) -> Result<Self, CrawlError> {
        let fail = |e| CrawlError::read(path, e);
        let mut magic = Vec::new();
        File::open(path).and_then(|f| f.take(3).read_to_end(&mut magic)).map_err(fail)?;
        let seal = Arc::new(OnceLock::new());
        let file = Tracked {
            file: File::open(path).map_err(fail)?,
            hash: Sha256::new(),
            bytes: 0,
            meter: Arc::clone(meter),
            seal: Arc::clone(&seal),
        };
        let reader: Box<dyn Read + Send> = match magic.as_slice() {
            b"BZh" => Box::new(ParallelBz2::new(file, threads).map_err(fail)?),
            [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(BufReader::with_capacity(1 << 18, file))),
            _ => Box::new(file),
        };
        Ok(Self { kind, path: path.to_owned(), reader, seal })
    }

    /// The error for a read that failed: of the disk, or of what is packed.
    pub(super) fn fail(&self, e: io::Error) -> CrawlError {
        match e.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
                CrawlError::format(&self.path, format!("its packed data is damaged or cut short ({e}); get the file again"))
            }
            _ => CrawlError::read(&self.path, e),
        }
    }

    /// Its lines, without line ends.
    pub(super) fn lines(&mut self) -> Lines<'_> {
        Lines { reader: BufReader::with_capacity(1 << 18, &mut *self.reader), line: Vec::new(), number: 0 }
    }

    /// What the file was, once it has been read to its end.
    pub(super) fn finish(self) -> Result<InputFile, CrawlError> {
        let name = self.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        match self.seal.get() {
            Some((bytes, sha256)) => Ok(InputFile { kind: self.kind.to_owned(), name, bytes: *bytes, sha256: *sha256 }),
            None => Err(CrawlError::format(&self.path, "there is more behind its end than can be read; get the file again")),
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

/// Lines of any bytes. One that is longer than 64 KiB is given as an empty one, so that no file can fill the memory.
pub(super) struct Lines<'a> {
    reader: BufReader<&'a mut (dyn Read + Send)>,
    line: Vec<u8>,
    number: u64,
}

impl Lines<'_> {
    /// The next line and its number (from 1), without its end; `None` after the last.
    pub(super) fn next(&mut self) -> io::Result<Option<(u64, &[u8])>> {
        self.line.clear();
        self.number += 1;
        let limit = LONGEST_LINE as u64;
        let n = (&mut self.reader).take(limit).read_until(b'\n', &mut self.line)?;
        if n == 0 {
            return Ok(None);
        }
        if n as u64 == limit && !self.line.ends_with(b"\n") {
            self.line.clear();
            self.reader.skip_until(b'\n')?;
        }
        let start = if self.number == 1 && self.line.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        Ok(Some((self.number, self.line[start..].trim_ascii_end())))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write as _;

    fn open(path: &Path) -> Input {
        let meter = Meter::new(&[path], Box::new(|_, _| ())).unwrap();
        Input::open("titles", path, 2, &meter).unwrap()
    }

    #[test]
    fn opens_by_content_and_hashes_what_is_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let text = b"\xef\xbb\xbfone\r\ntwo\n\nlast".to_vec();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&text).unwrap();
        let mut bz = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bz.write_all(&text).unwrap();
        for bytes in [text.clone(), gz.finish().unwrap(), bz.finish().unwrap()] {
            let path = folder.path().join("any-name");
            std::fs::write(&path, &bytes).unwrap();
            let mut input = open(&path);
            let (mut lines, mut got) = (input.lines(), Vec::new());
            while let Some((number, line)) = lines.next().unwrap() {
                got.push((number, String::from_utf8(line.to_vec()).unwrap()));
            }
            assert_eq!(got, [(1, "one"), (2, "two"), (3, ""), (4, "last")].map(|(n, l)| (n, l.to_owned())));
            let about = input.finish().unwrap();
            assert_eq!((about.bytes, about.name.as_str()), (bytes.len() as u64, "any-name"));
            assert_eq!(about.sha256, Digest::from_bytes(Sha256::digest(&bytes).into()));
        }
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("long");
        let mut bytes = vec![b'x'; LONGEST_LINE * 3];
        bytes.extend_from_slice(b"\nshort\n");
        std::fs::write(&path, &bytes).unwrap();
        let mut input = open(&path);
        let mut lines = input.lines();
        assert_eq!(lines.next().unwrap(), Some((1, &b""[..])));
        assert_eq!(lines.next().unwrap(), Some((2, &b"short"[..])));
        assert!(lines.line.capacity() <= 2 * LONGEST_LINE);
        assert_eq!(lines.next().unwrap(), None);
    }

    #[test]
    fn a_cut_archive_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.gz");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&b"some words ".repeat(50)).unwrap();
        let bytes = gz.finish().unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 6]).unwrap();
        let mut input = open(&path);
        let e = io::copy(&mut input, &mut io::sink()).unwrap_err();
        let text = input.fail(e).to_string();
        assert!(text.contains("cut.gz") && text.contains("cut short"), "{text}");
    }
}

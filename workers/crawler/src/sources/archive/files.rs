//! Which archive files a source means, and what a local one is known by.

use std::fs::File;
use std::io::{self, BufRead, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use capfilt_schemas::Digest;
use sha2::{Digest as _, Sha256};
use url::Url;

use crate::CrawlError;
use crate::config::{ArchiveConfig, STORES};
use crate::unpack;

/// Endings of archive files in a folder.
const ENDINGS: [&str; 4] = [".warc", ".warc.gz", ".wat", ".wat.gz"];
/// Endings of lists of them.
const LISTS: [&str; 4] = [".paths", ".paths.gz", ".txt", ".txt.gz"];
/// Longest line of a list.
const MAX_LINE: u64 = 8 << 10;
/// A fingerprint is of so many blocks of so many bytes.
const BLOCKS: u64 = 32;
const BLOCK: u64 = 4 << 10;

/// Where an archive is that is not a local file.
pub(super) enum Remote {
    Web(Url),
    Store(Url),
}

/// The address of an archive that is not a local file. `s3://commoncrawl/` is what Common Crawl serves under a public address.
pub(super) fn remote(path: &str) -> Option<Remote> {
    let public = path.strip_prefix("s3://commoncrawl/").map(|rest| format!("https://data.commoncrawl.org/{rest}"));
    let url = Url::parse(public.as_deref().unwrap_or(path)).ok()?;
    match url.scheme() {
        "http" | "https" => Some(Remote::Web(url)),
        scheme if STORES.contains(&scheme) => Some(Remote::Store(url)),
        _ => None,
    }
}

/// The archive files that a source names, each once, in its order: files, all that a folder or a glob holds (by name), and what lists
/// name. With `count`, so many of them: a draw by hash, which more files change as little as can be.
///
/// # Errors
/// [`CrawlError::Read`], [`CrawlError::Format`] if a folder, glob or list names no archive.
pub(crate) fn expand(archive: &ArchiveConfig) -> Result<Vec<String>, CrawlError> {
    let mut all = Vec::new();
    for path in &archive.paths {
        let before = all.len();
        let is_list = LISTS.iter().any(|ending| path.ends_with(ending));
        match remote(path) {
            Some(_) if is_list => {
                let what = "lists are read from local files; download it, and name the copy here";
                return Err(CrawlError::format(Path::new(path), what));
            }
            Some(_) => all.push(path.clone()),
            None if is_list => read_list(Path::new(path), &archive.base, &mut all)?,
            None if Path::new(path).is_file() => all.push(path.clone()),
            None if Path::new(path).is_dir() => glob(&format!("{}/**/*", glob::Pattern::escape(path)), true, &mut all)?,
            None if path.contains(['*', '?', '[']) => glob(path, false, &mut all)?,
            None => return Err(CrawlError::read(Path::new(path), io::ErrorKind::NotFound.into())),
        }
        if all.len() == before {
            return Err(CrawlError::format(Path::new(path), "it names no archive file (.warc, .warc.gz, .wat or .wat.gz)"));
        }
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|path| seen.insert(path.clone()));
    if let Some(count) = archive.count
        && count < all.len()
    {
        let key = |path: &str| Sha256::new().chain_update(archive.seed.to_le_bytes()).chain_update(path).finalize();
        let mut keys: Vec<_> = all.iter().map(|path| key(path)).collect();
        let (_, last, _) = keys.select_nth_unstable(count - 1);
        let last = *last;
        all.retain(|path| key(path) <= last);
    }
    Ok(all)
}

fn glob(pattern: &str, only_archives: bool, all: &mut Vec<String>) -> Result<(), CrawlError> {
    let bad = |e: glob::PatternError| CrawlError::format(Path::new(pattern), format!("it is no pattern for paths ({e})"));
    for found in glob::glob(pattern).map_err(bad)? {
        let path = found.map_err(|e| CrawlError::read(&PathBuf::from(e.path()), e.into()))?;
        let name = path.to_string_lossy().into_owned();
        if path.is_file() && (!only_archives || ENDINGS.iter().any(|ending| name.ends_with(ending))) {
            all.push(name);
        }
    }
    Ok(())
}

/// One path or address a line, as in Common Crawl's `wat.paths.gz`; what is no address starts from `base`.
fn read_list(path: &Path, base: &str, all: &mut Vec<String>) -> Result<(), CrawlError> {
    let mut reader = unpack::open(path).map_err(|e| CrawlError::read(path, e))?;
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = reader
            .by_ref()
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .map_err(|e| CrawlError::format(path, format!("it breaks off or is damaged ({e})")))?;
        if n == 0 {
            return Ok(());
        }
        let text = std::str::from_utf8(&line).ok().filter(|_| (n as u64) < MAX_LINE);
        let text = text.ok_or_else(|| CrawlError::format(path, "it is no list of paths: a line is too long or no UTF-8"))?.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let is_whole = remote(text).is_some() || Path::new(text).is_absolute();
        all.push(if is_whole { text.to_owned() } else { format!("{}/{text}", base.trim_end_matches('/')) });
    }
}

/// What a local archive is known by in a task's name: SHA-256 of its size and of blocks spread over it. To read the whole of some
/// terabytes at each plan would take hours; a time of change would make every copy another file; and a packed file with other content
/// of the same size differs almost everywhere.
///
/// # Errors
/// [`CrawlError::Read`].
pub(crate) fn fingerprint(path: &Path) -> Result<Digest, CrawlError> {
    let read = || -> io::Result<Digest> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut hash = Sha256::new().chain_update(size.to_le_bytes());
        let last = size.saturating_sub(BLOCK);
        let step = (last / (BLOCKS - 1)).max(BLOCK);
        let mut block = Vec::new();
        for at in (0..BLOCKS).map(|i| if i == BLOCKS - 1 { last } else { i * step }).filter(|at| *at <= last) {
            block.clear();
            file.seek(SeekFrom::Start(at))?;
            file.by_ref().take(BLOCK).read_to_end(&mut block)?;
            hash.update(&block);
        }
        Ok(Digest::from_bytes(hash.finalize().into()))
    };
    read().map_err(|e| CrawlError::read(path, e))
}

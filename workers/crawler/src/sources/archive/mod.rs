//! Archive files of the web: WARC files with whole pages, and WAT files, in which Common Crawl keeps the links and images of each page.
//!
//! ```text
//! file or download ─► members: unpack ─► records ─► (batches, rayon) a page's texts ─► once each
//! ```
//!
//! A file is one task and is read once, from its beginning, in bounded memory. A record that is cut, damaged or too long is counted and
//! passed over. The rules for texts and addresses are those of crawled pages, so a page gives the same candidates either way; WAT files
//! know less of a page (see `wat.rs`).

mod files;
mod http;
mod members;
mod object;
mod records;
#[cfg(test)]
mod tests;
mod wat;

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::path::Path;
use std::pin::pin;

use bytes::{Buf, Bytes};
use capfilt_runtime::{StageError, Work, on_blocking, on_rayon};
use capfilt_schemas::Digest;
use futures::{Stream, StreamExt, stream};
use tokio::sync::mpsc;
use url::Url;

pub(crate) use files::{expand, fingerprint};

use super::{Found, FoundStream, take};
use crate::address::is_web;
use crate::config::{ArchiveConfig, WebConfig};
use crate::html;
use crate::opt_out::Directives;
use crate::web::Web;
use crate::{CrawlError, units};
use files::Remote;
use http::Answer;
use object::Object;
use records::{Batch, RecordRef, Records};
use wat::Wat;

/// Batches that are looked through at once, and that wait for it.
const AT_ONCE: usize = 2;
/// Pairs remembered so that none is given twice in a row of pages; when there are more it starts anew.
const REMEMBERED: usize = 1 << 20;

/// The texts of the one archive file that `archive` names, in its order; `wanted` is the fingerprint of the local file that is meant.
pub(crate) fn read_archive(
    web: Web,
    archive: &ArchiveConfig,
    wanted: Option<Digest>,
    config: &WebConfig,
    max_text: usize,
    work: Work,
) -> FoundStream {
    let path = archive.paths.first().cloned().unwrap_or_default();
    let (sender, receiver) = mpsc::channel(AT_ONCE);
    let opening = open(web, path.clone(), archive.options.clone(), wanted, config.clone());
    tokio::spawn(async move {
        let result = match opening.await {
            Ok((file, size)) => {
                let out = sender.clone();
                let name = path.clone();
                on_blocking(move || unpack(&name, file, size, &out, &work)).await.flatten()
            }
            Err(e) => Err(e),
        };
        if let Err(e) = result {
            let _ = sender.send(Err(e)).await;
        }
    });
    let reader = Reader { token: config.token().to_owned(), opt_out: config.opt_out, max_page: archive.max_page_bytes, max_text };
    let batches = stream::unfold(receiver, |mut r| async move { r.recv().await.map(|batch| (batch, r)) });
    let pages = batches
        .map(move |batch: Result<(Batch, Work), StageError>| {
            let reader = reader.clone();
            async move {
                let (batch, work) = batch?;
                let (found, counts) = on_rayon(move || reader.read(&batch)).await?;
                counts.add_to(&work);
                Ok(found)
            }
        })
        .buffered(AT_ONCE);
    let mut seen = HashSet::new();
    let once = move |found: Result<Vec<Found>, StageError>| {
        let mut found = found?;
        // The logo of a site stands on all of its pages.
        found.retain(|f| {
            let mut hash = DefaultHasher::new();
            (&f.url, &f.text).hash(&mut hash);
            seen.insert(hash.finish())
        });
        if seen.len() > REMEMBERED {
            seen.clear();
        }
        Ok(found)
    };
    pages.map(once).filter(|found| std::future::ready(found.as_ref().map_or(true, |f| !f.is_empty()))).boxed()
}

type Source = Box<dyn Read + Send>;

/// Opens a local file, or what is read while it arrives, and tells its size if it is known.
async fn open(
    web: Web,
    path: String,
    options: BTreeMap<String, String>,
    wanted: Option<Digest>,
    config: WebConfig,
) -> Result<(Source, u64), StageError> {
    match files::remote(&path) {
        Some(Remote::Web(url)) => {
            let mut file = web.remote_file(url, config);
            // The size comes with the first bytes.
            let first = file.chunk().await?;
            let size = file.size().unwrap_or(0);
            let others = stream::try_unfold(file, |mut file| async { Ok(file.chunk().await?.map(|chunk| (chunk, file))) });
            return Ok((Arriving::source(stream::iter(first.map(Ok)).chain(others)), size));
        }
        Some(Remote::Store(url)) => {
            let mut object = Object::new(path, &url, options, &config)?;
            let first = object.chunk().await?;
            let size = object.size().unwrap_or(0);
            let others =
                stream::try_unfold(object, |mut object| async { Ok(object.chunk().await?.map(|chunk| (chunk, object))) });
            return Ok((Arriving::source(stream::iter(first.map(Ok)).chain(others)), size));
        }
        None => {}
    }
    let local = move || -> Result<(Source, u64), StageError> {
        let path = Path::new(&path);
        if let Some(wanted) = wanted {
            let found = fingerprint(path)?;
            if found != wanted {
                return Err(CrawlError::WrongFile { what: "archive", wanted, found: found.to_string() }.into());
            }
        }
        let file = File::open(path).map_err(|e| CrawlError::read(path, e))?;
        let size = file.metadata().map_err(|e| CrawlError::read(path, e))?.len();
        Ok((Box::new(file), size))
    };
    on_blocking(local).await?
}

/// What arrives as a reader, for a thread that may wait.
struct Arriving {
    receiver: mpsc::Receiver<Result<Bytes, CrawlError>>,
    chunk: Bytes,
}

impl Arriving {
    fn source(chunks: impl Stream<Item = Result<Bytes, CrawlError>> + Send + 'static) -> Source {
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut chunks = pin!(chunks);
            while let Some(chunk) = chunks.next().await {
                if sender.send(chunk).await.is_err() {
                    return;
                }
            }
        });
        Box::new(Self { receiver, chunk: Bytes::new() })
    }
}

impl Read for Arriving {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.receiver.blocking_recv() {
                Some(chunk) => self.chunk = chunk.map_err(io::Error::other)?,
                None => return Ok(0),
            }
        }
        let n = self.chunk.len().min(out.len());
        self.chunk.copy_to_slice(&mut out[..n]);
        Ok(n)
    }
}

/// Unpacks a file and hands its records on.
fn unpack(
    path: &str,
    file: Source,
    size: u64,
    out: &mpsc::Sender<Result<(Batch, Work), StageError>>,
    work: &Work,
) -> Result<(), StageError> {
    let mut records = Records::new(file);
    let mut any = false;
    let failed = |e: io::Error| match e.downcast::<CrawlError>() {
        Ok(download) => download,
        Err(e) => CrawlError::read(Path::new(path), e),
    };
    while let Some(batch) = records.next_batch().map_err(failed)? {
        any |= batch.len() > 0;
        work.progress(batch.read >> 20, size.max(batch.read) >> 20, "MiB");
        if out.blocking_send(Ok((batch, work.clone()))).is_err() {
            return Ok(());
        }
    }
    if any {
        return Ok(());
    }
    let what =
        format!("no WARC record can be read in it, looking for records of up to {}", units::size_text(records::MAX_RECORD));
    Err(CrawlError::format(Path::new(path), what).into())
}

/// What a batch of records held.
#[derive(Default, Debug, PartialEq, Eq)]
struct Counts {
    records: u64,
    bad: u64,
    too_long: u64,
    pages: u64,
    images: u64,
    pages_opted_out: u64,
    images_opted_out: u64,
}

impl Counts {
    fn add_to(&self, work: &Work) {
        let counts = [
            ("records_seen", self.records),
            ("records_bad", self.bad),
            ("records_too_long", self.too_long),
            ("pages_read", self.pages),
            ("images_seen", self.images),
            ("pages_opted_out", self.pages_opted_out),
            ("images_opted_out", self.images_opted_out),
        ];
        counts.iter().for_each(|(name, n)| work.facts.add(name, *n));
    }
}

/// Makes texts of records.
#[derive(Clone)]
struct Reader {
    /// The crawler's name in wishes.
    token: String,
    opt_out: bool,
    /// How much of a page is read, in bytes.
    max_page: usize,
    max_text: usize,
}

impl Reader {
    fn read(&self, batch: &Batch) -> (Vec<Found>, Counts) {
        let records = (batch.len() as u64) + batch.bad + batch.too_long;
        let mut counts = Counts { records, bad: batch.bad, too_long: batch.too_long, ..Counts::default() };
        let mut found = Vec::new();
        for record in batch.iter() {
            self.record(record, &mut found, &mut counts);
        }
        (found, counts)
    }

    fn record(&self, record: RecordRef<'_>, found: &mut Vec<Found>, counts: &mut Counts) {
        let kind = record.field("warc-type").unwrap_or_default();
        let content = record.field("content-type").and_then(|c| std::str::from_utf8(c).ok()).unwrap_or_default();
        let is = |wanted: &str| content.get(..wanted.len()).is_some_and(|c| c.eq_ignore_ascii_case(wanted));
        let (url, page, headers) = match kind {
            b"metadata" if is("application/json") => match wat::read(record.block, &self.token, self.max_text) {
                Wat::Page(told) => (told.url, told.page, told.headers),
                Wat::Other => return,
                Wat::Bad => {
                    counts.bad += 1;
                    return;
                }
            },
            b"response" if is("application/http") => {
                let Some(url) = page_url(record) else { return };
                let Some(answer) = Answer::parse(record.block) else {
                    counts.bad += 1;
                    return;
                };
                let content_type = answer.header("content-type");
                if !(200..300).contains(&answer.status) || !html::is_html(content_type) {
                    return;
                }
                let mut headers = Directives::default();
                answer.headers().for_each(|(name, value)| headers.add_header(name, value, &self.token));
                let text = html::decode(&answer.body(self.max_page), content_type);
                let page = html::extract(&text, &url, &self.token, self.max_text);
                (url, page, headers)
            }
            b"resource" if !content.is_empty() && html::is_html(Some(content)) => {
                let Some(url) = page_url(record) else { return };
                let text = html::decode(&record.block[..record.block.len().min(self.max_page)], Some(content));
                let page = html::extract(&text, &url, &self.token, self.max_text);
                (url, page, Directives::default())
            }
            _ => return,
        };
        let taken = take(page, headers, &url, self.opt_out);
        counts.pages += 1;
        counts.images += taken.images;
        if taken.opted_out {
            counts.pages_opted_out += 1;
            counts.images_opted_out += taken.images;
        }
        found.extend(taken.found);
    }
}

/// Reads an archive on this thread and gives address and text of each pair: what fuzzing and benches call.
///
/// # Errors
/// Those of `file`.
pub fn archive_pairs(file: impl Read, mut each: impl FnMut(&str, &str)) -> io::Result<u64> {
    let defaults = WebConfig::default();
    let reader = Reader { token: defaults.token().to_owned(), opt_out: true, max_page: 4 << 20, max_text: 1000 };
    let (mut records, mut total) = (Records::new(file), 0);
    while let Some(batch) = records.next_batch()? {
        let (found, counts) = reader.read(&batch);
        total += counts.records;
        found.iter().for_each(|f| each(&f.url, &f.text));
    }
    Ok(total)
}

fn page_url(record: RecordRef<'_>) -> Option<Url> {
    Url::parse(record.target()?).ok().filter(is_web)
}

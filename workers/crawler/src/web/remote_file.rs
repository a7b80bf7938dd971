//! A long download, read as it arrives, that goes on where a connection broke.

use std::time::Duration;

use bytes::Bytes;
use capfilt_schemas::FetchStatus;
use reqwest::Response;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, LAST_MODIFIED, RANGE, USER_AGENT};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};
use url::Url;

use super::exchange::judge;
use super::failure::classify;
use super::hosts::{Clock, Slot};
use super::{Failure, Web, backoff, may_pass_soon};
use crate::CrawlError;
use crate::config::WebConfig;

/// Bytes that count as progress: after so many, failures are forgotten. They have to come within so many `timeout`s.
const STRETCH: u64 = 1 << 20;
const STRETCH_TIMEOUTS: u32 = 30;
/// Other files of the same host may have to end first.
const LONGEST_WAIT: Duration = Duration::from_secs(30 * 24 * 3600);
/// More than any file of an archive has.
const MAX_BYTES: u64 = 256 << 30;

/// A file on its way. It was named by a person, not found by a crawl: robots.txt is not asked, pace and manners are kept.
///
/// Without progress it ends within `(retries + 1) × timeout` and the waits between; each MiB may take 30 × `timeout`.
pub(crate) struct RemoteFile {
    web: Web,
    url: Url,
    config: WebConfig,
    open: Option<Open>,
    /// Bytes given out.
    at: u64,
    size: Option<u64>,
    /// What tells this state of the file from another: a strong `ETag`, or `Last-Modified`.
    state: Option<HeaderValue>,
    failures: u32,
    /// When the current stretch has to be over, and its bytes so far.
    stretch: (Instant, u64),
}

/// The right to one request at a host, and to a connection.
type Turn = (Slot, OwnedSemaphorePermit);

/// An answer that is being read.
struct Open {
    response: Response,
    /// Bytes of it that were given out before.
    skip: u64,
    _turn: Turn,
}

impl Web {
    /// Starts to download `url`; nothing is asked before the first chunk is.
    pub(crate) fn remote_file(&self, url: Url, config: WebConfig) -> RemoteFile {
        let stretch = (Instant::now() + config.timeout * STRETCH_TIMEOUTS, 0);
        RemoteFile { web: self.clone(), url, config, open: None, at: 0, size: None, state: None, failures: 0, stretch }
    }
}

impl RemoteFile {
    /// The size of the file, once its first bytes have come, if the server tells it.
    pub(crate) const fn size(&self) -> Option<u64> {
        self.size
    }

    /// The next bytes; `None` at the end of the file.
    ///
    /// # Errors
    /// [`CrawlError::Download`] when further attempts are of no use.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, CrawlError> {
        loop {
            let failure = match self.next().await {
                Ok(chunk) => return Ok(chunk),
                Err(failure) => failure,
            };
            self.open = None;
            let backoff = backoff(&self.url, self.failures, self.config.backoff);
            let wait = match failure.retry_after {
                Some(wait) if failure.status == FetchStatus::Dns => wait.max(backoff),
                told => told.unwrap_or(backoff),
            };
            if !failure.may_pass
                || self.failures >= self.config.retries
                || wait > self.config.max_retry_after.max(super::MAX_BACKOFF)
            {
                let may_pass = may_pass_soon(failure.status);
                return Err(CrawlError::Download { url: self.url.to_string(), reason: failure.reason, may_pass });
            }
            tracing::debug!(url = %self.url, at = self.at, reason = %failure.reason, "download breaks off");
            self.failures += 1;
            tokio::time::sleep(wait).await;
            self.stretch = (Instant::now() + self.config.timeout * STRETCH_TIMEOUTS, 0);
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            let open = match &mut self.open {
                Some(open) => open,
                None => {
                    let open = self.ask().await?;
                    self.open.insert(open)
                }
            };
            let late = self.stretch.0.min(Instant::now() + self.config.timeout);
            let Ok(read) = timeout_at(late, open.response.chunk()).await else {
                return Err(Failure::new(FetchStatus::Timeout, "the server stalls or sends too slowly"));
            };
            let Some(mut chunk) = read.map_err(|e| classify(e, FetchStatus::Truncated))? else {
                return match self.size {
                    Some(size) if self.at < size => Err(Failure::new(FetchStatus::Truncated, "the body broke off")),
                    _ => Ok(None),
                };
            };
            self.stretch.1 += chunk.len() as u64;
            if self.stretch.1 >= STRETCH {
                self.stretch = (Instant::now() + self.config.timeout * STRETCH_TIMEOUTS, 0);
                self.failures = 0;
            }
            let known = chunk.len().min(usize::try_from(open.skip).unwrap_or(usize::MAX));
            open.skip -= known as u64;
            let _ = chunk.split_to(known);
            if chunk.is_empty() {
                continue;
            }
            self.at += chunk.len() as u64;
            if self.at > MAX_BYTES {
                return Err(Failure::new(FetchStatus::TooLarge, format!("it has more than {MAX_BYTES} bytes")));
            }
            return Ok(Some(chunk));
        }
    }

    /// Asks for the file from the place reached, and follows redirects.
    async fn ask(&mut self) -> Result<Open, Failure> {
        let mut url = self.url.clone();
        // Without a size the bytes may be unpacked ones, to which a range does not apply.
        let range = (self.at > 0 && self.size.is_some()).then(|| format!("bytes={}-", self.at));
        for _ in 0..=self.config.max_redirects {
            if !self.web.inner.route.admits(&url) {
                return Err(Failure::forbidden());
            }
            let (slot, connection) = self.web.turn(&url, Duration::ZERO, None, &Clock::new(LONGEST_WAIT)).await?;
            let (turn, client) = ((slot, connection), self.web.clients(&self.config)?.keeping);
            let mut request = client.get(url.clone()).header(USER_AGENT, &self.config.agent).header(ACCEPT_ENCODING, "identity");
            if let Some(range) = &range {
                request = request.header(RANGE, range);
                if let Some(state) = &self.state {
                    request = request.header(IF_RANGE, state);
                }
            }
            let Ok(response) = timeout(self.config.timeout, request.send()).await else {
                return Err(Failure::new(FetchStatus::Timeout, "the server does not answer"));
            };
            let response = response.map_err(|e| classify(e, FetchStatus::Connect))?;
            match judge(&response, &url) {
                Ok(Some(target)) => url = target,
                Ok(None) if matches!(response.status().as_u16(), 200 | 206) => return self.begin(response, turn),
                Ok(None) => return Err(Failure::new(FetchStatus::HttpClient, format!("http {}", response.status().as_u16()))),
                Err(failure) => {
                    if failure.status == FetchStatus::RateLimited {
                        turn.0.too_fast(&failure, &self.config);
                    }
                    return Err(failure);
                }
            }
        }
        Err(Failure::new(FetchStatus::Redirect, format!("more than {} redirects", self.config.max_redirects)))
    }

    /// Looks whether an answer is of the file as it was, and where in the file it begins.
    fn begin(&mut self, response: Response, turn: Turn) -> Result<Open, Failure> {
        turn.0.fine();
        let changed =
            || Failure { may_pass: false, ..Failure::new(FetchStatus::Truncated, "the file changed while it was read") };
        let state = state_of(response.headers());
        if self.state.is_some() && state.is_some() && self.state != state {
            return Err(changed());
        }
        let (from, size) = match response.status().as_u16() {
            206 => content_range(response.headers())
                .ok_or_else(|| Failure::new(FetchStatus::HttpServer, "a range without its place"))?,
            _ => (0, response.content_length()),
        };
        if from > self.at {
            return Err(Failure::new(FetchStatus::HttpServer, "another range than was asked for"));
        }
        if self.at == 0 {
            (self.size, self.state) = (size, state);
        } else if self.size != size {
            return Err(changed());
        }
        Ok(Open { response, skip: self.at - from, _turn: turn })
    }
}

/// What tells one state of a file from another.
fn state_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let strong = headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"));
    strong.or_else(|| headers.get(LAST_MODIFIED)).cloned()
}

/// Where a range begins, and how many bytes the whole has: `bytes 5-9/10`.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let (place, size) = headers.get(CONTENT_RANGE)?.to_str().ok()?.trim().strip_prefix("bytes ")?.split_once('/')?;
    Some((place.split_once('-')?.0.trim().parse().ok()?, size.trim().parse().ok()))
}

//! Asking the web politely: one client for the whole process, robots.txt, pace by host, redirects, deadlines, further attempts.

mod download;
mod exchange;
mod hosts;
mod robots;
mod rules;

use std::sync::Arc;
use std::time::Duration;

use capfilt_schemas::FetchStatus;
use reqwest::Client;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use url::Url;

pub(crate) use exchange::{Answer, Want};

use crate::CrawlError;
use crate::config::{CrawlerWorkerConfig, WebConfig};
use exchange::{Budget, Reply, client, exchange};
use hosts::{Hosts, Slot};
use robots::{Robots, Site};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use rules::Rules;

/// Longest wait between two attempts where the server names none.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// The web, as all stages of the process share it: what one learns of a host (its rules, its pace), the others keep to. Cheap to clone.
#[derive(Clone)]
pub struct Web(Arc<Inner>);

struct Inner {
    client: Client,
    hosts: Hosts,
    robots: Robots,
    connections: Arc<Semaphore>,
    settings: CrawlerWorkerConfig,
}

/// Why there is no answer.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) status: FetchStatus,
    pub(crate) http_status: Option<u16>,
    pub(crate) reason: String,
    /// What the server asks to wait before the next attempt.
    retry_after: Option<Duration>,
    /// Whether the same request may succeed later.
    may_pass: bool,
}

impl Failure {
    pub(crate) fn new(status: FetchStatus, reason: impl Into<String>) -> Self {
        use FetchStatus as S;
        let may_pass = matches!(status, S::Dns | S::Connect | S::Timeout | S::Truncated | S::RateLimited | S::HttpServer);
        Self { status, http_status: None, reason: reason.into(), retry_after: None, may_pass }
    }
}

impl Web {
    /// Sets the client up.
    ///
    /// # Errors
    /// [`CrawlError::Config`] or [`CrawlError::Client`].
    pub fn new(config: &CrawlerWorkerConfig) -> Result<Self, CrawlError> {
        config.check()?;
        Ok(Self(Arc::new(Inner {
            client: client(config)?,
            hosts: Hosts::new(config.per_host, config.requests_per_second),
            robots: Robots::default(),
            connections: Arc::new(Semaphore::new(config.connections)),
            settings: config.clone(),
        })))
    }

    pub(crate) fn settings(&self) -> &CrawlerWorkerConfig {
        &self.0.settings
    }

    /// The body at `url`, after redirects, as [`Want`] says; `max_body` bytes of it at most.
    ///
    /// It ends within `(retries + 1) × timeout`, the waits between the attempts (`Retry-After` up to its cap), and the waits for a turn
    /// at the host.
    pub(crate) async fn get(&self, url: &Url, config: &WebConfig, want: Want, max_body: usize) -> Result<Answer, Failure> {
        self.ask(url, config, want, max_body, config.robots).await
    }

    async fn ask(&self, url: &Url, config: &WebConfig, want: Want, max_body: usize, robots: bool) -> Result<Answer, Failure> {
        let mut attempt = 0;
        loop {
            let failure = match self.attempt(url, config, want, max_body, robots).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            let wait = failure.retry_after.unwrap_or_else(|| backoff(url, attempt, config.backoff));
            // To ask earlier than the server wants would be rude; to wait for as long as any server wants would be endless.
            let too_long = failure.retry_after.is_some_and(|wait| wait > config.max_retry_after);
            if attempt >= config.retries || !failure.may_pass || too_long {
                return Err(failure);
            }
            attempt += 1;
            tokio::time::sleep(wait).await;
        }
    }

    /// One attempt: the request and the redirects that it leads to, each allowed by its own site.
    async fn attempt(&self, url: &Url, config: &WebConfig, want: Want, max_body: usize, robots: bool) -> Result<Answer, Failure> {
        let mut budget = Budget::new(config.timeout);
        let mut seen = vec![url.clone()];
        loop {
            let Some(url) = seen.last().cloned() else { return Err(Failure::new(FetchStatus::BadUrl, "no address")) };
            let delay = if robots { self.permission(&url, config).await? } else { Duration::ZERO };
            let (slot, place) = self.turn(&url, delay).await?;
            let ask = async |left| exchange(&self.0.client, &url, config, want, max_body, left).await;
            let reply = budget.spend(ask).await;
            match reply {
                Ok(Reply::Answer(answer)) => {
                    slot.fine();
                    return Ok(Answer { _place: Some(place), ..answer });
                }
                Ok(Reply::Redirect(target)) => {
                    if seen.contains(&target) {
                        return Err(Failure::new(FetchStatus::Redirect, format!("a redirect loop at {target}")));
                    }
                    if seen.len() > config.max_redirects as usize {
                        let reason = format!("more than {} redirects", config.max_redirects);
                        return Err(Failure::new(FetchStatus::Redirect, reason));
                    }
                    seen.push(target);
                }
                Err(failure) => {
                    if failure.status == FetchStatus::RateLimited {
                        let pause = failure.retry_after.unwrap_or(config.backoff);
                        slot.too_fast(pause, config.max_retry_after.max(config.backoff));
                    }
                    return Err(failure);
                }
            }
        }
    }

    /// Whether the site allows the address, and the spacing it wishes.
    async fn permission(&self, url: &Url, config: &WebConfig) -> Result<Duration, Failure> {
        match self.0.robots.of(self, url, config).await {
            Site::Rules(rules) if rules.allow(url) => Ok(rules.delay),
            Site::Rules(_) => {
                Err(Failure::new(FetchStatus::Robots, format!("robots.txt of {} forbids it", url.host_str().unwrap_or_default())))
            }
            // Its robots.txt has been asked for often enough.
            Site::Closed(failure) => Err(Failure { may_pass: false, ..failure }),
        }
    }

    /// The addresses of the sitemaps that the site's robots.txt names.
    pub(crate) async fn sitemaps(&self, url: &Url, config: &WebConfig) -> Vec<Url> {
        match self.0.robots.of(self, url, config).await {
            Site::Rules(rules) => rules.sitemaps.iter().filter_map(|s| url.join(s).ok()).collect(),
            Site::Closed(_) => Vec::new(),
        }
    }

    fn client(&self) -> &Client {
        &self.0.client
    }

    /// A turn at the host first, a connection then: who waits for a slow host holds up nobody else.
    async fn turn(&self, url: &Url, delay: Duration) -> Result<(Slot, OwnedSemaphorePermit), Failure> {
        let host = format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default());
        let shut = |_| Failure {
            may_pass: false,
            ..Failure::new(FetchStatus::RateLimited, "the host limits its rate and is left alone")
        };
        let slot = self.0.hosts.enter(&host, delay).await.map_err(shut)?;
        let connection = Arc::clone(&self.0.connections).acquire_owned().await;
        Ok((slot, connection.map_err(|_| Failure::new(FetchStatus::Connect, "the client is closed"))?))
    }
}

/// The wait after attempt number `attempt` (from 0): doubling, between half of it and all of it, by the address: so that many
/// addresses that failed at once do not come back at once, and no random number is drawn.
fn backoff(url: &Url, attempt: u32, first: Duration) -> Duration {
    let digest = Sha256::new().chain_update(url.as_str()).chain_update(attempt.to_le_bytes()).finalize();
    let share = 0.5 + f64::from(digest[0]) / 512.0;
    let doubled = first.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX));
    doubled.min(MAX_BACKOFF).mul_f64(share)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn backoff_doubles_is_capped_and_differs_by_address() {
        let url = |n: u32| Url::parse(&format!("http://a.test/{n}")).unwrap();
        let first = Duration::from_millis(500);
        for attempt in 0..40 {
            let full = first.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX)).min(MAX_BACKOFF);
            let wait = backoff(&url(1), attempt, first);
            assert!(wait >= full / 2 && wait <= full, "{attempt}: {wait:?}");
        }
        assert_eq!(backoff(&url(1), 3, first), backoff(&url(1), 3, first));
        assert!((0..20).any(|n| backoff(&url(n), 0, first) != backoff(&url(20), 0, first)));
    }
}

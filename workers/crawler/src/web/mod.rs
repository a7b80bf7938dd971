//! Asking the web politely, and never for ever: one client for the whole process, robots.txt, opt-out lists, pace by host, redirects,
//! deadlines, further attempts.
//!
//! However servers behave, an address takes at most `deadline` from its first request on. Without waits for the host's turn it takes at
//! most `(retries + 1) × timeout + retries × max(max_retry_after, 10 s)`, and as much again for the site's robots.txt if it was not
//! known. It may wait for its first turn as long as manners and good answers to others take, and `deadline` beside: a slow host costs
//! none of its addresses, and one that does nothing well keeps nobody for longer. A fetch task with `n` rows, of which `AHEAD` are on
//! their way at once, so ends within `ceil(n / AHEAD) × 2 × deadline`, the time that its slowest host takes when it is asked at its pace
//! and answers well, and the time for decoding.

mod client;
mod dns;
mod exchange;
mod failure;
mod guard;
mod hosts;
mod probe;
mod remote_file;
mod robots;
mod rules;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capfilt_schemas::{Digest, FetchStatus};
use capfilt_store::TakenDown;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use url::Url;

pub(crate) use exchange::{Answer, Header, Want};
pub use probe::Probe;

use crate::CrawlError;
use crate::config::{CrawlerWorkerConfig, WebConfig};
use crate::opt_out::OptOuts;
use crate::room::Place;
use client::{Clients, Route};
use exchange::{Budget, Reply, exchange};
pub(crate) use failure::Failure;
use failure::may_pass_soon;
use hosts::{Clock, Hosts, Slot};
use robots::{Robots, Site};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use rules::Rules;

/// Rows begun before an earlier one has ended; a row that waits for a slow host holds little, so there may be many.
pub(crate) const AHEAD: usize = 4096;
/// Longest wait between two attempts where the server names none.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Waits for open files to become free: the first, and the longest.
const FILES_BACKOFF: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// The web, as all stages of the process share it: what one learns of a host (its rules, its pace), the others keep to. Cheap to clone.
#[derive(Clone)]
pub struct Web {
    inner: Arc<Inner>,
    /// Addresses that are not asked for, whoever wants them: their owners opted out, or they were taken down.
    opt_outs: Arc<OptOuts>,
    taken_down: Arc<TakenDown>,
}

/// Lists that are read by the first who needs them.
type ReadOnce = Arc<OnceCell<Arc<OptOuts>>>;

struct Inner {
    route: Route,
    clients: Mutex<HashMap<Duration, Clients>>,
    hosts: Hosts,
    robots: Robots,
    connections: Arc<Semaphore>,
    /// The opt-out lists that were read, by their digests.
    opt_outs: Mutex<HashMap<Vec<Digest>, ReadOnce>>,
    settings: CrawlerWorkerConfig,
}

/// What is asked for, beside the address.
#[derive(Clone, Copy)]
struct Ask<'a> {
    config: &'a WebConfig,
    want: Want,
    max_body: usize,
    robots: bool,
    /// Time between two requests to the host, where robots.txt is not asked.
    delay: Duration,
    /// Sent to the host of the address, not to those that it redirects to.
    key: Option<&'a Header>,
    /// Requests begin only while this one may.
    place: Option<&'a Place>,
}

impl<'a> Ask<'a> {
    /// As the settings say, from nobody in particular.
    fn new(config: &'a WebConfig, want: Want, max_body: usize) -> Self {
        Self { config, want, max_body, robots: config.robots, delay: Duration::ZERO, key: None, place: None }
    }
}

impl Web {
    /// Sets the client up.
    ///
    /// # Errors
    /// [`CrawlError::Config`] or [`CrawlError::Client`].
    pub fn new(config: &CrawlerWorkerConfig) -> Result<Self, CrawlError> {
        config.check()?;
        let inner = Inner {
            route: Route::new(config)?,
            clients: Mutex::default(),
            hosts: Hosts::new(config.per_host, config.requests_per_second),
            robots: Robots::default(),
            connections: Arc::new(Semaphore::new(config.connections)),
            opt_outs: Mutex::default(),
            settings: config.clone(),
        };
        let connect_timeout = WebConfig::default().connect_timeout;
        let clients = inner.route.clients(connect_timeout)?;
        inner.clients.lock().unwrap_or_else(PoisonError::into_inner).insert(connect_timeout, clients);
        Ok(Self { inner: Arc::new(inner), opt_outs: Arc::default(), taken_down: Arc::default() })
    }

    /// The same web without the addresses that the opt-out lists of a config name. Lists with the same digests are read once.
    ///
    /// # Errors
    /// [`CrawlError::WrongFile`], [`CrawlError::Read`], [`CrawlError::Format`].
    pub(crate) async fn without(&self, config: &WebConfig, digests: &[Digest]) -> Result<Self, CrawlError> {
        if config.opt_out_lists.is_empty() {
            return Ok(self.clone());
        }
        let cell = {
            let mut lists = self.inner.opt_outs.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(lists.entry(digests.to_vec()).or_default())
        };
        let read = || async {
            let (paths, digests) = (config.opt_out_lists.clone(), digests.to_vec());
            let read = tokio::task::spawn_blocking(move || OptOuts::load(&paths, &digests)).await;
            read.map_err(|e| CrawlError::Thread(e.to_string()))?.map(Arc::new)
        };
        Ok(Self { opt_outs: Arc::clone(cell.get_or_try_init(read).await?), ..self.clone() })
    }

    /// The same web without what was taken down.
    pub(crate) fn without_taken_down(self, taken_down: Arc<TakenDown>) -> Self {
        Self { taken_down, ..self }
    }

    fn whole(&self) -> Self {
        Self { opt_outs: Arc::default(), taken_down: Arc::default(), ..self.clone() }
    }

    pub(crate) fn settings(&self) -> &CrawlerWorkerConfig {
        &self.inner.settings
    }

    /// The addresses of a host's name, as the built-in resolver finds them (fixed ones in `resolve` are not looked at).
    ///
    /// # Errors
    /// A sentence that says why there are none.
    pub async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, String> {
        self.inner.route.dns().addresses(name).await.map(|found| found.to_vec()).map_err(|e| e.to_string())
    }

    /// The body at `url`, after redirects, as [`Want`] says; `max_body` bytes of it at most. It ends within `deadline` from its first
    /// request on.
    pub(crate) async fn get(&self, url: &Url, config: &WebConfig, want: Want, max_body: usize) -> Result<Answer, Failure> {
        self.within_deadline(url, Ask::new(config, want, max_body)).await
    }

    /// The body at an address that is made for programs: robots.txt, which is for those that follow links, does not count. Two requests
    /// are `delay` apart, or further; `key` is sent to the host of `url` only.
    pub(crate) async fn get_api(
        &self,
        url: &Url,
        config: &WebConfig,
        max_body: usize,
        delay: Duration,
        key: Option<&Header>,
    ) -> Result<Answer, Failure> {
        self.within_deadline(url, Ask { robots: false, delay, key, ..Ask::new(config, Want::Json, max_body) }).await
    }

    /// As [`Web::get`], while the row of `place` may begin.
    pub(crate) async fn get_at(
        &self,
        place: &Place,
        url: &Url,
        config: &WebConfig,
        want: Want,
        max_body: usize,
    ) -> Result<Answer, Failure> {
        self.within_deadline(url, Ask { place: Some(place), ..Ask::new(config, want, max_body) }).await
    }

    async fn within_deadline(&self, url: &Url, ask: Ask<'_>) -> Result<Answer, Failure> {
        let clock = Clock::new(ask.config.deadline);
        tokio::select! {
            answer = self.ask(url, ask, &clock) => answer,
            () = clock.passed() => Err(Failure::late()),
        }
    }

    async fn ask(&self, url: &Url, ask: Ask<'_>, clock: &Clock) -> Result<Answer, Failure> {
        let config = ask.config;
        let (mut attempt, mut pause) = (0, FILES_BACKOFF[0]);
        loop {
            let failure = match self.attempt(url, ask, attempt, clock).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            if failure.ours {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(FILES_BACKOFF[1]);
                continue;
            }
            let backoff = backoff(url, attempt, config.backoff);
            let (wait, too_long) = match failure.retry_after {
                // The resolver knows when it is worth asking again, and nobody is hurt by waiting longer.
                Some(wait) if failure.status == FetchStatus::Dns => (wait.max(backoff), false),
                // To ask earlier than the server wants would be rude; to wait for as long as any server wants would be endless.
                Some(wait) => (wait, wait > config.max_retry_after),
                None => (backoff, false),
            };
            if attempt >= config.retries || !failure.may_pass || too_long {
                return Err(failure);
            }
            attempt += 1;
            tokio::time::sleep(wait).await;
        }
    }

    /// One attempt, number `number` from 0: the request and the redirects that it leads to, each allowed by its own site.
    async fn attempt(&self, url: &Url, ask: Ask<'_>, number: u32, clock: &Clock) -> Result<Answer, Failure> {
        let Ask { config, want, max_body, robots, delay, key, place } = ask;
        let clients = self.clients(config)?;
        let client = if number == 0 { &clients.keeping } else { &clients.fresh };
        let mut budget = Budget::new(config.timeout);
        let mut seen = vec![url.clone()];
        loop {
            let Some(url) = seen.last().cloned() else { return Err(Failure::new(FetchStatus::BadUrl, "no address")) };
            if self.opt_outs.name(&url) {
                return Err(Failure::new(FetchStatus::OptOut, "an opt-out list names the address"));
            }
            if self.taken_down.covers_url(url.as_str()) {
                return Err(Failure::new(FetchStatus::TakenDown, "the address was taken down"));
            }
            if !self.inner.route.admits(&url) {
                return Err(Failure::forbidden());
            }
            let delay = if robots { self.permission(&url, config).await? } else { delay };
            let key = key.filter(|_| url.origin() == seen[0].origin());
            let (slot, connection) = self.turn(&url, delay, place, clock).await?;
            let reply = budget.spend(async |left| exchange(client, &url, config, want, key, max_body, left).await).await;
            match &reply {
                // Behind a redirect there may have been too little time left for any host.
                Err(failure) if failure.silent && seen.len() > 1 => {}
                Err(failure) if failure.silent => slot.silent(failure, config.give_up_host_after),
                Err(failure) if failure.ours || matches!(failure.status, FetchStatus::Dns | FetchStatus::ForbiddenAddress) => {}
                Err(failure) => slot.heard(!failure.may_pass),
                Ok(_) => slot.heard(true),
            }
            match reply {
                Ok(Reply::Answer(answer)) => {
                    slot.fine();
                    return Ok(Answer { connection: Some(connection), ..answer });
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
                        slot.too_fast(&failure, config);
                    }
                    return Err(failure);
                }
            }
        }
    }

    /// Whether the site allows the address, and the spacing it wishes.
    async fn permission(&self, url: &Url, config: &WebConfig) -> Result<Duration, Failure> {
        match self.inner.robots.of(self, url, config).await {
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
        match tokio::time::timeout(config.deadline, self.inner.robots.of(self, url, config)).await {
            Ok(Site::Rules(rules)) => rules.sitemaps.iter().filter_map(|s| url.join(s).ok()).collect(),
            Ok(Site::Closed(_)) | Err(_) => Vec::new(),
        }
    }

    fn clients(&self, config: &WebConfig) -> Result<Clients, Failure> {
        let mut clients = self.inner.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(clients) = clients.get(&config.connect_timeout) {
            return Ok(clients.clone());
        }
        let made = self.inner.route.clients(config.connect_timeout);
        let made = made.map_err(|e| Failure { may_pass: false, ..Failure::new(FetchStatus::Connect, e.to_string()) })?;
        Ok(clients.entry(config.connect_timeout).or_insert(made).clone())
    }

    /// Room for the row and a turn at the host first, a connection then: who waits for a slow host holds up nobody else, and who waits
    /// for room holds nothing. A row whose time runs already does not wait for room.
    async fn turn(
        &self,
        url: &Url,
        delay: Duration,
        place: Option<&Place>,
        clock: &Clock,
    ) -> Result<(Slot, OwnedSemaphorePermit), Failure> {
        let host = format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default());
        let place = place.filter(|_| !clock.runs());
        let slot = loop {
            if let Some(place) = place {
                place.begin().await;
            }
            let slot = self.inner.hosts.enter(&host, delay, clock).await?;
            if place.is_none_or(Place::may_begin) {
                break slot;
            }
        };
        let connection = Arc::clone(&self.inner.connections).acquire_owned().await;
        clock.begin();
        Ok((slot, connection.map_err(|_| Failure::new(FetchStatus::Connect, "the client is closed"))?))
    }
}

/// The wait after attempt number `attempt` (from 0): doubling, between half of it and all of it, by the address: so that many
/// addresses that failed at once do not come back at once, and no random number is drawn.
pub(crate) fn backoff(url: &Url, attempt: u32, first: Duration) -> Duration {
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

//! Politeness and patience: how many requests a host gets at once and how fast, what a 429 changes, how long an address waits for its
//! turn, and when a host is given up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SetOnce};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Failure;
use crate::config::WebConfig;

/// The spacing after the first 429, the longest one, and how many good answers in a row it takes to shorten it again.
const FIRST_SPACING: Duration = Duration::from_millis(200);
const MAX_SPACING: Duration = Duration::from_secs(10);
const TRUST_AFTER: u32 = 30;
/// A host that answers 429 this often in a row, however slowly it is asked, is left alone for [`LEFT_ALONE`].
const GIVE_UP_AFTER: u32 = 16;
/// A host is not dead before so many requests in a row were met with silence, however long it has lasted.
const LEAST_SILENCES: u32 = 8;
/// How long a host is left alone that answers nothing but 429, or that is dead.
const LEFT_ALONE: Duration = Duration::from_secs(600);
/// A host is not left alone for longer than this, whatever it asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// Hosts kept in memory before idle ones are first forgotten.
const KEPT_HOSTS: usize = 10_000;
/// A host that has been idle for this long may be forgotten, with whatever was learnt about it.
const IDLE: Duration = Duration::from_secs(120);

/// All hosts that are being talked to.
pub(super) struct Hosts {
    hosts: Mutex<Known>,
    at_once: usize,
    spacing: Duration,
}

struct Known {
    hosts: HashMap<String, Arc<Host>>,
    /// Idle hosts are forgotten when there are this many.
    limit: usize,
}

struct Host {
    /// Addresses that have had no turn yet wait here, in their order: at most one of them waits for a slot beside those that have begun.
    /// So what was begun is ended before more is.
    door: tokio::sync::Mutex<()>,
    slots: Arc<Semaphore>,
    at_once: u32,
    pace: Mutex<Pace>,
}

struct Pace {
    /// No request starts before this.
    next: Instant,
    /// Time between the starts of two requests, as learnt from 429s.
    spacing: Duration,
    /// When a 429 last changed that.
    slowed: Instant,
    good_in_a_row: u32,
    limited_in_a_row: u32,
    silent_in_a_row: u32,
    silent_since: Instant,
    /// Time that manners and good answers have taken so far: those who wait meanwhile wait for nothing bad.
    well_spent: Duration,
    shut: Option<Shut>,
}

/// Nothing is asked of a host for some time.
struct Shut {
    until: Instant,
    /// What whoever does not wait for the end of it gets.
    failure: Failure,
    /// Whether it is worth no waiting.
    given_up: bool,
}

/// The right to one request; it ends when this is dropped.
pub(super) struct Slot {
    host: Arc<Host>,
    _permit: Option<OwnedSemaphorePermit>,
    granted: Instant,
    spacing: Duration,
}

/// The time of one address. It runs from its first request on, and before that while its host does nothing well.
pub(super) struct Clock {
    limit: Duration,
    begun: SetOnce<Instant>,
}

impl Clock {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, begun: SetOnce::new() }
    }

    /// The first request is on its way.
    pub(super) fn begin(&self) {
        let _ = self.begun.set(Instant::now());
    }

    /// Whether the first request has been on its way.
    pub(super) fn runs(&self) -> bool {
        self.begun.initialized()
    }

    /// Waits until time is up.
    pub(super) async fn passed(&self) {
        let begun = *self.begun.wait().await;
        sleep_until(begun + self.limit).await;
    }
}

impl Hosts {
    pub(super) fn new(at_once: usize, requests_per_second: f64) -> Self {
        let spacing = Duration::try_from_secs_f64(1.0 / requests_per_second).unwrap_or(MAX_SPACING);
        Self { hosts: Mutex::new(Known { hosts: HashMap::new(), limit: KEPT_HOSTS }), at_once, spacing }
    }

    /// Waits until a request to `host` may start. `delay` is the host's own wish for the time between two requests.
    ///
    /// # Errors
    /// The time of the address is up; or the host is left alone for longer than that: it asked for a long pause, answers 429 to
    /// everything, or is dead. Then the failure is the one that showed it, so that a row says the same whether it came before or after.
    pub(super) async fn enter(&self, host: &str, delay: Duration, clock: &Clock) -> Result<Slot, Failure> {
        let host = self.host(host);
        // The spacing after the last turn is well spent, and was counted when it was granted.
        let (came, spent) = {
            let pace = host.pace();
            (Instant::now().max(pace.next), pace.well_spent)
        };
        let until = |pace: &Pace| match clock.begun.get() {
            Some(begun) => *begun + clock.limit,
            None => came + clock.limit + (pace.well_spent - spent),
        };
        let turn = async {
            let _first = if clock.begun.get().is_none() { Some(host.door.lock().await) } else { None };
            let permit = Arc::clone(&host.slots).acquire_owned().await.ok();
            loop {
                let wait_until = {
                    let mut pace = host.pace();
                    let now = Instant::now();
                    match &pace.shut {
                        Some(shut) if shut.until > now && (shut.given_up || shut.until > until(&pace)) => {
                            return Err(shut.failure.clone());
                        }
                        Some(shut) if shut.until > now => shut.until,
                        _ if pace.next > now => pace.next,
                        _ => {
                            let spacing = self.spacing.max(pace.spacing).max(delay);
                            pace.next = now + spacing;
                            pace.well_spent += spacing;
                            return Ok((permit, now, spacing));
                        }
                    }
                };
                sleep_until(wait_until).await;
            }
        };
        tokio::pin!(turn);
        let (permit, granted, spacing) = loop {
            let limit = until(&host.pace());
            match timeout_at(limit, &mut turn).await {
                Ok(turn) => break turn?,
                Err(_) if until(&host.pace()) > limit => {}
                Err(_) => return Err(Failure::late()),
            }
        };
        Ok(Slot { host: Arc::clone(&host), _permit: permit, granted, spacing })
    }

    fn host(&self, name: &str) -> Arc<Host> {
        let mut known = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = known.hosts.get(name) {
            return Arc::clone(host);
        }
        if known.hosts.len() >= known.limit {
            let now = Instant::now();
            known.hosts.retain(|_, host| {
                let pace = host.pace();
                let is_shut = pace.shut.as_ref().is_some_and(|shut| shut.until > now);
                Arc::strong_count(host) > 1 || is_shut || pace.next + IDLE > now
            });
            known.limit = KEPT_HOSTS.max(known.hosts.len() * 2);
        }
        let pace = Pace {
            next: Instant::now(),
            spacing: Duration::ZERO,
            slowed: Instant::now(),
            good_in_a_row: 0,
            limited_in_a_row: 0,
            silent_in_a_row: 0,
            silent_since: Instant::now(),
            well_spent: Duration::ZERO,
            shut: None,
        };
        let host = Arc::new(Host {
            door: tokio::sync::Mutex::default(),
            slots: Arc::new(Semaphore::new(self.at_once)),
            at_once: u32::try_from(self.at_once).unwrap_or(u32::MAX).max(1),
            pace: Mutex::new(pace),
        });
        known.hosts.insert(name.to_owned(), Arc::clone(&host));
        host
    }
}

impl Host {
    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// The host answered 429: all its requests wait as long as it asks, or for a backoff, and follow one another more slowly from then on.
    /// If that is longer than `config` allows, only those wait whose time it leaves; if nothing but 429 comes back, the host is left alone.
    pub(super) fn too_fast(&self, failure: &Failure, config: &WebConfig) {
        let pause = failure.retry_after.unwrap_or(config.backoff);
        let longest = config.max_retry_after.max(config.backoff);
        let mut pace = self.host.pace();
        let now = Instant::now();
        // What was on its way already when the last 429 came says nothing about the pace since then.
        if self.granted >= pace.slowed {
            pace.slowed = now;
            pace.limited_in_a_row += 1;
            pace.spacing = (pace.spacing * 2).clamp(FIRST_SPACING, MAX_SPACING);
        }
        let shut_for = if pace.limited_in_a_row >= GIVE_UP_AFTER {
            pace.limited_in_a_row = 0;
            Some((LEFT_ALONE.max(pause.min(LONGEST_PAUSE)), true))
        } else {
            (pause > longest).then(|| (pause.min(LONGEST_PAUSE), false))
        };
        if let Some((shut_for, given_up)) = shut_for {
            let until = now + shut_for;
            match &mut pace.shut {
                Some(shut) if shut.until >= until => shut.given_up |= given_up,
                shut => *shut = Some(Shut { until, failure: Failure { may_pass: false, ..failure.clone() }, given_up }),
            }
        }
        pace.next = pace.next.max(now + pause.min(longest));
        pace.good_in_a_row = 0;
    }

    /// The host gave no sign of life. If it has given none for `most`, zero being for ever, it is left alone, and then again after each
    /// further request like this one.
    pub(super) fn silent(&self, failure: &Failure, most: Duration) {
        let mut pace = self.host.pace();
        let now = Instant::now();
        if pace.silent_in_a_row == 0 {
            // The request itself was part of the silence.
            pace.silent_since = self.granted;
        }
        pace.silent_in_a_row = pace.silent_in_a_row.saturating_add(1);
        if !most.is_zero() && pace.silent_in_a_row >= LEAST_SILENCES && now - pace.silent_since >= most {
            let failure = Failure { may_pass: false, ..failure.clone() };
            pace.shut = Some(Shut { until: now + LEFT_ALONE, failure, given_up: true });
        }
    }

    /// The host gave a sign of life. If it `answered`, the time that it took was well spent.
    pub(super) fn heard(&self, answered: bool) {
        let mut pace = self.host.pace();
        pace.silent_in_a_row = 0;
        if answered {
            pace.well_spent += (self.granted.elapsed() / self.host.at_once).saturating_sub(self.spacing);
        }
    }

    /// The host answered well; after some of these it is trusted with a little more again.
    pub(super) fn fine(&self) {
        let mut pace = self.host.pace();
        pace.limited_in_a_row = 0;
        pace.good_in_a_row += 1;
        if pace.good_in_a_row >= TRUST_AFTER {
            pace.good_in_a_row = 0;
            pace.spacing = pace.spacing.mul_f64(0.7);
        }
    }
}

#[cfg(test)]
mod tests;

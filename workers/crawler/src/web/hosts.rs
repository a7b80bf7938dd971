//! Politeness and patience: how many requests a host gets at once and how fast, what a 429 changes, and when a host is given up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capfilt_schemas::FetchStatus;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

use super::Failure;

/// The spacing after the first 429, the longest one, and how many good answers in a row it takes to shorten it again.
const FIRST_SPACING: Duration = Duration::from_millis(200);
const MAX_SPACING: Duration = Duration::from_secs(10);
const TRUST_AFTER: u32 = 30;
/// A host that answers 429 this often in a row, however slowly it is asked, is left alone for [`LEFT_ALONE`].
const GIVE_UP_AFTER: u32 = 16;
/// How long a host is left alone that asked for it, or that is dead.
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
    slots: Arc<Semaphore>,
    pace: Mutex<Pace>,
}

struct Pace {
    /// No request starts before this.
    next: Instant,
    /// Time between the starts of two requests, as learnt from 429s.
    spacing: Duration,
    good_in_a_row: u32,
    limited_in_a_row: u32,
    silent_in_a_row: u32,
    /// Nothing is asked of the host before this; whoever comes gets the failure.
    shut: Option<(Instant, Failure)>,
}

/// The right to one request; it ends when this is dropped.
pub(super) struct Slot {
    host: Arc<Host>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Hosts {
    pub(super) fn new(at_once: usize, requests_per_second: f64) -> Self {
        let spacing = Duration::try_from_secs_f64(1.0 / requests_per_second).unwrap_or(MAX_SPACING);
        Self { hosts: Mutex::new(Known { hosts: HashMap::new(), limit: KEPT_HOSTS }), at_once, spacing }
    }

    /// Waits until a request to `host` may start. `delay` is the host's own wish for the time between two requests.
    ///
    /// # Errors
    /// The host is left alone for now: it asked for a long pause, answers 429 to everything, or is dead. Then the failure is the one that
    /// showed it, so that a row says the same whether it came before or after.
    pub(super) async fn enter(&self, host: &str, delay: Duration) -> Result<Slot, Failure> {
        let host = self.host(host);
        let permit = Arc::clone(&host.slots).acquire_owned().await.ok();
        loop {
            let wait_until = {
                let mut pace = host.pace();
                let now = Instant::now();
                if let Some((until, failure)) = &pace.shut
                    && *until > now
                {
                    return Err(failure.clone());
                }
                if pace.next <= now {
                    pace.next = now + self.spacing.max(pace.spacing).max(delay);
                    break;
                }
                pace.next
            };
            sleep_until(wait_until).await;
        }
        Ok(Slot { host, _permit: permit })
    }

    fn host(&self, name: &str) -> Arc<Host> {
        let mut known = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = known.hosts.get(name) {
            return Arc::clone(host);
        }
        if known.hosts.len() >= known.limit {
            let now = Instant::now();
            known.hosts.retain(|_, host| Arc::strong_count(host) > 1 || host.pace().next + IDLE > now);
            known.limit = KEPT_HOSTS.max(known.hosts.len() * 2);
        }
        let pace = Pace {
            next: Instant::now(),
            spacing: Duration::ZERO,
            good_in_a_row: 0,
            limited_in_a_row: 0,
            silent_in_a_row: 0,
            shut: None,
        };
        let host = Arc::new(Host { slots: Arc::new(Semaphore::new(self.at_once)), pace: Mutex::new(pace) });
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
    /// The host answered 429: all its requests wait for `pause`, and follow one another more slowly from then on. If the pause is longer
    /// than `longest`, or nothing but 429 comes back, the host is left alone.
    pub(super) fn too_fast(&self, pause: Duration, longest: Duration) {
        let mut pace = self.host.pace();
        pace.limited_in_a_row += 1;
        let shut_for = if pause > longest {
            Some(pause.min(LONGEST_PAUSE))
        } else if pace.limited_in_a_row >= GIVE_UP_AFTER {
            pace.limited_in_a_row = 0;
            Some(LEFT_ALONE)
        } else {
            None
        };
        if let Some(shut_for) = shut_for {
            let failure = Failure::new(FetchStatus::RateLimited, "the host limits its rate and is left alone");
            pace.shut = Some((Instant::now() + shut_for, Failure { may_pass: false, ..failure }));
        }
        pace.spacing = (pace.spacing * 2).clamp(FIRST_SPACING, MAX_SPACING);
        pace.next = pace.next.max(Instant::now() + pause.min(longest));
        pace.good_in_a_row = 0;
    }

    /// The host gave no sign of life. After `most` requests like this one it is left alone, and then again after each further one.
    pub(super) fn silent(&self, failure: &Failure, most: u32) {
        let mut pace = self.host.pace();
        pace.silent_in_a_row = pace.silent_in_a_row.saturating_add(1);
        if most > 0 && pace.silent_in_a_row >= most {
            pace.shut = Some((Instant::now() + LEFT_ALONE, Failure { may_pass: false, ..failure.clone() }));
        }
    }

    /// The host answered, whatever it was.
    pub(super) fn heard(&self) {
        self.host.pace().silent_in_a_row = 0;
    }

    /// The host answered well; after some of these it is trusted with a little more again.
    pub(super) fn fine(&self) {
        let mut pace = self.host.pace();
        (pace.limited_in_a_row, pace.silent_in_a_row) = (0, 0);
        pace.good_in_a_row += 1;
        if pace.good_in_a_row >= TRUST_AFTER {
            pace.good_in_a_row = 0;
            pace.spacing = pace.spacing.mul_f64(0.7);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures::future::join_all;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn requests_to_one_host_are_spaced_and_few_at_once() {
        let hosts = Hosts::new(2, 100.0);
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let start = Instant::now();
        join_all((0..10).map(|_| async {
            let _slot = hosts.enter("a", Duration::ZERO).await.unwrap();
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(30)).await;
            now.fetch_sub(1, Ordering::SeqCst);
        }))
        .await;
        assert_eq!(most.load(Ordering::SeqCst), 2);
        // Five pairs of 30 ms, the second of each pair 10 ms later.
        assert!(start.elapsed() >= Duration::from_millis(160), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn hosts_do_not_wait_for_each_other_and_a_crawl_delay_counts() {
        let hosts = Hosts::new(4, 1000.0);
        let start = Instant::now();
        for _ in 0..3 {
            drop(hosts.enter("slow", Duration::from_millis(300)).await);
        }
        assert!(start.elapsed() >= Duration::from_millis(600));
        let other = Instant::now();
        drop(hosts.enter("other", Duration::ZERO).await);
        assert!(other.elapsed() < Duration::from_millis(250));
    }

    #[tokio::test]
    async fn a_429_slows_the_host_down_until_it_is_trusted_again() {
        let hosts = Hosts::new(4, 1000.0);
        let slot = hosts.enter("a", Duration::ZERO).await.unwrap();
        let longest = Duration::from_secs(1);
        slot.too_fast(Duration::from_millis(400), longest);
        slot.too_fast(Duration::ZERO, longest);
        drop(slot);
        let start = Instant::now();
        drop(hosts.enter("a", Duration::ZERO).await);
        assert!(start.elapsed() >= Duration::from_millis(400), "nobody comes before the pause is over");
        let spacing = || hosts.host("a").pace().spacing;
        assert_eq!(spacing(), FIRST_SPACING * 2);
        let slot = Slot { host: hosts.host("a"), _permit: None };
        (0..TRUST_AFTER - 1).for_each(|_| slot.fine());
        assert_eq!(spacing(), FIRST_SPACING * 2);
        slot.fine();
        assert!(spacing() < FIRST_SPACING * 2);
        (0..TRUST_AFTER * 100).for_each(|_| slot.fine());
        assert!(spacing() < Duration::from_millis(1));
        (0..GIVE_UP_AFTER - 1).for_each(|_| slot.too_fast(Duration::ZERO, longest));
        assert_eq!(spacing(), MAX_SPACING);
    }

    #[tokio::test]
    async fn a_host_that_wants_no_more_is_left_alone() {
        let longest = Duration::from_secs(1);
        let hosts = Hosts::new(4, 1000.0);
        hosts.enter("pause", Duration::ZERO).await.unwrap().too_fast(Duration::from_secs(1000), longest);
        assert!(hosts.enter("pause", Duration::ZERO).await.is_err());
        let slot = hosts.enter("never", Duration::ZERO).await.unwrap();
        (0..GIVE_UP_AFTER - 1).for_each(|_| slot.too_fast(Duration::ZERO, longest));
        slot.fine();
        (0..GIVE_UP_AFTER - 1).for_each(|_| slot.too_fast(Duration::ZERO, longest));
        assert!(hosts.host("never").pace().shut.is_none(), "a good answer in between");
        slot.too_fast(Duration::ZERO, longest);
        assert!(hosts.enter("never", Duration::ZERO).await.is_err());
        assert!(hosts.enter("other", Duration::ZERO).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_host_is_given_up_and_tried_again_later() {
        let hosts = Hosts::new(4, 1000.0);
        let dead = Failure::new(FetchStatus::Timeout, "no sign");
        let slot = hosts.enter("dead", Duration::ZERO).await.unwrap();
        (0..3).for_each(|_| slot.silent(&dead, 4));
        slot.heard();
        (0..3).for_each(|_| slot.silent(&dead, 4));
        assert!(hosts.enter("dead", Duration::ZERO).await.is_ok(), "an answer in between");
        slot.silent(&dead, 4);
        let failure = hosts.enter("dead", Duration::ZERO).await.err().unwrap();
        assert_eq!((failure.status, failure.reason.as_str(), failure.may_pass), (FetchStatus::Timeout, "no sign", false));
        tokio::time::advance(LEFT_ALONE).await;
        hosts.enter("dead", Duration::ZERO).await.unwrap().silent(&dead, 4);
        assert!(hosts.enter("dead", Duration::ZERO).await.is_err(), "one trial is enough");
        tokio::time::advance(LEFT_ALONE).await;
        hosts.enter("dead", Duration::ZERO).await.unwrap().heard();
        slot.silent(&dead, 4);
        assert!(hosts.enter("dead", Duration::ZERO).await.is_ok());
        (0..100).for_each(|_| slot.silent(&dead, 0));
        assert!(hosts.enter("dead", Duration::ZERO).await.is_ok(), "never, if so told");
    }

    #[test]
    fn idle_hosts_are_forgotten_and_busy_ones_are_not() {
        let hosts = Hosts::new(1, 1000.0);
        let busy = hosts.host("busy");
        for n in 0..KEPT_HOSTS {
            hosts.host(&n.to_string()).pace().next -= IDLE * 2;
        }
        let known = || hosts.hosts.lock().unwrap().hosts.len();
        assert!(known() < KEPT_HOSTS);
        assert!(Arc::ptr_eq(&busy, &hosts.host("busy")));
    }
}

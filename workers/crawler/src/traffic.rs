//! What downloads led to, by status and by host, for people who watch a run. Never part of any output.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capfilt_schemas::FetchStatus;
use serde::Serialize;

/// Hosts that are counted by name; what further ones do is counted under [`OTHER_HOSTS`].
const MAX_HOSTS: usize = 20_000;
/// Stands for all hosts beyond the first 20,000.
pub const OTHER_HOSTS: &str = "(other hosts)";
/// Stands for addresses that name none.
const NO_HOST: &str = "(no host)";

/// The downloads of a process. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Traffic(Arc<Mutex<Counted>>);

#[derive(Debug, Default)]
struct Counted {
    totals: Downloads,
    hosts: HashMap<String, Downloads>,
    span: Option<(Instant, Instant)>,
}

/// Counts of downloads that have ended.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Downloads {
    /// How many ended in which way.
    pub by_status: BTreeMap<FetchStatus, u64>,
    /// Bytes of the bodies that became images.
    pub bytes: u64,
    /// The time that they took, each for itself, waiting for a turn included.
    pub busy: Duration,
}

impl Downloads {
    /// All that ended.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.by_status.values().sum()
    }

    /// Those that gave an image.
    #[must_use]
    pub fn ok(&self) -> u64 {
        self.by_status.get(&FetchStatus::Ok).copied().unwrap_or(0)
    }

    /// The share that gave an image, 0 to 1; of nothing it is 0.
    #[must_use]
    pub fn success(&self) -> f64 {
        share(self.ok(), self.all())
    }

    /// The failures as (status, share of all downloads), the most frequent first.
    #[must_use]
    pub fn failures(&self) -> Vec<(FetchStatus, f64)> {
        let mut failures: Vec<_> = self.by_status.iter().filter(|(s, _)| **s != FetchStatus::Ok).collect();
        failures.sort_by_key(|(status, n)| (std::cmp::Reverse(**n), **status));
        failures.into_iter().map(|(status, n)| (*status, share(*n, self.all()))).collect()
    }

    fn add(&mut self, status: FetchStatus, bytes: u64, took: Duration) {
        *self.by_status.entry(status).or_default() += 1;
        self.bytes += bytes;
        self.busy += took;
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn share(part: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { part as f64 / all as f64 }
}

impl Traffic {
    /// Counts one download that has ended. `url` may be anything.
    pub(crate) fn record(&self, url: &str, status: FetchStatus, bytes: u64, took: Duration) {
        let host = url::Url::parse(url).ok().and_then(|u| u.host_str().map(str::to_owned)).unwrap_or_else(|| NO_HOST.to_owned());
        metrics::counter!("capfilt_downloaded_bytes_total").increment(bytes);
        metrics::histogram!("capfilt_download_duration_seconds").record(took.as_secs_f64());
        let mut counted = self.lock();
        let now = Instant::now();
        let first = counted.span.map_or_else(|| now.checked_sub(took).unwrap_or(now), |(first, _)| first);
        counted.span = Some((first, now));
        counted.totals.add(status, bytes, took);
        let known = counted.hosts.len() < MAX_HOSTS || counted.hosts.contains_key(&host);
        let name = if known { host } else { OTHER_HOSTS.to_owned() };
        counted.hosts.entry(name).or_default().add(status, bytes, took);
    }

    /// All downloads so far.
    #[must_use]
    pub fn totals(&self) -> Downloads {
        self.lock().totals.clone()
    }

    /// From the start of the first download to the end of the last.
    #[must_use]
    pub fn span(&self) -> Duration {
        self.lock().span.map_or(Duration::ZERO, |(first, last)| last - first)
    }

    /// The `n` hosts with most downloads, by name among equals.
    #[must_use]
    pub fn hosts(&self, n: usize) -> Vec<(String, Downloads)> {
        let mut hosts: Vec<_> = self.lock().hosts.iter().map(|(name, d)| (name.clone(), d.clone())).collect();
        hosts.sort_by_cached_key(|(name, d)| (std::cmp::Reverse(d.all()), name.clone()));
        hosts.truncate(n);
        hosts
    }

    /// What a million images cost at the pace so far, in the unit of `hourly_price`, the price of this machine an hour.
    #[must_use]
    pub fn cost_per_million(&self, hourly_price: f64) -> Option<f64> {
        let (images, hours) = (self.totals().ok(), self.span().as_secs_f64() / 3600.0);
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        (images > 0).then(|| hourly_price * hours / images as f64 * 1e6)
    }

    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counts_by_status_and_host() {
        let traffic = Traffic::default();
        let second = Duration::from_secs(1);
        traffic.record("http://b.test/1", FetchStatus::Ok, 100, second);
        traffic.record("http://b.test/2", FetchStatus::Timeout, 0, second);
        traffic.record("https://a.test/", FetchStatus::Ok, 50, second);
        traffic.record("no address", FetchStatus::BadUrl, 0, second);
        let totals = traffic.totals();
        assert_eq!((totals.all(), totals.ok(), totals.bytes, totals.success()), (4, 2, 150, 0.5));
        assert_eq!(totals.failures(), [(FetchStatus::BadUrl, 0.25), (FetchStatus::Timeout, 0.25)]);
        let hosts = traffic.hosts(2);
        assert_eq!(hosts.iter().map(|(name, d)| (name.as_str(), d.all())).collect::<Vec<_>>(), [("b.test", 2), (NO_HOST, 1)]);
        let cost = traffic.cost_per_million(3.6).unwrap();
        assert!((cost - 3.6 * traffic.span().as_secs_f64() / 3600.0 / 2.0 * 1e6).abs() < 1e-6 && cost >= 500.0, "{cost}");
    }

    #[test]
    fn hosts_are_bounded() {
        let traffic = Traffic::default();
        for i in 0..MAX_HOSTS + 10 {
            traffic.record(&format!("http://h{i}.test/"), FetchStatus::Dns, 0, Duration::ZERO);
        }
        assert!(traffic.hosts(usize::MAX).len() == MAX_HOSTS + 1);
        assert_eq!(traffic.hosts(1)[0].0, OTHER_HOSTS);
    }
}

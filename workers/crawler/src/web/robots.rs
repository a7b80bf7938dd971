//! The robots.txt of every site that is talked to: asked for once, before anything else, and kept.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use capfilt_schemas::FetchStatus;
use tokio::sync::OnceCell;
use url::Url;

use super::rules::{MAX_BYTES, Rules};
use super::{Ask, Failure, Want, Web};
use crate::config::WebConfig;

/// How long a robots.txt counts (RFC 9309, 2.4), and how long it counts that there was none to be had.
const KEPT: Duration = Duration::from_secs(24 * 3600);
const KEPT_FAILURE: Duration = Duration::from_secs(600);
/// Sites kept in memory before outdated ones are dropped, and bytes of rules before the oldest are.
const KEPT_SITES: usize = 20_000;
const KEPT_BYTES: usize = 256 << 20;

/// What is known of a site's robots.txt.
#[derive(Clone)]
pub(super) enum Site {
    /// The rules, perhaps none.
    Rules(Arc<Rules>),
    /// The site did not answer, or only with errors: nothing may be asked for.
    Closed(Failure),
}

struct Entry {
    site: Arc<OnceCell<Site>>,
    since: Instant,
}

#[derive(Default)]
pub(super) struct Robots {
    sites: Mutex<HashMap<String, Entry>>,
    /// Bytes of all rules, and of those that were dropped since they were last counted.
    bytes: AtomicUsize,
}

impl Robots {
    /// The rules of the site of `url`. Whoever asks first fetches them; the others wait for it.
    pub(super) async fn of(&self, web: &Web, url: &Url, config: &WebConfig) -> Site {
        let key = format!("{} {}", config.token(), url.origin().ascii_serialization());
        let cell = self.entry(key);
        // What it says does not depend on who asks, and is for all: so no opt-out list counts.
        let asked = || async {
            let site = Box::pin(fetch(web.whole(), url, config)).await;
            self.bytes.fetch_add(site.bytes(), Ordering::Relaxed);
            site
        };
        cell.get_or_init(asked).await.clone()
    }

    fn entry(&self, key: String) -> Arc<OnceCell<Site>> {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        if sites.len() >= KEPT_SITES {
            sites.retain(|_, entry| !entry.is_outdated());
        }
        if sites.len() >= KEPT_SITES * 4 {
            sites.clear();
        }
        if self.bytes.load(Ordering::Relaxed) > KEPT_BYTES {
            self.bytes.store(drop_oldest(&mut sites, KEPT_BYTES / 2), Ordering::Relaxed);
        }
        let fresh = || Entry { site: Arc::default(), since: Instant::now() };
        let entry = sites.entry(key).or_insert_with(fresh);
        if entry.is_outdated() {
            *entry = fresh();
        }
        Arc::clone(&entry.site)
    }
}

impl Site {
    fn bytes(&self) -> usize {
        match self {
            Self::Rules(rules) => rules.bytes(),
            Self::Closed(_) => 0,
        }
    }
}

/// Drops the oldest sites until all have at most `most` bytes, and tells how many these are.
fn drop_oldest(sites: &mut HashMap<String, Entry>, most: usize) -> usize {
    let bytes = |entry: &Entry| entry.site.get().map_or(0, Site::bytes);
    let mut by_age: Vec<_> = sites.values().map(|entry| (entry.since, bytes(entry))).collect();
    by_age.sort_unstable_by_key(|(since, _)| std::cmp::Reverse(*since));
    let mut kept = 0;
    let dropped = by_age.iter().find(|(_, bytes)| {
        kept += bytes;
        kept > most
    });
    if let Some((last, _)) = dropped.copied() {
        sites.retain(|_, entry| entry.since > last);
    }
    sites.values().map(bytes).sum()
}

impl Entry {
    fn is_outdated(&self) -> bool {
        let kept = match self.site.get() {
            Some(Site::Closed(_)) => KEPT_FAILURE,
            _ => KEPT,
        };
        self.since.elapsed() > kept
    }
}

/// RFC 9309, 2.3.1: an answer of 4xx means that there are no rules; a server that fails, or cannot be reached, closes its site. So do
/// 429 and an endless redirect. Of what may pass the status tells what failed, so that a dead or busy host is not taken for one that
/// forbids.
async fn fetch(web: Web, url: &Url, config: &WebConfig) -> Site {
    let Ok(robots_url) = url.join("/robots.txt") else { return Site::Rules(Arc::default()) };
    let ask = Ask { robots: false, ..Ask::new(config, Want::Text, MAX_BYTES) };
    match web.within_deadline(&robots_url, ask).await {
        Ok(answer) => Site::Rules(Arc::new(Rules::parse(&answer.body, config.token()))),
        Err(failure) if failure.status == FetchStatus::HttpClient => Site::Rules(Arc::default()),
        Err(failure) => {
            let told = failure.status.is_transient() || failure.status == FetchStatus::ForbiddenAddress;
            let status = if told { failure.status } else { FetchStatus::Robots };
            let reason = format!("robots.txt could not be had: {}", failure.reason);
            tracing::debug!(site = %url.origin().ascii_serialization(), %reason, "site is closed");
            Site::Closed(Failure::new(status, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_sites_are_dropped_first() {
        let since = Instant::now();
        let rules = Rules::parse(b"User-agent: *\nDisallow: /private", "capfilt");
        let (bytes, site) = (rules.bytes(), Site::Rules(Arc::new(rules)));
        let entry = |n| Entry { site: Arc::new(OnceCell::new_with(Some(site.clone()))), since: since + Duration::from_secs(n) };
        let mut sites: HashMap<String, Entry> = (0..10).map(|n| (n.to_string(), entry(n))).collect();
        assert_eq!(drop_oldest(&mut sites, bytes * 3 + 1), bytes * 3);
        let mut kept: Vec<&str> = sites.keys().map(String::as_str).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["7", "8", "9"]);
        assert_eq!(drop_oldest(&mut sites, bytes * 3), bytes * 3);
    }
}

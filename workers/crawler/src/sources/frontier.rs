//! Which pages a crawl visits: level by level, within its caps. The choice depends on the pages' content alone, never on what answered
//! first.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use url::Url;

use super::address::{is_listed, page_address, shape};
use crate::config::PagesConfig;

/// The pages seen and the pages to come.
pub(super) struct Frontier {
    config: PagesConfig,
    seed_hosts: HashSet<String>,
    /// Every address that was visited or led to.
    seen: HashSet<String>,
    by_host: HashMap<String, usize>,
    by_shape: HashMap<String, usize>,
    visited: usize,
    /// What the pages so far link to, by host; of each host at most as many as could still be visited, the first in order.
    next: BTreeMap<String, BTreeSet<String>>,
}

impl Frontier {
    /// A crawl that starts with the seeds.
    pub(super) fn new(config: PagesConfig) -> Self {
        let seeds: Vec<Url> = config.seeds.iter().filter_map(|s| Url::parse(s).ok()).collect();
        let mut frontier = Self {
            seed_hosts: seeds.iter().filter_map(|u| u.host_str().map(str::to_owned)).collect(),
            config,
            seen: HashSet::new(),
            by_host: HashMap::new(),
            by_shape: HashMap::new(),
            visited: 0,
            next: BTreeMap::new(),
        };
        seeds.into_iter().for_each(|seed| frontier.offer(seed));
        frontier
    }

    /// Whether the crawl may touch the host of `url`.
    pub(super) fn in_scope(&self, url: &Url) -> bool {
        url.host_str().is_some_and(|host| self.seed_hosts.contains(host) || is_listed(host, &self.config.hosts))
    }

    /// Takes up a link for the next level. In which order links are offered does not matter.
    pub(super) fn offer(&mut self, url: Url) {
        let Some(url) = page_address(url) else { return };
        if !self.in_scope(&url) || self.seen.contains(url.as_str()) {
            return;
        }
        let host = url.authority().to_owned();
        let left = self.config.max_pages_per_host.saturating_sub(self.by_host.get(&host).copied().unwrap_or(0));
        if !self.next.contains_key(&host) && self.next.len() >= self.config.max_pages {
            // Of too many hosts the first in order are kept.
            if self.next.last_key_value().is_none_or(|(last, _)| *last <= host) {
                return;
            }
            self.next.pop_last();
        }
        let pages = self.next.entry(host).or_default();
        pages.insert(url.into());
        // Numbers of one shape stand together: room for a few shapes, so that one of them cannot take all places.
        if pages.len() > left.saturating_mul(4) {
            pages.pop_last();
        }
    }

    /// Remembers where a redirect led, so that it is not visited again.
    pub(super) fn led_to(&mut self, url: &Url) {
        if let Some(url) = page_address(url.clone()) {
            self.seen.insert(url.into());
        }
    }

    /// The pages of the next level: first one page of each host, then the second of each, and so on, so that hosts are visited side by
    /// side and a cap takes from all alike.
    pub(super) fn next_level(&mut self) -> Vec<Url> {
        let mut level = Vec::new();
        for (host, pages) in std::mem::take(&mut self.next) {
            let of_host = self.by_host.entry(host.clone()).or_default();
            let mut rank = 0;
            for url in pages {
                if *of_host + rank >= self.config.max_pages_per_host {
                    break;
                }
                let Ok(url) = Url::parse(&url) else { continue };
                if self.seen.contains(url.as_str()) {
                    continue;
                }
                let of_shape = self.by_shape.entry(shape(&url)).or_default();
                if *of_shape < self.config.max_pages_per_shape {
                    *of_shape += 1;
                    level.push((rank, host.clone(), url));
                    rank += 1;
                }
            }
            *of_host += rank;
        }
        level.sort();
        level.truncate(self.config.max_pages.saturating_sub(self.visited));
        self.visited += level.len();
        for (_, _, url) in &level {
            self.seen.insert(url.as_str().to_owned());
        }
        level.into_iter().map(|(_, _, url)| url).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn frontier(change: impl FnOnce(&mut PagesConfig)) -> Frontier {
        let mut config = PagesConfig { seeds: vec!["http://a.test/".to_owned()], hosts: vec!["*.b.test".to_owned()], ..PagesConfig::default() };
        change(&mut config);
        let mut frontier = Frontier::new(config);
        assert_eq!(level(&mut frontier), ["http://a.test/"]);
        frontier
    }

    fn level(frontier: &mut Frontier) -> Vec<String> {
        frontier.next_level().into_iter().map(String::from).collect()
    }

    fn offer(frontier: &mut Frontier, urls: impl IntoIterator<Item = impl AsRef<str>>) {
        urls.into_iter().for_each(|u| frontier.offer(Url::parse(u.as_ref()).unwrap()));
    }

    #[test]
    fn stays_in_scope_and_visits_once() {
        let mut f = frontier(|_| {});
        offer(&mut f, ["http://a.test/x?sid=1", "http://a.test/x?sid=2#y", "http://a.test/", "http://c.test/", "http://w.b.test/", "http://b.test/"]);
        assert_eq!(level(&mut f), ["http://a.test/x", "http://w.b.test/"]);
        offer(&mut f, ["http://a.test/x", "http://a.test/moved"]);
        f.led_to(&Url::parse("http://a.test/moved").unwrap());
        assert_eq!(level(&mut f), [] as [&str; 0]);
    }

    #[test]
    fn hosts_take_turns() {
        let mut f = frontier(|c| c.max_pages = 5);
        offer(&mut f, ["http://a.test/3", "http://a.test/2", "http://a.test/1", "http://x.b.test/2", "http://x.b.test/1", "http://y.b.test/9"]);
        assert_eq!(level(&mut f), ["http://a.test/1", "http://x.b.test/1", "http://y.b.test/9", "http://a.test/2"]);
    }

    #[test]
    fn caps_hold_over_levels() {
        let mut f = frontier(|c| (c.max_pages_per_host, c.max_pages_per_shape) = (6, 3));
        offer(&mut f, (0..50).map(|n| format!("http://a.test/calendar/{n}/{n}")).chain((0..50).map(|n| format!("http://a.test/zoo{n}x"))));
        let first = level(&mut f);
        assert_eq!(first.len(), 5, "the seed was the first of six: {first:?}");
        assert_eq!(first.iter().filter(|u| u.contains("calendar")).count(), 3);
        offer(&mut f, ["http://a.test/last1", "http://a.test/last2"]);
        assert_eq!(level(&mut f).len(), 0);
    }

    proptest! {
        #[test]
        fn the_order_of_offers_does_not_matter(
            links in proptest::collection::vec("http://[abc]\\.b\\.test/[a-d]{1,2}[0-9]{0,2}", 0..60).prop_shuffle(),
            caps in (1_usize..20, 1_usize..6, 1_usize..4),
        ) {
            let run = |links: &[String]| {
                let mut f = frontier(|c| (c.max_pages, c.max_pages_per_host, c.max_pages_per_shape) = caps);
                offer(&mut f, links);
                level(&mut f)
            };
            let mut sorted = links.clone();
            sorted.sort();
            sorted.reverse();
            prop_assert_eq!(run(&links), run(&sorted));
        }
    }
}

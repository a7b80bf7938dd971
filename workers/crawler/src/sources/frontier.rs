//! Which pages a crawl visits: level by level, within its caps. The choice depends on the pages' content alone, never on what answered
//! first.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use url::Url;

use super::page_address::{is_listed, page_address, shape};
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
    /// What the pages so far link to.
    next: BTreeMap<String, Links>,
}

/// Links to one host, by their shape; of each shape at most as many as could still be visited, the first in order.
type Links = BTreeMap<String, BTreeSet<String>>;

impl Frontier {
    /// A crawl that starts with the seeds.
    pub(super) fn new(config: PagesConfig) -> Self {
        let seeds: Vec<Url> = config.seeds.iter().filter_map(|s| Url::parse(s).ok()).collect();
        let mut frontier = Self::around(config, &seeds);
        seeds.into_iter().for_each(|seed| frontier.offer(seed));
        frontier
    }

    /// A crawl without seeds, to which the hosts of `sites` belong.
    pub(super) fn around(config: PagesConfig, sites: &[Url]) -> Self {
        Self {
            seed_hosts: sites.iter().filter_map(|u| u.host_str().map(str::to_owned)).collect(),
            config,
            seen: HashSet::new(),
            by_host: HashMap::new(),
            by_shape: HashMap::new(),
            visited: 0,
            next: BTreeMap::new(),
        }
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
        let (host, shape) = (url.authority().to_owned(), shape(&url));
        let of_host = room_in(&mut self.next, host, self.config.max_pages);
        let room = self.config.max_pages_per_host.saturating_sub(self.by_host.get(url.authority()).copied().unwrap_or(0));
        let room_of_shape = self.config.max_pages_per_shape.saturating_sub(self.by_shape.get(&shape).copied().unwrap_or(0));
        if let Some(links) = of_host.and_then(|links| room_in(links, shape, room)) {
            links.insert(url.into());
            if links.len() > room_of_shape {
                links.pop_last();
            }
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
        for (host, shapes) in std::mem::take(&mut self.next) {
            let of_host = self.by_host.entry(host.clone()).or_default();
            let room = self.config.max_pages_per_host.saturating_sub(*of_host);
            let fresh = |(shape, links): (String, BTreeSet<String>)| {
                let unseen = links.into_iter().filter(|url| !self.seen.contains(url));
                unseen.map(move |url| (url, shape.clone())).collect::<Vec<_>>()
            };
            let mut pages: Vec<(String, String)> = shapes.into_iter().flat_map(fresh).collect();
            pages.sort_unstable();
            pages.truncate(room);
            *of_host += pages.len();
            for (rank, (url, shape)) in pages.into_iter().enumerate() {
                *self.by_shape.entry(shape).or_default() += 1;
                level.push((rank, host.clone(), url));
            }
        }
        level.sort();
        level.truncate(self.config.max_pages.saturating_sub(self.visited));
        self.visited += level.len();
        self.seen.extend(level.iter().map(|(_, _, url)| url.clone()));
        level.into_iter().filter_map(|(_, _, url)| Url::parse(&url).ok()).collect()
    }
}

/// The value of a key in a map of at most `most` keys, made if need be; of too many keys the first in order are kept.
fn room_in<V: Default>(map: &mut BTreeMap<String, V>, key: String, most: usize) -> Option<&mut V> {
    if !map.contains_key(&key) && map.len() >= most {
        if map.last_key_value().is_none_or(|(last, _)| *last <= key) {
            return None;
        }
        map.pop_last();
    }
    Some(map.entry(key).or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn frontier(change: impl FnOnce(&mut PagesConfig)) -> Frontier {
        let mut config = PagesConfig {
            seeds: vec!["http://a.test/".to_owned()],
            hosts: vec!["*.b.test".to_owned()],
            ..PagesConfig::default()
        };
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
        offer(
            &mut f,
            [
                "http://a.test/x?sid=1",
                "http://a.test/x?sid=2#y",
                "http://a.test/",
                "http://c.test/",
                "http://w.b.test/",
                "http://b.test/",
            ],
        );
        assert_eq!(level(&mut f), ["http://a.test/x", "http://w.b.test/"]);
        offer(&mut f, ["http://a.test/x", "http://a.test/moved"]);
        f.led_to(&Url::parse("http://a.test/moved").unwrap());
        assert_eq!(level(&mut f), [] as [&str; 0]);
    }

    #[test]
    fn hosts_take_turns() {
        let mut f = frontier(|c| c.max_pages = 5);
        offer(
            &mut f,
            [
                "http://a.test/3",
                "http://a.test/2",
                "http://a.test/1",
                "http://x.b.test/2",
                "http://x.b.test/1",
                "http://y.b.test/9",
            ],
        );
        assert_eq!(level(&mut f), ["http://a.test/1", "http://x.b.test/1", "http://y.b.test/9", "http://a.test/2"]);
    }

    #[test]
    fn caps_hold_over_levels() {
        let mut f = frontier(|c| (c.max_pages_per_host, c.max_pages_per_shape) = (6, 3));
        offer(
            &mut f,
            (0..50).map(|n| format!("http://a.test/calendar/{n}/{n}")).chain((0..50).map(|n| format!("http://a.test/zoo{n}x"))),
        );
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

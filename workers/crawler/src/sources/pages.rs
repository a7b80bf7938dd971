//! Crawling web pages for images with texts.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use capfilt_runtime::{StageError, Work, on_rayon};
use capfilt_schemas::sample_id;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use url::Url;

use super::frontier::Frontier;
use super::page_address::page_address;
use super::sitemap::{self, SitePage, Sitemap};
use super::{Found, FoundStream, Sender, take};
use crate::CrawlError;
use crate::config::{PagesConfig, SitemapsConfig, WebConfig};
use crate::html::{self, FoundImage, Page};
use crate::opt_out::Directives;
use crate::web::{Failure, Want, Web};

/// Pages of which the answer may be at hand before an earlier one's: for each connection so many.
const AHEAD: usize = 8;
/// Sitemaps read for one host, those in an index included.
const MAX_SITEMAPS: usize = 20;
/// Images of sitemaps that are kept until their pages are visited.
const MAX_TOLD: usize = 500_000;

/// What one page gave.
#[derive(Default)]
struct Visit {
    /// Where redirects led.
    url: Option<Url>,
    found: Vec<Found>,
    links: Vec<Url>,
}

/// Visits pages level by level and gives the texts of their images: the pages of a level in their order, each page's images in theirs.
pub(crate) fn crawl(web: Web, pages: PagesConfig, config: WebConfig, max_text: usize, work: Work) -> FoundStream {
    let crawler = Crawler { web, config, max_page: pages.max_page_bytes, max_text, work };
    run(async move |out| {
        let (with_sitemaps, max_depth, max_sitemap) = (pages.sitemaps, pages.max_depth, pages.max_pages_per_host);
        let seeds = pages.seeds.join(", ");
        let mut crawl = Crawl { frontier: Frontier::new(pages), told: Told::default(), seeds };
        crawler.levels(&mut crawl, max_depth, with_sitemaps.then_some(max_sitemap), &out).await
    })
}

/// Reads sitemaps, in their order, and gives the texts of the images that they name: with their pages, which are visited, or at once.
pub(crate) fn read_sitemaps(web: Web, maps: SitemapsConfig, config: WebConfig, max_text: usize, work: Work) -> FoundStream {
    let crawler = Crawler { web, config, max_page: maps.max_page_bytes, max_text, work };
    run(async move |out| crawler.sitemaps(maps, &out).await)
}

fn run<F>(work: impl FnOnce(Sender) -> F) -> FoundStream
where
    F: Future<Output = Result<(), StageError>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(2);
    let work = work(sender.clone());
    tokio::spawn(async move {
        // A crawl that nobody waits for any more ends at once.
        let result = tokio::select! {
            result = work => result,
            () = sender.closed() => return,
        };
        if let Err(e) = result {
            let _ = sender.send(Err(e)).await;
        }
    });
    super::stream(receiver)
}

/// What is still to be visited.
struct Crawl {
    frontier: Frontier,
    told: Told,
    /// Where it began, for errors.
    seeds: String,
}

/// Images that sitemaps have texts for, by the page that they are on.
#[derive(Default)]
struct Told {
    of: HashMap<String, Vec<FoundImage>>,
    images: usize,
}

impl Told {
    fn add(&mut self, page: SitePage) -> Url {
        let room = MAX_TOLD.saturating_sub(self.images);
        if let Some(url) = page_address(page.url.clone())
            && !page.images.is_empty()
            && room > 0
        {
            let of = self.of.entry(url.into()).or_default();
            let before = of.len();
            of.extend(page.images.into_iter().take(room));
            self.images += of.len() - before;
        }
        page.url
    }

    fn take(&mut self, page: &Url) -> Vec<FoundImage> {
        let images = self.of.remove(page.as_str()).unwrap_or_default();
        self.images -= images.len();
        images
    }
}

#[derive(Clone)]
struct Crawler {
    web: Web,
    config: WebConfig,
    max_page: usize,
    max_text: usize,
    work: Work,
}

impl Crawler {
    /// Visits level after level; with the sitemaps of the sites that it comes to, `sitemaps` addresses of each, if that is wanted.
    async fn levels(&self, crawl: &mut Crawl, max_depth: u32, sitemaps: Option<usize>, out: &Sender) -> Result<(), StageError> {
        let ahead = self.web.settings().connections * AHEAD;
        let Crawl { frontier, told, seeds } = crawl;
        let mut known_sites = BTreeSet::new();
        let mut emitted = HashSet::new();
        let (mut visited, mut read) = (0, 0);
        for depth in 0..=max_depth {
            let level = frontier.next_level();
            if level.is_empty() {
                break;
            }
            let known = visited + level.len() as u64;
            let mut new_sites = BTreeSet::new();
            for url in &level {
                if let Ok(root) = url.join("/")
                    && known_sites.insert(root.clone())
                {
                    new_sites.insert(root);
                }
            }
            let level: Vec<_> = level.into_iter().map(|url| (told.take(&url), url)).collect();
            let mut visits = stream::iter(level).map(|(images, url)| self.visit(url, images)).buffered(ahead);
            while let Some(visit) = visits.next().await {
                let Visit { url, mut found, links } = visit?;
                visited += 1;
                read += u64::from(url.is_some());
                self.work.progress(visited, known, "pages");
                match &url {
                    Some(url) if !frontier.in_scope(url) => continue,
                    Some(url) => frontier.led_to(url),
                    None => {}
                }
                links.into_iter().for_each(|link| frontier.offer(link));
                // A logo stands on every page; it is one pair.
                found.retain(|f| emitted.insert(sample_id(&f.url, &f.text)));
                if !found.is_empty() && out.send(Ok(found)).await.is_err() {
                    return Ok(());
                }
            }
            drop(visits);
            if let Some(most) = sitemaps.filter(|_| depth < max_depth) {
                let mut maps = stream::iter(new_sites).map(|site| self.site_pages(site, most)).buffered(ahead);
                while let Some(pages) = maps.next().await {
                    pages.into_iter().for_each(|page| frontier.offer(told.add(page)));
                }
            }
        }
        if read == 0 { Err(self.no_way_in(seeds, "pages_")) } else { Ok(()) }
    }

    /// What to say when nothing could be read; facts whose names begin with `of` tell why.
    fn no_way_in(&self, seeds: &str, of: &str) -> StageError {
        let facts = self.work.facts.to_value();
        let misses = facts.as_object().into_iter().flatten().filter_map(|(name, n)| Some((name.strip_prefix(of)?, n)));
        let why = misses.map(|(status, n)| format!("{status} {n}")).collect::<Vec<_>>().join(", ");
        CrawlError::Seeds { seeds: seeds.to_owned(), why }.into()
    }

    async fn sitemaps(&self, maps: SitemapsConfig, out: &Sender) -> Result<(), StageError> {
        let seeds = maps.sitemaps.join(", ");
        let roots: Vec<Url> = maps.sitemaps.iter().filter_map(|s| Url::parse(s).ok()).collect();
        let limits = PagesConfig {
            hosts: maps.hosts,
            max_pages: maps.max_pages,
            max_pages_per_host: maps.max_pages_per_host,
            max_pages_per_shape: maps.max_pages_per_host,
            ..PagesConfig::default()
        };
        let mut crawl = Crawl { frontier: Frontier::around(limits, &roots), told: Told::default(), seeds };
        let mut to_read = VecDeque::new();
        for root in roots {
            match root.path() {
                "/" => {
                    let named = self.web.sitemaps(&root, &self.config).await;
                    to_read.extend(if named.is_empty() { root.join("/sitemap.xml").into_iter().collect() } else { named });
                }
                _ => to_read.push_back(root),
            }
        }
        let (mut done, mut read, mut pages) = (HashSet::new(), 0_u64, 0);
        while let Some(url) = to_read.pop_front() {
            if done.len() >= maps.max_sitemaps || pages >= maps.max_pages || !done.insert(url.clone()) {
                continue;
            }
            let Some(sitemap) = self.sitemap(&url, maps.max_pages - pages, sitemap::MAX_BYTES).await else { continue };
            read += 1;
            self.work.progress(read, read + to_read.len() as u64, "sitemaps");
            // The parts of an index come before what is named after it.
            sitemap.sitemaps.into_iter().rev().for_each(|part| to_read.push_front(part));
            let mut found = Vec::new();
            for page in sitemap.pages {
                if !crawl.frontier.in_scope(&page.url) {
                    continue;
                }
                pages += 1;
                if maps.visit {
                    crawl.frontier.offer(crawl.told.add(page));
                } else {
                    let url = page.url;
                    let mut told = Page::default();
                    page.images.into_iter().for_each(|image| _ = told.add_image(image.url, image.texts));
                    self.work.facts.add("images_seen", told.images.len() as u64);
                    found.extend(take(told, Directives::default(), &url, false).found);
                }
            }
            if !found.is_empty() && out.send(Ok(found)).await.is_err() {
                return Ok(());
            }
        }
        match (read, maps.visit) {
            (0, _) => Err(self.no_way_in(&crawl.seeds, "sitemaps_")),
            (_, true) if pages > 0 => self.levels(&mut crawl, 0, None, out).await,
            _ => Ok(()),
        }
    }

    /// Visits a page, of which sitemaps tell these images.
    async fn visit(&self, url: Url, told: Vec<FoundImage>) -> Result<Visit, StageError> {
        let answer = match self.web.get(&url, &self.config, Want::Page, self.max_page).await {
            Ok(answer) => answer,
            Err(failure) => {
                self.missed(&url, &failure);
                return Ok(Visit::default());
            }
        };
        if !answer.may_be_html() {
            self.work.facts.add("pages_not_html", 1);
            return Ok(Visit { url: Some(answer.url), ..Visit::default() });
        }
        self.work.facts.add("pages_read", 1);
        let (token, max_text, opt_out) = (self.config.token().to_owned(), self.max_text, self.config.opt_out);
        let facts = self.work.facts.clone();
        let read = move || {
            let text = html::decode(&answer.body, answer.content_type());
            let mut page = html::extract(&text, &answer.url, &token, max_text);
            told.into_iter().for_each(|image| _ = page.add_image(image.url, image.texts));
            let taken = take(page, Directives::of_headers(&answer.headers, &token), &answer.url, opt_out);
            facts.add("images_seen", taken.images);
            if taken.opted_out {
                facts.add("pages_opted_out", 1);
                facts.add("images_opted_out", taken.images);
            }
            Visit { url: Some(answer.url), found: taken.found, links: taken.links }
        };
        on_rayon(read).await
    }

    fn missed(&self, url: &Url, failure: &Failure) {
        tracing::debug!(%url, status = %failure.status, reason = %failure.reason, "page is left out");
        self.work.facts.add(&format!("pages_{}", failure.status), 1);
    }

    /// The pages that the sitemaps of a site name.
    async fn site_pages(&self, site: Url, max: usize) -> Vec<SitePage> {
        let mut to_read = self.web.sitemaps(&site, &self.config).await;
        let (mut pages, mut done) = (Vec::new(), BTreeSet::new());
        while let Some(url) = to_read.pop() {
            if done.len() >= MAX_SITEMAPS || pages.len() >= max || !done.insert(url.clone()) {
                continue;
            }
            if let Some(read) = self.sitemap(&url, max - pages.len(), sitemap::MAX_BYTES_ON_THE_WAY).await {
                pages.extend(read.pages);
                to_read.extend(read.sitemaps);
            }
        }
        pages
    }

    /// Reads one sitemap, if it can be had.
    async fn sitemap(&self, url: &Url, max: usize, max_bytes: usize) -> Option<Sitemap> {
        match self.web.get(url, &self.config, Want::Text, max_bytes).await {
            Ok(answer) => {
                let max_text = self.max_text;
                let read = on_rayon(move || sitemap::parse(&answer.body, max, max_bytes, max_text)).await;
                self.work.facts.add("sitemaps_read", 1);
                read.ok()
            }
            Err(failure) => {
                tracing::debug!(%url, reason = %failure.reason, "sitemap is left out");
                self.work.facts.add(&format!("sitemaps_{}", failure.status), 1);
                None
            }
        }
    }
}

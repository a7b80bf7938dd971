//! Crawling web pages for images with texts.

use std::collections::BTreeSet;

use capfilt_runtime::{StageError, Work, on_rayon};
use capfilt_schemas::sample_id;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use url::Url;

use super::frontier::Frontier;
use super::{Found, FoundStream, Sender, sitemap};
use crate::config::{PagesConfig, WebConfig};
use crate::opt_out::Directives;
use crate::web::{Failure, Want, Web};
use crate::{CrawlError, html};

/// Pages of which the answer may be at hand before an earlier one's: for each connection so many.
const AHEAD: usize = 8;
/// Sitemaps read for one host, those in an index included.
const MAX_SITEMAPS: usize = 20;

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
    let (sender, receiver) = mpsc::channel(2);
    let crawler = Crawler { web, config, max_page: pages.max_page_bytes, max_text, work };
    tokio::spawn(async move {
        // A crawl that nobody waits for any more ends at once.
        let result = tokio::select! {
            result = crawler.run(pages, &sender) => result,
            () = sender.closed() => return,
        };
        if let Err(e) = result {
            let _ = sender.send(Err(e)).await;
        }
    });
    super::stream(receiver)
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
    async fn run(&self, pages: PagesConfig, out: &Sender) -> Result<(), StageError> {
        let ahead = self.web.settings().connections * AHEAD;
        let (with_sitemaps, max_depth, max_sitemap) = (pages.sitemaps, pages.max_depth, pages.max_pages_per_host);
        let seeds = pages.seeds.join(", ");
        let mut frontier = Frontier::new(pages);
        let mut known_sites = BTreeSet::new();
        let mut emitted = std::collections::HashSet::new();
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
            let mut visits = stream::iter(level).map(|url| self.visit(url)).buffered(ahead);
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
            if with_sitemaps && depth < max_depth {
                let mut maps = stream::iter(new_sites).map(|site| self.site_pages(site, max_sitemap)).buffered(ahead);
                while let Some(pages) = maps.next().await {
                    pages.into_iter().for_each(|page| frontier.offer(page));
                }
            }
        }
        if read == 0 {
            let facts = self.work.facts.to_value();
            let misses = facts.as_object().into_iter().flatten().filter_map(|(name, n)| Some((name.strip_prefix("pages_")?, n)));
            let why = misses.map(|(status, n)| format!("{status} {n}")).collect::<Vec<_>>().join(", ");
            return Err(CrawlError::Seeds { seeds, why }.into());
        }
        Ok(())
    }

    async fn visit(&self, url: Url) -> Result<Visit, StageError> {
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
            let page = html::extract(&text, &answer.url, &token, max_text);
            let wishes = page.directives.and(Directives::of_headers(&answer.headers, &token));
            let (nofollow, refusal) = (wishes.nofollow() && opt_out, if opt_out { wishes.refusal() } else { None });
            let links = if nofollow { Vec::new() } else { page.links };
            facts.add("images_seen", page.images.len() as u64);
            let found = match refusal {
                None => texts_of(page.images, &answer.url),
                Some(_) => {
                    facts.add("pages_opted_out", 1);
                    facts.add("images_opted_out", page.images.len() as u64);
                    Vec::new()
                }
            };
            Visit { url: Some(answer.url), found, links }
        };
        on_rayon(read).await
    }

    fn missed(&self, url: &Url, failure: &Failure) {
        tracing::debug!(%url, status = %failure.status, reason = %failure.reason, "page is left out");
        self.work.facts.add(&format!("pages_{}", failure.status), 1);
    }

    /// The pages that the sitemaps of a site name.
    async fn site_pages(&self, site: Url, max: usize) -> Vec<Url> {
        let mut to_read = self.web.sitemaps(&site, &self.config).await;
        let (mut pages, mut done) = (Vec::new(), BTreeSet::new());
        while let Some(url) = to_read.pop() {
            if done.len() >= MAX_SITEMAPS || pages.len() >= max || !done.insert(url.clone()) {
                continue;
            }
            match self.web.get(&url, &self.config, Want::Text, sitemap::MAX_BYTES).await {
                Ok(answer) => {
                    let limit = max - pages.len();
                    let read = on_rayon(move || sitemap::parse(&answer.body, limit)).await;
                    let read = read.unwrap_or_default();
                    self.work.facts.add("sitemaps_read", 1);
                    pages.extend(read.pages);
                    to_read.extend(read.sitemaps);
                }
                Err(failure) => tracing::debug!(%url, reason = %failure.reason, "sitemap is left out"),
            }
        }
        pages
    }
}

/// One row a text; of equal texts of an image the preferred source counts.
fn texts_of(images: Vec<html::FoundImage>, page: &Url) -> Vec<Found> {
    let mut found = Vec::new();
    for image in images {
        let mut told: Vec<String> = Vec::new();
        for (text_source, text) in image.texts {
            if told.contains(&text) {
                continue;
            }
            told.push(text.clone());
            found.push(Found { url: image.url.as_str().to_owned(), text, text_source, page_url: Some(page.as_str().to_owned()) });
        }
    }
    found
}

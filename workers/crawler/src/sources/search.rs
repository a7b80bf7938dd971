//! Search APIs, asked for every query of the list.

mod adapter;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use capfilt_runtime::{StageError, Work, on_blocking, on_rayon};
use futures::{StreamExt, stream};
use lol_html::html_content::TextType;
use lol_html::{HtmlRewriter, MemorySettings, Settings, doc_text, element};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use url::Url;

use super::{Found, FoundStream, Sender};
use crate::address::resolve;
use crate::config::WebConfig;
use crate::params::Part;
use crate::text::clean;
use crate::web::Web;
use crate::{CrawlError, QueryList};
pub use adapter::{Adapter, ApiKey};
use adapter::{Image, Key, Position};

/// Pages in a row that bring no new image, before a search is over.
const BARREN: u32 = 3;
/// Memory that the HTML parser may hold for an unfinished tag of a text.
const PARSER_BYTES: usize = 1 << 20;

/// A search API that is asked for the queries of the list. What it finds is a candidate only if its text holds a query: mostly, but not
/// always, the one that was asked for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchConfig {
    /// `openverse`, `wikimedia_commons`, or a table that tells how the API is spoken to.
    #[serde(deserialize_with = "adapter::read")]
    pub adapter: Adapter,
    /// Most images of one query.
    #[serde(default = "per_query")]
    pub per_query: usize,
    /// So many queries, from the beginning of the list; all if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queries: Option<u32>,
    /// Queries of one task: so many are asked again by another machine after a crash.
    #[serde(default = "chunk")]
    pub chunk: u32,
}

const fn per_query() -> usize {
    20_000
}

const fn chunk() -> u32 {
    100
}

impl SearchConfig {
    /// Checks what serde cannot; `name` is the setting.
    pub(crate) fn check(&self, name: &str) -> Result<(), CrawlError> {
        let zero =
            [("per_query", self.per_query), ("chunk", self.chunk as usize), ("queries", self.queries.unwrap_or(1) as usize)];
        if let Some((field, _)) = zero.into_iter().find(|(_, n)| *n == 0) {
            return Err(CrawlError::Config { setting: format!("{name}.{field}"), reason: "it must be at least 1".to_owned() });
        }
        self.adapter.check(&format!("{name}.adapter"))
    }

    /// Whether the environment has the key that the API wants.
    pub(super) fn probe(&self) -> Result<(), CrawlError> {
        self.adapter.key().map(drop)
    }

    /// The parts of a list of so many queries, each for one task, and the settings as they stand in all of them.
    pub(crate) fn tasks(&self, queries: usize) -> (Self, impl Iterator<Item = Part> + use<>) {
        let (all, chunk) = (u32::try_from(queries).unwrap_or(u32::MAX).min(self.queries.unwrap_or(u32::MAX)), self.chunk);
        let parts = (0..all).step_by(chunk as usize).map(move |first| Part { first, count: chunk.min(all - first) });
        // How many other queries are asked, and in which tasks, does not matter to one.
        (Self { queries: None, chunk: self::chunk(), ..self.clone() }, parts)
    }
}

/// The texts that an API has for some queries, in the order of the queries and of the API.
pub(crate) fn search(
    web: Web,
    config: SearchConfig,
    part: Part,
    queries: Arc<QueryList>,
    manners: WebConfig,
    max_text: usize,
    work: Work,
) -> FoundStream {
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        let result = match config.adapter.key() {
            Ok(key) => {
                let searcher = Searcher { web, config, key, manners, max_text, work };
                tokio::select! {
                    result = searcher.run(&queries, part, &sender) => result,
                    () = sender.closed() => return,
                }
            }
            Err(e) => Err(e.into()),
        };
        if let Err(e) = result {
            let _ = sender.send(Err(e)).await;
        }
    });
    super::stream(receiver)
}

struct Searcher {
    web: Web,
    config: SearchConfig,
    key: Key,
    manners: WebConfig,
    max_text: usize,
    work: Work,
}

/// What one query gave.
#[derive(Default, Serialize, Deserialize)]
struct Search {
    found: Vec<Found>,
    /// Why there may be more than was found, and whether that may pass.
    failure: Option<(String, bool)>,
    /// Pages and results.
    facts: BTreeMap<String, u64>,
}

impl Search {
    fn count(&mut self, fact: &str, n: usize) {
        if n > 0 {
            *self.facts.entry(fact.to_owned()).or_default() += n as u64;
        }
    }

    fn fails(&mut self, why: &str, may_pass: bool) {
        self.failure = Some((why.to_owned(), may_pass));
    }

    /// What an earlier attempt at the task kept.
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    fn keep(&self, path: &Path) -> Result<(), CrawlError> {
        let json = serde_json::to_vec(self).map_err(std::io::Error::other);
        json.and_then(|json| std::fs::write(path, json)).map_err(|e| CrawlError::write(path, e))
    }
}

impl Searcher {
    async fn run(&self, queries: &QueryList, part: Part, out: &Sender) -> Result<(), StageError> {
        let last = part.first.saturating_add(part.count);
        let texts: Vec<String> = (part.first..last).map_while(|id| queries.get(id)).map(|query| query.text.to_owned()).collect();
        let folder = self.work.scratch()?;
        let searches = texts.into_iter().zip(part.first..).map(|(text, id)| self.once(text, folder.join(format!("{id}.json"))));
        let mut searches = stream::iter(searches).buffered(self.config.adapter.at_once as usize);
        let (mut asked, mut failed, mut empty, mut may_pass) = (0, 0, 0, false);
        while let Some(search) = searches.next().await {
            let Search { found, failure, facts } = search?;
            asked += 1;
            self.work.facts.add("queries_asked", 1);
            facts.iter().for_each(|(fact, n)| self.work.facts.add(fact, *n));
            self.work.progress(asked, u64::from(part.count), "queries");
            if let Some((why, passes)) = failure {
                self.work.facts.add(&format!("queries_{why}"), 1);
                failed += 1;
                empty += u64::from(found.is_empty());
                may_pass |= passes;
            }
            if !found.is_empty() && out.send(Ok(found)).await.is_err() {
                return Ok(());
            }
        }
        if may_pass || (empty == asked && asked > 0) {
            let facts = self.work.facts.to_value();
            let reasons = facts.as_object().into_iter().flatten().filter(|(name, _)| *name != "queries_asked");
            let reasons = reasons.filter_map(|(name, n)| Some((name.strip_prefix("queries_")?, n)));
            let why = reasons.map(|(why, n)| format!("{why} {n}")).collect::<Vec<_>>().join(", ");
            return Err(CrawlError::Search { adapter: self.config.adapter.name.clone(), failed, asked, why }.into());
        }
        Ok(())
    }

    /// One query's search, unless an earlier attempt at the task has its whole answer: a task that fails for some queries costs the API
    /// no more than these. A query that failed in an earlier attempt already does not make the task fail again, for the others' sake.
    async fn once(&self, query: String, kept: PathBuf) -> Result<Search, StageError> {
        let path = kept.clone();
        let earlier = on_blocking(move || Search::read(&path)).await?;
        let failed_before = match earlier {
            Some(search) if search.failure.is_none() => return Ok(search),
            earlier => earlier.is_some(),
        };
        let search = self.search(query).await?;
        let search = on_blocking(move || search.keep(&kept).map(|()| search)).await??;
        Ok(match search.failure {
            Some((why, may_pass)) => Search { failure: Some((why, may_pass && !failed_before)), ..search },
            None => search,
        })
    }

    /// Asks for one query, page by page, until there is no further one, enough was found, or something is wrong.
    async fn search(&self, query: String) -> Result<Search, StageError> {
        let adapter = &self.config.adapter;
        let (mut search, mut seen) = (Search::default(), HashSet::new());
        let (mut position, mut barren) = (Some(Position::default()), 0);
        while let Some(at) = position.take() {
            let Some(url) = adapter.address(&query, &at, &self.key) else {
                search.fails("bad_address", false);
                break;
            };
            let asked = self.web.get_api(&url, &self.manners, adapter.max_body, adapter.delay(), self.key.header.as_ref());
            let answer = match asked.await {
                Ok(answer) => answer,
                Err(failure) => {
                    tracing::debug!(adapter = adapter.name, query, status = %failure.status, "the search failed");
                    search.fails(failure.status.as_str(), failure.status.is_transient());
                    break;
                }
            };
            let (reader, here) = (adapter.clone(), at.clone());
            let page = match on_rayon(move || reader.read(&answer.body, &here)).await? {
                Ok(page) => page,
                Err(why) => {
                    tracing::debug!(adapter = adapter.name, query, why, "the answer cannot be used");
                    search.fails(why, false);
                    break;
                }
            };
            position = adapter.after(&at, &page);
            search.count("search_pages", 1);
            search.count("search_results", page.results);
            search.count("search_results_unusable", page.results - page.images.len());
            let before = seen.len();
            for image in page.images {
                if seen.len() < self.config.per_query && seen.insert(image.url.clone()) {
                    self.take(image, &url, &mut search);
                }
            }
            barren = if seen.len() == before { barren + 1 } else { 0 };
            if page.results == 0 || barren >= BARREN || seen.len() >= self.config.per_query {
                break;
            }
        }
        Ok(search)
    }

    /// Adds the texts of an image; of equal ones the preferred source counts.
    fn take(&self, image: Image, api: &Url, search: &mut Search) {
        // The key may be in the query, which an address that is empty or only a fragment would take along.
        let mut base = api.clone();
        base.set_query(None);
        let url = resolve(&base, &image.url);
        let page_url: Option<Arc<str>> =
            image.page.as_deref().and_then(|page| resolve(&base, page)).map(|page| page.as_str().into());
        let found = &mut search.found;
        let first = found.len();
        for (text_source, text) in image.texts {
            let text = clean(&plain(&text), self.max_text);
            let Some(url) = &url else { break };
            if !text.is_empty() && found[first..].iter().all(|f| f.text != text) {
                let (url, page_url) = (url.to_string(), page_url.clone());
                found.push(Found { url, text, text_source, page_url, expected_hash: None });
            }
        }
        if found.len() == first {
            search.count("search_results_unusable", 1);
        }
    }
}

/// A text without HTML, if there is any in it.
fn plain(text: &str) -> String {
    if !text.contains(['<', '&']) {
        return text.to_owned();
    }
    let out = std::rc::Rc::new(std::cell::RefCell::new(String::new()));
    let (texts, blocks) = (std::rc::Rc::clone(&out), std::rc::Rc::clone(&out));
    let settings = Settings::new()
        .with_strict(false)
        .with_memory_settings(MemorySettings::new().with_max_allowed_memory_usage(PARSER_BYTES))
        .append_document_content_handler(doc_text!(move |chunk| {
            if matches!(chunk.text_type(), TextType::Data | TextType::RCData) {
                texts.borrow_mut().push_str(chunk.as_str());
            }
            Ok(())
        }))
        .append_element_content_handler(element!("br, p, div, li, tr, td, th, dt, dd, h1, h2, h3, h4, h5, h6", move |_| {
            blocks.borrow_mut().push(' ');
            Ok(())
        }));
    let mut rewriter = HtmlRewriter::new(settings, |_: &[u8]| {});
    if rewriter.write(text.as_bytes()).is_ok() {
        let _ = rewriter.end();
    }
    let text = out.borrow();
    htmlize::unescape(text.as_str()).into_owned()
}

#[cfg(test)]
mod tests;

//! Where candidates come from. A source gives texts with image addresses, in an order that is the same every time.

mod archive;
mod frontier;
mod lists;
mod page_address;
mod pages;
mod search;
pub(crate) mod sitemap;

use std::sync::Arc;

use capfilt_runtime::StageError;
use capfilt_schemas::TextSource;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use url::Url;

use crate::CrawlError;
use crate::config::SourceConfig;
use crate::html::Page;
use crate::opt_out::Directives;

pub use archive::archive_pairs;
pub(crate) use archive::{expand, fingerprint, read_archive};
pub(crate) use lists::{ListFile, Wanted, read_list};
pub(crate) use pages::{crawl, read_sitemaps};
pub(crate) use search::search;
pub use search::{Adapter, ApiKey, SearchConfig};

impl SourceConfig {
    /// Looks for what the source needs on this machine: a readable list with its columns, the key of an API.
    ///
    /// # Errors
    /// [`CrawlError::Config`], [`CrawlError::Read`] and [`CrawlError::Format`].
    pub fn probe(&self) -> Result<(), CrawlError> {
        match self {
            Self::List(list) => lists::probe(list),
            Self::Search(search) => search.probe(),
            Self::Pages(_) | Self::Sitemaps(_) | Self::Archive(_) => Ok(()),
        }
    }
}

/// A text that belongs to an image, before it is known whether any query is for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) url: String,
    pub(crate) text: String,
    pub(crate) text_source: TextSource,
    pub(crate) page_url: Option<Arc<str>>,
    /// As in the column of the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expected_hash: Option<String>,
}

/// Texts on their way, some at a time.
pub(crate) type FoundStream = BoxStream<'static, Result<Vec<Found>, StageError>>;

/// What a source sends into; it fails when nobody listens any more.
type Sender = mpsc::Sender<Result<Vec<Found>, StageError>>;

fn stream(mut receiver: mpsc::Receiver<Result<Vec<Found>, StageError>>) -> FoundStream {
    futures::stream::poll_fn(move |cx| receiver.poll_recv(cx)).boxed()
}

/// What a page that was read gives.
struct PageYield {
    found: Vec<Found>,
    links: Vec<Url>,
    images: u64,
    /// Its wishes forbid to take anything of it.
    opted_out: bool,
}

/// Takes the texts and links of a page at `url`, as far as its own wishes and those in the answer's `headers` allow it. One row a text;
/// of equal texts of an image the preferred source counts.
fn take(page: Page, headers: Directives, url: &Url, opt_out: bool) -> PageYield {
    let wishes = page.directives.and(headers);
    let opted_out = opt_out && wishes.refusal().is_some();
    let links = if opt_out && wishes.nofollow() { Vec::new() } else { page.links };
    let page_url: Arc<str> = url.as_str().into();
    let mut found: Vec<Found> = Vec::new();
    for image in page.images.into_iter().filter(|_| !opted_out) {
        let first = found.len();
        for (text_source, text) in image.texts {
            if found[first..].iter().all(|f| f.text != text) {
                let (url, page_url) = (image.url.clone(), Some(page_url.clone()));
                found.push(Found { url, text, text_source, page_url, expected_hash: None });
            }
        }
    }
    PageYield { found, links, images: page.images_seen, opted_out }
}

//! Where candidates come from. A source gives texts with image addresses, in an order that is the same every time.

mod address;
mod frontier;
mod lists;
mod pages;
mod search;
pub(crate) mod sitemap;

use capfilt_runtime::StageError;
use capfilt_schemas::TextSource;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::mpsc;

pub(crate) use lists::{ListFile, Wanted, read_list};
pub(crate) use pages::crawl;
pub(crate) use search::search;
pub use search::{Adapter, ApiKey, SearchConfig};

/// A text that belongs to an image, before it is known whether any query is for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    pub(crate) url: String,
    pub(crate) text: String,
    pub(crate) text_source: TextSource,
    pub(crate) page_url: Option<String>,
}

/// Texts on their way, some at a time.
pub(crate) type FoundStream = BoxStream<'static, Result<Vec<Found>, StageError>>;

/// What a source sends into; it fails when nobody listens any more.
type Sender = mpsc::Sender<Result<Vec<Found>, StageError>>;

fn stream(mut receiver: mpsc::Receiver<Result<Vec<Found>, StageError>>) -> FoundStream {
    futures::stream::poll_fn(move |cx| receiver.poll_recv(cx)).boxed()
}

//! An object of a store, read as it arrives, that goes on where a connection broke.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, path};
use tokio::time::timeout;
use url::Url;

use crate::CrawlError;
use crate::config::WebConfig;
use crate::web::backoff;

/// Bytes that count as progress: after so many, failures are forgotten.
const STRETCH: u64 = 1 << 20;

/// An object on its way. Each piece of it has `timeout` to come; so many failures as there are `retries` are passed over, without
/// progress between.
pub(super) struct Object {
    /// As it was named, and as an address.
    name: String,
    url: Url,
    store: Arc<dyn ObjectStore>,
    at: path::Path,
    timeout: Duration,
    retries: u32,
    backoff: Duration,
    meta: Option<ObjectMeta>,
    body: Option<BoxStream<'static, object_store::Result<Bytes>>>,
    /// Bytes given out, those since the last failure, and failures without progress between.
    given: u64,
    since: u64,
    failures: u32,
}

impl Object {
    /// An object by its address. `options` are those of its store; the environment holds the credentials, under the names that each
    /// store's own tools give them.
    ///
    /// # Errors
    /// [`CrawlError::Read`] if address or options are none of a store.
    pub(super) fn new(
        name: String,
        url: &Url,
        options: BTreeMap<String, String>,
        config: &WebConfig,
    ) -> Result<Self, CrawlError> {
        let environment = std::env::vars_os().filter_map(|(key, value)| {
            let key = key.into_string().ok()?;
            let is_ours = ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|start| key.starts_with(start));
            is_ours.then_some((key, value.into_string().ok()?))
        });
        // By default a request ends after half a minute, body and all; here each piece of the body has its own time.
        let all = [("timeout".to_owned(), "30 days".to_owned())].into_iter().chain(environment).chain(options);
        let (store, at) = object_store::parse_url_opts(url, all).map_err(|e| unreadable(&name, e))?;
        Ok(Self {
            name,
            url: url.clone(),
            store: Arc::from(store),
            at,
            timeout: config.timeout,
            retries: config.retries,
            backoff: config.backoff,
            meta: None,
            body: None,
            given: 0,
            since: 0,
            failures: 0,
        })
    }

    /// The object's size, once its first bytes have come.
    pub(super) fn size(&self) -> Option<u64> {
        self.meta.as_ref().map(|meta| meta.size)
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`CrawlError::Read`] when further attempts are of no use.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, CrawlError> {
        loop {
            let failure = match timeout(self.timeout, self.next()).await {
                Ok(Ok(chunk)) => return Ok(chunk),
                Ok(Err(failure)) => failure,
                Err(_) => other(io::Error::new(io::ErrorKind::TimedOut, "the store stalls")),
            };
            if !may_pass(&failure) || self.failures >= self.retries {
                return Err(unreadable(&self.name, failure));
            }
            tracing::debug!(object = self.name, at = self.given, error = %failure, "reading breaks off");
            tokio::time::sleep(backoff(&self.url, self.failures, self.backoff)).await;
            (self.body, self.since) = (None, 0);
            self.failures += 1;
        }
    }

    async fn next(&mut self) -> object_store::Result<Option<Bytes>> {
        if self.size() == Some(self.given) {
            return Ok(None);
        }
        let body = match &mut self.body {
            Some(body) => body,
            None => {
                let body = self.ask().await?;
                self.body.insert(body)
            }
        };
        let Some(chunk) = body.next().await.transpose()? else {
            return Err(other(io::Error::new(io::ErrorKind::UnexpectedEof, "the object broke off")));
        };
        self.given += chunk.len() as u64;
        self.since += chunk.len() as u64;
        if self.since >= STRETCH {
            (self.since, self.failures) = (0, 0);
        }
        Ok(Some(chunk))
    }

    /// Asks for the object from the place reached, if it is still what it was.
    async fn ask(&mut self) -> object_store::Result<BoxStream<'static, object_store::Result<Bytes>>> {
        let options = GetOptions {
            range: (self.given > 0).then_some(GetRange::Offset(self.given)),
            if_match: self.meta.as_ref().and_then(|meta| meta.e_tag.clone()),
            ..GetOptions::default()
        };
        let got = self.store.get_opts(&self.at, options).await?;
        let state = |meta: &ObjectMeta| (meta.size, meta.last_modified, meta.e_tag.clone());
        match &self.meta {
            Some(meta) if state(meta) != state(&got.meta) => {
                let source = "the object changed while it was read".into();
                return Err(object_store::Error::Precondition { path: self.at.to_string(), source });
            }
            Some(_) => {}
            None => self.meta = Some(got.meta.clone()),
        }
        Ok(got.into_stream())
    }
}

fn may_pass(e: &object_store::Error) -> bool {
    use object_store::Error::{NotFound, PermissionDenied, Precondition, Unauthenticated};
    !matches!(e, NotFound { .. } | Precondition { .. } | PermissionDenied { .. } | Unauthenticated { .. })
}

fn other(e: io::Error) -> object_store::Error {
    object_store::Error::Generic { store: "archive", source: Box::new(e) }
}

fn unreadable(name: &str, e: object_store::Error) -> CrawlError {
    let kind = match e {
        object_store::Error::NotFound { .. } => io::ErrorKind::NotFound,
        _ => io::ErrorKind::Other,
    };
    CrawlError::read(Path::new(name), io::Error::new(kind, e))
}

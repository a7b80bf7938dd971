//! The parameters of tasks: settings, and what they are applied to, named by content.

use std::fs::File;
use std::path::Path;

use capfilt_schemas::Digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::CrawlError;
use crate::config::{ArchiveConfig, DiscoverConfig, FetchConfig, ImageConfig, SourceConfig, WebConfig};
use crate::sources::{expand, fingerprint};

/// The parameters of a discover task.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscoverParams {
    /// The source.
    pub source: SourceConfig,
    /// Manners.
    pub web: WebConfig,
    /// Longest text kept, in characters.
    pub max_text: usize,
    /// SHA-256 of the file, if the source is a list; the fingerprint of it, if it is a local archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<Digest>,
    /// The digest of the query list ([`QueryList::digest`](crate::QueryList::digest)).
    pub queries: Digest,
    /// The state of the web that is meant: the same name is the same work.
    pub snapshot: String,
}

/// The parameters of a fetch task.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchParams {
    /// The settings.
    pub fetch: FetchConfig,
    /// The state of the web that is meant: the same name is the same work.
    pub snapshot: String,
}

/// The parameters of an annotate task.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnotateParams {
    /// The set's name.
    pub name: String,
    /// SHA-256 of the JSON file.
    pub annotations: Digest,
    /// SHA-256 over the names and sizes of the images that it names.
    pub images: Digest,
    /// What the stored image looks like.
    pub image: ImageConfig,
}

impl DiscoverConfig {
    /// The parameters of the tasks, one for each source and, of archives, for each file. Lists are read to be named by content.
    ///
    /// # Errors
    /// [`CrawlError::Read`], [`CrawlError::Format`].
    pub fn params(&self, queries: Digest, snapshot: &str) -> Result<Vec<DiscoverParams>, CrawlError> {
        let mut tasks = Vec::new();
        let mut task = |source: SourceConfig, list: Option<Digest>| {
            let (web, snapshot) = (self.web.clone(), snapshot.to_owned());
            tasks.push(DiscoverParams { source, list, web, max_text: self.max_text, queries, snapshot });
        };
        for source in &self.sources {
            match source {
                SourceConfig::Pages(_) | SourceConfig::Sitemaps(_) => task(source.clone(), None),
                SourceConfig::List(list) => task(source.clone(), Some(file_digest(&list.path)?)),
                SourceConfig::Archive(archive) => {
                    for path in expand(archive)? {
                        let local = (!path.contains("://")).then(|| fingerprint(Path::new(&path))).transpose()?;
                        // Which other files there are does not matter to this one.
                        let max_page_bytes = archive.max_page_bytes;
                        let one = ArchiveConfig { paths: vec![path], base: String::new(), count: None, seed: 0, max_page_bytes };
                        task(SourceConfig::Archive(one), local);
                    }
                }
            }
        }
        Ok(tasks)
    }
}

impl FetchConfig {
    /// The parameters of a fetch task.
    #[must_use]
    pub fn params(&self, snapshot: &str) -> FetchParams {
        FetchParams { fetch: self.clone(), snapshot: snapshot.to_owned() }
    }
}

/// SHA-256 of a file.
pub(crate) fn file_digest(path: &Path) -> Result<Digest, CrawlError> {
    let read = || -> std::io::Result<Digest> {
        let (mut file, mut hash) = (File::open(path)?, Sha256::new());
        std::io::copy(&mut file, &mut hash)?;
        Ok(Digest::from_bytes(hash.finalize().into()))
    };
    read().map_err(|e| CrawlError::read(path, e))
}

//! The parameters of tasks: settings, and what they are applied to, named by content.

use std::path::Path;

use capfilt_schemas::{Digest, FetchStatus};
use serde::{Deserialize, Serialize};

use crate::config::{ArchiveConfig, DiscoverConfig, FetchConfig, ImageConfig, SourceConfig, WebConfig};
use crate::digest::file_digest;
use crate::sources::{expand, fingerprint};
use crate::{CrawlError, QueryList, opt_out};

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
    /// SHA-256 of the opt-out lists, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub opt_outs: Vec<Digest>,
    /// The queries that are asked for, if the source is a search API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    /// The digest of the query list ([`QueryList::digest`](crate::QueryList::digest)).
    pub queries: Digest,
    /// The state of the web that is meant: the same name is the same work.
    pub snapshot: String,
}

/// Some queries of a list that follow one another.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The first one.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// The parameters of a fetch task.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchParams {
    /// The settings.
    pub fetch: FetchConfig,
    /// SHA-256 of the opt-out lists, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub opt_outs: Vec<Digest>,
    /// The state of the web that is meant: the same name is the same work.
    pub snapshot: String,
    /// Set where the task fetches some rows of a `samples` shard again, in place of all rows of a `selected` shard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryParams>,
}

/// What a retry fetches again.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryParams {
    /// The name of the retry: the same retry is the same state of the web.
    pub name: String,
    /// Rows with one of these statuses are fetched again, all others are kept as they are.
    pub statuses: Vec<FetchStatus>,
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
    /// The parameters of the tasks: one for each source, for each file of an archive, and for each part of the queries that a search API is
    /// asked for. Lists are read to be named by content.
    ///
    /// # Errors
    /// [`CrawlError::Read`], [`CrawlError::Format`].
    pub fn params(&self, queries: &QueryList, snapshot: &str) -> Result<Vec<DiscoverParams>, CrawlError> {
        let opt_outs = opt_out::digests(&self.web.opt_out_lists)?;
        let mut tasks = Vec::new();
        let mut task = |source: SourceConfig, list: Option<Digest>, part: Option<Part>| {
            tasks.push(DiscoverParams {
                source,
                list,
                part,
                web: self.web.clone(),
                max_text: self.max_text,
                opt_outs: opt_outs.clone(),
                queries: queries.digest(),
                snapshot: snapshot.to_owned(),
            });
        };
        for source in &self.sources {
            match source {
                SourceConfig::Pages(_) | SourceConfig::Sitemaps(_) => task(source.clone(), None, None),
                SourceConfig::List(list) => task(source.clone(), Some(file_digest(&list.path)?), None),
                SourceConfig::Search(search) => {
                    let (search, parts) = search.tasks(queries.len());
                    parts.for_each(|part| task(SourceConfig::Search(Box::new(search.clone())), None, Some(part)));
                }
                SourceConfig::Archive(archive) => {
                    for path in expand(archive)? {
                        let local = (!path.contains("://")).then(|| fingerprint(Path::new(&path))).transpose()?;
                        // Which other files there are does not matter to this one.
                        let one =
                            ArchiveConfig { paths: vec![path], base: String::new(), count: None, seed: 0, ..archive.clone() };
                        task(SourceConfig::Archive(one), local, None);
                    }
                }
            }
        }
        Ok(tasks)
    }
}

impl FetchConfig {
    /// The parameters of a fetch task. Opt-out lists are read to be named by content.
    ///
    /// # Errors
    /// [`CrawlError::Read`].
    pub fn params(&self, snapshot: &str) -> Result<FetchParams, CrawlError> {
        let opt_outs = opt_out::digests(&self.web.opt_out_lists)?;
        Ok(FetchParams { fetch: self.clone(), opt_outs, snapshot: snapshot.to_owned(), retry: None })
    }
}

//! Settings. What can change a byte of the output is in [`DiscoverConfig`], [`FetchConfig`] and [`AnnotateConfig`], which go into the
//! names of tasks (`params.rs`); what changes only speed and route is in [`CrawlerWorkerConfig`], which never does.

mod image;
mod sources;
mod web;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{CrawlError, units};
pub use image::{ImageConfig, Interpolation, Reencode, ResizeMode, StoredFormat};
pub(crate) use sources::STORES;
pub use sources::{ArchiveConfig, ListConfig, ListFormat, PagesConfig, SitemapsConfig, SourceConfig};
pub use web::{CrawlerWorkerConfig, DnsConfig, WebConfig};

/// `[discover]`: where candidates come from.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiscoverConfig {
    /// The sources; each is one task.
    pub sources: Vec<SourceConfig>,
    /// Manners, for the sources that are on the web.
    pub web: WebConfig,
    /// Longest text kept, in characters; a longer one is cut.
    pub max_text: usize,
}

impl Default for DiscoverConfig {
    fn default() -> Self {
        Self { sources: Vec::new(), web: WebConfig::default(), max_text: 1_000 }
    }
}

impl DiscoverConfig {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// [`CrawlError::Config`] with the first setting that cannot be.
    pub fn check(&self) -> Result<(), CrawlError> {
        self.web.check("discover.web")?;
        for (i, source) in self.sources.iter().enumerate() {
            source.check(&format!("discover.sources[{i}]"))?;
        }
        Ok(())
    }
}

/// `[fetch]`: what is made of a download.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FetchConfig {
    /// Manners.
    pub web: WebConfig,
    /// Most bytes of a body.
    #[serde(with = "units::size")]
    pub max_body: usize,
    /// What the stored image looks like.
    pub image: ImageConfig,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self { web: WebConfig::default(), max_body: 20 << 20, image: ImageConfig::default() }
    }
}

impl FetchConfig {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// [`CrawlError::Config`] with the first setting that cannot be.
    pub fn check(&self) -> Result<(), CrawlError> {
        self.web.check("fetch.web")?;
        self.image.check("fetch.image")
    }
}

/// `[annotated]` and `[heldout]`: sets of images with captions that people wrote.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnnotateConfig {
    /// The sets; each is one task.
    pub sources: Vec<AnnotatedSource>,
    /// What the stored image looks like.
    pub image: ImageConfig,
}

impl AnnotateConfig {
    /// Checks what serde cannot; `section` is where these settings stand, for errors.
    ///
    /// # Errors
    /// [`CrawlError::Config`] with the first setting that cannot be.
    pub fn check(&self, section: &str) -> Result<(), CrawlError> {
        self.image.check(&format!("{section}.image"))
    }
}

/// One set in the layout of COCO captions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnotatedSource {
    /// The set's name, as it stands in `source`.
    pub name: String,
    /// The JSON file with `images` and `annotations`.
    pub annotations: PathBuf,
    /// The folder that `file_name` starts from; the JSON file's own if not given.
    #[serde(default)]
    pub images: Option<PathBuf>,
}

fn bad(setting: &str, reason: &str) -> CrawlError {
    CrawlError::Config { setting: setting.to_owned(), reason: reason.to_owned() }
}

//! Where candidates come from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use url::Url;

use super::bad;
use crate::address::{NOT_WEB, is_web};
use crate::digest::HashKind;
use crate::sources::SearchConfig;
use crate::{CrawlError, units};

/// Schemes of object stores, of Amazon, Google and Microsoft in this order, as `object_store` reads them.
pub(crate) const STORES: [&str; 6] = ["s3", "s3a", "gs", "az", "abfs", "abfss"];

/// One source of candidates.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SourceConfig {
    /// Web pages, crawled from seeds.
    Pages(PagesConfig),
    /// A list of addresses and texts.
    List(ListConfig),
    /// A search API, asked for the queries. Every `chunk` of them is a task of its own.
    Search(Box<SearchConfig>),
    /// Sitemaps: the images that they name, and the pages.
    Sitemaps(SitemapsConfig),
    /// WARC and WAT files, as Common Crawl publishes them. Each file is a task of its own.
    Archive(ArchiveConfig),
}

impl SourceConfig {
    /// Checks what serde cannot; `name` is where the settings stand.
    pub(super) fn check(&self, name: &str) -> Result<(), CrawlError> {
        match self {
            Self::Pages(pages) => check_addresses(&pages.seeds, &format!("{name}.seeds"), "page to start from"),
            Self::Sitemaps(maps) => check_addresses(&maps.sitemaps, &format!("{name}.sitemaps"), "sitemap or site"),
            Self::Search(search) => search.check(name),
            Self::Archive(archive) => archive.check(name),
            Self::List(_) => Ok(()),
        }
    }
}

/// A crawl: breadth first, level by level, each level in the order of its addresses, so that it visits the same pages every time.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PagesConfig {
    /// Where to start.
    pub seeds: Vec<String>,
    /// Hosts that links may lead to: names, `*.example.org`, or `*` for any. The hosts of the seeds always belong.
    pub hosts: Vec<String>,
    /// Whether the sitemaps that robots.txt names are further seeds.
    pub sitemaps: bool,
    /// Most pages in all.
    pub max_pages: usize,
    /// Most pages of one host.
    pub max_pages_per_host: usize,
    /// Most pages of one host whose paths differ only in their numbers and query values: an endless calendar ends here.
    pub max_pages_per_shape: usize,
    /// Most links between a seed and a page.
    pub max_depth: u32,
    /// How much of a page is read.
    #[serde(with = "units::size")]
    pub max_page_bytes: usize,
}

impl Default for PagesConfig {
    fn default() -> Self {
        Self {
            seeds: Vec::new(),
            hosts: Vec::new(),
            sitemaps: true,
            max_pages: 10_000,
            max_pages_per_host: 2_000,
            max_pages_per_shape: 500,
            max_depth: 8,
            max_page_bytes: 4 << 20,
        }
    }
}

/// Sitemaps, the indexes of sitemaps, and the pages that they name; links are not followed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SitemapsConfig {
    /// Addresses of sitemaps or of their indexes, packed or not. `https://example.org/` stands for all that the site's robots.txt names,
    /// or else for `/sitemap.xml`.
    pub sitemaps: Vec<String>,
    /// Hosts of which pages are taken, as in [`PagesConfig`]. The hosts of the sitemaps always belong.
    pub hosts: Vec<String>,
    /// Whether the pages are visited. If not, only images are found that the sitemaps themselves have texts for, and what pages ask
    /// of crawlers is not known.
    pub visit: bool,
    /// Most sitemaps, those in indexes included.
    pub max_sitemaps: usize,
    /// Most pages in all.
    pub max_pages: usize,
    /// Most pages of one host.
    pub max_pages_per_host: usize,
    /// How much of a page is read.
    #[serde(with = "units::size")]
    pub max_page_bytes: usize,
}

impl Default for SitemapsConfig {
    fn default() -> Self {
        Self {
            sitemaps: Vec::new(),
            hosts: Vec::new(),
            visit: true,
            max_sitemaps: 1_000,
            max_pages: 100_000,
            max_pages_per_host: 100_000,
            max_page_bytes: max_page_bytes(),
        }
    }
}

/// A list of image addresses with texts.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListConfig {
    /// The file; `.parquet`, `.csv`, `.tsv`, `.json`, `.jsonl`, each also with `.gz`.
    pub path: PathBuf,
    /// What the file is, if its name does not tell.
    #[serde(default)]
    pub format: Option<ListFormat>,
    /// The column of the image's address.
    #[serde(default = "url_col")]
    pub url_col: String,
    /// The column of the text.
    #[serde(default = "caption_col")]
    pub caption_col: String,
    /// The column of the expected hash of the image's bytes, and its kind: `["sha256", "sha256"]`. Other bytes are refused then; rows
    /// without a value are not verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_hash: Option<(String, HashKind)>,
}

fn url_col() -> String {
    "url".to_owned()
}

fn caption_col() -> String {
    "caption".to_owned()
}

/// Archive files of the web: WARC files with whole pages, WAT files with the links and images of each page; packed or not. Which of the
/// two a file is tells each of its records.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArchiveConfig {
    /// Files; folders and globs (`crawl/*.warc.gz`); `http:` and `https:` addresses; objects of stores (`s3:`, `gs:`, `az:`, `abfs:`);
    /// and local lists of them, an entry a line, such as Common Crawl's `wat.paths.gz` (`.paths`, `.txt`, each also with `.gz`).
    /// `s3://commoncrawl/` is read from where it is public.
    pub paths: Vec<String>,
    /// How object stores are reached, where the environment does not say (`aws_endpoint`, `aws_region`, `aws_skip_signature`, …): the
    /// options of `object_store`, never credentials, which come from the environment alone.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
    /// The address or folder that entries of a list start from.
    #[serde(default = "common_crawl")]
    pub base: String,
    /// So many of the files only, drawn by hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
    /// The seed of that draw.
    #[serde(default)]
    pub seed: u64,
    /// How much of a page is read.
    #[serde(default = "max_page_bytes", with = "units::size")]
    pub max_page_bytes: usize,
}

impl ArchiveConfig {
    /// Makes local paths absolute: they start from `folder`.
    pub fn make_absolute(&mut self, folder: &Path) {
        for path in self.paths.iter_mut().chain([&mut self.base]).filter(|path| !path.contains("://")) {
            *path = folder.join(&*path).to_string_lossy().into_owned();
        }
    }
}

impl ArchiveConfig {
    fn check(&self, name: &str) -> Result<(), CrawlError> {
        if self.paths.is_empty() {
            return Err(bad(&format!("{name}.paths"), "it is empty; name at least one file, folder, address or list of them"));
        }
        let other = self.paths.iter().chain([&self.base]).find(|path| {
            let scheme = path.split_once("://").map(|(scheme, _)| scheme);
            scheme.is_some_and(|scheme| !matches!(scheme, "http" | "https") && !STORES.contains(&scheme))
        });
        if let Some(path) = other {
            let why = format!(
                "`{path}` cannot be read: name a local path, an http or https address, or an object ({}:)",
                STORES.join(":, ")
            );
            return Err(bad(&format!("{name}.paths"), &why));
        }
        let is_secret =
            |key: &&String| ["key", "secret", "token", "credential", "password", "sas"].iter().any(|word| key.contains(word));
        if let Some(key) = self.options.keys().find(is_secret) {
            let why = format!("`{key}` is a credential, and settings are kept with the data: set it in the environment");
            return Err(bad(&format!("{name}.options"), &why));
        }
        if self.count == Some(0) {
            return Err(bad(&format!("{name}.count"), "it is 0; ask for at least one file, or leave it out for all"));
        }
        Ok(())
    }
}

fn common_crawl() -> String {
    "https://data.commoncrawl.org/".to_owned()
}

fn max_page_bytes() -> usize {
    PagesConfig::default().max_page_bytes
}

/// The formats of lists. A gzipped file is unpacked on the way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListFormat {
    /// Apache Parquet.
    Parquet,
    /// Comma-separated, with a header.
    Csv,
    /// Tab-separated, with a header; a row is a line.
    Tsv,
    /// An array of JSON objects.
    Json,
    /// One JSON object a line.
    Jsonl,
    /// An address a line, without texts: for downloads only.
    Txt,
}

fn check_addresses(addresses: &[String], setting: &str, what: &str) -> Result<(), CrawlError> {
    if addresses.is_empty() {
        return Err(bad(setting, &format!("it is empty; name at least one {what}")));
    }
    let usable = |address: &&String| Url::parse(address).is_ok_and(|url| is_web(&url));
    match addresses.iter().find(|address| !usable(address)) {
        Some(address) => Err(bad(setting, &format!("`{address}` is {NOT_WEB}"))),
        None => Ok(()),
    }
}

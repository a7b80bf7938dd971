//! Settings. What can change a byte of the output is in [`DiscoverConfig`], [`FetchConfig`] and [`AnnotateConfig`], which go into the
//! names of tasks (`params.rs`); what changes only speed and route is in [`CrawlerWorkerConfig`], which never does.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::Url;

use crate::{CrawlError, units};

/// How the crawler behaves towards servers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WebConfig {
    /// The `User-Agent`. Its leading word is the name that robots.txt and `X-Robots-Tag` are searched for; it should lead to a person.
    pub agent: String,
    /// Whether robots.txt (RFC 9309) is obeyed.
    pub robots: bool,
    /// Whether `noai`, `noimageai`, `noindex`, `noimageindex` and `tdm-reservation: 1` in headers and pages are obeyed.
    pub opt_out: bool,
    /// Most time for one attempt, from the connection to the last byte of the body.
    #[serde(with = "units::time")]
    pub timeout: Duration,
    /// Further attempts after one that failed in a way that may pass.
    pub retries: u32,
    /// The wait before the first further attempt; it doubles each time.
    #[serde(with = "units::time")]
    pub backoff: Duration,
    /// A `Retry-After` up to this is waited for; a longer one ends the attempts.
    #[serde(with = "units::time")]
    pub max_retry_after: Duration,
    /// Redirects followed for one address.
    pub max_redirects: u32,
}

impl Default for WebConfig {
    fn default() -> Self {
        Self {
            agent: concat!("capfilt/", env!("CARGO_PKG_VERSION"), " (image-text dataset crawler; obeys robots.txt)").to_owned(),
            robots: true,
            opt_out: true,
            timeout: Duration::from_secs(10),
            retries: 2,
            backoff: Duration::from_millis(500),
            max_retry_after: Duration::from_secs(30),
            max_redirects: 5,
        }
    }
}

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

/// One source of candidates.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SourceConfig {
    /// Web pages, crawled from seeds.
    Pages(PagesConfig),
    /// A list of addresses and texts.
    List(ListConfig),
    /// Sitemaps: the images that they name, and the pages.
    Sitemaps(SitemapsConfig),
    /// WARC and WAT files, as Common Crawl publishes them. Each file is a task of its own.
    Archive(ArchiveConfig),
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
    /// The file; `.parquet`, `.csv`, `.tsv`, `.jsonl`, each also with `.gz`.
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
    /// Files; folders and globs (`crawl/*.warc.gz`); `http:` and `https:` addresses; and local lists of them, an entry a line, such as
    /// Common Crawl's `wat.paths.gz` (`.paths`, `.txt`, each also with `.gz`). `s3://commoncrawl/` is read from where it is public.
    pub paths: Vec<String>,
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

fn common_crawl() -> String {
    "https://data.commoncrawl.org/".to_owned()
}

fn max_page_bytes() -> usize {
    PagesConfig::default().max_page_bytes
}

impl ArchiveConfig {
    /// Makes local paths absolute: they start from `folder`.
    pub fn make_absolute(&mut self, folder: &Path) {
        for path in self.paths.iter_mut().chain([&mut self.base]).filter(|path| !path.contains("://")) {
            *path = folder.join(&*path).to_string_lossy().into_owned();
        }
    }
}

/// The formats of a [`ListConfig`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListFormat {
    /// Apache Parquet.
    Parquet,
    /// Comma-separated, with a header.
    Csv,
    /// Tab-separated, with a header.
    Tsv,
    /// One JSON object a line.
    Jsonl,
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

/// What the stored image looks like, and which images are refused.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageConfig {
    /// Largest length of the `side`, in pixels: a larger image is scaled down, a smaller one is left. 0 leaves all.
    pub size: u32,
    /// The side that `size` speaks of.
    pub side: Side,
    /// How the image is stored.
    pub format: StoredFormat,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
    /// An image with a shorter side below this is refused.
    pub min_side: u32,
    /// An image whose longer side is more than this many times the shorter one is refused.
    pub max_aspect: f64,
    /// An image with more pixels than this is refused before it is decoded.
    pub max_pixels: u64,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            size: 384,
            side: Side::Shorter,
            format: StoredFormat::Jpeg,
            quality: 95,
            min_side: 24,
            max_aspect: 8.0,
            max_pixels: 50_000_000,
        }
    }
}

/// A side of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The shorter one.
    Shorter,
    /// The longer one.
    Longer,
}

/// How an image is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredFormat {
    /// JPEG, colour at half resolution.
    Jpeg,
    /// PNG, without loss.
    Png,
}

impl StoredFormat {
    /// The text in the `format` column.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "jpeg",
            Self::Png => "png",
        }
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

/// `[worker.crawler]`: speed and route.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrawlerWorkerConfig {
    /// Most requests at work at once.
    pub connections: usize,
    /// Most requests at work at once at one host.
    pub per_host: usize,
    /// Most requests a second to one host; a host that answers 429 gets fewer.
    pub requests_per_second: f64,
    /// Most bytes of finished images that wait for an earlier one.
    #[serde(with = "units::size")]
    pub buffer: usize,
    /// An HTTP proxy for all requests: `http://127.0.0.1:3128`.
    pub proxy: Option<String>,
    /// Addresses of host names, in place of DNS; `*` stands for every name without its own. A port here replaces 80 or 443.
    pub resolve: BTreeMap<String, SocketAddr>,
}

impl Default for CrawlerWorkerConfig {
    fn default() -> Self {
        Self { connections: 64, per_host: 4, requests_per_second: 10.0, buffer: 512 << 20, proxy: None, resolve: BTreeMap::new() }
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
            let name = format!("discover.sources[{i}]");
            match source {
                SourceConfig::Pages(pages) => check_addresses(&pages.seeds, &format!("{name}.seeds"), "page to start from")?,
                SourceConfig::Sitemaps(maps) => check_addresses(&maps.sitemaps, &format!("{name}.sitemaps"), "sitemap or site")?,
                SourceConfig::Archive(archive) => archive.check(&name)?,
                SourceConfig::List(_) => {}
            }
        }
        Ok(())
    }
}

fn check_addresses(addresses: &[String], setting: &str, what: &str) -> Result<(), CrawlError> {
    if addresses.is_empty() {
        return Err(bad(setting, &format!("it is empty; name at least one {what}")));
    }
    let usable = |address: &&String| Url::parse(address).is_ok_and(|u| matches!(u.scheme(), "http" | "https") && u.has_host());
    match addresses.iter().find(|address| !usable(address)) {
        Some(address) => Err(bad(setting, &format!("`{address}` is not an absolute http or https address"))),
        None => Ok(()),
    }
}

impl ArchiveConfig {
    fn check(&self, name: &str) -> Result<(), CrawlError> {
        if self.paths.is_empty() {
            return Err(bad(&format!("{name}.paths"), "it is empty; name at least one file, folder, address or list of them"));
        }
        let other = self.paths.iter().chain([&self.base]).find(|path| {
            let scheme = path.split_once("://").map(|(scheme, _)| scheme);
            scheme.is_some_and(|scheme| !matches!(scheme, "http" | "https")) && !path.starts_with("s3://commoncrawl/")
        });
        if let Some(path) = other {
            let why = format!("`{path}` cannot be read: name a local path or an http or https address");
            return Err(bad(&format!("{name}.paths"), &why));
        }
        if self.count == Some(0) {
            return Err(bad(&format!("{name}.count"), "it is 0; ask for at least one file, or leave it out for all"));
        }
        Ok(())
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

impl AnnotateConfig {
    /// Checks what serde cannot; `section` is where these settings stand, for errors.
    ///
    /// # Errors
    /// [`CrawlError::Config`] with the first setting that cannot be.
    pub fn check(&self, section: &str) -> Result<(), CrawlError> {
        self.image.check(&format!("{section}.image"))
    }
}

impl WebConfig {
    fn check(&self, name: &str) -> Result<(), CrawlError> {
        if self.token().is_empty() || !self.agent.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            let why = "it must begin with a name of letters, `-` and `_`, and hold only printable ASCII";
            return Err(bad(&format!("{name}.agent"), why));
        }
        if self.timeout.is_zero() {
            return Err(bad(&format!("{name}.timeout"), "it is zero"));
        }
        Ok(())
    }

    /// The product token of the agent (RFC 9309, section 2.2.1): its leading letters, `-` and `_`.
    #[must_use]
    pub fn token(&self) -> &str {
        let end = self.agent.find(|c: char| !c.is_ascii_alphabetic() && c != '-' && c != '_');
        &self.agent[..end.unwrap_or(self.agent.len())]
    }
}

impl ImageConfig {
    fn check(&self, name: &str) -> Result<(), CrawlError> {
        if !(1..=100).contains(&self.quality) {
            return Err(bad(&format!("{name}.quality"), "it must be 1 to 100"));
        }
        if self.max_aspect.is_nan() || self.max_aspect < 1.0 {
            return Err(bad(&format!("{name}.max_aspect"), "it must be 1 or more"));
        }
        Ok(())
    }
}

impl CrawlerWorkerConfig {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// [`CrawlError::Config`] with the first setting that cannot be.
    pub fn check(&self) -> Result<(), CrawlError> {
        if self.connections == 0 || self.per_host == 0 {
            return Err(bad("worker.crawler.connections and per_host", "they must be at least 1"));
        }
        if self.requests_per_second.is_nan() || self.requests_per_second <= 0.0 {
            return Err(bad("worker.crawler.requests_per_second", "it must be above 0"));
        }
        Ok(())
    }
}

fn bad(setting: &str, reason: &str) -> CrawlError {
    CrawlError::Config { setting: setting.to_owned(), reason: reason.to_owned() }
}

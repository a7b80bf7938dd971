//! Settings. What can change a byte of the output is in [`DiscoverConfig`], [`FetchConfig`] and [`AnnotateConfig`], which go into the
//! names of tasks (`params.rs`); what changes only speed and route is in [`CrawlerWorkerConfig`], which never does.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::sources::SearchConfig;
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
    /// Files of addresses whose owners have opted out: hosts (with their subdomains), addresses, `https://host/path/*`, or SHA-256 of
    /// addresses, one a line.
    pub opt_out_lists: Vec<PathBuf>,
    /// Most time for one attempt, from the connection to the last byte of the body.
    #[serde(with = "units::time")]
    pub timeout: Duration,
    /// Most time of an attempt until the connection stands: name resolution, TCP and TLS.
    #[serde(with = "units::time")]
    pub connect_timeout: Duration,
    /// Most time for an address from its first request on: attempts, redirects, waits between them. Before that it waits for its turn as
    /// long as manners and good answers to others take, and so much beside.
    #[serde(with = "units::time")]
    pub deadline: Duration,
    /// A body must bring so many bytes a second, over every five seconds of it; 0 asks for nothing.
    #[serde(with = "units::size")]
    pub min_rate: usize,
    /// Further attempts after one that failed in a way that may pass.
    pub retries: u32,
    /// The wait before the first further attempt; it doubles each time.
    #[serde(with = "units::time")]
    pub backoff: Duration,
    /// A `Retry-After` up to this is waited for; a longer one ends the attempts of its address. The host's other addresses wait, if it is
    /// over within their `deadline`.
    #[serde(with = "units::time")]
    pub max_retry_after: Duration,
    /// Redirects followed for one address.
    pub max_redirects: u32,
    /// A host that has given no sign of life for so long, to eight requests at least, is left alone for ten minutes: its other addresses
    /// fail at once, in the same way. 0 never gives up.
    #[serde(with = "units::time")]
    pub give_up_host_after: Duration,
}

impl Default for WebConfig {
    fn default() -> Self {
        Self {
            agent: concat!("capfilt/", env!("CARGO_PKG_VERSION"), " (image-text dataset crawler; obeys robots.txt)").to_owned(),
            robots: true,
            opt_out: true,
            opt_out_lists: Vec::new(),
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            deadline: Duration::from_secs(900),
            min_rate: 256,
            retries: 2,
            backoff: Duration::from_millis(500),
            max_retry_after: Duration::from_secs(30),
            max_redirects: 5,
            give_up_host_after: Duration::from_secs(60),
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
    /// A search API, asked for the queries. Every `chunk` of them is a task of its own.
    Search(Box<SearchConfig>),
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

/// Pixels of an image, where nothing else is said.
const MAX_PIXELS: u64 = 50_000_000;

/// What the stored image looks like, and which images are refused. The settings of the size are img2dataset's, and lead to its sizes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageConfig {
    /// The length in pixels that `resize` speaks of.
    pub size: u32,
    /// What is made `size` pixels long.
    pub resize: ResizeMode,
    /// Whether an image that is smaller than `size` is left as it is; otherwise it is scaled up.
    pub only_if_bigger: bool,
    /// How an image is made smaller.
    pub downscale: Interpolation,
    /// How an image is made larger.
    pub upscale: Interpolation,
    /// How the image is stored.
    pub format: StoredFormat,
    /// JPEG and WebP: quality, 1 to 100, 95 if not given. PNG: effort of compression, 0 to 9, 6 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<u8>,
    /// Whether the downloaded bytes may be stored as they are.
    pub reencode: Reencode,
    /// An image with a shorter side below this is refused.
    pub min_side: u32,
    /// An image whose longer side is more than this many times the shorter one is refused.
    pub max_aspect: f64,
    /// An image with more pixels than this is refused before it is decoded; so is one that would be scaled up beyond this and beyond
    /// 50 million.
    pub max_pixels: u64,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            size: 384,
            resize: ResizeMode::KeepRatio,
            only_if_bigger: true,
            downscale: Interpolation::Lanczos,
            upscale: Interpolation::Lanczos,
            format: StoredFormat::Jpeg,
            quality: None,
            reencode: Reencode::Always,
            min_side: 24,
            max_aspect: 8.0,
            max_pixels: MAX_PIXELS,
        }
    }
}

/// What is made of an image's size, by img2dataset's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResizeMode {
    /// Nothing.
    No,
    /// The shorter side becomes `size`, the longer one keeps its ratio to it.
    KeepRatio,
    /// The longer side becomes `size`, the shorter one keeps its ratio to it.
    KeepRatioLargest,
    /// As `keep_ratio`; then the `size`×`size` square in the middle is cut out.
    CenterCrop,
    /// As `keep_ratio_largest`; then white is added on both sides until the image is a square.
    Border,
}

/// How pixels of another size are worked out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// The nearest pixel.
    Nearest,
    /// A triangle, as wide as what becomes one pixel.
    #[serde(alias = "linear")]
    Bilinear,
    /// Catmull-Rom, as wide as what becomes one pixel.
    #[serde(alias = "cubic")]
    Bicubic,
    /// The average of what becomes one pixel.
    Area,
    /// Lanczos with three lobes.
    #[serde(alias = "lanczos4")]
    Lanczos,
}

/// How an image is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredFormat {
    /// JPEG, colour at half resolution.
    #[serde(alias = "jpg")]
    Jpeg,
    /// PNG, without loss.
    Png,
    /// WebP, with loss.
    #[serde(rename = "webp")]
    WebP,
}

impl StoredFormat {
    /// The text in the `format` column.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "jpeg",
            Self::Png => "png",
            Self::WebP => "webp",
        }
    }
}

/// Whether an image is encoded anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reencode {
    /// Always: nothing but pixels of the downloaded file is kept.
    Always,
    /// Unless the file has the stored format already, and nothing would change it: neither its size nor EXIF, transparency or a colour
    /// profile (img2dataset's `skip_reencode`).
    IfNeeded,
    /// Never: every file is stored as it came, in its own size (img2dataset's `disable_all_reencoding`). It is decoded nevertheless, to
    /// see that it can be.
    Never,
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
    /// Most bytes of finished images that wait for an earlier one, in a fetch task.
    #[serde(with = "units::size")]
    pub buffer: usize,
    /// An HTTP proxy for all requests: `http://127.0.0.1:3128`.
    pub proxy: Option<String>,
    /// Addresses of host names, in place of DNS; `*` stands for every name without its own. A port here replaces 80 or 443.
    pub resolve: BTreeMap<String, SocketAddr>,
    /// Networks that may be asked although they are not on the public internet: `["10.0.0.0/8"]`. Private, loopback, link-local and all
    /// other special addresses are refused otherwise, whatever name or redirect leads to them; those in `resolve` are your own choice.
    pub allow_networks: Vec<IpNet>,
    /// Files of further certificates (PEM) that are trusted, beside Mozilla's roots: for a TLS proxy.
    pub ca_files: Vec<PathBuf>,
    /// How names are resolved.
    pub dns: DnsConfig,
}

/// `[worker.crawler.dns]`: the built-in resolver. Its cache belongs to the process.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DnsConfig {
    /// Servers to ask, in order of preference: `["1.1.1.1", "[2620:fe::fe]:53"]`; those of the system (`/etc/resolv.conf`) if empty.
    pub upstreams: Vec<String>,
    /// When a server has not answered for this long, the next one is asked too.
    #[serde(with = "units::time")]
    pub patience: Duration,
    /// Most time for one name.
    #[serde(with = "units::time")]
    pub timeout: Duration,
    /// Rounds over all servers, within `timeout`.
    pub attempts: u32,
    /// Whether AAAA records are asked for; by default if the machine has a route to the IPv6 internet.
    pub ipv6: Option<bool>,
    /// Names kept in memory.
    pub cache: usize,
    /// Shortest time an address is kept, whatever its record says.
    #[serde(with = "units::time")]
    pub min_ttl: Duration,
    /// Longest time an address is kept.
    #[serde(with = "units::time")]
    pub max_ttl: Duration,
    /// Longest time it is kept that a name does not exist.
    #[serde(with = "units::time")]
    pub max_negative_ttl: Duration,
    /// How long it is kept that the servers failed (`SERVFAIL`, `REFUSED`, silence).
    #[serde(with = "units::time")]
    pub failure_ttl: Duration,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            upstreams: Vec::new(),
            patience: Duration::from_millis(400),
            timeout: Duration::from_secs(4),
            attempts: 2,
            ipv6: None,
            cache: 200_000,
            min_ttl: Duration::from_secs(60),
            max_ttl: Duration::from_secs(3600),
            max_negative_ttl: Duration::from_secs(300),
            failure_ttl: Duration::from_secs(2),
        }
    }
}

impl Default for CrawlerWorkerConfig {
    fn default() -> Self {
        Self {
            connections: 64,
            per_host: 4,
            requests_per_second: 10.0,
            buffer: 512 << 20,
            proxy: None,
            resolve: BTreeMap::new(),
            allow_networks: Vec::new(),
            ca_files: Vec::new(),
            dns: DnsConfig::default(),
        }
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
                SourceConfig::Search(search) => search.check(&name)?,
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
        for (setting, time) in [("timeout", self.timeout), ("connect_timeout", self.connect_timeout), ("deadline", self.deadline)]
        {
            if time.is_zero() {
                return Err(bad(&format!("{name}.{setting}"), "it is zero"));
            }
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
    /// Quality or effort, as set or as is usual for the format.
    pub(crate) fn quality(&self) -> u8 {
        self.quality.unwrap_or(if self.format == StoredFormat::Png { 6 } else { 95 })
    }

    /// Most pixels of a stored image: a small `max_pixels` chooses among images, it does not forbid to scale them up.
    pub(crate) fn max_stored_pixels(&self) -> u64 {
        self.max_pixels.max(MAX_PIXELS)
    }

    fn check(&self, name: &str) -> Result<(), CrawlError> {
        if self.size == 0 {
            return Err(bad(&format!("{name}.size"), "it is zero; set resize = \"no\" to leave every image in its own size"));
        }
        let (allowed, range) = if self.format == StoredFormat::Png { (0..=9, "0 to 9") } else { (1..=100, "1 to 100") };
        if !allowed.contains(&self.quality()) {
            return Err(bad(&format!("{name}.quality"), &format!("for {} it must be {range}", self.format.name())));
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
        if self.dns.timeout.is_zero() || self.dns.attempts == 0 || self.dns.cache == 0 {
            return Err(bad("worker.crawler.dns", "timeout, attempts and cache must be above 0"));
        }
        self.dns.servers()?;
        Ok(())
    }
}

impl DnsConfig {
    /// The servers of `upstreams`, with port 53 where none is given.
    pub(crate) fn servers(&self) -> Result<Vec<SocketAddr>, CrawlError> {
        let parse = |text: &String| {
            let server = text.parse().or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53)));
            server.map_err(|_| bad("worker.crawler.dns.upstreams", &format!("`{text}` is no IP address, with or without a port")))
        };
        self.upstreams.iter().map(parse).collect()
    }
}

fn bad(setting: &str, reason: &str) -> CrawlError {
    CrawlError::Config { setting: setting.to_owned(), reason: reason.to_owned() }
}

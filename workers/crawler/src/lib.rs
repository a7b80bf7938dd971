//! How candidates and images come from the web: queries, sources, matching, download. The only crate with an HTTP client.
//!
//! It knows HTTP, HTML, robots.txt, image formats and the manners of a crawler. It never learns what a model is, what a dataset is made
//! of, or how tasks are handed out: it gives three stages ([`Discover`], [`Annotate`], [`Fetch`]) to whoever runs them. What a server
//! or a file of the web does wrong is a row with a status, never an error.

mod address;
mod annotate;
mod columns;
mod config;
mod digest;
mod discover;
mod download;
mod error;
mod fetch;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod html;
mod image;
mod matcher;
mod opt_out;
mod params;
mod queries;
mod room;
mod rows;
mod sources;
mod text;
mod traffic;
mod units;
mod unpack;
mod web;

pub use annotate::{ANNOTATE_VERSION, Annotate};
pub use config::{
    AnnotateConfig, AnnotatedSource, ArchiveConfig, CrawlerWorkerConfig, DiscoverConfig, DnsConfig, FetchConfig, ImageConfig,
    Interpolation, ListConfig, ListFormat, PagesConfig, Reencode, ResizeMode, SitemapsConfig, SourceConfig, StoredFormat,
    WebConfig,
};
pub use digest::HashKind;
pub use discover::{DISCOVER_VERSION, Discover};
pub use download::{DownloadConfig, DownloadProgress, DownloadSummary, IncrementalMode, OutputFormat, download};
pub use error::CrawlError;
pub use fetch::{FETCH_VERSION, Fetch};
pub use matcher::{Matcher, Scratch};
pub use opt_out::opt_out_entries;
pub use params::{AnnotateParams, DiscoverParams, FetchParams, Part, RetryParams};
pub use queries::{
    InputFile, OnProgress, Pages, QUERY_TABLE_VERSION, Query, QueryBuild, QueryInputs, QueryList, QueryRow, QuerySource,
    QueryTable, SourceCounts, TableHead,
};
#[doc(hidden)]
pub use sources::archive_pairs;
pub use sources::{Adapter, ApiKey, SearchConfig};
pub use traffic::{Downloads, OTHER_HOSTS, Traffic};
pub use units::parse_size;
pub use web::{Probe, Web};

//! What can go wrong with a whole task. What goes wrong with one address or one row is a status, never this.

use std::path::{Path, PathBuf};

use capfilt_runtime::StageError;
use capfilt_schemas::Digest;

/// An error of the crawler.
#[derive(Debug, thiserror::Error)]
pub enum CrawlError {
    /// A setting cannot be.
    #[error("the setting `{setting}` cannot be used: {reason}")]
    Config {
        /// The setting's name in the config.
        setting: String,
        /// What is wrong.
        reason: String,
    },
    /// A local file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A local file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A local file is not what it should be.
    #[error("cannot use `{}`: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The task was planned with another file than the one at hand.
    #[error("the task needs the {what} with digest {wanted}, but this worker has {found}; give it the file of the run's config")]
    WrongFile {
        /// `query list`, `list`, `archive`, `opt-out list` or `annotations`.
        what: &'static str,
        /// The digest in the task.
        wanted: Digest,
        /// What there is.
        found: String,
    },
    /// A crawl that found no way in.
    #[error("no page could be read, starting from {seeds} ({why}); check the addresses and that the hosts answer")]
    Seeds {
        /// The addresses of the config.
        seeds: String,
        /// What became of the requests, by status.
        why: String,
    },
    /// A search API that answered no query, or left some without an answer for now.
    #[error(
        "the search API {adapter} left {failed} of the task's {asked} queries without a whole answer ({why}); check its address and key, \
         that it is up, and its rate"
    )]
    Search {
        /// The adapter's name.
        adapter: String,
        /// Queries without a whole answer.
        failed: u64,
        /// Queries of the task.
        asked: u64,
        /// What became of them, by status.
        why: String,
    },
    /// A file that is named by its address cannot be downloaded.
    #[error("cannot download {url}: {reason}")]
    Download {
        /// The address.
        url: String,
        /// What went wrong last.
        reason: String,
        /// Whether it may be otherwise later.
        may_pass: bool,
    },
    /// The query list is too large for the matcher.
    #[error("the query list cannot be compiled: {0}")]
    Compile(String),
    /// The HTTP client cannot be set up.
    #[error("the http client cannot be set up: {0}")]
    Client(String),
    /// A thread of this program ended early; what it says is logged too.
    #[error("a thread ended early: {0}")]
    Thread(String),
}

impl CrawlError {
    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Read { source, .. } => source.kind() != std::io::ErrorKind::NotFound,
            Self::Seeds { .. } | Self::Search { .. } | Self::Write { .. } => true,
            Self::Download { may_pass, .. } => *may_pass,
            _ => false,
        }
    }
}

impl From<CrawlError> for StageError {
    fn from(e: CrawlError) -> Self {
        let retryable = e.is_retryable();
        Self::caused(e, retryable)
    }
}

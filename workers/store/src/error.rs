//! What can go wrong with the store.

use capfilt_schemas::{Digest, Table};

/// An error of the store; it names the object and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store's address cannot be used.
    #[error("cannot open the store `{url}`: {reason}")]
    Open {
        /// The address as given.
        url: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// An object could not be read or written.
    #[error("cannot {verb} `{path}` in the store")]
    Io {
        /// `read`, `write`, `list` or `delete`.
        verb: &'static str,
        /// The object's path.
        path: String,
        /// The cause.
        #[source]
        source: object_store::Error,
    },
    /// An object that a record names is not there.
    #[error("`{path}` is not in the store; run `capfilt store check` to see what else is missing")]
    Missing {
        /// The object's path.
        path: String,
    },
    /// An object's bytes are not the ones that its name promises.
    #[error(
        "`{path}` is corrupt: its bytes have the digest {found}; restore it from a backup or delete its commit to have it made again"
    )]
    Corrupt {
        /// The object's path.
        path: String,
        /// The digest of the bytes found.
        found: Digest,
    },
    /// A record is not the JSON that it should be.
    #[error("the record `{path}` cannot be read")]
    Record {
        /// The record's path.
        path: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A Parquet shard cannot be read or written.
    #[error("the {table} shard {what} is not readable Parquet")]
    Parquet {
        /// The shard's table.
        table: Table,
        /// The shard's digest, or `being written`.
        what: String,
        /// The cause.
        #[source]
        source: parquet::errors::ParquetError,
    },
    /// Rows do not have the columns of their table.
    #[error("rows for {table} do not have its columns: expected {expected}, found {found}")]
    Schema {
        /// The table.
        table: Table,
        /// Its columns.
        expected: String,
        /// The columns found.
        found: String,
    },
    /// A name that the caller gave does not exist.
    #[error("{0}")]
    Unknown(String),
}

impl StoreError {
    /// Whether the same call may succeed later: the store did not answer, as against answering badly.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

/// An error and its causes in one line; a cause that its effect repeats is left out.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let line = cause.to_string();
        if !text.ends_with(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        next = cause.source();
    }
    text
}

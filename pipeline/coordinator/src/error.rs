//! What can go wrong between the tables.

use std::path::PathBuf;

use capfilt_schemas::{Digest, Table};
use capfilt_store::StoreError;
use datafusion::error::DataFusionError;

/// An error of the coordinator; it names the shard, setting or file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The store failed, or holds what it should not.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A setting cannot be used.
    #[error("`{setting}` {problem}")]
    Setting {
        /// The setting's name below its section: `balance.per_query`.
        setting: &'static str,
        /// What is wrong and what to write instead.
        problem: String,
    },
    /// A shard's rows break the contract of their table.
    #[error("the {table} shard {shard} {problem}; it was not written by this version of capfilt, or it is damaged")]
    Rows {
        /// The shard's table.
        table: Table,
        /// The shard.
        shard: Digest,
        /// What is wrong.
        problem: String,
    },
    /// A query ran out of the memory that it may use.
    #[error("the query `{query}` needs more than {limit_mib} MiB of memory; raise `worker.sql.memory_mib`")]
    Memory {
        /// The query's name.
        query: &'static str,
        /// The limit.
        limit_mib: usize,
        /// What the engine said.
        #[source]
        source: Box<DataFusionError>,
    },
    /// The SQL engine failed.
    #[error("the query `{query}` failed")]
    Sql {
        /// The query's name.
        query: &'static str,
        /// What the engine said.
        #[source]
        source: Box<DataFusionError>,
    },
    /// What does not fit into memory cannot be put on disk.
    #[error(
        "cannot keep in `{}` what does not fit into memory; make room there, name a larger disk by `worker.sql.spill_folder`, \
         or raise `worker.sql.memory_mib`",
        folder.display()
    )]
    Spill {
        /// The folder.
        folder: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A file outside the store cannot be read or written.
    #[error("cannot {verb} `{}`", path.display())]
    File {
        /// `write`, `make`, `rename`, …
        verb: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// An export's folder cannot be used as it is.
    #[error("cannot export to `{}`: {problem}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What is in the way and what to do.
        problem: String,
    },
    /// The parameters of a task are not those of its stage.
    #[error("the parameters of a task are not those of its stage; it was planned by another version of this program")]
    Params(#[from] serde_json::Error),
    /// A task cannot be done as it stands.
    #[error("{0}")]
    Task(String),
    /// The queue did not take tasks.
    #[error("the work queue does not take tasks: {0}")]
    Queue(String),
    /// An external trainer failed.
    #[error("the trainer `{command}` failed: {what}")]
    Trainer {
        /// The command.
        command: String,
        /// What happened.
        what: String,
    },
    /// Rows could not be encoded.
    #[error("cannot encode {what}")]
    Encode {
        /// What was being written.
        what: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl CoordinatorError {
    /// Whether the same call may succeed later, without anything being changed.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Store(e) => e.is_retryable(),
            Self::Trainer { .. } | Self::Queue(_) | Self::Spill { .. } => true,
            _ => false,
        }
    }

    /// The whole chain of causes in one line; a cause that its effect repeats is left out.
    #[must_use]
    pub fn chain(&self) -> String {
        capfilt_store::chain(self)
    }
}

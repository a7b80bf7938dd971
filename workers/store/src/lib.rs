//! Where data *lives*: object paths, shards, commits, the dataset log, the model registry, and the sweep.
//!
//! Every record is made with create-if-absent and never changed; a shard is visible if and only if a commit names it. The crate
//! speaks to any [`object_store`] (`file:` and `memory:` are built in) and knows nothing of queues, models, HTTP or SQL.

mod check;
mod commit;
mod dataset;
mod error;
mod layout;
mod ledger;
mod registry;
mod shard;
mod store;
mod takedown;

pub use check::{CheckReport, Finding, SweepReport};
pub use commit::CommitResult;
pub use error::{StoreError, chain};
pub use ledger::RunEvent;
pub use registry::{CHECKPOINT_FILES, IMPORTED, ROLES, model_rows};
pub use shard::{ShardWriter, read_parquet};
pub use store::{Created, Store, now_ms};
pub use takedown::{TakenDown, Targets};

/// The result of everything that touches the store.
pub type Result<T> = std::result::Result<T, StoreError>;

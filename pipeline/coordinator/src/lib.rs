//! What happens *next*, and everything that is decided over tables: balancing, building dataset versions, comparing and exporting
//! them, planning and retraining.
//!
//! The only crate with a SQL engine. It reads and writes the store and nothing else: it knows no queue, no HTTP, no model and no
//! stage crate, and never looks into pixels.

pub mod balance;
pub mod bench;
pub mod build;
mod cap;
mod dedup;
pub mod diff;
mod draw;
mod error;
pub mod export;
mod external;
pub mod marginals;
mod memory;
pub mod plan;
mod readers;
pub mod reconcile;
pub mod report;
pub mod retrain;
mod scan;
mod shards;
mod spill;
mod sql;
pub mod takedown;
#[cfg(test)]
mod testing;

pub use error::CoordinatorError;
pub use sql::SqlConfig;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, CoordinatorError>;

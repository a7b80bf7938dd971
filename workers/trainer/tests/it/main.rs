//! The trainer as its callers see it.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod caption_metrics;
mod runs;

//! The system as its user sees it.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod architecture;

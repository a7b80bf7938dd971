//! The system as its user sees it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, missing_docs)]

mod architecture;
mod bad_input;
mod crash;
mod download;
mod exports;
mod retry;
mod run;
mod study;
mod takedown;
mod trainers;
mod world;

//! The stages of the crawler against servers that misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod annotate;
mod crawl;
mod fetch;
mod search;
mod server;
mod support;

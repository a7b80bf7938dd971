//! The stages of the crawler against servers that misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod annotate;
mod archive;
mod archives;
mod crawl;
mod fetch;
mod server;
mod sitemaps;
mod support;

//! The stages of the crawler against servers that misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod annotate;
mod archive;
mod archives;
mod crawl;
mod download;
mod fetch;
mod h2;
mod hostile;
mod limits;
mod names;
mod retry;
mod search;
mod server;
mod sitemaps;
mod support;
mod tls;

//! The stages of the crawler against servers that misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod annotate;
mod crawl;
mod download;
mod fetch;
mod server;
mod support;

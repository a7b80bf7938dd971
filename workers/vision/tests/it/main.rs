//! The caption and score stages on real image files and small checkpoints, and their models tried by hand.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fixture;
mod stages;

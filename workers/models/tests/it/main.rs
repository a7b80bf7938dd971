//! The models as their users see them: against golden outputs, against themselves, and given bad input.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod checkpoint;
mod decoding;
mod fixture;
mod formats;
mod golden;
mod gradients;
mod scoring;
mod text;

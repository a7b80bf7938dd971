//! The models as their users see them: against golden outputs, against themselves, and given bad input.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod checkpoint;
mod clip;
mod decoding;
mod families;
mod fixture;
mod formats;
mod golden;
mod gradients;
mod inputs;
mod number_types;
mod real;
mod scoring;
mod text;
mod training;

//! The models of capfilt, on candle.
//!
//! This crate knows how a MED (BLIP's multimodal mixture of encoder-decoder), BLIP's model that answers questions and a CLIP are made of tensors, how a checkpoint lies on
//! disk in the Hugging Face layout, how an image and a text become its input, how captions are drawn from it, how pairs are
//! scored by it and how it is trained. It is synchronous and computes; it never knows where data comes from or goes to, what a
//! task, a shard or a run is, and imports nothing of this workspace.

mod block;
pub mod checkpoint;
pub mod clip;
pub mod config;
pub mod device;
pub mod error;
pub mod files;
pub mod generate;
pub mod layers;
mod logits;
pub mod med;
pub mod moments;
pub mod ops;
mod original;
pub mod parameters;
pub mod preprocess;
pub mod random;
pub mod retrieval;
pub mod sampling;
pub mod score;
mod search;
pub mod special;
pub mod text;
pub mod tokenizer;
pub mod train;
pub mod trunk;
mod vision;
pub mod vqa;
pub mod weights;

pub use error::{ModelError, Result};

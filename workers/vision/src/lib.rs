//! The caption and score stages: rows of images in, rows of texts or of scores out.
//!
//! Knows how rows become pixels and texts, and how a model is kept on its thread. Never knows what a tensor is, where rows come from or
//! which texts are kept.

mod caption;
mod model;
mod pixels;
mod score;

pub use capfilt_models::{ModelError, files};
pub use caption::{CaptionConfig, CaptionStage};
pub use model::{VisionWorkerConfig, check_checkpoint, stored_files, write_checkpoint};
pub use score::{ScoreConfig, ScoreStage};

/// Raised whenever the same image and model would give other captions or scores than before.
pub const STAGE_VERSION: u32 = 1;

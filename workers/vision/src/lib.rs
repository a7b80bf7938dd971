//! The caption and score stages: rows of images in, rows of texts or of scores out; and their models tried by hand on image files.
//!
//! Knows how rows become pixels and texts, and how a model is kept on its thread. Never knows what a tensor is, where rows come from or
//! which texts are kept.

mod by_hand;
mod caption;
mod judge;
mod model;
mod pixels;
mod score;

pub use by_hand::{ImageCaptioner, ImageScorer};
pub use capfilt_models::device::share_threads;
pub use capfilt_models::generate::Caption;
pub use capfilt_models::sampling::{Sampling, Strategy};
pub use capfilt_models::score::ItmToken;
pub use capfilt_models::{ModelError, files};
pub use caption::{CaptionConfig, CaptionStage};
pub use judge::TextScores;
pub use model::{NumberType, VisionWorkerConfig, check_checkpoint, is_checkpoint_file, kind_of, stored_files, write_checkpoint};
pub use score::{ScoreConfig, ScoreParams, ScoreStage};

/// Raised whenever the same image and model would give other captions or scores than before.
pub const STAGE_VERSION: u32 = 3;

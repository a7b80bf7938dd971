//! Training and judging models: the `train` and `evaluate` stages and the plain functions under them.
//!
//! This crate knows pairs of images and texts in memory, in which order a run draws them, what a finished model consists of, and how
//! good it is on held-out pairs. It never knows tensors (they are `capfilt-models`' business), when a model should be trained, or
//! which model is promoted.

mod config;
mod error;
mod evaluate;
mod loader;
mod members;
pub mod metrics;
mod pair;
mod sampler;
mod set;
mod stage;
mod train;
mod zero_shot;

pub use config::{Init, ModelSize, ResNetSize, TrainConfig, TrainDType, TrainerWorkerConfig};
pub use error::TrainerError;
pub use evaluate::{EvaluateConfig, Metric, evaluate};
pub use pair::{PairText, TrainPair};
pub use sampler::Member;
pub use set::TrainSet;
pub use stage::{EVALUATE_VERSION, EvaluateStage, TRAIN_VERSION, TrainStage};
pub use train::{LogLine, Progress, Saves, train};
pub use zero_shot::ZeroShot;

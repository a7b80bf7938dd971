//! What can go wrong while training and judging.

use std::path::PathBuf;

use capfilt_models::ModelError;
use capfilt_schemas::Digest;

/// Everything this crate can fail with.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// A setting makes no sense.
    #[error("train settings: {0}")]
    Config(String),
    /// There is nothing to train on or to judge by.
    #[error("no pairs to {purpose}: {reason}")]
    NoPairs {
        /// `train on` or `judge by`.
        purpose: &'static str,
        /// Why there is none.
        reason: String,
    },
    /// A caption has nothing to be judged against.
    #[error("caption {candidate:?} has no reference to be judged against")]
    NoReferences {
        /// The caption.
        candidate: String,
    },
    /// Retrieval scores do not fit the pairs.
    #[error("retrieval cannot be judged: {0}")]
    Retrieval(String),
    /// The images of a shard cannot be read.
    #[error("the images of shard {shard} cannot be read: {reason}")]
    Images {
        /// The shard.
        shard: Digest,
        /// What the store said.
        reason: String,
    },
    /// An image cannot be used.
    #[error("the image of sample {sample_id} cannot be used: {reason}")]
    Image {
        /// The sample.
        sample_id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The machine gives no threads.
    #[error("no threads to train with: {0}")]
    Threads(String),
    /// A file of an unfinished run cannot be read or written.
    #[error("cannot access {path}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The model failed.
    #[error("the model failed")]
    Model(#[from] ModelError),
    /// The caller asked to stop.
    #[error("training was stopped at step {step}; what was saved goes on from there")]
    Stopped {
        /// Steps made.
        step: u64,
    },
}

impl TrainerError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Images { .. } | Self::Stopped { .. } | Self::Threads(_) => true,
            Self::Model(error) => error.is_retryable(),
            Self::Config(_) | Self::Image { .. } | Self::NoPairs { .. } | Self::NoReferences { .. } | Self::Retrieval(_) => false,
        }
    }
}

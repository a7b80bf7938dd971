//! Why a task fails.

use capfilt_store::StoreError;

/// The failure of a whole task. Rows that cannot be processed are rows with a status, never this.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The task's parameters are not the stage's.
    #[error("the parameters of the task are not those of its stage; it was planned by another version of this program")]
    Params(#[from] serde_json::Error),
    /// Rows could not be put together.
    #[error("rows of the task could not be put together")]
    Arrow(#[from] arrow::error::ArrowError),
    /// The inputs do not fit one another.
    #[error("the inputs of the task do not fit: {0}")]
    Input(String),
    /// The stage's own failure.
    #[error("{message}")]
    Failed {
        /// What failed, where, and what to do.
        message: String,
        /// Whether the same task may succeed later.
        retryable: bool,
        /// The cause.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The stage's code panicked.
    #[error("the stage panicked: {0}")]
    Panicked(String),
    /// The program is being stopped.
    #[error("stopped before the end")]
    Cancelled,
}

impl StageError {
    /// A failure with a cause; the message is the cause's own.
    pub fn caused(source: impl std::error::Error + Send + Sync + 'static, retryable: bool) -> Self {
        Self::Failed { message: source.to_string(), retryable, source: Some(Box::new(source)) }
    }

    /// A failure that will be the same every time.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self::Failed { message: message.into(), retryable: false, source: None }
    }

    /// Whether a further attempt may succeed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Store(e) => e.is_retryable(),
            Self::Failed { retryable, .. } => *retryable,
            Self::Panicked(_) | Self::Cancelled => true,
            Self::Params(_) | Self::Arrow(_) | Self::Input(_) => false,
        }
    }

    /// The whole chain of causes in one line, without repeating a text that a level hands on.
    #[must_use]
    pub fn chain(&self) -> String {
        capfilt_store::chain(self)
    }
}

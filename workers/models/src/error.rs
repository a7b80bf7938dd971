//! What can go wrong inside the models, one enum for the whole crate.

use std::fmt;
use std::path::{Path, PathBuf};

/// What is wrong with a file whose name promises safetensors.
pub(crate) const NO_SAFETENSORS: &str = "is not a readable safetensors file; fetch or save it again";

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

/// Everything this crate can fail with.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file of a checkpoint could not be read or written.
    #[error("cannot access {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file of a checkpoint does not parse.
    #[error("{path} is not the JSON this program expects")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// A configuration describes a model that cannot exist or that this crate does not implement.
    #[error("unusable model config: {0}")]
    Config(String),
    /// There is no such device.
    #[error("device `{name}`: {reason}")]
    Device {
        /// As it was named.
        name: String,
        /// Why not, and what to do.
        reason: &'static str,
    },
    /// A weight file, or an index of shards, cannot be used.
    #[error("{path} {what}")]
    Weights {
        /// The file, or the folder that should hold it.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What the reader said, if it was asked.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The weight file and `config.json` disagree.
    #[error("{path} does not fit its config.json: {problems}")]
    Tensors {
        /// The weight file.
        path: PathBuf,
        /// Every tensor that is missing, unknown or of another shape or type.
        problems: TensorProblems,
    },
    /// The model has no such part.
    #[error("{wanted} needs {missing}, which this checkpoint does not have")]
    MissingPart {
        /// What was asked for.
        wanted: &'static str,
        /// The weights it would need.
        missing: &'static str,
    },
    /// A tokenizer cannot be loaded, trained or applied.
    #[error("tokenizer: {what}")]
    Tokenizer {
        /// What was being done.
        what: String,
        /// What the tokenizer library said, if it was asked.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// An image cannot be brought into the shape the model wants.
    #[error("cannot prepare an image of {width}x{height} pixels: {reason}")]
    Image {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Why not.
        reason: String,
    },
    /// A call does not fit the model: wrong sizes, lengths or settings.
    #[error("invalid input: {0}")]
    Input(String),
    /// A training step cannot be made; the weights are as they were before it.
    #[error("training stopped after step {step}: {reason}")]
    Training {
        /// Steps made so far.
        step: u64,
        /// Why there is no next one.
        reason: String,
    },
    /// The tensor library failed.
    #[error("tensor operation failed")]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    pub(crate) fn no_safetensors(path: &Path, source: safetensors::SafeTensorError) -> Self {
        Self::Weights { path: path.to_owned(), what: NO_SAFETENSORS.to_owned(), source: Some(source.into()) }
    }

    /// True if the same call may succeed later without any change: only interrupted input and output.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Io { source, .. } => !matches!(
                source.kind(),
                std::io::ErrorKind::NotFound
                    | std::io::ErrorKind::PermissionDenied
                    | std::io::ErrorKind::InvalidData
                    | std::io::ErrorKind::IsADirectory
                    | std::io::ErrorKind::NotADirectory
            ),
            _ => false,
        }
    }
}

/// One tensor of a weight file that is not as `config.json` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TensorProblem {
    /// The config asks for it, the file lacks it.
    Missing {
        /// Tensor name.
        name: String,
        /// Shape that the config asks for.
        expected: Vec<usize>,
    },
    /// The file has it, the config knows no such tensor.
    Unknown {
        /// Tensor name.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// Both have it, with different shapes.
    Shape {
        /// Tensor name.
        name: String,
        /// Shape that the config asks for.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// It is stored in a number format that this crate does not read.
    Format {
        /// Tensor name.
        name: String,
        /// Format in the file.
        found: String,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { name, expected } => {
                write!(f, "tensor {name} of shape {expected:?} is missing")
            }
            Self::Unknown { name, found } => {
                write!(f, "tensor {name} of shape {found:?} is unknown to the config")
            }
            Self::Shape { name, expected, found } => write!(f, "tensor {name} has shape {found:?}, the config says {expected:?}"),
            Self::Format { name, found } => write!(f, "tensor {name} is stored as {found}, expected F32, F16 or BF16"),
        }
    }
}

/// The problems of one weight file, in the order of tensor names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorProblems(pub Vec<TensorProblem>);

impl fmt::Display for TensorProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A wrong config makes hundreds of these; the first few tell the story.
        const SHOWN: usize = 4;
        for (i, problem) in self.0.iter().take(SHOWN).enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            problem.fmt(f)?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

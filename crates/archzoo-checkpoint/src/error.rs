use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// `Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What is wrong, and where.
#[derive(Debug)]
pub struct Error {
    /// File or folder.
    pub file: PathBuf,
    /// Tensor, where there is one.
    pub tensor: Option<String>,
    /// What was expected and what was found.
    pub message: String,
}

impl Error {
    pub(crate) fn new(file: &Path, message: impl Into<String>) -> Self {
        Self { file: file.to_owned(), tensor: None, message: message.into() }
    }

    pub(crate) fn tensor(file: &Path, tensor: &str, message: impl Into<String>) -> Self {
        Self { tensor: Some(tensor.to_owned()), ..Self::new(file, message) }
    }

    /// For `map_err`: the operating system's refusal to do `action`.
    pub(crate) fn io(file: &Path, action: &str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::new(file, format!("cannot {action}: {error}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file.display())?;
        if let Some(tensor) = &self.tensor {
            write!(f, "tensor {tensor:?}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

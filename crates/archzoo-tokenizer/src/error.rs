use std::fmt::{self, Display};
use std::path::Path;

/// A tokenizer that cannot be read, or input that it cannot take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

/// What every fallible function here returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    /// Something that a file asks for and this crate does not do.
    pub fn unsupported(feature: impl Display) -> Self {
        Self(format!("not supported: {feature}"))
    }

    /// The same, with the file in front.
    #[must_use]
    pub fn in_file(self, path: &Path) -> Self {
        Self(format!("{}: {}", path.display(), self.0))
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

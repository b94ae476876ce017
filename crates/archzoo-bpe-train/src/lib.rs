//! Byte-level BPE vocabularies learnt from text, merge for merge those of Hugging Face's `BpeTrainer`.
//!
//! Text is split into words by a regular expression and only distinct words are kept, with their counts. Then
//! the most frequent pair of neighbouring tokens becomes a token, again and again.

mod alphabet;
mod count;
mod file;
mod learn;
mod split;

pub use count::WordCounts;
pub use file::tokenizer_json;
pub use learn::{Vocabulary, learn};
pub use split::Splitter;

use std::fmt;
use std::path::PathBuf;

/// Why training was refused.
#[derive(Debug)]
pub enum Error {
    /// The pattern is no regular expression, or gave up on a text.
    Pattern(String),
    /// A file cannot be read or is not UTF-8.
    File(PathBuf, String),
    /// The vocabulary cannot hold the special tokens and all bytes.
    TooSmall {
        /// As asked.
        vocab_size: usize,
        /// At least needed.
        needed: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern(message) => write!(f, "pattern: {message}"),
            Error::File(path, message) => write!(f, "{}: {message}", path.display()),
            Error::TooSmall { vocab_size, needed } => {
                write!(f, "vocab_size {vocab_size}: the special tokens and the 256 bytes alone need {needed}")
            }
        }
    }
}

impl std::error::Error for Error {}

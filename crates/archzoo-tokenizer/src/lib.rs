//! Text to token ids and back: exact, linear on any input, without a regex on the hot path.

mod added;
mod borders;
mod bpe;
mod byte_level;
mod cache;
mod cache_file;
mod chars;
mod charsmap;
mod chat;
mod classes;
mod decode;
mod error;
mod gguf;
mod json;
mod long_cache;
mod merges;
mod metaspace;
mod model;
mod normalize;
mod reached;
mod sentencepiece;
mod split;
mod tekken;
mod tiktoken;
mod tokenizer;
mod trie;
mod unigram;
mod vocab;
mod wordpiece;

pub use added::{AddedToken, AllowedSpecial};
#[cfg(fuzzing)]
pub use cache_file::{encode_by, tables_of};
pub use chat::render as render_chat;
pub use decode::DecodeStream;
pub use error::{Error, Result};
pub use split::SPLIT_PATTERNS;
pub use tiktoken::NAMES as PATTERN_NAMES;
pub use tokenizer::{Options, Ragged, Tokenizer};

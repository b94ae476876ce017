//! Sharded safetensors checkpoints.
//!
//! [`Reader`] checks every header, and the index against the headers, before a byte is used; [`save`] writes
//! shards and their index; [`FolderWriter`] puts a finished folder in the place of an older one in one step.

mod bitstream;
mod container;
mod dfloat11;
mod dtype;
mod error;
mod folder;
mod header;
mod huffman;
mod planes;
mod reader;
mod writer;

pub use container::{compress, decompress};
pub use dfloat11::{Buffers, Encoded, decode_dfloat11, encode_dfloat11};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use folder::FolderWriter;
pub use header::{Header, TensorInfo};
pub use reader::{Reader, Request};
pub use writer::{Tensor, save};

/// The file of an unsharded checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file that tells the shard of each tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

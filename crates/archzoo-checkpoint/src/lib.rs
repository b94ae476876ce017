//! Sharded safetensors checkpoints.
//!
//! [`Reader`] checks every header, and the index against the headers, before a byte is used; [`save`] writes
//! shards, their index and a manifest; [`FolderWriter`] puts a finished folder in the place of an older one in
//! one step. [`Reader::verify`] checks every byte: the manifest holds the checksums of the headers, these hold
//! the checksums of the tensors.
//!
//! [`compress`] makes tensors smaller without loss, [`encode_dfloat11`] in a public format; [`Gguf`] reads files of
//! that format.

mod bitstream;
mod cast;
mod checksum;
mod compressed;
mod container;
mod dequantize;
mod dfloat11;
mod dtype;
mod error;
mod folder;
mod gguf;
mod header;
mod huffman;
mod manifest;
mod planes;
mod read;
mod reader;
mod spread;
mod stream;
mod writer;

pub use container::{compress, decompress};
pub use dfloat11::{Buffers, Encoded, Encoder, count_exponents, decode_dfloat11, encode_dfloat11};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use folder::FolderWriter;
pub use gguf::{Gguf, gguf_dtype};
pub use header::{Header, TensorInfo};
pub use read::Request;
pub use reader::{Reader, parse_index};
pub use writer::{Elements, Tensor, save};

/// The file of an unsharded checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file that tells the shard of each tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The file that tells the size and the checksum of the head of each of the others.
pub const MANIFEST_FILE: &str = "model.manifest.json";

//! The native module `archzoo._rust`: thin bindings, all work done with the interpreter released.

mod bpe;
mod checkpoint;
mod compression;
mod decode;
mod eplb;
mod gate;
mod gguf;
mod json_lines;
mod listing;
mod plan;
mod pool;
mod texts;
mod tokenizer;

use pyo3::prelude::*;

#[pymodule]
mod _rust {
    use super::*;

    #[pymodule_export]
    use super::bpe::BpeTrainer;
    #[pymodule_export]
    use super::checkpoint::{CheckpointError, CheckpointReader, PyFolderWriter, write_shards};
    #[pymodule_export]
    use super::compression::{compress, decode_dfloat11, decompress, encode_dfloat11, measure_dfloat11};
    #[pymodule_export]
    use super::decode::{
        attention, conv, conv_step, experts, gated_rms_norm, latent_attention, linear, rms_norm, rope,
        ssd_scan, ssd_step, swiglu,
    };
    #[pymodule_export]
    use super::eplb::eplb;
    #[pymodule_export]
    use super::gate::gate;
    #[pymodule_export]
    use super::gguf::GgufReader;
    #[pymodule_export]
    use super::listing::list_files;
    #[pymodule_export]
    use super::plan::plan;
    #[pymodule_export]
    use super::pool::threads;
    #[pymodule_export]
    use super::texts::{Texts, Xxh3, file_texts, json_texts, text_start};
    #[pymodule_export]
    use super::tokenizer::{PyTokenizer, TokenizerError, Utf8Stream, render_chat, split_patterns};

    /// The vector instructions in use: "baseline", "avx2" or "avx512".
    #[pyfunction]
    fn instruction_set() -> &'static str {
        archzoo_simd::InstructionSet::current().name()
    }

    /// Whether this CPU multiplies bfloat16 itself.
    #[pyfunction]
    fn has_bfloat16() -> bool {
        archzoo_simd::has_bfloat16()
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

use std::path::PathBuf;

use archzoo_bpe_train::{Error, Splitter, WordCounts, learn, tokenizer_json};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::pool;

fn to_python(error: Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn views(texts: &[PyBackedStr]) -> Vec<&str> {
    texts.iter().map(|text| &**text).collect()
}

/// Counts the words of texts, then learns a byte-level BPE vocabulary from them.
#[pyclass(frozen, module = "archzoo._rust")]
pub struct BpeTrainer {
    pattern: String,
    counts: WordCounts,
}

#[pymethods]
impl BpeTrainer {
    /// A trainer that splits text into words by `pattern`.
    #[new]
    fn new(pattern: String) -> PyResult<Self> {
        let splitter = Splitter::new(&pattern).map_err(to_python)?;
        Ok(Self { pattern, counts: WordCounts::new(splitter) })
    }

    /// Counts the words of some texts; none spans two of them.
    fn feed(&self, py: Python, texts: Vec<PyBackedStr>) -> PyResult<()> {
        let texts = views(&texts);
        py.detach(|| pool::run(|| self.counts.feed(&texts)))?.map_err(to_python)
    }

    /// Counts the words of a UTF-8 file of any size.
    fn feed_file(&self, py: Python, path: PathBuf) -> PyResult<()> {
        py.detach(|| pool::run(|| self.counts.feed_file(&path)))?.map_err(to_python)
    }

    /// Learns the vocabulary; returns it as the text of a `tokenizer.json`.
    fn train(
        &self,
        py: Python,
        vocab_size: usize,
        special_tokens: Vec<PyBackedStr>,
        min_frequency: u64,
    ) -> PyResult<String> {
        let special = views(&special_tokens);
        let vocabulary = py
            .detach(|| pool::run(|| learn(&self.counts, vocab_size, min_frequency, &special)))?
            .map_err(to_python)?;
        tokenizer_json(&vocabulary, &self.pattern, &special).map_err(|e| PyValueError::new_err(e.to_string()))
    }
}

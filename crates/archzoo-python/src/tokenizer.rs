use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use archzoo_tokenizer::{AllowedSpecial, DecodeStream, Error, Options, Tokenizer};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::pool;
use crate::texts::Texts;

pyo3::create_exception!(
    archzoo._rust,
    TokenizerError,
    PyException,
    "A tokenizer that cannot be read, or input that it cannot take: names the file and what is not supported."
);

fn to_python(error: Error) -> PyErr {
    TokenizerError::new_err(error.to_string())
}

/// A tokenizer, ready for any number of threads.
#[pyclass(name = "Tokenizer", frozen, module = "archzoo._rust")]
pub struct PyTokenizer(Tokenizer);

/// Ids of several texts, and where each text's start.
type Ragged<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>);

/// Bytes of a text that is worth several threads.
const LONG: usize = 1 << 18;

/// Texts to encode.
#[derive(FromPyObject)]
enum Batch<'py> {
    Texts(Bound<'py, Texts>),
    List(Vec<Bound<'py, PyString>>),
}

impl Batch<'_> {
    fn parts(&self) -> PyResult<Vec<&str>> {
        match self {
            Self::Texts(texts) => Ok(texts.get().parts().collect()),
            Self::List(texts) => texts.iter().map(utf8).collect(),
        }
    }
}

#[pymethods]
impl PyTokenizer {
    /// Reads a `tokenizer.json`, a GGUF file's vocabulary, a SentencePiece file, Mistral's Tekken or a tiktoken rank
    /// file with the name of its pattern; with a folder for tables that are built once, and the control tokens that go
    /// before and after a text if the file does not say so.
    #[new]
    #[pyo3(signature = (path, pattern = None, cache = None, ends = (None, None)))]
    fn new(
        py: Python,
        path: PathBuf,
        pattern: Option<&str>,
        cache: Option<PathBuf>,
        ends: (Option<String>, Option<String>),
    ) -> PyResult<Self> {
        let read = || match &cache {
            None => Tokenizer::from_file(&path, pattern),
            Some(folder) => Tokenizer::from_file_cached(&path, pattern, folder),
        };
        let tokenizer = py.detach(|| pool::run(read))?.map_err(to_python)?;
        match ends {
            (None, None) => Ok(Self(tokenizer)),
            (before, after) => {
                let tokenizer = tokenizer.with_ends(before.as_deref(), after.as_deref());
                tokenizer.map(Self).map_err(|e| to_python(e.in_file(&path)))
            }
        }
    }

    /// Number of ids, those of added tokens included.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    /// For `decode_next`; None if the text of a token depends on more than whether it is the first.
    fn stream(&self) -> Option<Utf8Stream> {
        self.0.stream().map(Utf8Stream)
    }

    /// The text that one more id completes.
    fn decode_next(&self, id: u32, skip_special_tokens: bool, stream: &mut Utf8Stream) -> PyResult<String> {
        self.0.decode_next(id, skip_special_tokens, &mut stream.0).map_err(to_python)
    }

    /// A hash of the file and the pattern, in hexadecimal.
    #[getter]
    fn hash(&self) -> String {
        self.0.hash()
    }

    /// Added tokens: content, id, and whether it is a control token.
    fn added_tokens(&self) -> Vec<(&str, u32, bool)> {
        let mut tokens: Vec<_> = self.0.added().map(|t| (t.content.as_str(), t.id, t.special)).collect();
        tokens.sort_unstable_by_key(|&(_, id, _)| id);
        tokens
    }

    /// Ids of a text or of bytes, uint32.
    #[pyo3(signature = (text, add_special_tokens, allowed_special))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyAny>,
        add_special_tokens: bool,
        allowed_special: Option<BTreeSet<String>>,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let options = options(add_special_tokens, allowed_special.as_ref());
        // A text, or else bytes.
        let given = match text.cast::<PyBytes>() {
            Ok(bytes) => Err(bytes.as_bytes()),
            Err(_) => Ok(utf8(text.cast::<PyString>()?)?),
        };
        let encode = || {
            let mut ids = Vec::new();
            match given {
                Ok(text) => self.0.encode(text, options, &mut ids)?,
                Err(bytes) => self.0.encode_bytes(bytes, options, &mut ids)?,
            }
            Ok(ids)
        };
        let is_long = given.map_or_else(<[u8]>::len, str::len) >= LONG;
        let ids = py.detach(|| if is_long { pool::run(encode) } else { Ok(encode()) })?;
        Ok(PyArray1::from_vec(py, ids.map_err(to_python)?))
    }

    /// Ids of a text, uint32, and the starts and ends of their bytes in it, int64 [2 * n].
    #[pyo3(signature = (text, add_special_tokens, allowed_special))]
    fn encode_with_offsets<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyString>,
        add_special_tokens: bool,
        allowed_special: Option<BTreeSet<String>>,
    ) -> PyResult<Ragged<'py>> {
        let text = utf8(text)?;
        let options = options(add_special_tokens, allowed_special.as_ref());
        let (ids, spans) = py.detach(|| self.0.encode_with_offsets(text, options)).map_err(to_python)?;
        let spans = spans.iter().flat_map(|span| [span.start as i64, span.end as i64]).collect();
        Ok((PyArray1::from_vec(py, ids), PyArray1::from_vec(py, spans)))
    }

    /// Number of ids of a text.
    #[pyo3(signature = (text, add_special_tokens, allowed_special))]
    fn count(
        &self,
        py: Python,
        text: &Bound<PyString>,
        add_special_tokens: bool,
        allowed_special: Option<BTreeSet<String>>,
    ) -> PyResult<usize> {
        let text = utf8(text)?;
        let options = options(add_special_tokens, allowed_special.as_ref());
        py.detach(|| self.0.count(text, options)).map_err(to_python)
    }

    /// Ids of all texts, uint32, and their offsets, int64.
    #[pyo3(signature = (texts, add_special_tokens, allowed_special))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Batch<'py>,
        add_special_tokens: bool,
        allowed_special: Option<BTreeSet<String>>,
    ) -> PyResult<Ragged<'py>> {
        let texts = texts.parts()?;
        let options = options(add_special_tokens, allowed_special.as_ref());
        let ragged = py.detach(|| pool::run(|| self.0.encode_batch(&texts, options)))?.map_err(to_python)?;
        Ok((PyArray1::from_vec(py, ragged.ids), PyArray1::from_vec(py, ragged.offsets)))
    }

    /// Ids of documents one after the other, uint16 or uint32, and their offsets, int64; made by this thread alone unless a
    /// document is long. After each document comes `eos`; after the last one only if it `ends` here.
    fn encode_documents<'py>(
        &self,
        py: Python<'py>,
        texts: Batch<'py>,
        is_wide: bool,
        eos: Option<u32>,
        ends: bool,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<i64>>)> {
        let texts = texts.parts()?;
        let (ids, offsets) = if is_wide {
            let (ids, offsets) = py.detach(|| documents(&self.0, &texts, eos, ends, u32::MAX, |id| id))?;
            (PyArray1::from_vec(py, ids).into_any(), offsets)
        } else {
            let (ids, offsets) =
                py.detach(|| documents(&self.0, &texts, eos, ends, u16::MAX.into(), |id| id as u16))?;
            (PyArray1::from_vec(py, ids).into_any(), offsets)
        };
        Ok((ids, PyArray1::from_vec(py, offsets)))
    }

    /// Text of ids; what is not UTF-8 becomes replacement characters.
    fn decode(&self, py: Python, ids: PyReadonlyArray1<u32>, skip_special_tokens: bool) -> PyResult<String> {
        let ids = contiguous(&ids)?;
        py.detach(|| self.0.decode(ids, skip_special_tokens)).map_err(to_python)
    }

    /// Bytes of ids.
    fn decode_bytes<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<u32>,
        skip_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let ids = contiguous(&ids)?;
        let bytes = py.detach(|| self.0.decode_bytes(ids, skip_special_tokens)).map_err(to_python)?;
        Ok(PyBytes::new(py, &bytes))
    }
}

/// The ids of documents in the type that `narrow` makes of those up to `highest`, and where each one's start.
fn documents<T: Send>(
    tokenizer: &Tokenizer,
    texts: &[&str],
    eos: Option<u32>,
    ends: bool,
    highest: u32,
    narrow: impl Fn(u32) -> T + Sync,
) -> PyResult<(Vec<T>, Vec<i64>)> {
    let bytes: usize = texts.iter().map(|text| text.len()).sum();
    let mut ids = Vec::with_capacity(bytes / 3);
    let mut offsets = Vec::with_capacity(texts.len() + 1);
    offsets.push(0);
    let take = |found: &[u32]| {
        let eos = eos.filter(|_| ends || offsets.len() < texts.len());
        match found.iter().copied().chain(eos).max() {
            Some(id) if id > highest => return Err(Error::new(format!("id {id} is above {highest}"))),
            _ => ids.extend(found.iter().copied().chain(eos).map(&narrow)),
        }
        offsets.push(ids.len() as i64);
        Ok(())
    };
    let encode = || tokenizer.encode_each(texts.iter().copied(), options(false, None), take);
    let is_long = texts.iter().any(|text| text.len() >= 4 * LONG);
    let encoded = if is_long { pool::run(encode)? } else { encode() };
    encoded.map(|()| (ids, offsets)).map_err(to_python)
}

fn options(add_special_tokens: bool, allowed: Option<&BTreeSet<String>>) -> Options<'_> {
    let allowed_special = allowed.map_or(AllowedSpecial::All, AllowedSpecial::Only);
    Options { add_special_tokens, allowed_special }
}

fn utf8<'a>(text: &'a Bound<PyString>) -> PyResult<&'a str> {
    text.to_str().map_err(|e| TokenizerError::new_err(format!("text that is not valid Unicode: {e}")))
}

fn contiguous<'a>(ids: &'a PyReadonlyArray1<u32>) -> PyResult<&'a [u32]> {
    ids.as_slice().map_err(|_| PyTypeError::new_err("ids must be contiguous"))
}

/// Joins the bytes of tokens that come one by one, and holds back what may still become a character.
#[pyclass(name = "Utf8Stream", module = "archzoo._rust")]
pub struct Utf8Stream(DecodeStream);

#[pymethods]
impl Utf8Stream {
    /// What is left at the end.
    fn finish(&mut self) -> String {
        self.0.finish()
    }
}

/// The regular expressions that cut text into words, by the name of a family of models.
#[pyfunction]
pub fn split_patterns() -> BTreeMap<&'static str, &'static str> {
    archzoo_tokenizer::SPLIT_PATTERNS.into()
}

/// Fills in a chat template with the variables of a JSON object.
#[pyfunction]
pub fn render_chat(py: Python, template: &str, variables: &str) -> PyResult<String> {
    py.detach(|| archzoo_tokenizer::render_chat(template, variables)).map_err(to_python)
}

//! Texts on their way from files into a tokenizer, without Python objects between.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyIterator, PyList};
use twox_hash::XxHash3_128;

use crate::json_lines;

/// Texts, one after the other in memory; as many strings for who iterates.
#[pyclass(frozen, module = "archzoo._rust")]
#[derive(Default)]
pub struct Texts {
    content: String,
    ends: Vec<usize>,
}

impl Texts {
    /// The texts.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.content[start..end])
    }

    /// The text that goes on after the last one ends here.
    fn end(&mut self) {
        self.ends.push(self.content.len());
    }
}

#[pymethods]
impl Texts {
    fn __len__(&self) -> usize {
        self.ends.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, self.parts().collect::<Vec<_>>())?.try_iter()
    }
}

/// The text at `key` of every JSON object, one a line, blank lines skipped; how many lines; what is wrong with the next.
/// The lines are those of `block`, the last of which goes on in `rest`.
#[pyfunction]
pub fn json_texts(
    py: Python,
    block: PyBackedBytes,
    rest: PyBackedBytes,
    key: &str,
) -> (Texts, usize, Option<String>) {
    py.detach(|| {
        let mut texts = Texts { content: String::with_capacity(block.len() + rest.len()), ends: Vec::new() };
        let (lines, last) = block.split_at(memchr::memrchr(b'\n', &block).map_or(0, |at| at + 1));
        let last = [last, &rest].concat();
        let mut number = 0;
        for mut lines in [lines, &last] {
            let is_text = simdutf8::basic::from_utf8(lines).is_ok();
            while !lines.is_empty() {
                match json_lines::add_text(lines, is_text, key, &mut texts.content) {
                    Ok((is_found, after)) => {
                        lines = after;
                        if is_found {
                            texts.end();
                        }
                    }
                    Err(error) => return (texts, number, Some(error.to_string())),
                }
                if let Some(after) = lines.strip_prefix(b"\n") {
                    lines = after;
                    number += 1;
                }
            }
        }
        (texts, number, None)
    })
}

/// The start of a text file, up to a line that does not start with white space if there is one in its second half and
/// the content is not `whole`; and how many bytes that is.
#[pyfunction]
pub fn text_start(py: Python, content: PyBackedBytes, whole: bool) -> PyResult<(Texts, usize)> {
    py.detach(|| {
        let text = match simdutf8::compat::from_utf8(&content) {
            Ok(text) => text,
            // A character that goes on after the content.
            Err(e) if e.error_len().is_none() && !whole => {
                std::str::from_utf8(&content[..e.valid_up_to()]).unwrap_or_default()
            }
            Err(e) => return Err(PyValueError::new_err(not_utf8(e))),
        };
        let text = if whole { text } else { &text[..line_start(text)] };
        let mut texts = Texts { content: text.to_owned(), ends: Vec::new() };
        texts.end();
        Ok((texts, text.len()))
    })
}

/// Where the last line begins that starts with more than white space, in the second half of `text`.
fn line_start(text: &str) -> usize {
    let breaks = memchr::memrchr_iter(b'\n', text.as_bytes()).take_while(|&at| at >= text.len() / 2);
    let mut starts = breaks.map(|at| at + 1);
    let begins_word = |&at: &usize| text[at..].chars().next().is_some_and(|c| !c.is_whitespace());
    starts.find(begins_word).unwrap_or(text.len())
}

/// The texts of whole files, told by their paths and about how many bytes they have, and the xxh3-128 of each.
#[pyfunction]
pub fn file_texts(py: Python, files: Vec<(PathBuf, usize)>) -> PyResult<(Texts, Vec<String>)> {
    py.detach(|| {
        let size: usize = files.iter().map(|&(_, size)| size.min(MOST_EXPECTED)).sum();
        let mut texts = Texts { content: String::with_capacity(size), ends: Vec::with_capacity(files.len()) };
        let mut hashes = Vec::with_capacity(files.len());
        let mut buffer = Vec::new();
        for (path, size) in &files {
            let content =
                read(path, (*size).min(MOST_EXPECTED), &mut buffer).map_err(|e| not_read(path, &e))?;
            let text = simdutf8::compat::from_utf8(content);
            texts.content +=
                text.map_err(|e| PyValueError::new_err(format!("{}: {}", path.display(), not_utf8(e))))?;
            texts.end();
            hashes.push(hex(XxHash3_128::oneshot(content)));
        }
        Ok((texts, hashes))
    })
}

/// Bytes that a file is given room for before it is read, at most.
const MOST_EXPECTED: usize = 1 << 20;

/// The content of a file of about that many bytes. `fs::read` asks the system three times as often.
fn read<'a>(path: &Path, size: usize, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
    let mut file = File::open(path)?;
    let (mut len, mut reads) = (0, 0);
    loop {
        if buffer.len() <= len.max(size) {
            buffer.resize(2 * len.max(size) + 1, 0);
        }
        match file.read(&mut buffer[len..]) {
            Ok(0) => return Ok(&buffer[..len]),
            Ok(more) => len += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        reads += 1;
        // The buffer has room for more, and would have got it if there were more.
        if reads == 1 && len == size {
            return Ok(&buffer[..len]);
        }
    }
}

/// xxh3-128 of bytes that are given part by part.
#[pyclass(module = "archzoo._rust")]
pub struct Xxh3(XxHash3_128);

#[pymethods]
impl Xxh3 {
    #[new]
    fn new() -> Self {
        Self(XxHash3_128::new())
    }

    /// Takes the next bytes.
    fn update(&mut self, py: Python, part: PyBackedBytes) {
        py.detach(|| self.0.write(&part));
    }

    /// The hash of the bytes so far, in 32 hexadecimal digits.
    fn hexdigest(&self) -> String {
        hex(self.0.finish_128())
    }
}

fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

/// A path, and why what is there cannot be read.
pub fn not_read(path: &Path, error: &io::Error) -> PyErr {
    PyOSError::new_err(format!("{}: {error}", path.display()))
}

fn not_utf8(error: simdutf8::compat::Utf8Error) -> String {
    format!("not UTF-8 text: {error}")
}

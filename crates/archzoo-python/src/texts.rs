//! Texts on their way from files into a tokenizer, without Python objects between.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyIterator, PyList};
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};

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
#[pyfunction]
pub fn json_texts(py: Python, lines: PyBackedBytes, key: &str) -> (Texts, usize, Option<String>) {
    py.detach(|| {
        let mut texts = Texts { content: String::with_capacity(lines.len()), ends: Vec::new() };
        let (mut start, mut number) = (0, 0);
        for end in memchr::memchr_iter(b'\n', &lines).chain([lines.len()]) {
            let line = &lines[start..end];
            if !line.trim_ascii().is_empty() {
                if let Err(error) = add_text(line, key, &mut texts.content) {
                    return (texts, number, Some(error.to_string()));
                }
                texts.end();
            }
            number += usize::from(end < lines.len());
            start = end + 1;
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

/// The texts of whole files.
#[pyfunction]
pub fn file_texts(py: Python, paths: Vec<PathBuf>) -> PyResult<Texts> {
    py.detach(|| {
        let mut texts = Texts::default();
        let mut content = Vec::new();
        for path in &paths {
            content.clear();
            let read = File::open(path).and_then(|mut file| file.read_to_end(&mut content));
            read.map_err(|e| PyOSError::new_err(format!("{}: {e}", path.display())))?;
            let text = simdutf8::compat::from_utf8(&content);
            texts.content +=
                text.map_err(|e| PyValueError::new_err(format!("{}: {}", path.display(), not_utf8(e))))?;
            texts.end();
        }
        Ok(texts)
    })
}

fn not_utf8(error: simdutf8::compat::Utf8Error) -> String {
    format!("not UTF-8 text: {error}")
}

/// Appends the text of a line to `out`.
fn add_text(line: &[u8], key: &str, out: &mut String) -> serde_json::Result<()> {
    let line = simdutf8::compat::from_utf8(line).map_err(serde_json::Error::custom)?;
    let start = out.len();
    if add_plain_text(line, key, out).is_some() {
        return Ok(());
    }
    out.truncate(start);
    let mut json = serde_json::Deserializer::from_str(line);
    Object { key, out }.deserialize(&mut json)?;
    json.end()
}

/// As `add_text`, but about twice as fast; leaves what is rare, and all faults, to serde.
fn add_plain_text(line: &str, key: &str, out: &mut String) -> Option<()> {
    let line = line.strip_suffix('\r').unwrap_or(line);
    // The only characters that may not be in a string.
    if line.bytes().fold(false, |any, byte| any | (byte < b' ')) {
        return None;
    }
    let start = out.len();
    let mut is_found = false;
    let mut rest = line.trim_ascii().strip_prefix('{')?;
    loop {
        let (name, value) = rest.trim_ascii_start().strip_prefix('"')?.split_once('"')?;
        let value = value.trim_ascii_start().strip_prefix(':')?.trim_ascii_start();
        if name.contains('\\') {
            return None;
        }
        rest = if name == key {
            out.truncate(start);
            is_found = true;
            add_string(value.strip_prefix('"')?, out)?
        } else {
            let mut values = serde_json::Deserializer::from_str(value).into_iter::<IgnoredAny>();
            values.next()?.ok()?;
            value.get(values.byte_offset()..)?
        };
        rest = rest.trim_ascii_start();
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return (is_found && rest == "}").then_some(()),
        }
    }
}

/// Appends a string without control characters, of which the first quote is left out; what follows the last one.
fn add_string<'a>(mut rest: &'a str, out: &mut String) -> Option<&'a str> {
    loop {
        let (run, after) = rest.split_at_checked(memchr::memchr2(b'"', b'\\', rest.as_bytes())?)?;
        out.push_str(run);
        let Some(escape) = after.strip_prefix('\\') else { return after.strip_prefix('"') };
        let (letter, after) = escape.split_at_checked(1)?;
        rest = after;
        out.push(match letter {
            "n" => '\n',
            "t" => '\t',
            "r" => '\r',
            "b" => '\u{8}',
            "f" => '\u{c}',
            "\"" => '"',
            "\\" => '\\',
            "/" => '/',
            "u" => character(&mut rest)?,
            _ => return None,
        });
    }
}

/// The character of the hexadecimal digits that follow a `\u`, and of a second half if this is the first of two.
fn character(rest: &mut &str) -> Option<char> {
    let first = unit(rest)?;
    char::from_u32(first.into()).or_else(|| {
        *rest = rest.strip_prefix("\\u")?;
        char::decode_utf16([first, unit(rest)?]).next()?.ok()
    })
}

/// Four hexadecimal digits.
fn unit(rest: &mut &str) -> Option<u16> {
    let (digits, after) = rest.split_at_checked(4)?;
    *rest = after;
    // Of a sign too, Rust would make a number.
    if digits.starts_with('+') { None } else { u16::from_str_radix(digits, 16).ok() }
}

/// An object of which the text at `key` is wanted; the others are passed over.
struct Object<'a> {
    key: &'a str,
    out: &'a mut String,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a JSON object with text at '{}'", self.key)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let start = self.out.len();
        let mut is_found = false;
        while let Some(key) = map.next_key::<Cow<str>>()? {
            if key == self.key {
                self.out.truncate(start);
                map.next_value_seed(Text(self.out))?;
                is_found = true;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if is_found { Ok(()) } else { Err(A::Error::custom(format_args!("no text at '{}'", self.key))) }
    }
}

/// A string that is appended to another.
struct Text<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

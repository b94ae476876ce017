use std::borrow::Cow;
use std::fmt;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};

/// Texts, how many lines they took, and what is wrong with the next one.
type Texts = (Vec<String>, usize, Option<String>);

/// The text at `key` of every JSON object, one a line; blank lines are skipped.
#[pyfunction]
pub fn json_texts(py: Python, lines: PyBackedBytes, key: &str) -> Texts {
    py.detach(|| {
        let mut texts = Vec::new();
        let (mut start, mut number) = (0, 0);
        for end in memchr::memchr_iter(b'\n', &lines).chain([lines.len()]) {
            let line = &lines[start..end];
            if !line.trim_ascii().is_empty() {
                match text_of(line, key) {
                    Ok(text) => texts.push(text),
                    Err(error) => return (texts, number, Some(error.to_string())),
                }
            }
            number += usize::from(end < lines.len());
            start = end + 1;
        }
        (texts, number, None)
    })
}

fn text_of(line: &[u8], key: &str) -> serde_json::Result<String> {
    let mut json = serde_json::Deserializer::from_slice(line);
    let text = Field(key).deserialize(&mut json)?;
    json.end()?;
    Ok(text)
}

/// One string field of an object; the others are passed over.
struct Field<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a JSON object with text at '{}'", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<Cow<str>>()? {
            if key == self.0 {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        found.ok_or_else(|| A::Error::custom(format_args!("no text at '{}'", self.0)))
    }
}

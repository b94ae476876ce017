//! The vocabulary in the metadata of a GGUF file (versions 2 and 3), read as the `tokenizer.json` that it was made of.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Value as Json, json};

use crate::error::{Error, Result};
use crate::json;
use crate::split::{DEEPSEEK, GPT2, LLAMA3, O200K, QWEN, TEKKEN};
use crate::tokenizer::Parts;

/// What a GGUF file starts with.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Kinds of tokens that are found in a text before anything else.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// A value of the metadata, as far as a tokenizer has such.
enum Value<'a> {
    Number(i64),
    Text(&'a str),
    Texts(Vec<&'a str>),
    Numbers(Vec<i64>),
    Other,
}

/// Why metadata cannot be read.
enum Fault {
    /// The content ends before the metadata.
    Short,
    Wrong(String),
}

type Metadata<'a> = HashMap<&'a str, Value<'a>>;

struct Cursor<'a> {
    content: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize) -> std::result::Result<&'a [u8], Fault> {
        let bytes = self.content[self.at..].get(..length).ok_or(Fault::Short)?;
        self.at += length;
        Ok(bytes)
    }

    fn number<const N: usize>(&mut self) -> std::result::Result<u64, Fault> {
        let mut padded = [0; 8];
        padded[..N].copy_from_slice(self.take(N)?);
        Ok(u64::from_le_bytes(padded))
    }

    fn length(&mut self) -> std::result::Result<usize, Fault> {
        usize::try_from(self.number::<8>()?).map_err(|_| Fault::Short)
    }

    fn text(&mut self) -> std::result::Result<&'a str, Fault> {
        let length = self.length()?;
        let at = self.at;
        std::str::from_utf8(self.take(length)?).map_err(|e| Fault::Wrong(format!("text at byte {at}: {e}")))
    }

    fn value(&mut self, kind: u64, depth: usize) -> std::result::Result<Value<'a>, Fault> {
        Ok(match kind {
            0 | 7 => Value::Number(self.number::<1>()? as i64),
            1 => Value::Number(i64::from(self.number::<1>()? as i8)),
            2 => Value::Number(self.number::<2>()? as i64),
            3 => Value::Number(i64::from(self.number::<2>()? as i16)),
            4 => Value::Number(self.number::<4>()? as i64),
            5 => Value::Number(i64::from(self.number::<4>()? as i32)),
            10 | 11 => Value::Number(self.number::<8>()? as i64),
            6 => self.take(4).map(|_| Value::Other)?,
            12 => self.take(8).map(|_| Value::Other)?,
            8 => Value::Text(self.text()?),
            9 if depth == 0 => {
                let (kind, length) = (self.number::<4>()?, self.length()?);
                let (mut texts, mut numbers) = (Vec::new(), Vec::new());
                for _ in 0..length {
                    match self.value(kind, depth + 1)? {
                        Value::Text(text) => texts.push(text),
                        Value::Number(number) => numbers.push(number),
                        _ => {}
                    }
                }
                if kind == 8 { Value::Texts(texts) } else { Value::Numbers(numbers) }
            }
            _ => return Err(Fault::Wrong(format!("a value of type {kind} at byte {}", self.at))),
        })
    }
}

/// The metadata, and where it ends.
fn metadata(content: &[u8]) -> std::result::Result<(Metadata<'_>, usize), Fault> {
    let mut cursor = Cursor { content, at: MAGIC.len() };
    let version = cursor.number::<4>()?;
    if !(2..=3).contains(&version) {
        return Err(Fault::Wrong(format!("not supported: GGUF of version {version}")));
    }
    let (_tensors, count) = (cursor.length()?, cursor.length()?);
    let mut all = HashMap::new();
    for _ in 0..count {
        let key = cursor.text()?;
        let kind = cursor.number::<4>()?;
        let value = cursor.value(kind, 0)?;
        if all.insert(key, value).is_some() {
            return Err(Fault::Wrong(format!("the key {key:?} is there twice")));
        }
    }
    Ok((all, cursor.at))
}

/// Where the metadata ends; none if this is not all of it.
pub fn length(content: &[u8]) -> Result<Option<usize>> {
    match metadata(content) {
        Ok((_, end)) => Ok(Some(end)),
        Err(Fault::Short) => Ok(None),
        Err(Fault::Wrong(message)) => Err(Error::new(message)),
    }
}

/// The tokenizer's part of the metadata.
struct Vocabulary<'a>(Metadata<'a>);

impl<'a> Vocabulary<'a> {
    fn of(content: &'a [u8]) -> Result<Self> {
        match metadata(content) {
            Ok((all, _)) => Ok(Self(all)),
            Err(Fault::Short) => Err(Error::new("the file ends within its metadata")),
            Err(Fault::Wrong(message)) => Err(Error::new(message)),
        }
    }

    fn get(&self, name: &str) -> Option<&Value<'a>> {
        self.0.get(format!("tokenizer.ggml.{name}").as_str())
    }

    fn text(&self, name: &str) -> Result<&'a str> {
        match self.get(name) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(Error::new(format!("no text tokenizer.ggml.{name}"))),
        }
    }

    fn texts(&self, name: &str) -> Result<&[&'a str]> {
        match self.get(name) {
            Some(Value::Texts(texts)) => Ok(texts),
            _ => Err(Error::new(format!("no texts tokenizer.ggml.{name}"))),
        }
    }

    fn number(&self, name: &str) -> Option<i64> {
        match self.get(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// The `tokenizer.json` around the vocabulary and the merges.
    fn around(&self) -> Result<Json> {
        let model = self.text("model")?;
        if model != "gpt2" {
            return Err(Error::unsupported(format!("the GGUF vocabulary tokenizer.ggml.model = {model:?}")));
        }
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let mut normalizer = Json::Null;
        let mut ignore_merges = false;
        // Names of llama.cpp.
        let mut cuts = match self.text("pre")? {
            "gpt-2" => vec![split(GPT2)],
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
                vec![json!({"type": "Digits", "individual_digits": true}), split(GPT2)]
            }
            "llama-bpe" | "llama3" | "llama-v3" => {
                ignore_merges = true;
                vec![split(LLAMA3)]
            }
            "qwen2" | "deepseek-r1-qwen" => {
                normalizer = json!({"type": "NFC"});
                vec![split(QWEN)]
            }
            "gpt-4o" | "llama4" => vec![split(O200K)],
            "tekken" => {
                ignore_merges = true;
                vec![split(TEKKEN)]
            }
            "deepseek-v3" => DEEPSEEK.map(split).into(),
            other => return Err(Error::unsupported(format!("tokenizer.ggml.pre = {other:?}"))),
        };
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        cuts.push(byte_level.clone());
        let tokens = self.texts("tokens")?;
        let kinds = match self.get("token_type") {
            Some(Value::Numbers(kinds)) if kinds.len() == tokens.len() => kinds.as_slice(),
            None => &[],
            _ => return Err(Error::new("tokenizer.ggml.token_type does not have a number for each token")),
        };
        let added: Vec<Json> = (0..)
            .zip(kinds.iter().zip(tokens))
            .filter(|(_, (kind, _))| [CONTROL, USER_DEFINED].contains(kind))
            .map(|(id, (kind, token))| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == CONTROL})
            })
            .collect();
        let adds_bos = self.number("add_bos_token").map_or(ignore_merges, |flag| flag != 0);
        let bos = self.number("bos_token_id").filter(|_| adds_bos);
        let post_processor = bos.map_or(Json::Null, |id| {
            let special = json!({"bos": {"id": "bos", "ids": [id], "tokens": ["bos"]}});
            let single = json!([{"SpecialToken": {"id": "bos", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
            json!({"type": "TemplateProcessing", "single": single, "special_tokens": special})
        });
        Ok(json!({
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
            "post_processor": post_processor,
            "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": {}, "merges": []},
        }))
    }
}

/// Reads the vocabulary of a GGUF file.
pub(crate) fn read(content: &[u8]) -> Result<Parts> {
    let vocabulary = Vocabulary::of(content)?;
    let around = vocabulary.around()?.to_string();
    let tokens = vocabulary.texts("tokens")?.iter().map(|&token| Cow::Borrowed(token)).zip(0..).collect();
    json::read_tokens(&around, tokens, vocabulary.texts("merges")?)
}

/// What the file says around its vocabulary and merges, as a `tokenizer.json`.
pub(crate) fn around(content: &[u8]) -> Result<String> {
    Ok(Vocabulary::of(content)?.around()?.to_string())
}

//! The vocabulary in the metadata of a GGUF file (versions 2 and 3), read as the `tokenizer.json` that it was made of.

use std::borrow::Cow;

use archzoo_gguf::{Array, Fault, Metadata, Value};
use serde_json::{Value as Json, json};

use crate::error::{Error, Result};
use crate::json;
use crate::split::{DEEPSEEK, GPT2, LLAMA3, O200K, QWEN, TEKKEN};
use crate::tokenizer::Parts;

/// Kinds of tokens that are found in a text before anything else.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Where the metadata ends in the first bytes of a file of `size` bytes, which may be too few.
pub fn end(content: &[u8], size: u64) -> std::result::Result<usize, Fault> {
    Metadata::parse(content, size).map(|metadata| metadata.end)
}

/// The tokenizer's part of the metadata.
struct Vocabulary<'a>(Metadata<'a>);

impl<'a> Vocabulary<'a> {
    fn of(content: &'a [u8]) -> Result<Self> {
        match Metadata::parse(content, content.len() as u64) {
            Ok(metadata) => Ok(Self(metadata)),
            Err(Fault::Short) => Err(Error::new("the file ends within its metadata")),
            Err(Fault::Wrong(message)) => Err(Error::new(message)),
        }
    }

    fn get(&self, name: &str) -> Option<&Value<'a>> {
        self.0.values.get(format!("tokenizer.ggml.{name}").as_str())
    }

    fn text(&self, name: &str) -> Result<&'a str> {
        match self.get(name) {
            Some(Value::String(text)) => Ok(text),
            _ => Err(Error::new(format!("no text tokenizer.ggml.{name}"))),
        }
    }

    fn texts(&self, name: &str) -> Result<&[&'a str]> {
        match self.get(name) {
            Some(Value::Array(Array::String(texts))) => Ok(texts),
            _ => Err(Error::new(format!("no texts tokenizer.ggml.{name}"))),
        }
    }

    fn number(&self, name: &str) -> Option<i64> {
        self.get(name)?.integer()
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
            None => Some(Vec::new()),
            Some(Value::Array(kinds)) => kinds.integers().filter(|kinds| kinds.len() == tokens.len()),
            Some(_) => None,
        };
        let kinds = kinds
            .ok_or_else(|| Error::new("tokenizer.ggml.token_type does not have a number for each token"))?;
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

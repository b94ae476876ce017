//! The vocabulary in the metadata of a GGUF file (versions 2 and 3), read as the file that it was made of: a
//! `tokenizer.json`, or a SentencePiece model.

use std::borrow::Cow;

use archzoo_gguf::{Array, Fault, Metadata, Value};
use serde_json::{Value as Json, json};

use crate::bpe::Bpe;
use crate::error::{Error, Result};
use crate::split::{DEEPSEEK, GPT2, LLAMA3, O200K, QWEN, TEKKEN};
use crate::tokenizer::Parts;
use crate::{json, sentencepiece};

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

    fn flag(&self, name: &str, default: bool) -> bool {
        self.number(name).map_or(default, |flag| flag != 0)
    }

    /// Types of tokens; none if the file does not tell.
    fn kinds(&self, count: usize) -> Result<Vec<i64>> {
        let kinds = match self.get("token_type") {
            None => Some(Vec::new()),
            Some(Value::Array(kinds)) => kinds.integers().filter(|kinds| kinds.len() == count),
            Some(_) => None,
        };
        kinds.ok_or_else(|| Error::new("tokenizer.ggml.token_type does not have a number for each token"))
    }

    /// A byte-level model, and whether llama.cpp puts the first token before a text if the file does not tell.
    fn byte_level(&self, made: Option<Bpe>) -> Result<(Parts, bool)> {
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
        let kinds = self.kinds(tokens.len())?;
        let added: Vec<Json> = (0..)
            .zip(kinds.iter().zip(tokens))
            .filter(|(_, (kind, _))| [CONTROL, USER_DEFINED].contains(kind))
            .map(|(id, (kind, token))| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == CONTROL})
            })
            .collect();
        let around = json!({
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
            "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": {}, "merges": []},
        })
        .to_string();
        let parts = match made {
            Some(model) => json::read_around(&around, model)?,
            None => {
                let tokens = tokens.iter().map(|&token| Cow::Borrowed(token)).zip(0..).collect();
                json::read_tokens(&around, tokens, self.texts("merges")?)?
            }
        };
        Ok((parts, ignore_merges))
    }

    /// A SentencePiece model, as Llama 2, Mistral and Gemma have.
    fn pieces(&self, made: Option<Bpe>) -> Result<(Parts, bool)> {
        if self.get("precompiled_charsmap").is_some() {
            return Err(Error::unsupported("tokenizer.ggml.precompiled_charsmap"));
        }
        let tokens = self.texts("tokens")?;
        let scores = match self.get("scores") {
            Some(Value::Array(Array::F32(scores))) if scores.len() == tokens.len() => scores,
            _ => return Err(Error::new("tokenizer.ggml.scores does not have a number for each token")),
        };
        let kinds = self.kinds(tokens.len())?;
        if kinds.len() < tokens.len() {
            return Err(Error::new("no numbers tokenizer.ggml.token_type"));
        }
        let pieces = tokens.iter().zip(scores).zip(&kinds);
        let pieces = pieces.map(|((&text, &score), &kind)| (text, score, u64::try_from(kind).unwrap_or(0)));
        let (prefix, strips) =
            (self.flag("add_space_prefix", true), self.flag("remove_extra_whitespaces", false));
        Ok((sentencepiece::File::of_pieces(pieces, prefix, strips)?.parts(made)?, true))
    }

    /// The token at one end of a text, if there is to be one; without an id the default is none.
    fn end(&self, name: &str, default: bool) -> Result<Vec<u32>> {
        let (flag, key) = (format!("add_{name}_token"), format!("{name}_token_id"));
        if !self.flag(&flag, default) {
            return Ok(Vec::new());
        }
        if self.get(&flag).is_none() && self.get(&key).is_none() {
            return Ok(Vec::new());
        }
        let id = self.number(&key).and_then(|id| u32::try_from(id).ok());
        id.map(|id| vec![id]).ok_or_else(|| Error::new(format!("no id tokenizer.ggml.{key}")))
    }
}

/// The parts of a GGUF file's tokenizer, with the model made of it or that given.
pub(crate) fn parts(content: &[u8], made: Option<Bpe>) -> Result<Parts> {
    let vocabulary = Vocabulary::of(content)?;
    let (mut parts, adds_bos) = match vocabulary.text("model")? {
        "gpt2" => vocabulary.byte_level(made)?,
        "llama" => vocabulary.pieces(made)?,
        other => {
            return Err(Error::unsupported(format!("the GGUF vocabulary tokenizer.ggml.model = {other:?}")));
        }
    };
    (parts.before, parts.after) = (vocabulary.end("bos", adds_bos)?, vocabulary.end("eos", false)?);
    Ok(parts)
}

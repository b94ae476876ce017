//! Mistral's Tekken files: a JSON object of a pattern and of tokens by rank, of which the first are used. Special tokens
//! have the ids before them, and are not found in text.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::added::{Added, AddedToken};
use crate::bpe::Bpe;
use crate::error::{Error, Result};
use crate::tiktoken;
use crate::tokenizer::Parts;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    config: Config,
    vocab: Vec<Token>,
    special_tokens: Option<Vec<Special>>,
    /// What is not about text.
    #[serde(rename = "version")]
    _version: Option<IgnoredAny>,
    #[serde(rename = "type")]
    _kind: Option<IgnoredAny>,
    #[serde(rename = "image")]
    _image: Option<IgnoredAny>,
    #[serde(rename = "multimodal")]
    _multimodal: Option<IgnoredAny>,
    #[serde(rename = "audio")]
    _audio: Option<IgnoredAny>,
    #[serde(rename = "model_settings_builder")]
    _settings: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
    version: String,
}

#[derive(Deserialize)]
struct Token {
    rank: usize,
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
    is_control: bool,
}

/// Those of files that list none.
const SPECIAL: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];
/// Versions whose files list none.
const WITHOUT_SPECIAL: [&str; 2] = ["v3", "v7"];

/// Whether a JSON object starts with a key of such a file, which a `tokenizer.json` does not have.
pub fn is_tekken(content: &[u8]) -> bool {
    let key = content.trim_ascii_start().strip_prefix(b"{").unwrap_or_default().trim_ascii_start();
    [&b"\"config\""[..], b"\"vocab\"", b"\"special_tokens\"", b"\"type\"", b"\"image\"", b"\"audio\""]
        .iter()
        .any(|name| key.starts_with(name))
}

/// Reads a Tekken file.
pub(crate) fn read(content: &[u8]) -> Result<Parts> {
    parts(content, None)
}

/// The parts of a file, with the model made of it or that given.
pub(crate) fn parts(content: &[u8], made: Option<Bpe>) -> Result<Parts> {
    let file: File =
        serde_json::from_slice(content).map_err(|e| Error::new(format!("not a Tekken file: {e}")))?;
    let Config { pattern, default_vocab_size, default_num_special_tokens, version } = file.config;
    let special = special_tokens(file.special_tokens, &version, default_num_special_tokens)?;
    let count = default_vocab_size.checked_sub(special.len()).filter(|&count| count <= file.vocab.len());
    let count = count.ok_or_else(|| {
        let (all, first) = (file.vocab.len(), special.len());
        Error::new(format!(
            "expected {default_vocab_size} ids, found {all} tokens and {first} special tokens"
        ))
    })?;
    let model = match made {
        Some(model) => model,
        None => {
            let mut tokens = Vec::with_capacity(count);
            for (token, rank) in file.vocab[..count].iter().zip(0..) {
                if token.rank != rank {
                    return Err(Error::new(format!(
                        "expected the token of rank {rank}, found {}",
                        token.rank
                    )));
                }
                let bytes = tiktoken::base64(token.token_bytes.as_bytes())
                    .ok_or_else(|| Error::new(format!("the token of rank {rank} is no base64")))?;
                let id =
                    u32::try_from(special.len() + rank).map_err(|_| Error::unsupported("so many tokens"))?;
                tokens.push((bytes, id));
            }
            tiktoken::model(&tokens)?
        }
    };
    tiktoken::parts(&pattern, model, Added::silent(special))
}

fn special_tokens(listed: Option<Vec<Special>>, version: &str, count: usize) -> Result<Vec<AddedToken>> {
    let listed = match listed {
        Some(listed) => listed,
        None if WITHOUT_SPECIAL.contains(&version) => {
            let special = |(token, rank): (&&str, usize)| Special {
                rank,
                token_str: (*token).to_owned(),
                is_control: true,
            };
            SPECIAL.iter().zip(0..).map(special).collect()
        }
        None => return Err(Error::new(format!("a Tekken file of version {version} without special_tokens"))),
    };
    let mut by_rank: BTreeMap<usize, Special> = BTreeMap::new();
    for token in listed {
        if token.rank >= count {
            return Err(Error::new(format!(
                "the special token {:?} is no. {} of {count}",
                token.token_str, token.rank
            )));
        }
        if let Some(first) = by_rank.insert(token.rank, token) {
            return Err(Error::new(format!("two special tokens have the rank {}", first.rank)));
        }
    }
    if count >= crate::vocab::MOST_IDS {
        return Err(Error::unsupported(format!("{count} special tokens")));
    }
    let token = |rank: usize| {
        let listed = by_rank.remove(&rank);
        let (content, special) = listed
            .map_or_else(|| (format!("<SPECIAL_{rank}>"), true), |token| (token.token_str, token.is_control));
        AddedToken {
            id: rank as u32,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special,
        }
    };
    Ok((0..count).map(token).collect())
}

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Value, json};

use crate::Vocabulary;

/// The fields of a `tokenizer.json` in their usual order.
#[derive(Serialize)]
struct File<'a> {
    version: &'a str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    normalizer: (),
    pre_tokenizer: Value,
    post_processor: (),
    decoder: Value,
    model: Model<'a>,
}

#[derive(Serialize)]
struct Model<'a> {
    r#type: &'a str,
    dropout: (),
    unk_token: (),
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "by_id")]
    vocab: &'a [String],
    merges: Vec<[&'a str; 2]>,
}

fn by_id<S: Serializer>(tokens: &&[String], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(tokens.len()))?;
    for (id, token) in tokens.iter().enumerate() {
        map.serialize_entry(token, &id)?;
    }
    map.end()
}

/// Hugging Face's `tokenizer.json` of a byte-level vocabulary whose words are split by `pattern`.
pub fn tokenizer_json(
    vocabulary: &Vocabulary,
    pattern: &str,
    special_tokens: &[&str],
) -> serde_json::Result<String> {
    let tokens = &vocabulary.tokens;
    let byte_level = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": use_regex, "trim_offsets": true, "use_regex": use_regex,
        })
    };
    let added = |(id, token): (usize, &String)| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let file = File {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: tokens
            .iter()
            .enumerate()
            .filter(|(_, token)| special_tokens.contains(&token.as_str()))
            .map(added)
            .collect(),
        normalizer: (),
        pre_tokenizer: json!({
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ],
        }),
        post_processor: (),
        decoder: byte_level(true), // whose settings mean nothing: these are the usual ones
        model: Model {
            r#type: "BPE",
            dropout: (),
            unk_token: (),
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: tokens,
            merges: vocabulary
                .merges
                .iter()
                .map(|&(a, b)| [tokens[a as usize].as_str(), tokens[b as usize].as_str()])
                .collect(),
        },
    };
    serde_json::to_string_pretty(&file)
}

use crate::added::{Added, AddedToken};
use crate::bpe::{Bpe, MISSING, Symbols};
use crate::decode::Decoder;
use crate::error::{Error, Result};
use crate::merges::Merge;
use crate::model::Model;
use crate::split::regex::{Behavior, Step};
use crate::split::{Family, Splitter};
use crate::tokenizer::Parts;
use crate::vocab::Vocab;

/// Names of patterns, each with its special tokens.
pub const NAMES: [&str; 5] = ["gpt2", "cl100k", "o200k", "llama3", "qwen"];

/// Reads lines of a token in base64 and its rank. `pattern` is one of [`NAMES`] or a regex.
pub(crate) fn read(content: &[u8], pattern: &str) -> Result<Parts> {
    let mut tokens = Vec::new();
    for (number, line) in content.split(|&b| b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if !line.is_empty() {
            let token = entry(line).ok_or_else(|| {
                Error::new(format!("line {}: expected a token in base64, a blank and its rank", number + 1))
            })?;
            tokens.push(token);
        }
    }
    if tokens.is_empty() {
        return Err(Error::new("no tokens"));
    }
    parts_of(pattern, model(&tokens)?)
}

/// The parts of a tokenizer with this pattern and a model that an earlier [`read`] has made.
pub(crate) fn parts_of(pattern: &str, model: Bpe) -> Result<Parts> {
    let special = special_tokens(pattern, model.vocab.len() as u32);
    parts(pattern, model, Added::new(special)?)
}

/// A model of tokens with their ids, which are in the order of their ranks.
pub(crate) fn model(tokens: &[(Vec<u8>, u32)]) -> Result<Bpe> {
    let vocab = Vocab::new(tokens, |_| true)?;
    let mut bytes = Box::new([MISSING; 256]);
    for byte in 0..=255u8 {
        bytes[usize::from(byte)] = vocab
            .get(&[byte])
            .ok_or_else(|| Error::unsupported(format!("a rank file without the byte {byte:#04x}")))?;
    }
    let merges = merges(&vocab);
    let mut model = Bpe::new(vocab, Symbols::Bytes(bytes), &merges, None)?;
    model.ignore_merges = true;
    Ok(model)
}

/// The parts of a tokenizer with this pattern, model and special tokens.
pub(crate) fn parts(pattern: &str, model: Bpe, special: Added) -> Result<Parts> {
    let splitter = match family(pattern) {
        Some(family) => Splitter::Family(family),
        // Matches are the pieces, the text between them is dropped.
        None => Splitter::Steps(vec![Step::regex(pattern, Behavior::Removed, true)?]),
    };
    Ok(Parts {
        raw: special,
        normalized: Added::default(),
        normalizers: Vec::new(),
        prefix_blank: false,
        metaspace: None,
        splitter,
        model: Model::Bpe(model),
        before: Vec::new(),
        after: Vec::new(),
        decoder: Decoder::Bytes,
    })
}

fn family(pattern: &str) -> Option<Family> {
    match pattern {
        "gpt2" => Some(Family::Gpt2),
        "cl100k" => Some(Family::Cl100k),
        "o200k" => Some(Family::O200k),
        "llama3" => Some(Family::Llama3),
        "qwen" => Some(Family::Qwen),
        _ => Family::of_regex(pattern),
    }
}

fn entry(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let blank = line.iter().position(|&b| b == b' ')?;
    let rank = std::str::from_utf8(&line[blank + 1..]).ok()?.trim().parse().ok()?;
    Some((base64(&line[..blank])?, rank))
}

/// Bytes written in base64, at least one.
pub(crate) fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let digits = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let mut out = Vec::with_capacity(digits.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for &c in digits {
        let digit = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(digit);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    (text.len().is_multiple_of(4) && !out.is_empty()).then_some(out)
}

/// Two tokens merge if their bytes together are a token, whose rank is then that of the merge.
fn merges(vocab: &Vocab) -> Vec<Merge> {
    let mut merges = Vec::with_capacity(2 * vocab.len());
    for id in 0..vocab.len() as u32 {
        let token = vocab.bytes(id).unwrap_or_default();
        for cut in 1..token.len() {
            if let (Some(left), Some(right)) = (vocab.get(&token[..cut]), vocab.get(&token[cut..])) {
                merges.push(Merge { left, right, rank: id, product: id });
            }
        }
    }
    merges
}

fn special_tokens(pattern: &str, size: u32) -> Vec<AddedToken> {
    let named = |tokens: &[(&str, u32)]| -> Vec<(String, u32)> {
        tokens.iter().map(|&(content, id)| (content.to_owned(), id)).collect()
    };
    let tokens = match pattern {
        "gpt2" => named(&[("<|endoftext|>", 50256)]),
        "cl100k" => named(&[
            ("<|endoftext|>", 100_257),
            ("<|fim_prefix|>", 100_258),
            ("<|fim_middle|>", 100_259),
            ("<|fim_suffix|>", 100_260),
            ("<|endofprompt|>", 100_276),
        ]),
        "o200k" => named(&[("<|endoftext|>", 199_999), ("<|endofprompt|>", 200_018)]),
        "llama3" => llama3(size),
        "qwen" => ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            .into_iter()
            .map(str::to_owned)
            .chain((0..205).map(|i| format!("<|extra_{i}|>")))
            .zip(size..)
            .collect(),
        _ => Vec::new(),
    };
    tokens
        .into_iter()
        .map(|(content, id)| AddedToken {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
        })
        .collect()
}

fn llama3(size: u32) -> Vec<(String, u32)> {
    let mut names: Vec<String> = [
        "begin_of_text",
        "end_of_text",
        "reserved_special_token_0",
        "reserved_special_token_1",
        "finetune_right_pad_id",
        "step_id",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
        "image",
    ]
    .map(|name| format!("<|{name}|>"))
    .into();
    let more = 256 - names.len();
    names.extend((2..2 + more).map(|i| format!("<|reserved_special_token_{i}|>")));
    names.into_iter().zip(size..).collect()
}

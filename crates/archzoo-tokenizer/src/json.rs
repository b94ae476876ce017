//! Hugging Face `tokenizer.json`. Whatever is not understood is refused by its name.

use std::borrow::Cow;
use std::fmt;

use rayon::prelude::*;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::added::{Added, AddedToken};
use crate::bpe::{Bpe, MISSING, Symbols};
use crate::byte_level;
use crate::charsmap::Charsmap;
use crate::decode::{DecodeStep, Decoder};
use crate::error::{Error, Result};
use crate::metaspace::{self, Metaspace, Prepend};
use crate::model::Model;
use crate::normalize::Normalizer;
use crate::sentencepiece::MARK;
use crate::split::regex::{Behavior, Step};
use crate::split::{DEEPSEEK, Family, GPT2, Splitter};
use crate::tiktoken;
use crate::tokenizer::Parts;
use crate::unigram::{Score, Unigram};
use crate::vocab::{MOST_IDS, Vocab};
use crate::wordpiece::WordPiece;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File<'a> {
    #[serde(default)]
    version: Option<String>,
    /// Cutting and padding belong to whoever makes batches.
    #[serde(default, rename = "truncation")]
    _truncation: Option<Value>,
    #[serde(default, rename = "padding")]
    _padding: Option<Value>,
    #[serde(default)]
    added_tokens: Vec<Added1>,
    #[serde(default)]
    normalizer: Option<Value>,
    #[serde(default)]
    pre_tokenizer: Option<Value>,
    #[serde(default)]
    post_processor: Option<Value>,
    #[serde(default)]
    decoder: Option<Value>,
    #[serde(borrow)]
    model: ModelFile<'a>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Added1 {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct ModelFile<'a> {
    #[serde(borrow)]
    vocab: VocabFile<'a>,
    #[serde(borrow, default)]
    merges: Vec<Merge<'a>>,
    /// All the rest, small.
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Tokens with their ids, or with their scores in the order of their ids.
enum VocabFile<'a> {
    Ids(Vec<(Cow<'a, str>, u32)>),
    Scores(Vec<(Cow<'a, str>, f64)>),
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for VocabFile<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = VocabFile<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a vocabulary: tokens with their ids or scores")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut tokens = Vec::new();
                while let Some((Text(token), id)) = map.next_entry::<Text, u32>()? {
                    tokens.push((token, id));
                }
                Ok(VocabFile::Ids(tokens))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Self::Value, A::Error> {
                let mut tokens = Vec::new();
                while let Some((Text(token), score)) = seq.next_element::<(Text, f64)>()? {
                    tokens.push((token, score));
                }
                Ok(VocabFile::Scores(tokens))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

/// `"left right"` or `["left", "right"]`.
enum Merge<'a> {
    Joined(Cow<'a, str>),
    Pair(Cow<'a, str>, Cow<'a, str>),
}

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Merge<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a merge of two tokens")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> std::result::Result<Self::Value, E> {
                Ok(Merge::Joined(text.into()))
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<Self::Value, E> {
                Ok(Merge::Joined(text.to_owned().into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Self::Value, A::Error> {
                let missing = || serde::de::Error::custom("a merge of fewer than two tokens");
                let Text(left) = seq.next_element()?.ok_or_else(missing)?;
                let Text(right) = seq.next_element()?.ok_or_else(missing)?;
                Ok(Merge::Pair(left, right))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

impl Merge<'_> {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Joined(text) => text.split_once(' '),
            Self::Pair(left, right) => Some((left, right)),
        }
    }
}

/// Reads a `tokenizer.json`.
pub(crate) fn read(content: &[u8]) -> Result<Parts> {
    let content = std::str::from_utf8(content).map_err(|e| Error::new(format!("not UTF-8: {e}")))?;
    parts(parse(content)?, None)
}

/// The same for a file without its vocabulary and merges, of which the model was made.
pub(crate) fn read_around(around: &str, model: Bpe) -> Result<Parts> {
    parts(parse(around)?, Some(model))
}

/// The same with the tokens and merges of a byte-pair model.
pub(crate) fn read_tokens<'a>(
    around: &'a str,
    tokens: Vec<(Cow<'a, str>, u32)>,
    merges: &[&'a str],
) -> Result<Parts> {
    let mut file = parse(around)?;
    file.model.vocab = VocabFile::Ids(tokens);
    file.model.merges = merges.iter().map(|&merge| Merge::Joined(merge.into())).collect();
    parts(file, None)
}

/// A `tokenizer.json` without its vocabulary and merges.
pub(crate) fn around(content: &[u8]) -> Result<String> {
    let mut file: Value =
        serde_json::from_slice(content).map_err(|e| Error::new(format!("not a tokenizer.json: {e}")))?;
    file["model"]["vocab"] = Value::Object(Map::new());
    file["model"]["merges"] = Value::Array(Vec::new());
    Ok(file.to_string())
}

fn parse(content: &str) -> Result<File<'_>> {
    serde_json::from_str(content).map_err(|e| Error::new(format!("not a tokenizer.json: {e}")))
}

/// The parts of a file, with the model made of it or that given.
pub(crate) fn parts(file: File, made: Option<Bpe>) -> Result<Parts> {
    if file.version.as_deref().is_some_and(|v| v != "1.0") {
        return Err(Error::unsupported(format!("tokenizer.json of version {:?}", file.version)));
    }
    let mut pre = pre_tokenizer(file.pre_tokenizer)?;
    let normalizers: Vec<Normalizer> =
        flat(file.normalizer, "normalizers")?.into_iter().map(normalizer).collect::<Result<_>>()?;
    let model = match made {
        Some(bpe) => Model::Bpe(bpe),
        None => model(file.model, pre.byte_level)?,
    };
    if let Model::Bpe(bpe) = &model
        && bpe.starts_words_with(MARK)
    {
        match &mut pre.metaspace {
            Some(metaspace) if metaspace.cut == metaspace::Cut::Nowhere => {
                metaspace.cut = metaspace::Cut::Words
            }
            None if matches!(pre.splitter, Splitter::Whole) => pre.splitter = Splitter::Words(MARK),
            _ => {}
        }
    }
    let (before, after) = post_processor(file.post_processor)?;
    let decoder = decoder(file.decoder)?;
    let (raw, normalized) = added_tokens(file.added_tokens, &model, &normalizers)?;
    Ok(Parts {
        raw,
        normalized,
        normalizers,
        prefix_blank: pre.prefix_blank,
        metaspace: pre.metaspace,
        splitter: pre.splitter,
        model,
        before,
        after,
        decoder,
    })
}

/// The fields of a component; each is taken once, and one that is left is not understood.
struct Fields {
    kind: String,
    rest: Map<String, Value>,
}

impl Fields {
    fn new(value: Value) -> Result<Self> {
        match value {
            Value::Object(mut rest) => match rest.remove("type") {
                Some(Value::String(kind)) => Ok(Self { kind, rest }),
                _ => Err(Error::new("a component of the tokenizer has no type")),
            },
            _ => Err(Error::new("a component of the tokenizer is no object")),
        }
    }

    fn take(&mut self, name: &str) -> Value {
        self.rest.remove(name).unwrap_or_default()
    }

    fn wrong(&self, name: &str, value: &Value) -> Error {
        Error::unsupported(format!("{}.{name} = {value}", self.kind))
    }

    fn flag(&mut self, name: &str, default: bool) -> Result<bool> {
        match self.take(name) {
            Value::Null => Ok(default),
            Value::Bool(flag) => Ok(flag),
            value => Err(self.wrong(name, &value)),
        }
    }

    fn text(&mut self, name: &str) -> Result<String> {
        match self.take(name) {
            Value::String(text) => Ok(text),
            value => Err(self.wrong(name, &value)),
        }
    }

    fn number(&mut self, name: &str) -> Result<usize> {
        let value = self.take(name);
        value.as_u64().and_then(|n| n.try_into().ok()).ok_or_else(|| self.wrong(name, &value))
    }

    /// A character, or one of one letter.
    fn character(&mut self, name: &str) -> Result<char> {
        let text = self.text(name)?;
        let mut chars = text.chars();
        match (chars.next(), chars.next()) {
            (Some(c), None) => Ok(c),
            _ => Err(self.wrong(name, &Value::String(text))),
        }
    }

    fn ids(&mut self, name: &str) -> Result<u32> {
        // ["[CLS]", 101]
        let value = self.take(name);
        let id = value.get(1).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| self.wrong(name, &value))
    }

    /// Text or a regex.
    fn pattern(&mut self) -> Result<Pattern> {
        let value = self.take("pattern");
        match (value.get("Regex"), value.get("String")) {
            // `{1,3}+` takes as much as it can and gives nothing back for some engines; for the one that
            // `tokenizers` uses it is a repetition of a repetition.
            (Some(Value::String(regex)), None) if repeats_interval(regex) => {
                Err(self.wrong("pattern", &value))
            }
            (Some(Value::String(regex)), None) => Ok(Pattern::Regex(regex.clone())),
            (None, Some(Value::String(text))) => Ok(Pattern::Text(text.clone())),
            _ => Err(self.wrong("pattern", &value)),
        }
    }

    fn behavior(&mut self) -> Result<Behavior> {
        match self.text("behavior")?.as_str() {
            "Removed" => Ok(Behavior::Removed),
            "Isolated" => Ok(Behavior::Isolated),
            "MergedWithPrevious" => Ok(Behavior::MergedWithPrevious),
            "MergedWithNext" => Ok(Behavior::MergedWithNext),
            "Contiguous" => Ok(Behavior::Contiguous),
            other => Err(self.wrong("behavior", &Value::from(other))),
        }
    }

    fn end<T>(self, value: T) -> Result<T> {
        match self.rest.iter().next() {
            None => Ok(value),
            Some((name, value)) => Err(self.wrong(name, value)),
        }
    }

    fn unsupported<T>(&self, what: &str) -> Result<T> {
        Err(Error::unsupported(format!("the {what} {}", self.kind)))
    }
}

/// Whether a regex has an interval of repetitions, such as `{1,3}`, with a plus after it.
fn repeats_interval(regex: &str) -> bool {
    regex.match_indices("}+").any(|(end, _)| {
        let inner = regex[..end].rsplit_once('{').map_or("", |(_, inner)| inner);
        !inner.is_empty() && inner.bytes().all(|b| b.is_ascii_digit() || b == b',')
    })
}

enum Pattern {
    Regex(String),
    Text(String),
}

/// The components of a sequence, or the one component; none for null.
fn flat(value: Option<Value>, list: &str) -> Result<Vec<Fields>> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let mut fields = Fields::new(value)?;
    if fields.kind != "Sequence" {
        return Ok(vec![fields]);
    }
    match fields.take(list) {
        Value::Array(parts) => {
            let mut all = Vec::new();
            for part in parts {
                all.extend(flat(Some(part), list)?);
            }
            fields.end(all)
        }
        value => Err(fields.wrong(list, &value)),
    }
}

fn normalizer(mut f: Fields) -> Result<Normalizer> {
    let normalizer = match f.kind.as_str() {
        "NFC" => Normalizer::Nfc,
        "NFD" => Normalizer::Nfd,
        "NFKC" => Normalizer::Nfkc,
        "NFKD" => Normalizer::Nfkd,
        "Lowercase" => Normalizer::Lowercase,
        "StripAccents" => Normalizer::StripAccents,
        "Strip" => {
            Normalizer::Strip { left: f.flag("strip_left", true)?, right: f.flag("strip_right", true)? }
        }
        "Prepend" => Normalizer::Prepend(f.text("prepend")?),
        "Replace" => {
            let content = f.text("content")?;
            match f.pattern()? {
                Pattern::Text(text) => Normalizer::ReplaceText(text, content),
                Pattern::Regex(regex) => {
                    let compiled = fancy_regex::Regex::new(&regex)
                        .map_err(|e| Error::unsupported(format!("the regular expression {regex:?}: {e}")))?;
                    Normalizer::ReplaceRegex(Box::new(compiled), content)
                }
            }
        }
        "Precompiled" => {
            let map = f.text("precompiled_charsmap")?;
            let content = tiktoken::base64(map.as_bytes()).ok_or_else(|| {
                Error::new("the normalizer Precompiled has a precompiled_charsmap that is no base64")
            })?;
            Normalizer::Precompiled(Box::new(Charsmap::new(&content)?))
        }
        "BertNormalizer" => {
            let lowercase = f.flag("lowercase", true)?;
            Normalizer::Bert {
                clean_text: f.flag("clean_text", true)?,
                chinese: f.flag("handle_chinese_chars", true)?,
                strip_accents: f.flag("strip_accents", lowercase)?,
                lowercase,
            }
        }
        _ => return f.unsupported("normalizer"),
    };
    f.end(normalizer)
}

struct PreTokenizer {
    byte_level: bool,
    prefix_blank: bool,
    metaspace: Option<Metaspace>,
    splitter: Splitter,
}

/// A step as the file names it, before families are recognised.
enum Cut {
    Split(Pattern, Behavior, bool),
    Other(Vec<Step>),
}

fn pre_tokenizer(value: Option<Value>) -> Result<PreTokenizer> {
    let mut cuts = Vec::new();
    let (mut byte_level, mut prefix_blank, mut metaspace) = (false, false, None);
    for mut f in flat(value, "pretokenizers")? {
        if byte_level || metaspace.is_some() {
            return Err(Error::unsupported(format!(
                "the pre-tokenizer {} after ByteLevel or Metaspace",
                f.kind
            )));
        }
        let cut = match f.kind.as_str() {
            "ByteLevel" => {
                byte_level = true;
                prefix_blank = f.flag("add_prefix_space", true)?;
                if prefix_blank && !cuts.is_empty() {
                    return Err(f.wrong("add_prefix_space", &Value::Bool(true)));
                }
                f.flag("trim_offsets", true)?;
                if f.flag("use_regex", true)? {
                    cuts.push(Cut::Split(Pattern::Regex(GPT2.to_owned()), Behavior::Isolated, false));
                }
                f.end(())?;
                continue;
            }
            "Metaspace" => {
                metaspace = Some(marks(f)?);
                continue;
            }
            "Split" => Cut::Split(f.pattern()?, f.behavior()?, f.flag("invert", false)?),
            "Digits" => Cut::Other(vec![Step::Digits { individual: f.flag("individual_digits", false)? }]),
            "WhitespaceSplit" => Cut::Other(vec![Step::Blanks]),
            "Whitespace" => Cut::Other(vec![Step::regex(r"\w+|[^\w\s]+", Behavior::Removed, true)?]),
            "Punctuation" => Cut::Other(vec![Step::Punctuation(match f.take("behavior") {
                Value::Null => Behavior::Isolated,
                value => {
                    f.rest.insert("behavior".to_owned(), value);
                    f.behavior()?
                }
            })]),
            "BertPreTokenizer" => Cut::Other(vec![Step::Blanks, Step::Punctuation(Behavior::Isolated)]),
            "CharDelimiterSplit" => {
                let delimiter = f.character("delimiter")?.to_string();
                Cut::Split(Pattern::Text(delimiter), Behavior::Removed, false)
            }
            _ => return f.unsupported("pre-tokenizer"),
        };
        f.end(())?;
        cuts.push(cut);
    }
    Ok(PreTokenizer { byte_level, prefix_blank, metaspace, splitter: splitter(cuts)? })
}

fn splitter(cuts: Vec<Cut>) -> Result<Splitter> {
    let regexes: Vec<Option<&str>> = cuts
        .iter()
        .map(|cut| match cut {
            // The families' matches cover the text, so removing what lies between changes nothing.
            Cut::Split(Pattern::Regex(regex), Behavior::Isolated, false)
            | Cut::Split(Pattern::Regex(regex), Behavior::Removed, true) => Some(regex.as_str()),
            _ => None,
        })
        .collect();
    let isolated = |cut: &Cut| matches!(cut, Cut::Split(_, Behavior::Isolated, false));
    let family = match regexes.as_slice() {
        [] => return Ok(Splitter::Whole),
        [Some(regex)] => Family::of_regex(regex),
        [None, Some(GPT2)] if matches!(&cuts[0], Cut::Other(steps) if matches!(steps[..], [Step::Digits { individual: true }])) => {
            Some(Family::Gpt2Digit)
        }
        [Some(a), Some(b), Some(c)] if [*a, *b, *c] == DEEPSEEK && cuts.iter().all(isolated) => {
            Some(Family::DeepSeek)
        }
        _ => None,
    };
    if let Some(family) = family {
        return Ok(Splitter::Family(family));
    }
    let mut steps = Vec::new();
    for cut in cuts {
        match cut {
            Cut::Other(more) => steps.extend(more),
            Cut::Split(Pattern::Regex(regex), behavior, invert) => {
                steps.push(Step::regex(&regex, behavior, invert)?);
            }
            Cut::Split(Pattern::Text(text), behavior, invert) => {
                steps.push(Step::regex(&fancy_regex::escape(&text), behavior, invert)?);
            }
        }
    }
    Ok(Splitter::Steps(steps))
}

fn marks(mut f: Fields) -> Result<Metaspace> {
    let mark = f.character("replacement")?;
    let old = f.flag("add_prefix_space", true)?;
    let prepend = match f.take("prepend_scheme") {
        Value::Null if old => Prepend::Always,
        Value::Null => Prepend::Never,
        Value::String(s) if s == "always" => Prepend::Always,
        Value::String(s) if s == "first" => Prepend::First,
        Value::String(s) if s == "never" => Prepend::Never,
        value => return Err(f.wrong("prepend_scheme", &value)),
    };
    f.take("str_rep");
    let cut = if f.flag("split", true)? { metaspace::Cut::Marks } else { metaspace::Cut::Nowhere };
    f.end(Metaspace { mark, prepend, cut })
}

fn model(file: ModelFile, byte_level: bool) -> Result<Model> {
    let mut f = Fields { kind: "BPE".to_owned(), rest: file.rest };
    match f.take("type") {
        Value::String(kind) => f.kind = kind,
        // Files of before 2020 have no type.
        Value::Null => {}
        value => return Err(f.wrong("type", &value)),
    }
    match (f.kind.as_str(), file.vocab) {
        ("BPE", VocabFile::Ids(tokens)) => bpe(f, tokens, &file.merges, byte_level),
        ("WordPiece", VocabFile::Ids(tokens)) => wordpiece(f, &tokens),
        ("Unigram", VocabFile::Scores(tokens)) => unigram(f, &tokens),
        ("BPE" | "WordPiece" | "Unigram", _) => {
            Err(Error::new(format!("the vocabulary is not in the form of the model {}", f.kind)))
        }
        _ => f.unsupported("model"),
    }
}

/// Merges that are read together.
const MERGES: usize = 4096;

fn bpe(mut f: Fields, tokens: Vec<(Cow<str>, u32)>, merges: &[Merge], byte_level: bool) -> Result<Model> {
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] {
        match f.take(name) {
            Value::Null => {}
            Value::String(text) if text.is_empty() => {}
            value => return Err(f.wrong(name, &value)),
        }
    }
    match f.take("dropout") {
        Value::Null => {}
        value if value.as_f64() == Some(0.0) => {}
        value => return Err(f.wrong("dropout", &value)),
    }
    let unknown = match f.take("unk_token") {
        Value::Null => None,
        Value::String(text) => Some(text),
        value => return Err(f.wrong("unk_token", &value)),
    };
    let fuse_unknown = f.flag("fuse_unk", false)?;
    let byte_fallback = f.flag("byte_fallback", false)?;
    let ignore_merges = f.flag("ignore_merges", false)?;
    f.end(())?;

    // Tokens as bytes; a byte-level one that is not written for bytes is never found, but decoded as it is.
    let mut arena = Vec::with_capacity(tokens.iter().map(|(t, _)| t.len()).sum());
    let mut spans = Vec::with_capacity(tokens.len());
    for (token, id) in &tokens {
        let start = arena.len();
        let found = byte_level && byte_level::decode(token, &mut arena);
        if !found {
            arena.extend_from_slice(token.as_bytes());
        }
        spans.push((start..arena.len(), *id, found || !byte_level));
    }
    let bytes: Vec<(&[u8], u32)> = spans.iter().map(|(span, id, _)| (&arena[span.clone()], *id)).collect();
    let vocab = Vocab::new(&bytes, |i| spans[i].2)?;

    let mut is_found = vec![false; vocab.len()];
    for (span, id, found) in &spans {
        is_found[*id as usize] = *found && !span.is_empty();
    }
    let parsed = |(part, merges): (usize, &[Merge])| {
        let wrong = |i: usize, what: &str| {
            let shown =
                merges[i].parts().map_or_else(String::new, |(left, right)| format!("{left:?} {right:?}"));
            Error::new(format!("merge {} ({shown}) {what}", part * MERGES + i))
        };
        // All tokens of the part, and where each merge's two end.
        let (mut text, mut ends) = (Vec::new(), Vec::with_capacity(2 * merges.len()));
        for (i, merge) in merges.iter().enumerate() {
            let (left, right) = merge.parts().ok_or_else(|| wrong(i, "is not two tokens"))?;
            for token in [left, right] {
                if !byte_level {
                    text.extend_from_slice(token.as_bytes());
                } else if !byte_level::decode(token, &mut text) {
                    return Err(wrong(i, "has a character that stands for no byte"));
                }
                ends.push(text.len());
            }
        }
        let mut start = 0;
        let starts = ends.iter().map(|&end| std::mem::replace(&mut start, end));
        let mut ids = Vec::with_capacity(ends.len());
        vocab.get_each(starts.zip(&ends).map(|(start, &end)| &text[start..end]), |id| ids.push(id));
        let mut merged = Vec::with_capacity(merges.len());
        let (mut start, mut last) = (0, 0);
        for (i, (ids, ends)) in ids.chunks(2).zip(ends.chunks(2)).enumerate() {
            let token = &text[start..ends[1]];
            start = ends[1];
            // Merges are mostly in the order of what they give: no search for that.
            let is_it =
                |&id: &u32| is_found.get(id as usize) == Some(&true) && vocab.bytes(id) == Some(token);
            let product = [last, last + 1].into_iter().find(is_it).or_else(|| vocab.get(token));
            let (Some(left), Some(right), Some(product)) = (ids[0], ids[1], product) else {
                return Err(wrong(i, "has a token that the vocabulary lacks"));
            };
            last = product;
            merged.push(crate::merges::Merge { left, right, rank: (part * MERGES + i) as u32, product });
        }
        Ok(merged)
    };
    let parts = merges.par_chunks(MERGES).enumerate().map(parsed).collect::<Result<Vec<_>>>()?;
    let merges = parts.concat();
    let symbols = if byte_level {
        let mut ids = Box::new([MISSING; 256]);
        for byte in 0..=255u8 {
            ids[usize::from(byte)] = vocab.get(&[byte]).unwrap_or(MISSING);
        }
        Symbols::Bytes(ids)
    } else {
        let fallback = byte_fallback.then(|| byte_tokens(&vocab));
        Symbols::Chars { fallback }
    };
    let unknown = match unknown {
        None => None,
        Some(token) => {
            let found = tokens.iter().find(|(t, _)| *t == token).map(|&(_, id)| id);
            Some(found.ok_or_else(|| Error::new(format!("the vocabulary lacks the unk_token {token:?}")))?)
        }
    };
    let mut model = Bpe::new(vocab, symbols, &merges, unknown)?;
    (model.ignore_merges, model.fuse_unknown) = (ignore_merges, fuse_unknown);
    Ok(Model::Bpe(model))
}

fn wordpiece(mut f: Fields, tokens: &[(Cow<str>, u32)]) -> Result<Model> {
    let as_bytes: Vec<(&[u8], u32)> = tokens.iter().map(|(token, id)| (token.as_bytes(), *id)).collect();
    let vocab = Vocab::new(&as_bytes, |_| true)?;
    let unknown = f.text("unk_token")?;
    let lacks = || Error::new(format!("the vocabulary lacks the unk_token {unknown:?}"));
    let unknown = vocab.get(unknown.as_bytes()).ok_or_else(lacks)?;
    let prefix = f.text("continuing_subword_prefix")?;
    let longest = f.number("max_input_chars_per_word")?;
    f.end(Model::WordPiece(WordPiece { vocab, prefix, unknown, longest }))
}

fn unigram(mut f: Fields, tokens: &[(Cow<str>, f64)]) -> Result<Model> {
    let as_bytes: Vec<(&[u8], u32)> = tokens.iter().zip(0..).map(|((t, _), id)| (t.as_bytes(), id)).collect();
    let vocab = Vocab::new(&as_bytes, |_| true)?;
    let scores: Vec<f64> = tokens.iter().map(|&(_, score)| score).collect();
    let least = scores.iter().copied().fold(f64::INFINITY, f64::min);
    let unknown = match f.take("unk_id") {
        Value::Null => None,
        value => match value.as_u64() {
            Some(id) if (id as usize) < tokens.len() => Some(id as u32),
            _ => return Err(f.wrong("unk_id", &value)),
        },
    };
    let fallback = f.flag("byte_fallback", false)?.then(|| byte_tokens(&vocab));
    f.end(Model::Unigram(Unigram::new(vocab, scores, least, unknown, fallback, Score::Double)?))
}

/// Ids of `<0x00>` to `<0xFF>`.
fn byte_tokens(vocab: &Vocab) -> Box<[u32; 256]> {
    let mut ids = Box::new([MISSING; 256]);
    for byte in 0..=255u8 {
        ids[usize::from(byte)] = vocab.get(format!("<0x{byte:02X}>").as_bytes()).unwrap_or(MISSING);
    }
    ids
}

/// Ids before and after a text.
fn post_processor(value: Option<Value>) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for mut f in flat(value, "processors")? {
        let (first, last) = match f.kind.as_str() {
            // Changes offsets only.
            "ByteLevel" => continue,
            "TemplateProcessing" => template(&mut f)?,
            "BertProcessing" => (vec![f.ids("cls")?], vec![f.ids("sep")?]),
            "RobertaProcessing" => {
                f.take("trim_offsets");
                f.take("add_prefix_space");
                (vec![f.ids("cls")?], vec![f.ids("sep")?])
            }
            _ => return f.unsupported("post-processor"),
        };
        f.end(())?;
        before.splice(0..0, first);
        after.extend(last);
    }
    Ok((before, after))
}

fn template(f: &mut Fields) -> Result<(Vec<u32>, Vec<u32>)> {
    f.take("pair");
    let special = f.take("special_tokens");
    let single = f.take("single");
    let (mut before, mut after, mut seen) = (Vec::new(), Vec::new(), 0);
    for piece in single.as_array().ok_or_else(|| f.wrong("single", &single))? {
        if let Some(token) = piece.get("SpecialToken").and_then(|t| t["id"].as_str()) {
            let ids = special[token]["ids"].as_array().ok_or_else(|| f.wrong("special_tokens", &special))?;
            let side = if seen == 0 { &mut before } else { &mut after };
            for id in ids {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                side.push(id.ok_or_else(|| f.wrong("special_tokens", &special))?);
            }
        } else if piece.get("Sequence").is_some_and(|s| s["id"] == "A") {
            seen += 1;
        } else {
            return Err(f.wrong("single", piece));
        }
    }
    if seen == 1 { Ok((before, after)) } else { Err(f.wrong("single", &single)) }
}

fn decoder(value: Option<Value>) -> Result<Decoder> {
    let mut steps = Vec::new();
    let mut parts = flat(value, "decoders")?;
    if let [only] = parts.as_slice()
        && only.kind == "ByteLevel"
    {
        return Ok(Decoder::Bytes);
    }
    if parts.is_empty() {
        return Ok(Decoder::Steps(vec![DecodeStep::Join]));
    }
    for mut f in parts.drain(..) {
        let step = match f.kind.as_str() {
            "Replace" => match f.pattern()? {
                Pattern::Text(text) => DecodeStep::Replace(text, f.text("content")?),
                Pattern::Regex(regex) => return Err(f.wrong("pattern", &Value::from(regex))),
            },
            "ByteFallback" => DecodeStep::ByteFallback,
            "Fuse" => DecodeStep::Fuse,
            "Strip" => DecodeStep::Strip(f.character("content")?, f.number("start")?, f.number("stop")?),
            "Metaspace" => {
                let metaspace = marks(f)?;
                steps.push(DecodeStep::Metaspace(metaspace.mark, metaspace.prepend != Prepend::Never));
                continue;
            }
            "WordPiece" => {
                DecodeStep::WordPiece { prefix: f.text("prefix")?, cleanup: f.flag("cleanup", true)? }
            }
            _ => return f.unsupported("decoder"),
        };
        steps.push(f.end(step)?);
    }
    Ok(Decoder::Steps(steps))
}

/// The added tokens that are found in the text as given, and those in the normalised text.
fn added_tokens(tokens: Vec<Added1>, model: &Model, normalizers: &[Normalizer]) -> Result<(Added, Added)> {
    let (mut raw, mut normalized) = (Vec::new(), Vec::new());
    for token in tokens {
        if token.id as usize >= MOST_IDS {
            return Err(Error::unsupported(format!("token ids above {}", MOST_IDS - 1)));
        }
        if token.content.is_empty() {
            continue;
        }
        if let Some(id) = model.vocab().get(token.content.as_bytes())
            && id != token.id
        {
            let message =
                format!("the added token {:?} is {} but {id} in the vocabulary", token.content, token.id);
            return Err(Error::new(message));
        }
        let list = if token.normalized { &mut normalized } else { &mut raw };
        list.push(AddedToken {
            id: token.id,
            content: token.content,
            single_word: token.single_word,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
            normalized: token.normalized,
            special: token.special,
        });
    }
    let searched = |token: &AddedToken| {
        let content = Cow::Borrowed(token.content.as_str());
        normalizers.iter().fold(content, |text, n| n.apply(text)).into_owned()
    };
    let patterns: Vec<String> = normalized.iter().map(searched).collect();
    Ok((Added::new(raw)?, Added::searched(normalized, &patterns)?))
}

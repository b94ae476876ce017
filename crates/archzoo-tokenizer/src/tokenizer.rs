use std::borrow::Cow;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::added::{Added, AddedToken, AllowedSpecial, Section};
use crate::decode::{self, DecodeStep, Decoder};
use crate::error::{Error, Result};
use crate::metaspace::Metaspace;
use crate::model::{Encoder, Model, Scratch};
use crate::normalize::Normalizer;
use crate::split::Splitter;
use crate::{json, tiktoken};

/// A tokenizer, ready for any number of threads.
pub struct Tokenizer {
    pub(crate) parts: Parts,
    /// Of threads that are not at work.
    idle: Mutex<Vec<Scratch>>,
}

/// What a file says a tokenizer is.
pub(crate) struct Parts {
    /// Found in the text as given.
    pub raw: Added,
    /// Found in the normalised text.
    pub normalized: Added,
    pub normalizers: Vec<Normalizer>,
    /// A blank goes before text that does not start with one.
    pub prefix_blank: bool,
    pub metaspace: Option<Metaspace>,
    pub splitter: Splitter,
    pub model: Model,
    /// Ids around a text with special tokens.
    pub before: Vec<u32>,
    pub after: Vec<u32>,
    pub decoder: Decoder,
    /// Of the file and the pattern.
    pub hash: blake3::Hash,
}

/// Choices of one call.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Whether the ids that the post-processor puts around a text are added.
    pub add_special_tokens: bool,
    /// Which special tokens are found in the text.
    pub allowed_special: AllowedSpecial<'a>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { add_special_tokens: true, allowed_special: AllowedSpecial::All }
    }
}

/// Ids of several texts, one after the other.
pub struct Ragged {
    /// The ids in parts.
    pub parts: Vec<Vec<u32>>,
    /// Where each text's ids start, and the number of all.
    pub offsets: Vec<i64>,
}

/// Bytes of text that one task of a batch encodes, at least.
const TASK_BYTES: usize = 1 << 15;

impl Tokenizer {
    /// Reads a `tokenizer.json`, or a tiktoken rank file with the name of its pattern (or the pattern itself).
    pub fn from_file(path: &Path, pattern: Option<&str>) -> Result<Self> {
        let content = std::fs::read(path).map_err(|e| Error::new(format!("{}: {e}", path.display())))?;
        Self::from_bytes(&content, pattern).map_err(|e| e.in_file(path))
    }

    /// The same from a file's content.
    pub fn from_bytes(content: &[u8], pattern: Option<&str>) -> Result<Self> {
        let is_json = content.trim_ascii_start().first() == Some(&b'{');
        let mut parts = match (is_json, pattern) {
            (true, None) => json::read(content)?,
            (true, Some(_)) => {
                return Err(Error::new("a tokenizer.json names its own pattern: leave `pattern` out"));
            }
            (false, Some(pattern)) => tiktoken::read(content, pattern)?,
            (false, None) => {
                return Err(Error::new(format!(
                    "no tokenizer.json; a tiktoken rank file needs `pattern`, one of {}",
                    tiktoken::NAMES.join(", ")
                )));
            }
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(content).update(&[0]).update(pattern.unwrap_or_default().as_bytes());
        parts.hash = hasher.finalize();
        Ok(Self { parts, idle: Mutex::default() })
    }

    /// Number of ids, those of added tokens included.
    pub fn vocab_size(&self) -> usize {
        let added = self.added().map(|t| t.id as usize + 1).max().unwrap_or(0);
        self.parts.model.vocab().len().max(added)
    }

    /// Added tokens in no particular order.
    pub fn added(&self) -> impl Iterator<Item = &AddedToken> {
        self.parts.raw.tokens().iter().chain(self.parts.normalized.tokens())
    }

    /// A hash of the file and the pattern, in hexadecimal.
    pub fn hash(&self) -> String {
        self.parts.hash.to_hex().to_string()
    }

    /// Appends the ids of a text to `out`.
    pub fn encode(&self, text: &str, options: Options, out: &mut Vec<u32>) -> Result<()> {
        self.with_scratch(|scratch| self.encode_with(text, options, scratch, out, None).map(drop))
    }

    /// The number of ids of a text.
    pub fn count(&self, text: &str, options: Options) -> Result<usize> {
        self.with_scratch(|scratch| {
            let mut out = Vec::new();
            let counted = self.encode_with(text, options, scratch, &mut out, Some(0))?;
            Ok(counted.unwrap_or(0) + out.len())
        })
    }

    /// Encodes texts on the threads of the current pool, in their order.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], options: Options) -> Result<Ragged> {
        let tasks = tasks(texts);
        let encoded: Vec<Result<(Vec<u32>, Vec<usize>)>> = tasks
            .into_par_iter()
            .map(|texts| {
                let bytes: usize = texts.iter().map(|t| t.as_ref().len()).sum();
                let mut ids = Vec::with_capacity(bytes / 3);
                let mut ends = Vec::with_capacity(texts.len());
                self.with_scratch(|scratch| {
                    for text in texts {
                        self.encode_with(text.as_ref(), options, scratch, &mut ids, None)?;
                        ends.push(ids.len());
                    }
                    Ok(())
                })?;
                Ok((ids, ends))
            })
            .collect();
        let mut ragged = Ragged { parts: Vec::new(), offsets: Vec::with_capacity(texts.len() + 1) };
        ragged.offsets.push(0);
        let mut done = 0;
        for result in encoded {
            let (ids, ends) = result?;
            ragged.offsets.extend(ends.iter().map(|&end| (done + end) as i64));
            done += ids.len();
            ragged.parts.push(ids);
        }
        Ok(ragged)
    }

    fn with_scratch<R>(&self, work: impl FnOnce(&mut Scratch) -> R) -> R {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = idle().pop().unwrap_or_default();
        let result = work(&mut scratch);
        idle().push(scratch);
        result
    }

    /// Appends ids; with a count to start from, counts most of them instead and returns the new count.
    fn encode_with(
        &self,
        text: &str,
        options: Options,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
        counted: Option<usize>,
    ) -> Result<Option<usize>> {
        let parts = &self.parts;
        if options.add_special_tokens {
            out.extend_from_slice(&parts.before);
        }
        let mut encoder = Encoder { model: &parts.model, scratch, out, counted };
        parts.raw.split(text, options.allowed_special, |section| {
            let range = match section {
                Section::Token(id) => return encoder.token(id),
                Section::Text(range) => range,
            };
            let is_first = range.start == 0;
            let normalized =
                parts.normalizers.iter().fold(Cow::Borrowed(&text[range]), |text, n| n.apply(text));
            parts.normalized.split(&normalized, options.allowed_special, |section| match section {
                Section::Token(id) => encoder.token(id),
                Section::Text(range) => {
                    let is_first = is_first && range.start == 0;
                    parts.encode_text(&normalized[range], is_first, &mut encoder)
                }
            })
        })?;
        let counted = encoder.counted;
        if options.add_special_tokens {
            out.extend_from_slice(&parts.after);
        }
        Ok(counted)
    }

    /// The bytes of ids; not always UTF-8.
    pub fn decode_bytes(&self, ids: &[u32], skip_special_tokens: bool) -> Result<Vec<u8>> {
        match &self.parts.decoder {
            Decoder::Bytes => {
                let mut bytes = Vec::with_capacity(4 * ids.len());
                self.each_token(ids, skip_special_tokens, |token| bytes.extend_from_slice(token))?;
                Ok(bytes)
            }
            Decoder::Steps(steps) => self.run_steps(steps, ids, skip_special_tokens).map(String::into_bytes),
        }
    }

    /// The text of ids; what is not UTF-8 becomes replacement characters.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        match &self.parts.decoder {
            Decoder::Bytes => {
                let bytes = self.decode_bytes(ids, skip_special_tokens)?;
                Ok(String::from_utf8(bytes)
                    .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
            }
            Decoder::Steps(steps) => self.run_steps(steps, ids, skip_special_tokens),
        }
    }

    fn run_steps(&self, steps: &[DecodeStep], ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let mut tokens = Vec::with_capacity(ids.len());
        self.each_token(ids, skip_special_tokens, |token| {
            tokens.push(String::from_utf8_lossy(token).into_owned());
        })?;
        Ok(decode::run(steps, tokens))
    }

    fn each_token(&self, ids: &[u32], skip_special: bool, mut take: impl FnMut(&[u8])) -> Result<()> {
        let vocab = self.parts.model.vocab();
        for &id in ids {
            let added = self.parts.added_token(id);
            match (added, vocab.bytes(id)) {
                (Some(token), _) if skip_special && token.special => {}
                (Some(token), _) => take(token.content.as_bytes()),
                (None, Some(bytes)) => take(bytes),
                (None, None) => return Err(decode::unknown_id(id, self.vocab_size())),
            }
        }
        Ok(())
    }
}

impl Parts {
    fn encode_text(&self, text: &str, is_first: bool, encoder: &mut Encoder) -> Result<()> {
        if let Some(metaspace) = &self.metaspace {
            return metaspace.split(text, is_first, &self.splitter, encoder);
        }
        if self.prefix_blank && !text.starts_with(' ') {
            return self.splitter.split(&format!(" {text}"), encoder);
        }
        self.splitter.split(text, encoder)
    }

    fn added_token(&self, id: u32) -> Option<&AddedToken> {
        self.raw.by_id(id).or_else(|| self.normalized.by_id(id))
    }
}

/// Neighbouring texts of [`TASK_BYTES`] or more.
fn tasks<T: AsRef<str>>(texts: &[T]) -> Vec<&[T]> {
    let mut tasks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= TASK_BYTES {
            tasks.push(&texts[start..=i]);
            (start, bytes) = (i + 1, 0);
        }
    }
    if start < texts.len() {
        tasks.push(&texts[start..]);
    }
    tasks
}

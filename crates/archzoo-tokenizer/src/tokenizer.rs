use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::added::{Added, AddedToken, AllowedSpecial, Section};
use crate::decode::{self, DecodeStep, DecodeStream, Decoder};
use crate::error::{Error, Result};
use crate::metaspace::Metaspace;
use crate::model::{Encoder, Model, Scratch};
use crate::normalize::Normalizer;
use crate::sentencepiece::PieceDecoder;
use crate::split::{Sink, Splitter};
use crate::{cache_file, gguf, json, sentencepiece, tekken, tiktoken};

/// A tokenizer, ready for any number of threads.
pub struct Tokenizer {
    pub(crate) parts: Parts,
    /// Of the file, the pattern and what was changed since.
    hash: blake3::Hash,
    scratches: Mutex<Scratches>,
}

/// What threads keep from call to call. Text that comes again in the same place goes to the thread's scratch that has
/// seen it, whichever thread that is.
#[derive(Default)]
struct Scratches {
    /// Those of threads that are not at work, and each one's share of a call's text.
    idle: Vec<(usize, Scratch)>,
    /// All that there are.
    made: usize,
}

impl Scratches {
    /// One that was at work on a share before. Another one only when there is one for each share.
    fn take(&mut self, share: usize) -> Option<(usize, Scratch)> {
        let same = self.idle.iter().rposition(|&(of, _)| of == share);
        let any = self.idle.len().checked_sub(1).filter(|_| self.made > threads());
        let found = same.or(any).map(|i| self.idle.swap_remove(i));
        self.made += usize::from(found.is_none());
        found
    }
}

/// Threads of the current pool, if there is one.
fn threads() -> usize {
    if rayon::current_thread_index().is_some() { rayon::current_num_threads() } else { 1 }
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
}

/// A file's content by its kind.
enum Source<'a> {
    Json(&'a [u8]),
    Gguf(&'a [u8]),
    SentencePiece(&'a [u8]),
    Tekken(&'a [u8]),
    /// With its pattern.
    Ranks(&'a [u8], &'a str),
}

impl<'a> Source<'a> {
    fn of(content: &'a [u8], pattern: Option<&'a str>) -> Result<Self> {
        let source = if content.starts_with(&archzoo_gguf::MAGIC) {
            Self::Gguf(content)
        } else if sentencepiece::is_model(content) {
            Self::SentencePiece(content)
        } else if tekken::is_tekken(content) {
            Self::Tekken(content)
        } else if content.trim_ascii_start().first() == Some(&b'{') {
            Self::Json(content)
        } else if let Some(pattern) = pattern {
            return Ok(Self::Ranks(content, pattern));
        } else {
            return Err(Error::new(format!(
                "no tokenizer.json, GGUF, SentencePiece or Tekken file; a tiktoken rank file needs `pattern`, one of {}",
                tiktoken::NAMES.join(", ")
            )));
        };
        match pattern {
            None => Ok(source),
            Some(_) => Err(Error::new("only a rank file needs `pattern`; this file names its own")),
        }
    }

    fn parts(&self) -> Result<Parts> {
        match self {
            Self::Json(content) => json::read(content),
            Self::Gguf(content) => gguf::parts(content, None),
            Self::SentencePiece(content) => sentencepiece::parts(content, None),
            Self::Tekken(content) => tekken::read(content),
            Self::Ranks(content, pattern) => tiktoken::read(content, pattern),
        }
    }

    /// What the file says around the model, as a `tokenizer.json`.
    fn around(&self) -> Result<String> {
        match self {
            Self::Json(content) => json::around(content),
            Self::Gguf(_) | Self::SentencePiece(_) | Self::Tekken(_) | Self::Ranks(..) => Ok(String::new()),
        }
    }
}

/// The content of a file; of a GGUF file, which may be large, its metadata.
fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::new(format!("{}: {e}", path.display()));
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut content = Vec::new();
    (&mut file).take(archzoo_gguf::MAGIC.len() as u64).read_to_end(&mut content).map_err(failed)?;
    if content != archzoo_gguf::MAGIC {
        file.read_to_end(&mut content).map_err(failed)?;
        return Ok(content);
    }
    archzoo_gguf::read_start(content.chain(file), |content| gguf::end(content, size))
        .map_err(|message| Error::new(message).in_file(path))
}

fn hash(content: &[u8], pattern: Option<&str>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(content).update(&[0]).update(pattern.unwrap_or_default().as_bytes());
    hasher.finalize()
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
    /// The ids.
    pub ids: Vec<u32>,
    /// Where each text's ids start, and the number of all.
    pub offsets: Vec<i64>,
}

/// Bytes of text that one task of a batch encodes, at least.
const TASK_BYTES: usize = 1 << 15;
/// Bytes of a long text that one task encodes, at least.
const PART_BYTES: usize = 1 << 17;

/// Ids to make room for before so many bytes are encoded: mostly there are not more, and memory that is not touched
/// costs less than growing.
fn room(bytes: usize) -> usize {
    bytes.min(1 << 24)
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, a GGUF file's vocabulary, a SentencePiece file, Mistral's Tekken, or a tiktoken
    /// rank file with the name of its pattern (or the pattern itself).
    pub fn from_file(path: &Path, pattern: Option<&str>) -> Result<Self> {
        Self::from_bytes(&read(path)?, pattern).map_err(|e| e.in_file(path))
    }

    /// The same from a file's content.
    pub fn from_bytes(content: &[u8], pattern: Option<&str>) -> Result<Self> {
        Source::of(content, pattern)?.parts().map(|parts| Self::new(parts, hash(content, pattern)))
    }

    /// Reads the tables that an earlier call has left in `folder`; builds them and leaves them there if it must.
    pub fn from_file_cached(path: &Path, pattern: Option<&str>, folder: &Path) -> Result<Self> {
        let content = read(path)?;
        let hash = hash(&content, pattern);
        let source = Source::of(&content, pattern).map_err(|e| e.in_file(path))?;
        let file = cache_file::path(folder, &hash);
        if let Some((around, model)) = cache_file::read(&file, &hash) {
            let parts = match source {
                Source::Ranks(_, pattern) => tiktoken::parts_of(pattern, model),
                Source::Tekken(content) => tekken::parts(content, Some(model)),
                Source::SentencePiece(content) => sentencepiece::parts(content, Some(model)),
                Source::Gguf(content) => gguf::parts(content, Some(model)),
                Source::Json(_) => json::read_around(&around, model),
            };
            return parts.map(|parts| Self::new(parts, hash)).map_err(|e| e.in_file(path));
        }
        let parts = source.parts().map_err(|e| e.in_file(path))?;
        if let Model::Bpe(model) = &parts.model {
            let around = source.around().map_err(|e| e.in_file(path))?;
            cache_file::write(&file, &hash, &around, model)?;
        }
        Ok(Self::new(parts, hash))
    }

    fn new(parts: Parts, hash: blake3::Hash) -> Self {
        Self { parts, hash, scratches: Mutex::default() }
    }

    /// The same with control tokens, told by their content, around a text with special tokens.
    pub fn with_ends(mut self, before: Option<&str>, after: Option<&str>) -> Result<Self> {
        let id = |content: &str| {
            let token = self.added().find(|token| token.special && token.content == content);
            token.map(|token| token.id).ok_or_else(|| Error::new(format!("no control token {content:?}")))
        };
        let ids = |content: Option<&str>| content.map(id).transpose().map(|id| id.into_iter().collect());
        let (first, last) = (ids(before)?, ids(after)?);
        (self.parts.before, self.parts.after) = (first, last);
        let mut hasher = blake3::Hasher::new();
        for part in [Some(self.hash.to_hex().as_str()), before, after] {
            hasher.update(part.unwrap_or_default().as_bytes()).update(&[0]);
        }
        self.hash = hasher.finalize();
        Ok(self)
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

    /// For [`Self::decode_next`]: none if the text of a token depends on more than whether it is the first.
    pub fn stream(&self) -> Option<DecodeStream> {
        match self.parts.decoder {
            Decoder::Bytes => Some(DecodeStream::new(false)),
            Decoder::Pieces(_) => Some(DecodeStream::new(true)),
            Decoder::Steps(_) => None,
        }
    }

    /// The text that one more id completes; all ids together give what [`Self::decode`] does.
    pub fn decode_next(
        &self,
        id: u32,
        skip_special_tokens: bool,
        stream: &mut DecodeStream,
    ) -> Result<String> {
        let bytes = match &self.parts.decoder {
            Decoder::Pieces(pieces) => self.piece_bytes(pieces, &[id], &mut stream.is_start)?,
            _ => self.decode_bytes(&[id], skip_special_tokens)?,
        };
        Ok(stream.push(&bytes))
    }

    /// A hash of the file and the pattern, in hexadecimal.
    pub fn hash(&self) -> String {
        self.hash.to_hex().to_string()
    }

    /// Appends the ids of a text to `out`; of a long one on the threads of the current pool, if there is one.
    pub fn encode(&self, text: &str, options: Options, out: &mut Vec<u32>) -> Result<()> {
        if text.len() >= 2 * PART_BYTES {
            out.reserve(room(text.len()));
        }
        self.with_scratch(0, 1, |scratch| self.encode_with(text, options, scratch, out, None).map(drop))
    }

    /// The number of ids of a text.
    pub fn count(&self, text: &str, options: Options) -> Result<usize> {
        self.with_scratch(0, 1, |scratch| {
            let mut out = Vec::new();
            let counted = self.encode_with(text, options, scratch, &mut out, Some(0))?;
            Ok(counted.unwrap_or(0) + out.len())
        })
    }

    /// Encodes texts on the threads of the current pool, in their order.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], options: Options) -> Result<Ragged> {
        let tasks = tasks(texts);
        let encoded: Vec<Result<(Vec<u32>, Vec<usize>)>> = tasks
            .par_iter()
            .enumerate()
            .map(|(i, texts)| {
                let bytes: usize = texts.iter().map(|t| t.as_ref().len()).sum();
                let mut ids = Vec::with_capacity(room(bytes));
                let mut ends = Vec::with_capacity(texts.len());
                self.with_scratch(i, tasks.len(), |scratch| {
                    for text in *texts {
                        self.encode_with(text.as_ref(), options, scratch, &mut ids, None)?;
                        ends.push(ids.len());
                    }
                    Ok(())
                })?;
                Ok((ids, ends))
            })
            .collect();
        let (mut parts, mut offsets) = (Vec::new(), Vec::with_capacity(texts.len() + 1));
        offsets.push(0);
        let mut done = 0;
        for result in encoded {
            let (ids, ends) = result?;
            offsets.extend(ends.iter().map(|&end| (done + end) as i64));
            done += ids.len();
            parts.push(ids);
        }
        // One part, of a long text say, is all: it need not be copied.
        let ids = <[Vec<u32>; 1]>::try_from(parts).map_or_else(joined, |[all]| all);
        Ok(Ragged { ids, offsets })
    }

    /// Encodes texts one after the other on this thread, a long one on those of the current pool, if there is one; `take`
    /// gets each one's ids.
    pub fn encode_each<'t>(
        &self,
        texts: impl IntoIterator<Item = &'t str>,
        options: Options,
        mut take: impl FnMut(&[u32]) -> Result<()>,
    ) -> Result<()> {
        self.with_scratch(0, 1, |scratch| {
            let mut ids = Vec::new();
            for text in texts {
                ids.clear();
                self.encode_with(text, options, scratch, &mut ids, None)?;
                take(&ids)?;
            }
            Ok(())
        })
    }

    /// Does one of some works, which share a call's text in order; each thread begins with its share of them.
    fn with_scratch<R>(&self, i: usize, of: usize, work: impl FnOnce(&mut Scratch) -> R) -> R {
        let scratches = || self.scratches.lock().unwrap_or_else(PoisonError::into_inner);
        // What is done at once may have works of its own, whose scratches it should not take.
        let share = if of == 1 { threads() } else { ((i + 1) * threads() - 1) / of };
        let taken = scratches().take(share);
        let (share, mut scratch) = taken.unwrap_or_else(|| (share, Scratch::default()));
        let result = work(&mut scratch);
        scratches().idle.push((share, scratch));
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
        let mut encoder = Encoder { model: &self.parts.model, scratch, out, counted, spans: None };
        self.surround(options, &mut encoder, text.len(), |encoder| self.encode_text(text, options, encoder))?;
        Ok(encoder.counted)
    }

    /// Appends the ids of what `inner` encodes, and those around it.
    fn surround(
        &self,
        options: Options,
        encoder: &mut Encoder,
        end: usize,
        inner: impl FnOnce(&mut Encoder) -> Result<()>,
    ) -> Result<()> {
        let (before, after) = match options.add_special_tokens {
            true => (self.parts.before.as_slice(), self.parts.after.as_slice()),
            false => (&[][..], &[][..]),
        };
        before.iter().for_each(|&id| encoder.token(id, 0..0));
        inner(encoder)?;
        after.iter().for_each(|&id| encoder.token(id, end..end));
        Ok(())
    }

    fn encode_text(&self, text: &str, options: Options, encoder: &mut Encoder) -> Result<()> {
        let parts = &self.parts;
        parts.raw.split(text, options.allowed_special, |section| {
            let section = match section {
                Section::Token(id, range) => {
                    encoder.token(id, range);
                    return Ok(());
                }
                Section::Text(range) => range,
            };
            let given = &text[section.clone()];
            let normalized = parts.normalizers.iter().fold(Cow::Borrowed(given), |text, n| n.apply(text));
            if encoder.spans.is_some() && normalized != given {
                return Err(Error::unsupported("offsets of text that the normalizer changes"));
            }
            parts.normalized.split(&normalized, options.allowed_special, |inner| match inner {
                Section::Token(id, range) => {
                    encoder.token(id, section.start + range.start..section.start + range.end);
                    Ok(())
                }
                Section::Text(range) => {
                    let start = section.start + range.start;
                    let before = encoder.out.len();
                    let text = &normalized[range];
                    if encoder.only_ids()
                        && let several @ [_, _, ..] = &parts.shared(text)[..]
                    {
                        return self.encode_parts(several, start == 0, encoder.out);
                    }
                    parts.encode_section(text, start == 0, encoder)?;
                    let blank = parts.prefix_blank && !text.starts_with(' ');
                    encoder.locate(text.as_bytes(), start, before, blank);
                    Ok(())
                }
            })
        })
    }

    /// Appends the ids of the parts of a section, which several threads take.
    fn encode_parts(&self, texts: &[&str], is_first: bool, out: &mut Vec<u32>) -> Result<()> {
        let parts = &self.parts;
        let encode = |(i, text): (usize, &&str)| {
            let mut ids = Vec::with_capacity(room(text.len()));
            self.with_scratch(i, texts.len(), |scratch| {
                let mut encoder =
                    Encoder { model: &parts.model, scratch, out: &mut ids, counted: None, spans: None };
                match i {
                    0 => parts.encode_section(text, is_first, &mut encoder),
                    _ => parts.splitter.split(text, &mut encoder),
                }
            })?;
            Ok(ids)
        };
        let all = texts.par_iter().enumerate().map(encode).collect::<Result<Vec<_>>>()?;
        append(all, out);
        Ok(())
    }

    /// Appends the ids of bytes to `out`. Those that are not UTF-8 are pieces of their own, as long as they go.
    pub fn encode_bytes(&self, bytes: &[u8], options: Options, out: &mut Vec<u32>) -> Result<()> {
        if let Ok(text) = std::str::from_utf8(bytes) {
            return self.encode(text, options, out);
        }
        self.needs_bytes("bytes that are not UTF-8")?;
        self.with_scratch(0, 1, |scratch| {
            let mut encoder = Encoder { model: &self.parts.model, scratch, out, counted: None, spans: None };
            self.surround(options, &mut encoder, bytes.len(), |encoder| {
                let (mut start, mut end) = (0, 0);
                for chunk in bytes.utf8_chunks() {
                    if !chunk.valid().is_empty() {
                        if start < end {
                            encoder.take(bytes, &[(start, end)])?;
                        }
                        self.encode_text(chunk.valid(), options, encoder)?;
                        start = end + chunk.valid().len();
                    }
                    end += chunk.valid().len() + chunk.invalid().len();
                }
                if start < end { encoder.take(bytes, &[(start, end)]) } else { Ok(()) }
            })
        })
    }

    /// The ids of a text, and for each where its bytes start and end in the text.
    ///
    /// Of a byte-level tokenizer, for text that its normalizers leave as it is.
    pub fn encode_with_offsets(&self, text: &str, options: Options) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        self.needs_bytes("offsets")?;
        if !self.parts.splitter.keeps_all() {
            return Err(Error::unsupported("offsets with a pre-tokenizer that drops text"));
        }
        self.with_scratch(0, 1, |scratch| {
            let mut out = Vec::new();
            let spans = Some(Vec::new());
            let mut encoder =
                Encoder { model: &self.parts.model, scratch, out: &mut out, counted: None, spans };
            self.surround(options, &mut encoder, text.len(), |encoder| {
                self.encode_text(text, options, encoder)
            })?;
            let spans = encoder.spans.unwrap_or_default();
            Ok((out, spans))
        })
    }

    fn needs_bytes(&self, what: &str) -> Result<()> {
        match self.parts.model.is_byte_level() {
            true => Ok(()),
            false => Err(Error::unsupported(format!("{what} with a tokenizer that is not byte-level"))),
        }
    }

    /// The bytes of ids; not always UTF-8.
    pub fn decode_bytes(&self, ids: &[u32], skip_special_tokens: bool) -> Result<Vec<u8>> {
        match &self.parts.decoder {
            Decoder::Bytes => {
                let mut bytes = Vec::with_capacity(4 * ids.len());
                self.each_token(ids, skip_special_tokens, |token| bytes.extend_from_slice(token))?;
                Ok(bytes)
            }
            Decoder::Pieces(pieces) => self.piece_bytes(pieces, ids, &mut true),
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
            Decoder::Pieces(pieces) => {
                let mut stream = DecodeStream::new(true);
                let text = stream.push(&self.piece_bytes(pieces, ids, &mut true)?);
                Ok(text + &stream.finish())
            }
            Decoder::Steps(steps) => self.run_steps(steps, ids, skip_special_tokens),
        }
    }

    fn piece_bytes(&self, pieces: &PieceDecoder, ids: &[u32], is_start: &mut bool) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for &id in ids {
            let token = self.parts.model.vocab().bytes(id);
            let token = token.ok_or_else(|| decode::unknown_id(id, self.vocab_size()))?;
            pieces.decode(id, token, is_start, &mut bytes);
        }
        Ok(bytes)
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
    /// Parts of a long section for the threads of the current pool; none if one thread takes it all.
    fn shared<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let is_long = text.len() >= 2 * PART_BYTES && self.metaspace.is_none();
        if is_long && threads() > 1 { self.splitter.parts(text, PART_BYTES) } else { Vec::new() }
    }

    fn encode_section(&self, text: &str, is_first: bool, encoder: &mut Encoder) -> Result<()> {
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

fn joined(parts: Vec<Vec<u32>>) -> Vec<u32> {
    let mut all = Vec::new();
    append(parts, &mut all);
    all
}

/// Appends parts to `out`, on the threads of the current pool: memory that is new takes longer to touch than to fill.
fn append(parts: Vec<Vec<u32>>, out: &mut Vec<u32>) {
    let total: usize = parts.iter().map(Vec::len).sum();
    out.reserve(total);
    let mut free = out.spare_capacity_mut();
    let mut places = Vec::with_capacity(parts.len());
    for part in &parts {
        let (place, rest) = free.split_at_mut(part.len());
        places.push(place);
        free = rest;
    }
    parts.into_par_iter().zip(places).for_each(|(part, place)| {
        for (place, id) in place.iter_mut().zip(part) {
            place.write(id);
        }
    });
    // SAFETY: The places, side by side from the old end on, have been filled.
    unsafe { out.set_len(out.len() + total) };
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

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::bpe::{Bpe, Work};
use crate::cache::{self, Cache, INLINE, Key};
use crate::error::Result;
use crate::long_cache::LongCache;
use crate::shared_cache::SharedCache;
use crate::split::{BATCH, Piece, Sink};
use crate::unigram::Unigram;
use crate::vocab::{self, Vocab};
use crate::wordpiece::WordPiece;

/// What turns a piece into ids.
#[derive(Debug, Clone)]
pub enum Model {
    /// Byte-pair encoding.
    Bpe(Bpe),
    /// WordPiece, of BERT.
    WordPiece(WordPiece),
    /// Unigram, of T5.
    Unigram(Unigram),
}

impl Model {
    /// The tokens.
    pub fn vocab(&self) -> &Vocab {
        match self {
            Self::Bpe(bpe) => &bpe.vocab,
            Self::WordPiece(wordpiece) => &wordpiece.vocab,
            Self::Unigram(unigram) => &unigram.vocab,
        }
    }

    /// Whether the tokens' bytes are those of the text.
    pub fn is_byte_level(&self) -> bool {
        matches!(self, Self::Bpe(bpe) if bpe.is_byte_level())
    }

    fn encode(&self, piece: &[u8], work: &mut Work, out: &mut Vec<u32>) {
        match self {
            Self::Bpe(bpe) => bpe.encode(piece, work, out),
            Self::WordPiece(wordpiece) => wordpiece.encode(piece, out),
            Self::Unigram(unigram) => unigram.encode(piece, out),
        }
    }
}

/// At most 16 MB a thread.
const MOST_SHORT: usize = 1 << 19;

/// What one thread keeps from call to call: pieces that it has seen, and buffers.
pub struct Scratch {
    shared: Arc<OnceLock<SharedCache>>,
    short: Cache,
    long: LongCache,
    work: Box<Work>,
    keys: Box<[(Key, u64); BATCH]>,
}

impl Scratch {
    /// Empty, beside that of other threads which have the same `shared`.
    pub fn new(shared: Arc<OnceLock<SharedCache>>) -> Self {
        Self {
            shared,
            short: Cache::new(MOST_SHORT),
            long: LongCache::new(1),
            work: Box::default(),
            keys: Box::new([(Key::default(), 0); BATCH]),
        }
    }
}

/// Encodes pieces into `out`.
pub struct Encoder<'a> {
    /// The model.
    pub model: &'a Model,
    /// Of this thread.
    pub scratch: &'a mut Scratch,
    /// Where the ids go.
    pub out: &'a mut Vec<u32>,
    /// Ids counted instead of kept.
    pub counted: Option<usize>,
    /// Where each id's text is, if wanted.
    pub spans: Option<Vec<Range<usize>>>,
}

impl Encoder<'_> {
    /// Takes the id of an added token, which stands for `range` of the text.
    pub fn token(&mut self, id: u32, range: Range<usize>) {
        self.out.push(id);
        if let Some(spans) = &mut self.spans {
            spans.push(range);
        }
    }

    /// Whether ids are all that is wanted.
    pub fn only_ids(&self) -> bool {
        self.counted.is_none() && self.spans.is_none()
    }

    /// Finds where the tokens from `first` on are in their text, which starts at `start`; with `blank` the first token
    /// has a blank that the text lacks. A byte that no token stands for is passed over, and a token that is not
    /// there is empty.
    pub fn locate(&mut self, text: &[u8], start: usize, first: usize, blank: bool) {
        let Some(spans) = &mut self.spans else { return };
        let mut at = 0;
        for (i, &id) in self.out[first..].iter().enumerate() {
            let mut token = self.model.vocab().bytes(id).unwrap_or_default();
            if blank && i == 0 {
                token = token.strip_prefix(b" ").unwrap_or(token);
            }
            // A token may go on behind a byte that is passed over.
            let mut span: Option<Range<usize>> = None;
            let mut next = at;
            for byte in token {
                let Some(found) = text[next..].iter().position(|b| b == byte) else { break };
                next += found + 1;
                span = Some(span.map_or(next - 1, |span| span.start)..next);
            }
            let span = span.unwrap_or(at..at);
            at = span.end;
            spans.push(start + span.start..start + span.end);
        }
    }
}

impl Sink for Encoder<'_> {
    #[inline]
    fn take(&mut self, text: &[u8], pieces: &[Piece]) -> Result<()> {
        let Scratch { shared, short, long, work, keys } = &mut *self.scratch;
        // The tokenizer has one, each thread another.
        let others = (Arc::strong_count(shared) > 2).then(|| shared.get_or_init(SharedCache::default));
        for (&(start, end), (key, hash)) in pieces.iter().zip(keys.iter_mut()) {
            if end - start <= cache::LONGEST {
                *key = cache::key(text, start, end - start);
                *hash = cache::hash(key);
                short.prefetch(*hash);
            } else {
                *hash = vocab::hash(&text[start..end]);
                long.prefetch(*hash);
            }
        }
        self.out.reserve(INLINE * pieces.len());
        for (&(start, end), (key, hash)) in pieces.iter().zip(keys.iter()) {
            let before = self.out.len();
            if end - start <= cache::LONGEST {
                if !short.append(key, *hash, self.out) {
                    self.model.encode(&text[start..end], work, self.out);
                    short.insert(key, *hash, &self.out[before..]);
                }
            } else if let Some(ids) = long.get(&text[start..end], *hash) {
                self.out.extend_from_slice(ids);
            } else {
                let mut encode = |out: &mut Vec<u32>| self.model.encode(&text[start..end], work, out);
                match others {
                    Some(others) => others.append(&text[start..end], *hash, self.out, encode),
                    None => encode(self.out),
                }
                long.insert(&text[start..end], *hash, &self.out[before..]);
            }
        }
        if let Some(counted) = &mut self.counted {
            *counted += self.out.len();
            self.out.clear();
        }
        Ok(())
    }
}

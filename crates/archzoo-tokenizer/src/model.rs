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

    /// Hands the number of each piece and its ids to `take`, in some order.
    fn encode_each<'t>(
        &self,
        pieces: impl Iterator<Item = &'t [u8]>,
        work: &mut Work,
        mut take: impl FnMut(usize, &[u32]),
    ) {
        let encode: &dyn Fn(&[u8], &mut Vec<u32>) = match self {
            Self::Bpe(bpe) => return bpe.encode_each(pieces, work, take),
            Self::WordPiece(wordpiece) => &|piece, ids| wordpiece.encode(piece, ids),
            Self::Unigram(unigram) => &|piece, ids| unigram.encode(piece, ids),
        };
        for (i, piece) in pieces.enumerate() {
            work.ids.clear();
            encode(piece, &mut work.ids);
            take(i, &work.ids);
        }
    }
}

/// At most 16 MB a thread.
const MOST_SHORT: usize = 1 << 19;
/// Bytes of a piece that is encoded beside another, at most: such that the caches keep those of a batch.
const LONGEST_BESIDE: usize = 256;

/// What one thread keeps from call to call: pieces that it has seen, and buffers.
pub struct Scratch {
    shared: Arc<OnceLock<SharedCache>>,
    short: Cache,
    long: LongCache,
    work: Box<Work>,
    keys: Box<[(Key, u64); BATCH]>,
    /// Pieces that no cache has, and their hashes.
    missing: Vec<(usize, u64)>,
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
            missing: Vec::new(),
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
        let Scratch { shared, short, long, work, keys, missing } = &mut *self.scratch;
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
        let piece = |i: usize| &text[pieces[i].0..pieces[i].1];
        let length = |i: usize| pieces[i].1 - pieces[i].0;
        let is_short = |i: usize| length(i) <= cache::LONGEST;
        for i in 0..pieces.len() {
            let (key, hash) = &keys[i];
            if is_short(i) {
                if short.append(key, *hash, self.out) {
                    continue;
                }
            } else if let Some(ids) = long.get(piece(i), *hash) {
                self.out.extend_from_slice(ids);
                continue;
            } else if let Some(others) = others
                && others.get(piece(i), *hash, |ids| {
                    self.out.extend_from_slice(ids);
                    long.insert(piece(i), *hash, ids);
                })
            {
                continue;
            }
            // Those of the rest that are not there either are encoded beside it.
            missing.clear();
            missing.push((i, *hash));
            for j in (i + 1..pieces.len()).filter(|&j| length(j) <= LONGEST_BESIDE) {
                let (key, hash) = &keys[j];
                let is_there = if is_short(j) {
                    short.has(key, *hash)
                } else {
                    long.get(piece(j), *hash).is_some()
                        || others.is_some_and(|others| {
                            others.get(piece(j), *hash, |ids| long.insert(piece(j), *hash, ids))
                        })
                };
                if !is_there && !missing.iter().any(|&(_, other)| other == *hash) {
                    missing.push((j, *hash));
                }
            }
            self.model.encode_each(missing.iter().map(|&(j, _)| piece(j)), work, |nth, ids| {
                let (j, hash) = missing[nth];
                if i == j {
                    self.out.extend_from_slice(ids);
                }
                if is_short(j) {
                    short.insert(&keys[j].0, hash, ids);
                } else {
                    if let Some(others) = others {
                        others.insert(piece(j), hash, ids);
                    }
                    long.insert(piece(j), hash, ids);
                }
            });
        }
        if let Some(counted) = &mut self.counted {
            *counted += self.out.len();
            self.out.clear();
        }
        Ok(())
    }
}

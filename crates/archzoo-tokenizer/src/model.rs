use crate::bpe::{Bpe, Work};
use crate::cache::{self, Cache, INLINE, Key};
use crate::error::Result;
use crate::split::{BATCH, Piece, Sink};
use crate::unigram::Unigram;
use crate::vocab::Vocab;
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

    fn encode(&self, piece: &[u8], work: &mut Work, out: &mut Vec<u32>) {
        match self {
            Self::Bpe(bpe) => bpe.encode(piece, work, out),
            Self::WordPiece(wordpiece) => wordpiece.encode(piece, out),
            Self::Unigram(unigram) => unigram.encode(piece, out),
        }
    }
}

/// Words of the keys of short and of long pieces: 15 and 47 bytes.
const SHORT: usize = 2;
const LONG: usize = 6;
/// At most 16 MB and 8 MB a thread.
const MOST_SHORT: usize = 1 << 19;
const MOST_LONG: usize = 1 << 17;

/// What one thread keeps from call to call: pieces that it has seen, and buffers.
pub struct Scratch {
    short: Cache<SHORT>,
    long: Cache<LONG>,
    work: Box<Work>,
    keys: Box<[(Key<SHORT>, u64); BATCH]>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            short: Cache::new(MOST_SHORT),
            long: Cache::new(MOST_LONG),
            work: Box::default(),
            keys: Box::new([([0; SHORT], 0); BATCH]),
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
}

impl Encoder<'_> {
    /// Takes the id of an added token.
    pub fn token(&mut self, id: u32) -> Result<()> {
        self.out.push(id);
        Ok(())
    }
}

impl Sink for Encoder<'_> {
    #[inline]
    fn take(&mut self, text: &[u8], pieces: &[Piece]) -> Result<()> {
        let Scratch { short, long, work, keys } = &mut *self.scratch;
        for (&(start, end), (key, hash)) in pieces.iter().zip(keys.iter_mut()) {
            if end - start <= cache::longest(SHORT) {
                *key = cache::key(text, start, end - start);
                *hash = cache::hash(key);
                short.prefetch(*hash);
            }
        }
        self.out.reserve(INLINE * pieces.len());
        for (&(start, end), (key, hash)) in pieces.iter().zip(keys.iter()) {
            let length = end - start;
            if length <= cache::longest(SHORT) {
                match short.get(key, *hash) {
                    Some((ids, count)) => push(self.out, &ids, count),
                    None => {
                        let before = self.out.len();
                        self.model.encode(&text[start..end], work, self.out);
                        short.insert(key, *hash, &self.out[before..]);
                    }
                }
            } else if length <= cache::longest(LONG) {
                let key = cache::key::<LONG>(text, start, length);
                let hash = cache::hash(&key);
                match long.get(&key, hash) {
                    Some((ids, count)) => push(self.out, &ids, count),
                    None => {
                        let before = self.out.len();
                        self.model.encode(&text[start..end], work, self.out);
                        long.insert(&key, hash, &self.out[before..]);
                    }
                }
            } else {
                self.model.encode(&text[start..end], work, self.out);
            }
        }
        if let Some(counted) = &mut self.counted {
            *counted += self.out.len();
            self.out.clear();
        }
        Ok(())
    }
}

/// Appends the first `count` ids.
#[inline(always)]
fn push(out: &mut Vec<u32>, ids: &[u32; INLINE], count: usize) {
    let length = out.len();
    if out.capacity() - length >= INLINE && count <= INLINE {
        // SAFETY: all four fit the capacity; the length then covers only what was written.
        unsafe {
            out.as_mut_ptr().add(length).cast::<[u32; INLINE]>().write_unaligned(*ids);
            out.set_len(length + count);
        }
    } else {
        out.extend_from_slice(&ids[..count]);
    }
}

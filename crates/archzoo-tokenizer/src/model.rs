use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::bpe::{Bpe, Work};
use crate::cache::{Cache, LONGEST, Sought};
use crate::error::Result;
use crate::long_cache::LongCache;
use crate::shared_cache::SharedCache;
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
    sought: Box<[Sought; BATCH]>,
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
            sought: Box::new([Sought::default(); BATCH]),
            missing: Vec::new(),
        }
    }

    /// Fills in `sought` and starts to load where pieces are looked up.
    #[inline(never)]
    fn seek(&mut self, text: &[u8], pieces: &[Piece]) {
        for (&(start, end), sought) in pieces.iter().zip(self.sought.iter_mut()) {
            if end - start <= LONGEST {
                *sought = Sought::new(text, start, end - start);
                self.short.prefetch(sought);
            } else {
                *sought = Sought::long(self.long.seek(&text[start..end]));
            }
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

    /// Appends the ids of a piece that this thread has not seen, the `i`-th of some whose `sought` are there.
    #[inline(never)]
    fn take_new(&mut self, text: &[u8], pieces: &[Piece], i: usize) {
        let Scratch { shared, short, long, work, sought, missing } = &mut *self.scratch;
        // The tokenizer has one, each thread another.
        let others = (Arc::strong_count(shared) > 2).then(|| shared.get_or_init(SharedCache::default));
        let piece = |i: usize| &text[pieces[i].0..pieces[i].1];
        if let Some(hash) = sought[i].long_hash()
            && let Some(others) = others
            && others.get(piece(i), hash, |ids| {
                self.out.extend_from_slice(ids);
                long.insert(piece(i), hash, ids);
            })
        {
            return;
        }
        // Those of the rest that are not there either are encoded beside it.
        missing.clear();
        missing.push((i, sought[i].hash()));
        for j in (i + 1..pieces.len()).filter(|&j| piece(j).len() <= LONGEST_BESIDE) {
            let is_there = match sought[j].long_hash() {
                None => short.has(&sought[j]),
                Some(hash) => {
                    long.get(piece(j), hash).is_some()
                        || others.is_some_and(|others| {
                            others.get(piece(j), hash, |ids| long.insert(piece(j), hash, ids))
                        })
                }
            };
            let hash = sought[j].hash();
            if !is_there && !missing.iter().any(|&(_, other)| other == hash) {
                missing.push((j, hash));
            }
        }
        self.model.encode_each(missing.iter().map(|&(j, _)| piece(j)), work, |nth, ids| {
            let (j, _) = missing[nth];
            if i == j {
                self.out.extend_from_slice(ids);
            }
            match sought[j].long_hash() {
                None => short.insert(&sought[j], ids),
                Some(hash) => {
                    if let Some(others) = others {
                        others.insert(piece(j), hash, ids);
                    }
                    long.insert(piece(j), hash, ids);
                }
            }
        });
    }
}

impl Sink for Encoder<'_> {
    #[inline]
    fn take(&mut self, text: &[u8], pieces: &[Piece]) -> Result<()> {
        self.scratch.seek(text, pieces);
        let mut done = 0;
        loop {
            let Scratch { short, long, sought, .. } = &*self.scratch;
            done += short.append(&sought[done..pieces.len()], self.out);
            let Some(&(start, end)) = pieces.get(done) else { break };
            let hash = sought[done].long_hash();
            if let Some(ids) = hash.and_then(|hash| long.get(&text[start..end], hash)) {
                self.out.extend_from_slice(ids);
            } else {
                self.take_new(text, pieces, done);
            }
            done += 1;
        }
        if let Some(counted) = &mut self.counted {
            *counted += self.out.len();
            self.out.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::bpe::Symbols;

    /// So many different pieces that both caches are emptied on the way.
    #[test]
    fn caches_are_emptied_within_a_batch() {
        let tokens: Vec<_> = (0..=255).map(|byte: u8| ([byte], u32::from(byte))).collect();
        let vocab = Vocab::new(&tokens, |_| true).unwrap();
        let symbols = Symbols::Bytes(Box::new(std::array::from_fn(|byte| byte as u32)));
        let model = Model::Bpe(Bpe::new(vocab, symbols, &[]).unwrap());
        let mut scratch = Scratch::new(Arc::default());
        let mut out = Vec::new();
        for i in (0..150_000).step_by(25) {
            let (mut text, mut pieces) = (Vec::new(), Vec::new());
            for i in i..i + 25 {
                for piece in [format!("{i:09}"), format!("{i:020}"), "a".into(), format!("{:09}", i - i % 25)]
                {
                    pieces.push((text.len(), text.len() + piece.len()));
                    text.extend_from_slice(piece.as_bytes());
                }
            }
            out.clear();
            let scratch = &mut scratch;
            let mut encoder = Encoder { model: &model, scratch, out: &mut out, counted: None, spans: None };
            encoder.take(&text, &pieces).unwrap();
            assert!(out.iter().copied().eq(text.iter().map(|&byte| u32::from(byte))));
        }
    }
}

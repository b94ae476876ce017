use std::ops::Range;

use crate::borders::PLACES;
use crate::bpe::{Bpe, Work};
use crate::cache::{Cache, LONGEST, Sought};
use crate::error::Result;
use crate::long_cache::LongCache;
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

    /// Whether a piece that is longer than a key may have parts that are encoded one by one.
    #[inline]
    fn may_cut(&self, text: &[u8], (start, end): Piece) -> bool {
        matches!(self, Self::Bpe(bpe) if bpe.may_cut(&text[start..end]))
    }

    /// Hands the number of each piece and its ids to `take`, in some order.
    fn encode_each<'t>(
        &self,
        pieces: impl Iterator<Item = &'t [u8]> + Clone,
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
    short: Cache,
    long: LongCache,
    work: Box<Work>,
    sought: Box<[Sought; BATCH]>,
    /// Of a batch, those that no cache has, and their hashes.
    new: Vec<usize>,
    hashes: Vec<u64>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            short: Cache::new(MOST_SHORT),
            long: LongCache::default(),
            work: Box::default(),
            sought: Box::new([Sought::default(); BATCH]),
            new: Vec::new(),
            hashes: Vec::new(),
        }
    }
}

impl Scratch {
    /// Fills in `sought`. False if one `may_be_cut`, which has too many bytes for a key.
    #[inline(always)]
    fn seek(&mut self, text: &[u8], pieces: &[Piece], may_be_cut: impl Fn(Piece) -> bool) -> bool {
        let Self { short, long, sought, .. } = self;
        for (&piece, sought) in pieces.iter().zip(sought.iter_mut()) {
            if piece.1 - piece.0 > LONGEST && may_be_cut(piece) {
                return false;
            }
            *sought = seek(short, long, text, piece);
        }
        true
    }
}

/// Starts to load where a piece is looked up.
#[inline(always)]
fn seek(short: &Cache, long: &LongCache, text: &[u8], (start, end): Piece) -> Sought {
    if end - start <= LONGEST {
        let sought = Sought::new(text, start, end - start);
        short.prefetch(&sought);
        sought
    } else {
        Sought::long(long.seek(&text[start..end]))
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
        let Scratch { short, long, work, sought, new, hashes, .. } = &mut *self.scratch;
        let piece = |i: usize| &text[pieces[i].0..pieces[i].1];
        // Those of the rest that are not there either are encoded beside it.
        new.clear();
        hashes.clear();
        new.push(i);
        hashes.push(sought[i].hash());
        for j in (i + 1..pieces.len()).filter(|&j| piece(j).len() <= LONGEST_BESIDE) {
            let is_there = match sought[j].long_hash() {
                None => short.has(&sought[j]),
                Some(hash) => long.get(piece(j), hash).is_some(),
            };
            let hash = sought[j].hash();
            if !is_there && !hashes.contains(&hash) {
                new.push(j);
                hashes.push(hash);
            }
        }
        self.model.encode_each(new.iter().map(|&j| piece(j)), work, |nth, ids| {
            let j = new[nth];
            if i == j {
                self.out.extend_from_slice(ids);
            }
            match sought[j].long_hash() {
                None => short.insert(&sought[j], ids),
                Some(hash) => long.insert(piece(j), hash, ids),
            }
        });
    }

    /// Takes pieces whose `sought` are there.
    #[inline(always)]
    fn take_sought(&mut self, text: &[u8], pieces: &[Piece]) {
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
    }

    /// Takes pieces, some of which are cut: their parts are known more often.
    #[inline(never)]
    fn take_parts(&mut self, text: &[u8], pieces: &[Piece]) {
        let (mut parts, mut places) = ([(0, 0); BATCH], [0; PLACES]);
        let mut count = 0;
        for &piece in pieces {
            let (mut start, end) = piece;
            let cuts = match self.model {
                Model::Bpe(bpe) if end - start > LONGEST && bpe.may_cut(&text[start..end]) => {
                    bpe.cut(text, piece, &mut places)
                }
                _ => 0,
            };
            for end in places[..cuts].iter().copied().chain([end]) {
                parts[count] = (start, end);
                let Scratch { short, long, sought, .. } = &mut *self.scratch;
                sought[count] = seek(short, long, text, (start, end));
                (start, count) = (end, count + 1);
                if count == BATCH {
                    self.take_sought(text, &parts);
                    count = 0;
                }
            }
        }
        self.take_sought(text, &parts[..count]);
    }
}

impl Sink for Encoder<'_> {
    #[inline]
    fn take(&mut self, text: &[u8], pieces: &[Piece]) -> Result<()> {
        match self.scratch.seek(text, pieces, |piece| self.model.may_cut(text, piece)) {
            true => self.take_sought(text, pieces),
            false => self.take_parts(text, pieces),
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

    fn bytes_and(more: &[&str], ignore_merges: bool) -> Model {
        let bytes = (0..=255).map(|byte: u8| vec![byte]);
        let tokens: Vec<_> =
            bytes.chain(more.iter().map(|token| token.as_bytes().to_vec())).zip(0..).collect();
        let symbols = Symbols::Bytes(Box::new(std::array::from_fn(|byte| byte as u32)));
        let mut bpe = Bpe::new(Vocab::new(&tokens, |_| true).unwrap(), symbols, &[], None).unwrap();
        bpe.ignore_merges = ignore_merges;
        Model::Bpe(bpe)
    }

    fn encode(model: &Model, scratch: &mut Scratch, text: &[u8], pieces: &[Piece]) -> Vec<u32> {
        let mut out = Vec::new();
        let mut encoder = Encoder { model, scratch, out: &mut out, counted: None, spans: None };
        encoder.take(text, pieces).unwrap();
        out
    }

    /// So many different pieces that both caches are emptied on the way, those with parts of others among them.
    #[test]
    fn caches_are_emptied_within_a_batch() {
        let model = bytes_and(&[], false);
        let mut scratch = Scratch::default();
        let char = |i: u32| char::from_u32(0x4e00 + i % 0x5000).unwrap();
        for i in (0..150_000).step_by(25) {
            let (mut text, mut pieces) = (Vec::new(), Vec::new());
            for i in i..i + 25 {
                let chinese = [char(i), char(i / 7), char(i / 11)].iter().collect();
                for piece in [format!("{i:09}"), format!("{i:020}"), chinese, format!("{:09}", i - i % 25)] {
                    pieces.push((text.len(), text.len() + piece.len()));
                    text.extend_from_slice(piece.as_bytes());
                }
            }
            if i == 120_000 {
                // Now every few pieces empty it.
                scratch.short = Cache::new(2);
            }
            let out = encode(&model, &mut scratch, &text, &pieces);
            assert!(out.iter().copied().eq(text.iter().map(|&byte| u32::from(byte))));
        }
    }

    #[test]
    fn a_token_that_is_never_merged_stands_for_a_whole_piece() {
        let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        for ignore_merges in [false, true] {
            let model = bytes_and(&["一"], ignore_merges);
            let alone = if ignore_merges { vec![256] } else { bytes("一") };
            for pieces in [[(0, 3), (0, 6)], [(0, 6), (0, 3)]] {
                let mut scratch = Scratch::default();
                let found = encode(&model, &mut scratch, "一丁".as_bytes(), &pieces);
                let ids = |(_, end)| if end == 3 { alone.clone() } else { bytes("一丁") };
                assert_eq!(found, pieces.map(ids).concat());
            }
        }
    }
}

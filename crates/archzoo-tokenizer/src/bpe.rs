use std::iter::{Enumerate, Fuse};

use crate::borders::{Borders, LONGEST_CUT, PLACES, is_wide};
use crate::cache::LONGEST;
use crate::cache_file::{Reader, Table, Writer};
use crate::chars::Chars;
use crate::error::Result;
use crate::merges::{Lists, Long, Merge, Merges, Pieces, SHORT};
use crate::reached::Reached;
use crate::split::Piece;
use crate::vocab::Vocab;

/// A symbol that the vocabulary lacks.
pub const MISSING: u32 = u32::MAX;

/// What a piece is merged from.
#[derive(Debug, Clone)]
pub enum Symbols {
    /// Its bytes: the id of each.
    Bytes(Box<[u32; 256]>),
    /// Its characters, and `<0x..>` tokens for the bytes of one that has no token.
    Chars {
        /// Ids of the byte tokens, if a character without a token becomes its bytes.
        fallback: Option<Box<[u32; 256]>>,
    },
}

/// What encoding pieces needs and the next ones may have.
#[derive(Default)]
pub struct Work {
    lists: Lists,
    long: Long,
    tokens: Vec<Option<u32>>,
    /// Those of a piece.
    pub ids: Vec<u32>,
}

/// Byte-pair encoding.
#[derive(Debug, Clone)]
pub struct Bpe {
    /// The tokens.
    pub vocab: Vocab,
    merges: Merges,
    /// Which tokens merging gives, if bytes are merged.
    reached: Option<Reached>,
    /// What characters start as, if bytes are merged.
    chars: Option<Chars>,
    /// Where pieces can be cut, if it is known which tokens merging gives.
    borders: Option<Borders>,
    /// What is merged.
    symbols: Symbols,
    /// Whether each byte has a token.
    has_all_bytes: bool,
    /// A piece that is a token is that token, whatever its merges give.
    pub ignore_merges: bool,
    unknown: Option<u32>,
    /// Whether neighbouring unknown symbols are one.
    pub fuse_unknown: bool,
}

impl Bpe {
    /// A model of tokens and merges, the latter in the order of their ranks.
    ///
    /// `unknown` stands for a symbol without a token; such symbols are dropped if there is none.
    pub fn new(vocab: Vocab, symbols: Symbols, merges: &[Merge], unknown: Option<u32>) -> Result<Self> {
        let mut table = Merges::new(merges)?;
        let mut reached = None;
        let has_unknown = |merge: &Merge| unknown.is_some_and(|id| merge.left == id || merge.right == id);
        if let Symbols::Bytes(bytes) = &symbols
            && !(bytes.contains(&MISSING) && merges.iter().any(has_unknown))
            && let Some((made, kept)) = Reached::new(&vocab, bytes, merges, &table)
        {
            // The others are never made, and a smaller table is a faster one.
            if kept.len() < merges.len() {
                table = Merges::new(&kept)?;
            }
            reached = Some(made);
        }
        Ok(Self::of(vocab, symbols, table, reached, unknown))
    }

    fn of(
        vocab: Vocab,
        symbols: Symbols,
        merges: Merges,
        reached: Option<Reached>,
        unknown: Option<u32>,
    ) -> Self {
        let (chars, has_all_bytes) = match &symbols {
            Symbols::Bytes(bytes) => (Chars::new(&merges, &vocab, bytes), !bytes.contains(&MISSING)),
            Symbols::Chars { .. } => (None, false),
        };
        let borders =
            reached.as_ref().map(|reached| Borders::new(&vocab, |token| reached.may_be_unreached(token)));
        let (ignore_merges, fuse_unknown) = (false, false);
        Self {
            vocab,
            merges,
            reached,
            chars,
            borders,
            symbols,
            has_all_bytes,
            ignore_merges,
            unknown,
            fuse_unknown,
        }
    }

    /// Whether text can be cut before every run of `mark`: it is a token, and no token has it after anything else.
    pub fn starts_words_with(&self, mark: &str) -> bool {
        let is_inside = |token: &[u8]| {
            let rest = String::from_utf8_lossy(token);
            rest.trim_start_matches(mark).contains(mark)
        };
        let mut tokens = (0..self.vocab.len() as u32).filter_map(|id| self.vocab.bytes(id));
        !self.is_byte_level()
            && !self.ignore_merges
            && self.vocab.get(mark.as_bytes()).is_some()
            && !tokens.any(is_inside)
    }

    /// Whether it merges bytes.
    pub fn is_byte_level(&self) -> bool {
        matches!(self.symbols, Symbols::Bytes(_))
    }

    /// Hands the number of each piece and its ids to `take`, in some order.
    pub fn encode_each<'t>(
        &self,
        pieces: impl Iterator<Item = &'t [u8]> + Clone,
        work: &mut Work,
        take: impl FnMut(usize, &[u32]),
    ) {
        let Work { lists, long, tokens, ids } = work;
        tokens.clear();
        if self.ignore_merges || self.reached.is_some() {
            // Of long pieces, those that are worth a look.
            let likely = |piece: &'t [u8]| match piece.len() <= LONGEST || self.may_be_other(piece) {
                true => piece,
                false => &[],
            };
            self.vocab.get_each(pieces.clone().map(likely), |id| tokens.push(id));
        }
        let pieces = pieces.fuse().enumerate();
        self.merges.merge_each(lists, &mut Each { bpe: self, pieces, tokens, long, ids, take });
    }

    /// Whether a piece may be a token that is not what its merges give.
    fn may_be_other(&self, piece: &[u8]) -> bool {
        self.ignore_merges && self.reached.as_ref().is_none_or(|reached| reached.may_be_unreached(piece))
    }

    /// Whether a piece that is longer than a key may have parts that are encoded one by one.
    #[inline]
    pub fn may_cut(&self, piece: &[u8]) -> bool {
        self.borders.is_some() && piece.len() <= LONGEST_CUT && piece[..2].iter().any(|&byte| is_wide(byte))
    }

    /// Puts the places where a piece of `text` can be cut into parts that are encoded one by one first in `places`. Returns
    /// their number.
    #[inline]
    pub fn cut(&self, text: &[u8], piece: Piece, places: &mut [usize; PLACES]) -> usize {
        let (Some(borders), Symbols::Bytes(ids)) = (&self.borders, &self.symbols) else { return 0 };
        // What is left without a byte, or stands for it, has other neighbours.
        let is_missing = |&byte: &u8| ids[usize::from(byte)] == MISSING;
        if !self.has_all_bytes && text[piece.0..piece.1].iter().any(is_missing) {
            return 0;
        }
        let count = borders.find(text, piece, places);
        if self.ignore_merges && borders.has_unreached() {
            // A token that its merges do not give stands for a whole piece only.
            let mut start = piece.0;
            for end in places[..count].iter().copied().chain([piece.1]) {
                let part = &text[std::mem::replace(&mut start, end)..end];
                if borders.may_be_unreached(part) && self.may_be_other(part) {
                    return 0;
                }
            }
        }
        count
    }

    /// Appends the ids of a piece, and of the token that it is, that needs no merging to `out`, or returns false.
    fn known(&self, piece: &[u8], token: Option<u32>, out: &mut Vec<u32>) -> bool {
        let is_reached = || self.reached.as_ref().is_some_and(|reached| !reached.may_be_unreached(piece));
        if let Some(id) = token
            && (self.ignore_merges || is_reached())
        {
            out.push(id);
            return true;
        }
        self.reached
            .as_ref()
            .is_some_and(|reached| is_long_run(piece) && reached.encode_run(piece, &self.merges, out))
    }

    /// Puts the symbols that a piece is merged from in place of others.
    fn symbols(&self, piece: &[u8], symbols: &mut Vec<u32>) {
        symbols.clear();
        match &self.symbols {
            Symbols::Bytes(ids) => {
                match &self.chars {
                    Some(chars) => chars.symbols(piece, ids, symbols),
                    None => symbols.extend(piece.iter().map(|&byte| ids[usize::from(byte)])),
                }
                if symbols.contains(&MISSING) {
                    // A character may merge with what comes after the missing byte.
                    symbols.clear();
                    symbols.extend(piece.iter().map(|&byte| ids[usize::from(byte)]));
                    self.replace_missing(symbols);
                }
            }
            Symbols::Chars { fallback } => self.chars(piece, fallback.as_deref(), symbols),
        }
    }

    #[cold]
    fn replace_missing(&self, symbols: &mut Vec<u32>) {
        let mut unknown = Unknown { bpe: self, pending: false };
        let mut replaced = Vec::with_capacity(symbols.len());
        for &id in symbols.iter() {
            unknown.symbol((id != MISSING).then_some(id), &mut replaced);
        }
        unknown.flush(&mut replaced);
        *symbols = replaced;
    }

    fn chars(&self, piece: &[u8], fallback: Option<&[u32; 256]>, symbols: &mut Vec<u32>) {
        let mut unknown = Unknown { bpe: self, pending: false };
        let mut rest = piece;
        while !rest.is_empty() {
            let (_, length) = crate::classes::decode(rest, 0);
            let (c, tail) = rest.split_at(length.min(rest.len()));
            rest = tail;
            let id = self.vocab.get(c);
            match fallback {
                // As in `tokenizers`, a pending unknown stays pending across byte tokens.
                Some(ids) if id.is_none() && c.iter().all(|&b| ids[usize::from(b)] != MISSING) => {
                    symbols.extend(c.iter().map(|&b| ids[usize::from(b)]));
                }
                _ => unknown.symbol(id, symbols),
            }
        }
        unknown.flush(symbols);
    }
}

/// Pieces on their way into [`Merges::merge_each`].
struct Each<'a, I, F> {
    bpe: &'a Bpe,
    pieces: Enumerate<Fuse<I>>,
    tokens: &'a [Option<u32>],
    long: &'a mut Long,
    ids: &'a mut Vec<u32>,
    take: F,
}

impl<'t, I: Iterator<Item = &'t [u8]>, F: FnMut(usize, &[u32])> Pieces for Each<'_, I, F> {
    #[inline]
    fn next(&mut self, symbols: &mut Vec<u32>) -> Option<usize> {
        loop {
            let (i, piece) = self.pieces.next()?;
            self.ids.clear();
            let token = self.tokens.get(i).copied().flatten();
            if !self.bpe.known(piece, token, self.ids) {
                self.bpe.symbols(piece, symbols);
                if symbols.len() <= SHORT {
                    return Some(i);
                }
                self.bpe.merges.merge(symbols, self.long, self.ids);
            }
            (self.take)(i, self.ids);
        }
    }

    #[inline(never)]
    fn take(&mut self, piece: usize, tokens: impl Iterator<Item = (u32, usize)>) {
        self.ids.clear();
        self.ids.extend(tokens.map(|(id, _)| id));
        (self.take)(piece, self.ids);
    }
}

/// Bytes of a run from which on its longest tokens are found faster than they are merged.
const LONG_RUN: usize = 65;

fn is_long_run(piece: &[u8]) -> bool {
    piece.len() >= LONG_RUN && piece.windows(2).all(|pair| pair[0] == pair[1])
}

impl Table for Bpe {
    fn write(&self, out: &mut Writer) {
        self.vocab.write(out);
        self.merges.write(out);
        let (is_chars, bytes) = match &self.symbols {
            Symbols::Bytes(bytes) => (false, Some(bytes)),
            Symbols::Chars { fallback } => (true, fallback.as_ref()),
        };
        out.words(bytes.map_or(&[], |bytes| &bytes[..]));
        let flags = [is_chars, self.ignore_merges, self.fuse_unknown, self.reached.is_some()];
        out.bytes(&flags.map(u8::from));
        out.words(&[self.unknown.unwrap_or(MISSING)]);
        if let Some(reached) = &self.reached {
            reached.write(out);
        }
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let (vocab, merges, bytes) = (Vocab::read(from)?, Merges::read(from)?, from.words()?);
        let is_there = |&id: &u32| id == MISSING || (id as usize) < vocab.len();
        if !merges.is_below(vocab.len()) || !bytes.iter().all(is_there) {
            return None;
        }
        let [is_chars, ignore_merges, fuse_unknown, has_reached] =
            from.bytes()?.iter().map(|&b| b != 0).collect::<Vec<_>>()[..]
        else {
            return None;
        };
        let [unknown] = from.words()?[..] else { return None };
        if !is_there(&unknown) {
            return None;
        }
        let reached = if has_reached { Some(Reached::read(from, &vocab)?) } else { None };
        let table = || <[u32; 256]>::try_from(bytes.as_slice()).ok().map(Box::new);
        let symbols = match (is_chars, bytes.is_empty()) {
            (false, _) => Symbols::Bytes(table()?),
            (true, true) => Symbols::Chars { fallback: None },
            (true, false) => Symbols::Chars { fallback: Some(table()?) },
        };
        let unknown = (unknown != MISSING).then_some(unknown);
        Some(Self { ignore_merges, fuse_unknown, ..Self::of(vocab, symbols, merges, reached, unknown) })
    }
}

/// Symbols without a token on their way into the list.
struct Unknown<'a> {
    bpe: &'a Bpe,
    pending: bool,
}

impl Unknown<'_> {
    fn symbol(&mut self, id: Option<u32>, symbols: &mut Vec<u32>) {
        match id {
            Some(id) => {
                self.flush(symbols);
                symbols.push(id);
            }
            None => {
                if !self.bpe.fuse_unknown {
                    self.flush(symbols);
                }
                self.pending = self.bpe.unknown.is_some();
            }
        }
    }

    fn flush(&mut self, symbols: &mut Vec<u32>) {
        if self.pending {
            symbols.extend(self.bpe.unknown);
        }
        self.pending = false;
    }
}

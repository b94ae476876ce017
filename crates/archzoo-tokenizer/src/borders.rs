//! Where a piece can be cut because no token reaches over the place: what merges to its left and to its right then does
//! not depend on the other side. Most places between two Chinese characters are such, and the words between them are
//! mostly known.

use crate::split::Piece;
use crate::vocab::{MIX, Vocab, fold};

/// What tokens have side by side, of characters of three bytes: the others are seldom apart.
#[derive(Debug, Clone)]
pub struct Borders {
    /// A bit for each hash of two whole characters.
    pairs: Box<[u64; 1 << (PAIR_BITS - 6)]>,
    /// A bit for the last byte of one and the first byte of the next where a token does not have all of both.
    parts: Box<[u64; 1 << (PART_BITS - 6)]>,
    /// A bit for each hash of tokens that merging does not give; empty if there are none.
    unreached: Vec<u64>,
}

const PAIR_BITS: u32 = 19;
const PART_BITS: u32 = 12;
const UNREACHED_BITS: u32 = 14;
/// Bytes of a character that is looked at.
const WIDE: usize = 3;

/// Whether a byte is the first of a character of three.
pub fn is_wide(first: u8) -> bool {
    first >> 4 == 0xe
}

impl Borders {
    /// The borders inside tokens.
    pub fn new(vocab: &Vocab, may_be_unreached: impl Fn(&[u8]) -> bool) -> Self {
        let (pairs, parts) = (Box::new([0; _]), Box::new([0; _]));
        let mut made = Self { pairs, parts, unreached: Vec::new() };
        vocab.each_with(is_wide, |token| {
            if let Some(start) = token.first_chunk().filter(|_| may_be_unreached(token)) {
                made.unreached.resize(1 << (UNREACHED_BITS - 6), 0);
                set(&mut made.unreached, unreached(start, token.len()));
            }
            for at in (1..token.len()).filter(|&at| is_wide(token[at])) {
                match at.checked_sub(WIDE).map(|left| &token[left..]) {
                    Some(left) if !is_wide(left[0]) => {}
                    Some(left) if left.len() >= 2 * WIDE => {
                        set(&mut made.pairs[..], pair(last_word(&left[..2 * WIDE])));
                    }
                    _ => set(&mut made.parts[..], part(last_word(&[0, 0, token[at - 1], token[at]]))),
                }
            }
        });
        made
    }

    /// Whether there are tokens that merging does not give.
    pub fn has_unreached(&self) -> bool {
        !self.unreached.is_empty()
    }

    /// Whether a part may be one.
    #[inline]
    pub fn may_be_unreached(&self, part: &[u8]) -> bool {
        part.first_chunk().is_none_or(|start| has(&self.unreached, unreached(start, part.len())))
    }

    /// Puts the places where a piece of `text` can be cut, in its first [`LONGEST_CUT`] bytes, first in `places`. Returns
    /// their number.
    #[inline]
    pub fn find(&self, text: &[u8], (start, end): Piece, places: &mut [usize; PLACES]) -> usize {
        let (mut at, mut count) = (start + WIDE, 0);
        let end = end.min(start + LONGEST_CUT);
        while at + WIDE <= end {
            let both = text.get(at - WIDE..).and_then(<[u8]>::first_chunk);
            let both = both.map_or_else(|| last_word(&text[at - WIDE..]), |&word| u64::from_le_bytes(word));
            if both & FIRSTS_HIGH == FIRSTS_WIDE {
                // Which places these are follows no pattern that a processor could foresee.
                let is_inside = has(&self.pairs[..], pair(both)) | has(&self.parts[..], part(both));
                places[count & (PLACES - 1)] = at;
                count += usize::from(!is_inside);
                at += WIDE;
            } else {
                at += 1;
            }
        }
        count
    }
}

/// Bytes of a piece that is cut, at most: what is longer is more often known as a whole.
pub const LONGEST_CUT: usize = 256;
/// Places where such a piece can be cut fit into as many.
pub const PLACES: usize = 128;

/// The high halves of the first bytes of two characters of three bytes, in a word that starts with these.
const FIRSTS_HIGH: u64 = 0xf000_00f0;
const FIRSTS_WIDE: u64 = 0xe000_00e0;

/// Bytes, fewer than a word has, and zeros.
#[cold]
fn last_word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

/// Where the bit of two characters is, by a word that starts with them.
#[inline]
fn pair(both: u64) -> usize {
    ((both << 16).wrapping_mul(MIX[0]) >> (64 - PAIR_BITS)) as usize
}

fn unreached(&[a, b, c]: &[u8; WIDE], length: usize) -> usize {
    let word = u64::from_le_bytes([a, b, c, 0, 0, 0, 0, 0]) | (length as u64) << 32;
    (fold(word, MIX[0]) >> (64 - UNREACHED_BITS)) as usize
}

/// The same of the last byte of one and the low half of the first byte of the other.
#[inline]
fn part(both: u64) -> usize {
    (both >> 16) as usize & ((1 << PART_BITS) - 1)
}

fn set(bits: &mut [u64], at: usize) {
    bits[at / 64] |= 1 << (at % 64);
}

#[inline(always)]
fn has(bits: &[u64], at: usize) -> bool {
    bits[at / 64] >> (at % 64) & 1 == 1
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A few characters, and bytes of some.
    fn text() -> impl Strategy<Value = Vec<u8>> {
        let chars = ["一", "丁", "七", "，", "が", "é", "a", "\u{20000}"].map(str::as_bytes);
        let char = prop::sample::select([&chars[..], &[b"\xe4", b"\xb8"]].concat());
        prop::collection::vec(char, 0..12).prop_map(|chars| chars.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        /// Tokens may begin and end inside characters, and a piece has any bytes.
        #[test]
        fn no_token_reaches_over_a_border(
            tokens in prop::collection::vec((text(), 0..4usize, 0..4usize), 0..12),
            (text, start, end) in (text(), 0..4usize, 0..4usize),
        ) {
            let some = |text: &[u8], start: usize, end: usize| {
                let end = text.len().saturating_sub(end);
                text[start.min(end)..end].to_vec()
            };
            let mut tokens: Vec<_> = tokens.iter().map(|(text, start, end)| some(text, *start, *end)).collect();
            tokens.sort();
            tokens.dedup();
            let numbered: Vec<_> = tokens.iter().zip(0..).collect();
            let borders = Borders::new(&Vocab::new(&numbered, |_| true).unwrap(), |token| token == b"\xe4\xb8\x80");
            let piece = some(&text, start, end);
            // With something before it and behind it.
            let around = |after: &[u8]| [b"\xe4", &piece[..], after].concat();
            let [places, others] = [&b""[..], b"\xb8\x80\xe4\xb8\x80"].map(|after| {
                let mut places = [7; PLACES];
                let count = borders.find(&around(after), (1, 1 + piece.len()), &mut places);
                places[..count].iter().map(|place| place - 1).collect::<Vec<_>>()
            });
            prop_assert_eq!(&places, &others);
            let is_free = |place: usize| {
                let reaches = |token: &[u8], at: usize| at < place && place < at + token.len();
                !tokens.iter().any(|token| (0..place).any(|at| reaches(token, at) && piece[at..].starts_with(token)))
            };
            prop_assert!(places.is_sorted());
            for &place in &places {
                prop_assert!(0 < place && place < piece.len() && is_free(place));
            }
            let is_unreached = |token: &&Vec<u8>| token[..] == *b"\xe4\xb8\x80";
            prop_assert_eq!(borders.has_unreached(), tokens.iter().any(|token| is_unreached(&token)));
            if let Some(token) = tokens.iter().find(is_unreached) {
                prop_assert!(borders.may_be_unreached(token));
            }
            // And those that no token comes near are found.
            if tokens.iter().all(|token| token.len() < 2) && std::str::from_utf8(&text).is_ok() {
                let wide = |at: usize| is_wide(piece[at]);
                let expected = (WIDE..piece.len()).filter(|&at| wide(at) && wide(at - WIDE) && piece.len() - at >= WIDE);
                prop_assert_eq!(places, expected.collect::<Vec<_>>());
            }
        }
    }
}

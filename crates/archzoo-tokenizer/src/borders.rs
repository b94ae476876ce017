//! Where a piece can be cut because no token reaches over the place: what merges to its left and to its right then does
//! not depend on the other side. Most places between two Chinese characters are such, and the words between them are
//! mostly known.

use crate::vocab::{MIX, Vocab, fold};

/// What tokens have side by side, of characters of three bytes: the others are seldom apart.
#[derive(Debug, Clone)]
pub struct Borders {
    /// A bit for each hash of two whole characters.
    pairs: Vec<u64>,
    /// A bit for the last byte of one and the first byte of the next where a token does not have all of both.
    parts: Vec<u64>,
}

const PAIR_BITS: u32 = 19;
const PART_BITS: u32 = 12;
/// Bytes of a character that is looked at.
const WIDE: usize = 3;

fn is_wide(first: u8) -> bool {
    first >> 4 == 0xe
}

impl Borders {
    /// The borders inside tokens.
    pub fn new(vocab: &Vocab) -> Self {
        let bits = |count: u32| vec![0; 1 << (count - 6)];
        let mut made = Self { pairs: bits(PAIR_BITS), parts: bits(PART_BITS) };
        vocab.each_with(is_wide, |token| {
            for at in (1..token.len()).filter(|&at| is_wide(token[at])) {
                let left = at.checked_sub(WIDE).map(|left| &token[left..]);
                match left.map(|left| (left[0], left.first_chunk())) {
                    Some((first, _)) if !is_wide(first) => {}
                    Some((_, Some(both))) => set(&mut made.pairs, pair(both)),
                    _ => set(&mut made.parts, part(token[at - 1], token[at])),
                }
            }
        });
        made
    }

    /// Puts the places where a piece can be cut in place of others.
    pub fn find(&self, piece: &[u8], places: &mut Vec<usize>) {
        places.resize(piece.len() / WIDE, 0);
        let (mut at, mut count) = (WIDE, 0);
        while let Some(both) = piece.get(at - WIDE..).and_then(<[u8]>::first_chunk::<{ 2 * WIDE }>) {
            let &[left, _, last, right, ..] = both;
            if is_wide(left) && is_wide(right) {
                // Which places these are follows no pattern that a processor could foresee.
                let is_inside = has(&self.pairs, pair(both)) | has(&self.parts, part(last, right));
                places[count] = at;
                count += usize::from(!is_inside);
                at += WIDE;
            } else {
                at += 1;
            }
        }
        places.truncate(count);
    }
}

fn pair(both: &[u8; 2 * WIDE]) -> usize {
    let &[a, b, c, d, e, f] = both;
    (fold(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), MIX[0]) >> (64 - PAIR_BITS)) as usize
}

fn part(last: u8, first: u8) -> usize {
    usize::from(last) << 4 | usize::from(first & 15)
}

fn set(bits: &mut [u64], at: usize) {
    bits[at / 64] |= 1 << (at % 64);
}

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
            let borders = Borders::new(&Vocab::new(&numbered, |_| true).unwrap());
            let piece = some(&text, start, end);
            let mut places = vec![7; 3];
            borders.find(&piece, &mut places);
            let is_free = |place: usize| {
                let reaches = |token: &[u8], at: usize| at < place && place < at + token.len();
                !tokens.iter().any(|token| (0..place).any(|at| reaches(token, at) && piece[at..].starts_with(token)))
            };
            prop_assert!(places.is_sorted());
            for &place in &places {
                prop_assert!(0 < place && place < piece.len() && is_free(place));
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

//! Characters as the symbols that their bytes always become, to start merging from.
//!
//! Two neighbours a and b may be merged to c before all others if that merge's rank is below the rank of every other
//! merge that the text allows with a on its right, with b on its left, or with c. For such neighbours stay until they
//! merge: a pair that has one of them ranks behind them. And what is merged until then is the same whether they are
//! merged early or late: a pair that has c ranks behind them, too.
//!
//! Around a character that has others on both sides the text allows few merges: those of a token that ends with the
//! last byte of a character, and those of a token that starts with the first byte of one.

use rayon::prelude::*;

use crate::bpe::MISSING;
use crate::merges::{Merge, Merges, NONE};
use crate::vocab::{ID_BITS, NO_ID, Vocab};

/// The symbols of each character of two or three bytes, up to three in a word.
#[derive(Debug, Clone)]
pub struct Chars(Vec<u64>);

/// No second and no third symbol.
const ONE: u64 = (1 << (2 * ID_BITS)) - 1;

impl Chars {
    /// What `merges` make of the characters' bytes. None if the vocabulary lacks what is merged.
    pub fn new(merges: &Merges, vocab: &Vocab, bytes: &[u32; 256]) -> Option<Self> {
        let lowest = Lowest::new(merges, vocab)?;
        let entry = |code: u32| {
            let mut buffer = [0; 4];
            let Some(char) = char::from_u32(code).filter(|char| !char.is_ascii()) else { return 0 };
            let encoded = char.encode_utf8(&mut buffer).as_bytes();
            let mut ids = [MISSING; 3];
            for (id, &byte) in ids.iter_mut().zip(encoded) {
                *id = bytes[usize::from(byte)];
            }
            let ids = &mut ids[..encoded.len()];
            if ids.contains(&MISSING) {
                return 0;
            }
            let count = lowest.merge(merges, ids);
            ids[..count].iter().rev().fold(u64::MAX, |word, &id| word << ID_BITS | u64::from(id))
        };
        Some(Self((0..1 << 16).into_par_iter().map(entry).collect()))
    }

    /// Appends symbols that merge to what the bytes of `piece` merge to.
    pub fn symbols(&self, piece: &[u8], bytes: &[u32; 256], symbols: &mut Vec<u32>) {
        let bits = |byte: u8, shift: u32| usize::from(byte & 0x3f) << shift;
        symbols.reserve(piece.len());
        let mut rest = piece;
        let mut is_open = true;
        loop {
            let (ascii, others) =
                rest.split_at(rest.iter().position(|byte| !byte.is_ascii()).unwrap_or(rest.len()));
            symbols.extend(ascii.iter().map(|&byte| bytes[usize::from(byte)]));
            is_open &= ascii.is_empty();
            rest = others;
            let [first, ref tail @ ..] = *rest else { break };
            let (code, after) = match *rest {
                [a @ 0xe0..=0xef, b, c, ref after @ ..]
                    if is_tail(b) && is_tail(c) && (a, b) >= (0xe0, 0xa0) =>
                {
                    (usize::from(a & 15) << 12 | bits(b, 6) | bits(c, 0), after)
                }
                [a @ 0xc2..=0xdf, b, ref after @ ..] if is_tail(b) => (bits(a & 31, 6) | bits(b, 0), after),
                _ => (0, tail),
            };
            let ids = self.0[code];
            // What is around counts: see `Lowest`.
            if is_open && ids != 0 && after.first().is_none_or(|&byte| byte >= 0xc0) {
                if ids >> ID_BITS == ONE {
                    symbols.push(ids as u32 & NO_ID);
                } else {
                    let all = [0, 1, 2].map(|i| (ids >> (i * ID_BITS)) as u32 & NO_ID);
                    symbols.extend(all.into_iter().take_while(|&id| id != NO_ID));
                }
                rest = after;
            } else {
                symbols.push(bytes[usize::from(first)]);
                is_open = is_tail(first);
                rest = tail;
            }
        }
    }
}

/// Of each symbol, the lowest rank of merges across a border of two characters.
struct Lowest {
    /// That have it on their left.
    left: Vec<u32>,
    /// That have it on their right.
    right: Vec<u32>,
}

impl Lowest {
    /// None if the vocabulary lacks what is merged.
    fn new(merges: &Merges, vocab: &Vocab) -> Option<Self> {
        let mut lowest = Self { left: vec![NONE; vocab.len()], right: vec![NONE; vocab.len()] };
        for Merge { left, right, rank, .. } in merges.each() {
            let slot = &mut lowest.left[left as usize];
            if rank < *slot && vocab.bytes(right)?.first().is_some_and(|&byte| byte >= 0xc0) {
                *slot = rank;
            }
            let slot = &mut lowest.right[right as usize];
            if rank < *slot && vocab.bytes(left)?.last().is_some_and(|&byte| is_tail(byte)) {
                *slot = rank;
            }
        }
        Some(lowest)
    }

    /// Merges the symbols of a character as far as always happens. Returns how many are left.
    fn merge(&self, merges: &Merges, symbols: &mut [u32]) -> usize {
        let mut count = symbols.len();
        while count > 1 {
            let there = &symbols[..count];
            let pairs = there.windows(2).zip(0usize..).map(|(pair, i)| (merges.get(pair[0], pair[1]), i));
            let Some(((rank, product), i)) = pairs.min() else { break };
            let (first, last) = (there[0], there[count - 1]);
            let (before, after) = (i.checked_sub(1).map(|i| there[i]), there.get(i + 2).copied());
            // Those with a symbol from around, of which none may be first as long as the pair is not merged.
            let around = self.right[first as usize].min(self.left[last as usize]);
            if rank >= around {
                break;
            }
            let with = [
                before.map_or(self.right[product as usize], |before| merges.rank(before, product)),
                after.map_or(self.left[product as usize], |after| merges.rank(product, after)),
            ];
            if rank >= with[0].min(with[1]) {
                break;
            }
            symbols[i] = product;
            symbols.copy_within(i + 2..count, i + 1);
            count -= 1;
        }
        count
    }
}

fn is_tail(byte: u8) -> bool {
    byte & 0xc0 == 0x80
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::merges::Long;
    use crate::vocab::fold;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const PARTS: [&[u8]; 12] = [
        "é".as_bytes(),
        "è".as_bytes(),
        "ж".as_bytes(),
        "一".as_bytes(),
        "丁".as_bytes(),
        "乀".as_bytes(),
        "倀".as_bytes(),
        "﹀".as_bytes(),
        "😀".as_bytes(),
        b"a",
        b" ",
        b"\xb8",
    ];

    /// Merges that a training on `text` might give: each joins two neighbours of it as they then are. With an `order`
    /// they are ranked by that instead, as no training does.
    fn trained(text: &[u8], picks: &[u32], order: Option<u64>) -> (Vocab, Merges) {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let mut ids: HashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
        let mut joined: Vec<u32> = text.iter().map(|&byte| byte.into()).collect();
        let mut list = Vec::new();
        for &pick in picks {
            let Some(last) = joined.len().checked_sub(1).filter(|&last| last > 0) else { break };
            let (left, right) = (joined[pick as usize % last], joined[pick as usize % last + 1]);
            let token = [&tokens[left as usize][..], &tokens[right as usize]].concat();
            let product = *ids.entry(token.clone()).or_insert_with(|| {
                tokens.push(token);
                tokens.len() as u32 - 1
            });
            list.push(Merge { left, right, rank: list.len() as u32, product });
            let mut next = Vec::new();
            let mut rest = &joined[..];
            while let [first, tail @ ..] = rest {
                let is_pair = (*first, tail.first()) == (left, Some(&right));
                next.push(if is_pair { product } else { *first });
                rest = if is_pair { &tail[1..] } else { tail };
            }
            joined = next;
        }
        if let Some(seed) = order {
            list.sort_by_key(|merge| fold(seed ^ u64::from(merge.rank), 0x9e37_79b9_7f4a_7c15));
            (0..).zip(&mut list).for_each(|(rank, merge)| merge.rank = rank);
        }
        let numbered: Vec<_> = tokens.into_iter().zip(0..).collect();
        (Vocab::new(&numbered, |_| true).unwrap(), Merges::new(&list).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn characters_merge_to_what_their_bytes_do(
            learned in prop::collection::vec(0..PARTS.len(), 0..60),
            text in prop::collection::vec(0..PARTS.len(), 0..40),
            picks in prop::collection::vec(any::<u32>(), 0..60),
            order in prop::option::of(any::<u64>()),
        ) {
            let bytes = |parts: &[usize]| parts.iter().flat_map(|&i| PARTS[i]).copied().collect::<Vec<u8>>();
            let (vocab, merges) = trained(&bytes(&learned), &picks, order);
            let of_byte = std::array::from_fn(|byte| byte as u32);
            let chars = Chars::new(&merges, &vocab, &of_byte).unwrap();
            let text = bytes(&text);
            let single: Vec<u32> = text.iter().map(|&byte| byte.into()).collect();
            let (mut symbols, mut list, mut out, mut expected) = (vec![], Long::default(), vec![], vec![]);
            merges.merge(&single, &mut list, &mut expected);
            chars.symbols(&text, &of_byte, &mut symbols);
            prop_assert!(symbols.len() <= single.len());
            merges.merge(&symbols, &mut list, &mut out);
            prop_assert_eq!(out, expected);
        }
    }

    #[test]
    fn a_character_is_one_symbol_unless_another_merge_may_be_first() {
        let symbols = |picks: &[(u32, u32)], text: &str| {
            let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            let mut list = Vec::new();
            for &(left, right) in picks {
                tokens.push([&tokens[left as usize][..], &tokens[right as usize]].concat());
                list.push(Merge { left, right, rank: list.len() as u32, product: tokens.len() as u32 - 1 });
            }
            let numbered: Vec<_> = tokens.into_iter().zip(0..).collect();
            let vocab = Vocab::new(&numbered, |_| true).unwrap();
            let chars = Chars::new(&Merges::new(&list).unwrap(), &vocab, &std::array::from_fn(|b| b as u32));
            let mut out = Vec::new();
            chars.unwrap().symbols(text.as_bytes(), &std::array::from_fn(|b| b as u32), &mut out);
            out
        };
        // é is C3 A9, one symbol where no ASCII is beside it.
        assert_eq!(symbols(&[(0xc3, 0xa9)], "éé"), [256, 256]);
        assert_eq!(symbols(&[(0xc3, 0xa9)], "aéé"), [0x61, 0xc3, 0xa9, 256]);
        // Its last byte may go to the next character first, but only if that merge is before.
        assert_eq!(symbols(&[(0xa9, 0xc3), (0xc3, 0xa9)], "éé"), [0xc3, 0xa9, 0xc3, 0xa9]);
        assert_eq!(symbols(&[(0xc3, 0xa9), (0xa9, 0xc3)], "éé"), [256, 256]);
        // 一 is E4 B8 80, of which the first two always merge and the last may not.
        assert_eq!(symbols(&[(0xe4, 0xb8), (0x80, 0xe4), (256, 0x80)], "一一"), [256, 0x80, 256, 0x80]);
    }
}

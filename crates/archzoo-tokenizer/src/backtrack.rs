//! Byte-pair encoding without merging: the longest token that fits to the one before it, else the next shorter one,
//! else back to the token before.
//!
//! A sequence of tokens is what merging gives if and only if merging gives back each token from its own bytes and
//! each two neighbours from theirs (`merges` says why). There is one such sequence for a text and for each of its
//! prefixes, so that a position from which no token fits need not be tried again: time is linear.
//!
//! Whether two neighbours stay apart is seen by undoing their merges, the last one first: at no time may the
//! symbols at the border be a pair that merges before either of them is merged within its own token.
//!
//! That holds where a token's parts are made by merges of lower ranks than its own. The few tokens for which this
//! is not so (Llama 3 has some) are `odd`: a text that has the bytes of one is merged.

use std::collections::BTreeSet;

use aho_corasick::{AhoCorasick, AhoCorasickKind};

use crate::bpe::MISSING;
use crate::cache_file::{Reader, Table, Writer};
use crate::merges::{List, Merge, Merges, NONE};
use crate::trie::Trie;
use crate::vocab::{Vocab, hash};

/// How a token is made from its bytes.
#[derive(Debug, Clone, Copy)]
struct Token {
    /// Its last merge.
    left: u32,
    right: u32,
    /// One more than that merge's rank; 0 for a token of one byte, [`NONE`] for one that merging never gives.
    rank: u32,
    /// The longest token that this one starts with.
    shorter: u32,
}

/// What encoding by the longest tokens needs.
#[derive(Debug, Clone)]
pub struct Backtrack {
    tokens: Vec<Token>,
    /// Of tokens that merging gives.
    trie: Trie,
    /// A bit for each hash, modulo [`FILTER`], of a token that is not in the trie; empty if all are.
    unreached: Vec<u64>,
    odd: Option<Odd>,
}

/// Tokens whose bytes must be merged.
#[derive(Debug, Clone)]
struct Odd {
    ids: Vec<u32>,
    finder: AhoCorasick,
}

impl Odd {
    fn new(ids: Vec<u32>, vocab: &Vocab) -> Option<Self> {
        let tokens: Vec<&[u8]> = ids.iter().map(|&id| vocab.bytes(id)).collect::<Option<_>>()?;
        let finder = AhoCorasick::builder().kind(Some(AhoCorasickKind::DFA)).build(tokens).ok()?;
        Some(Self { ids, finder })
    }
}

const FILTER: u64 = 1 << 13;

/// More odd tokens than a text is searched for.
const MOST_ODD: usize = 256;

impl Backtrack {
    /// Tables for `merges` (left, right, rank in rising order, with the ids that they give) over bytes.
    ///
    /// Also returns the merges that are ever made: the last one of each token's own bytes. None if too many tokens
    /// are odd, or too large for a [`Trie`].
    pub fn new(
        vocab: &Vocab,
        bytes: &[u32; 256],
        list: &[Merge],
        table: &Merges,
    ) -> Option<(Self, Vec<Merge>)> {
        let unknown = Token { left: 0, right: 0, rank: NONE, shorter: NONE };
        let mut made = Self {
            tokens: vec![unknown; vocab.len()],
            trie: Trie::new(&[], |_, _| {}).ok()?,
            unreached: Vec::new(),
            odd: None,
        };
        for &id in bytes.iter().filter(|&&id| id != MISSING) {
            made.tokens[id as usize].rank = 0;
        }
        let mut late = Vec::new();
        let mut is_kept = vec![false; list.len()];
        for (&(left, right, rank), is_kept) in list.iter().zip(&mut is_kept) {
            if table.rank(left, right) != rank {
                continue;
            }
            let product = table.product(rank);
            let (a, b) = (made.tokens[left as usize], made.tokens[right as usize]);
            if a.rank == NONE || b.rank == NONE {
                late.push((left, right, product));
            } else if made.tokens[product as usize].rank == NONE && made.apart(table, left, right, rank + 1) {
                made.tokens[product as usize] = Token { left, right, rank: rank + 1, shorter: NONE };
                *is_kept = true;
            }
        }
        let is_made = |id: u32| made.tokens[id as usize].rank != NONE;
        // A merge whose parts are made only later may still be one that is made.
        let (mut buffers, mut merged) = (List::default(), Vec::new());
        let mut odd = BTreeSet::new();
        for (left, right, product) in late {
            if is_made(left) && is_made(right) && !is_made(product) {
                let token = vocab.bytes(product)?;
                let symbols: Vec<u32> = token.iter().map(|&b| bytes[usize::from(b)]).collect();
                merged.clear();
                table.merge(&symbols, &mut buffers, &mut merged);
                if merged == [product] {
                    odd.insert(product);
                }
            }
        }
        if odd.len() > MOST_ODD {
            return None;
        }
        if !odd.is_empty() {
            let odd = Odd::new(odd.into_iter().collect(), vocab)?;
            let has_odd = |id: u32| odd.finder.is_match(vocab.bytes(id).unwrap_or_default());
            for (merge, is_kept) in list.iter().zip(&mut is_kept) {
                *is_kept |= has_odd(table.product(merge.2));
            }
            made.odd = Some(odd);
        }
        let kept =
            list.iter().zip(&is_kept).filter(|&(_, &is_kept)| is_kept).map(|(&merge, _)| merge).collect();
        let all = 0..vocab.len() as u32;
        let reached: Vec<(&[u8], u32)> =
            all.filter(|&id| is_made(id)).map(|id| (vocab.bytes(id).unwrap_or_default(), id)).collect();
        if reached.len() < vocab.found() {
            made.unreached = vec![0; FILTER as usize / 64];
            for id in (0..vocab.len() as u32).filter(|&id| !is_made(id)) {
                let hash = hash(vocab.bytes(id).unwrap_or_default()) % FILTER;
                made.unreached[hash as usize / 64] |= 1 << (hash % 64);
            }
        }
        let tokens = &mut made.tokens;
        made.trie = Trie::new(&reached, |id, shorter| tokens[id as usize].shorter = shorter).ok()?;
        Some((made, kept))
    }

    /// Whether two tokens side by side do not merge across their border before a merge of `limit`.
    #[inline(always)]
    fn apart(&self, table: &Merges, left: u32, right: u32, limit: u32) -> bool {
        let (mut x, mut y) = (left, right);
        let (mut a, mut b) = (self.tokens[x as usize], self.tokens[y as usize]);
        // When the symbols at the border are merged within their own tokens.
        let (mut left_end, mut right_end) = (limit, limit);
        loop {
            let rank = table.rank(x, y).saturating_add(1);
            // Of equal ranks the leftmost pair is first.
            if rank < left_end && rank <= right_end {
                return false;
            }
            if a.rank > b.rank {
                left_end = a.rank;
                x = a.right;
                a = self.tokens[x as usize];
            } else if b.rank > 0 {
                right_end = b.rank;
                y = b.left;
                b = self.tokens[y as usize];
            } else {
                return true;
            }
        }
    }

    /// Whether a piece may be a token that merging does not give.
    #[inline]
    pub fn may_be_unreached(&self, piece: &[u8]) -> bool {
        if self.unreached.is_empty() {
            return false;
        }
        let hash = hash(piece) % FILTER;
        self.unreached[hash as usize / 64] >> (hash % 64) & 1 == 1
    }

    /// Appends the ids of a piece to `out`; `dead` is a buffer. False, and nothing is appended, if
    /// the piece must be merged: a byte has no token, or there is an odd one.
    pub fn encode(
        &self,
        piece: &[u8],
        vocab: &Vocab,
        table: &Merges,
        dead: &mut Vec<u64>,
        out: &mut Vec<u32>,
    ) -> bool {
        if self.odd.as_ref().is_some_and(|odd| odd.finder.is_match(piece)) {
            return false;
        }
        let first = out.len();
        dead.clear();
        dead.resize(piece.len() / 64 + 1, 0);
        let mut at = 0;
        while at < piece.len() {
            let (mut token, mut length) = self.trie.longest(&piece[at..]);
            if length == 0 {
                out.truncate(first);
                return false;
            }
            loop {
                let end = at + length;
                let is_dead = dead[end / 64] >> (end % 64) & 1 == 1;
                let last = out[first..].last();
                if !is_dead && last.is_none_or(|&last| self.apart(table, last, token, NONE)) {
                    out.push(token);
                    at = end;
                    break;
                }
                let mut shorter = self.tokens[token as usize].shorter;
                while shorter == NONE {
                    // Nothing fits here, but something does from a place before.
                    dead[at / 64] |= 1 << (at % 64);
                    let Some(&last) = out[first..].last() else { return false };
                    out.pop();
                    at -= vocab.length(last);
                    shorter = self.tokens[last as usize].shorter;
                }
                (token, length) = (shorter, vocab.length(shorter));
            }
        }
        true
    }
}

impl Backtrack {
    /// Appends what `read` reads.
    pub fn write(&self, out: &mut Writer) {
        let tokens: Vec<u32> =
            self.tokens.iter().flat_map(|t| [t.left, t.right, t.rank, t.shorter]).collect();
        out.words(&tokens);
        self.trie.write(out);
        out.longs(&self.unreached);
        out.words(self.odd.as_ref().map_or(&[], |odd| &odd.ids));
    }

    /// The tables that come next, of this vocabulary; none if they are not sound.
    pub fn read(from: &mut Reader, vocab: &Vocab) -> Option<Self> {
        let words = from.words()?;
        let (tokens, rest) = words.as_chunks();
        let trie = Trie::read(from)?;
        let unreached = from.longs()?;
        let odd = from.words()?;
        let is_there = |id: u32| id == NONE || (id as usize) < vocab.len();
        let all_there = trie.is_below(vocab.len())
            && tokens
                .iter()
                .all(|&[left, right, _, shorter]| [left, right, shorter].map(is_there) == [true; 3]);
        let is_filter = [0, FILTER as usize / 64].contains(&unreached.len());
        if !rest.is_empty() || !is_filter || tokens.len() != vocab.len() || !all_there {
            return None;
        }
        let tokens = tokens.iter().map(|&[left, right, rank, shorter]| Token { left, right, rank, shorter });
        Some(Self {
            tokens: tokens.collect(),
            trie,
            unreached,
            odd: if odd.is_empty() { None } else { Some(Odd::new(odd, vocab)?) },
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vocab::fold;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5000))]
        /// Over few symbols, with several merges that give one token, in any order, so that some tokens are odd and
        /// some are never made.
        #[test]
        fn longest_tokens_are_what_merging_gives(
            picks in prop::collection::vec(any::<(u32, u32)>(), 0..60),
            order in prop::option::of(any::<u64>()),
            kinds in 1..4u32,
            length in prop_oneof![0..20usize, 50..150usize, 200..700usize],
            seed in any::<u64>(),
        ) {
            let mut tokens: Vec<Vec<u8>> = (0..kinds).map(|k| vec![b'a' + k as u8]).collect();
            let mut merges: Vec<(u32, u32)> = Vec::new();
            let mut products = Vec::new();
            for (a, b) in picks {
                let (a, b) = (a % tokens.len() as u32, b % tokens.len() as u32);
                let token = [&tokens[a as usize][..], &tokens[b as usize]].concat();
                if token.len() > 20 || merges.contains(&(a, b)) {
                    continue;
                }
                let id = tokens.iter().position(|t| *t == token).unwrap_or_else(|| {
                    tokens.push(token);
                    tokens.len() - 1
                });
                merges.push((a, b));
                products.push(id as u32);
            }
            let mut ranked: Vec<_> = merges.into_iter().zip(products).collect();
            if let Some(seed) = order {
                ranked.sort_by_key(|&((a, b), _)| fold(seed ^ u64::from(a) << 32 ^ u64::from(b), 0x9e37_79b9_7f4a_7c15));
            }
            let list: Vec<_> = ranked.iter().zip(0..).map(|(&((a, b), _), rank)| (a, b, rank)).collect();
            let products: Vec<u32> = ranked.iter().map(|&(_, id)| id).collect();
            let numbered: Vec<_> = tokens.into_iter().zip(0..).collect();
            let vocab = Vocab::new(&numbered, |_| true).unwrap();
            let mut bytes = [MISSING; 256];
            (0..kinds).for_each(|k| bytes[usize::from(b'a') + k as usize] = k);
            let full = Merges::new(&list, products.clone()).unwrap();
            let (made, kept) = Backtrack::new(&vocab, &bytes, &list, &full).unwrap();
            let pruned = Merges::new(&kept, products).unwrap();

            let mut state = seed;
            let text: Vec<u8> = (0..length)
                .map(|_| {
                    state = fold(state ^ 0x1234_5678, 0x9e37_79b9_7f4a_7c15).wrapping_add(1);
                    b'a' + ((state >> 32) as u32 % kinds) as u8
                })
                .collect();
            let symbols: Vec<u32> = text.iter().map(|&b| bytes[usize::from(b)]).collect();
            let (mut list, mut expected, mut merged) = (List::default(), Vec::new(), Vec::new());
            full.merge(&symbols, &mut list, &mut expected);
            pruned.merge(&symbols, &mut list, &mut merged);
            prop_assert_eq!(&merged, &expected);
            let (mut dead, mut found) = (Vec::new(), vec![7]);
            if made.encode(&text, &vocab, &pruned, &mut dead, &mut found) {
                prop_assert_eq!(&found[1..], &expected);
            } else {
                prop_assert!(made.odd.is_some() && found == [7]);
            }
        }
    }
}

//! The tokens that merging gives, how it gives them, and runs: one byte over and over.
//!
//! A sequence of tokens is what merging gives if and only if merging gives back each token from its own bytes and
//! each two neighbours from theirs (`merges` says why). Whether two neighbours stay apart is seen by undoing their
//! merges, the last one first: at no time may the symbols at the border be a pair that merges before either of them is
//! merged within its own token.
//!
//! So a run needs no merging, of which its long tokens take much: the longest token that fits to the one before it,
//! else the next shorter one, else back to the token before. There is one such sequence for a run and for each of its
//! prefixes, so that a position from which no token fits need not be tried again: time is linear.
//!
//! That holds where a token's parts are made by merges of lower ranks than its own. The few tokens for which this
//! is not so (Llama 3 has some) are odd: a run that has the bytes of one is merged.

use std::collections::BTreeSet;

use aho_corasick::{AhoCorasick, AhoCorasickKind};

use crate::bpe::MISSING;
use crate::cache::prefetch;
use crate::cache_file::{Reader, Writer};
use crate::merges::{Long, Merge, Merges, NONE};
use crate::vocab::{Vocab, hash};

/// How a token is made from its bytes.
#[derive(Debug, Clone, Copy)]
struct Token {
    /// Its last merge.
    left: u32,
    right: u32,
    /// One more than that merge's rank; 0 for a token of one byte, [`NONE`] for one that merging never gives.
    rank: u32,
}

/// A token of a run: its length and its id.
type RunToken = (u32, u32);

/// The tokens that merging gives.
#[derive(Debug, Clone)]
pub struct Reached {
    tokens: Vec<Token>,
    /// Those of each byte's runs, the shortest first; none where one is odd.
    runs: Vec<Vec<RunToken>>,
    /// A bit for each hash, modulo [`FILTER`], of a token that merging does not give; empty if there is none.
    unreached: Vec<u64>,
}

const FILTER: u64 = 1 << 16;

/// More odd tokens than a vocabulary is searched for.
const MOST_ODD: usize = 256;

impl Reached {
    /// Tables for merges of bytes, in the order of their ranks.
    ///
    /// Also returns the merges that are ever made: the last one of each token's own bytes. None if too many tokens
    /// are odd.
    pub fn new(
        vocab: &Vocab,
        bytes: &[u32; 256],
        list: &[Merge],
        table: &Merges,
    ) -> Option<(Self, Vec<Merge>)> {
        let unknown = Token { left: 0, right: 0, rank: NONE };
        let mut made = Self { tokens: vec![unknown; vocab.len()], runs: Vec::new(), unreached: Vec::new() };
        for &id in bytes.iter().filter(|&&id| id != MISSING) {
            made.tokens[id as usize].rank = 0;
        }
        let mut late = Vec::new();
        let mut is_kept = vec![false; list.len()];
        for (i, (&Merge { left, right, rank, product }, is_kept)) in list.iter().zip(&mut is_kept).enumerate()
        {
            if let Some(later) = list.get(i + 16) {
                table.seek(later.left, later.right);
                prefetch(&made.tokens[later.left as usize]);
                prefetch(&made.tokens[later.right as usize]);
            }
            if table.rank(left, right) != rank {
                continue;
            }
            let (a, b) = (made.tokens[left as usize], made.tokens[right as usize]);
            if a.rank == NONE || b.rank == NONE {
                late.push((left, right, product));
            } else if made.tokens[product as usize].rank == NONE && made.apart(table, left, right, rank + 1) {
                made.tokens[product as usize] = Token { left, right, rank: rank + 1 };
                *is_kept = true;
            }
        }
        let is_made = |id: u32| made.tokens[id as usize].rank != NONE;
        // A merge whose parts are made only later may still be one that is made.
        let (mut buffers, mut merged) = (Long::default(), Vec::new());
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
            let tokens: Vec<&[u8]> = odd.iter().map(|&id| vocab.bytes(id)).collect::<Option<_>>()?;
            let finder = AhoCorasick::builder().kind(Some(AhoCorasickKind::DFA)).build(tokens).ok()?;
            let has_odd = |id: u32| finder.is_match(vocab.bytes(id).unwrap_or_default());
            for (merge, is_kept) in list.iter().zip(&mut is_kept) {
                *is_kept |= has_odd(merge.product);
            }
        }
        let kept =
            list.iter().zip(&is_kept).filter(|&(_, &is_kept)| is_kept).map(|(&merge, _)| merge).collect();
        if made.tokens.iter().filter(|token| token.rank != NONE).count() < vocab.found() {
            made.unreached = vec![0; FILTER as usize / 64];
            for (id, token) in (0..).zip(&made.tokens) {
                if token.rank == NONE {
                    let hash = hash(vocab.bytes(id).unwrap_or_default()) % FILTER;
                    made.unreached[hash as usize / 64] |= 1 << (hash % 64);
                }
            }
        }
        made.runs = runs(vocab, &made.tokens);
        odd.iter()
            .filter_map(|&id| run_byte(vocab, id))
            .for_each(|byte| made.runs[usize::from(byte)].clear());
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

    /// Appends the ids of a run to `out`. False, and nothing is appended, if it must be merged: its byte has no token, or
    /// a token is odd.
    pub fn encode_run(&self, run: &[u8], table: &Merges, out: &mut Vec<u32>) -> bool {
        let Some(tokens) = run.first().map(|&byte| &self.runs[usize::from(byte)]) else { return true };
        // How many of the tokens have at most a length.
        let up_to = |length: usize| match tokens.last() {
            Some(&(longest, _)) if longest as usize <= length => tokens.len(),
            _ => tokens.partition_point(|&(of, _)| of as usize <= length),
        };
        let first = out.len();
        // By the lengths that remain; empty while there is none.
        let mut dead: Vec<bool> = Vec::new();
        let mut rest = run.len();
        let mut tried = up_to(rest);
        // Mostly it is the same two again.
        let mut apart = None;
        while rest > 0 {
            if let Some(&(length, id)) = tried.checked_sub(1).and_then(|i| tokens.get(i)) {
                let length = length as usize;
                let two = out[first..].last().map(|&last| (last, id));
                let is_apart = |(last, id)| self.apart(table, last, id, NONE);
                let is_dead = dead.get(rest - length) == Some(&true);
                if !is_dead && (two == apart || two.is_none_or(is_apart)) {
                    apart = two;
                    // The longest of all fits beside itself as long as there is room.
                    let is_again = two == Some((id, id)) && tried == tokens.len() && dead.is_empty();
                    let count = if is_again { rest / length } else { 1 };
                    out.extend(std::iter::repeat_n(id, count));
                    rest -= count * length;
                    tried = up_to(rest);
                } else {
                    tried -= 1;
                }
            } else {
                // Nothing fits here, but something does from a place before.
                dead.resize(run.len() + 1, false);
                dead[rest] = true;
                let number = |&last| tokens.iter().position(|&(_, id)| id == last);
                let Some(last) = out[first..].last().and_then(number) else { return false };
                out.pop();
                rest += tokens[last].0 as usize;
                tried = last;
            }
        }
        true
    }

    /// Appends what `read` reads.
    pub fn write(&self, out: &mut Writer) {
        out.words(&self.tokens.iter().flat_map(|t| [t.left, t.right, t.rank]).collect::<Vec<_>>());
        out.longs(&self.unreached);
        out.bytes(&self.runs.iter().map(|run| u8::from(run.is_empty())).collect::<Vec<_>>());
    }

    /// The tables that come next, of this vocabulary; none if they are not sound.
    pub fn read(from: &mut Reader, vocab: &Vocab) -> Option<Self> {
        let words = from.words()?;
        let (tokens, rest) = words.as_chunks();
        let (unreached, no_runs) = (from.longs()?, from.bytes()?);
        let is_there = |id: u32| (id as usize) < vocab.len();
        let all_there = tokens.iter().all(|&[left, right, _]| is_there(left) && is_there(right));
        let is_filter = [0, FILTER as usize / 64].contains(&unreached.len());
        if !rest.is_empty() || !is_filter || tokens.len() != vocab.len() || !all_there || no_runs.len() != 256
        {
            return None;
        }
        let tokens: Vec<_> = tokens.iter().map(|&[left, right, rank]| Token { left, right, rank }).collect();
        // A token's parts are made before it.
        let rank = |id: u32| tokens[id as usize].rank;
        let is_merged = |token: &&Token| token.rank != 0 && token.rank != NONE;
        if !tokens.iter().filter(is_merged).all(|t| rank(t.left).max(rank(t.right)) < t.rank) {
            return None;
        }
        let mut runs = runs(vocab, &tokens);
        runs.iter_mut().zip(no_runs).filter(|(_, no_run)| **no_run != 0).for_each(|(run, _)| run.clear());
        Some(Self { tokens, runs, unreached })
    }
}

/// The byte that a token is a run of.
fn run_byte(vocab: &Vocab, id: u32) -> Option<u8> {
    let (&first, rest) = vocab.bytes(id)?.split_first()?;
    rest.iter().all(|&byte| byte == first).then_some(first)
}

/// Of each byte's runs the tokens that are made, the shortest first.
fn runs(vocab: &Vocab, tokens: &[Token]) -> Vec<Vec<RunToken>> {
    let mut runs = vec![Vec::new(); 256];
    for (id, token) in (0..).zip(tokens) {
        if token.rank != NONE
            && let Some(byte) = run_byte(vocab, id)
        {
            runs[usize::from(byte)].push((vocab.length(id) as u32, id));
        }
    }
    runs.iter_mut().for_each(|run| run.sort_unstable());
    runs
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
        fn pruned_merges_and_runs_are_what_merging_gives(
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
            let merge = |(&((left, right), product), rank)| Merge { left, right, rank, product };
            let list: Vec<_> = ranked.iter().zip(0..).map(merge).collect();
            let numbered: Vec<_> = tokens.into_iter().zip(0..).collect();
            let vocab = Vocab::new(&numbered, |_| true).unwrap();
            let mut bytes = [MISSING; 256];
            (0..kinds).for_each(|k| bytes[usize::from(b'a') + k as usize] = k);
            let full = Merges::new(&list).unwrap();
            let (made, kept) = Reached::new(&vocab, &bytes, &list, &full).unwrap();
            let pruned = Merges::new(&kept).unwrap();

            let mut state = seed;
            let text: Vec<u8> = (0..length)
                .map(|_| {
                    state = fold(state ^ 0x1234_5678, 0x9e37_79b9_7f4a_7c15).wrapping_add(1);
                    b'a' + ((state >> 32) as u32 % kinds) as u8
                })
                .collect();
            let symbols: Vec<u32> = text.iter().map(|&b| bytes[usize::from(b)]).collect();
            let (mut list, mut expected, mut merged) = (Long::default(), Vec::new(), Vec::new());
            full.merge(&symbols, &mut list, &mut expected);
            pruned.merge(&symbols, &mut list, &mut merged);
            prop_assert_eq!(&merged, &expected);
            for kind in 0..kinds {
                let (mut expected, mut found) = (Vec::new(), vec![7]);
                full.merge(&vec![kind; length], &mut list, &mut expected);
                if made.encode_run(&vec![b'a' + kind as u8; length], &pruned, &mut found) {
                    prop_assert_eq!(&found[1..], &expected);
                } else {
                    prop_assert!(made.runs[usize::from(b'a') + kind as usize].is_empty() && found == [7]);
                }
            }
        }
    }
}

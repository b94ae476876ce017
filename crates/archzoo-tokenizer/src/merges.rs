//! Byte-pair merges: the pair of lowest rank first, the leftmost of equals.
//!
//! Whether a sequence of tokens is the one that merging gives can be told from its neighbouring pairs alone: it
//! is if merging each pair's bytes gives the pair back. For what happens inside two neighbours, and whether they
//! merge across their border, does not depend on the rest of the text. So a long piece is merged in windows that
//! overlap, and two windows are joined where both have the same two tokens side by side.

use archzoo_simd::{InstructionSet, multiversion};

use crate::cache_file::{Reader, Table, Writer};
use crate::error::{Error, Result};
use crate::vocab::MOST_IDS;

/// No rank: the pair does not merge.
pub const NONE: u32 = u32::MAX;
/// In place of a rank's product: each of its pairs has its own.
pub const TIED: u32 = u32::MAX;
const ID_BITS: u32 = 21;
const RANK_BITS: u32 = 21;
const EMPTY: u64 = u64::MAX;
/// Symbols of a long piece's first window.
const WINDOW: usize = 64;
const POSITION_BITS: u32 = 11;
/// Symbols that are merged without a heap, at most.
const MOST_LINEAR: usize = 1 << POSITION_BITS;

/// Two tokens that merge, and the rank of that.
pub type Merge = (u32, u32, u32);

/// Merges by pair.
#[derive(Debug, Clone)]
pub struct Merges {
    /// Left id, right id, rank; a power of two of slots, at most half full.
    slots: Vec<u64>,
    /// A bit for each hash of [`FILTER_BITS`] that some pair has: it tells most pairs without a merge, and stays in
    /// a nearer cache than the slots.
    filter: Vec<u64>,
    /// The id that a rank gives.
    products: Vec<u32>,
    /// Pairs of the ranks that give several, in order, and what each gives.
    tied: Vec<(u64, u32)>,
}

const FILTER_BITS: u32 = 20;

impl Merges {
    /// Merges, of which a later one for the same pair counts, and the id that each rank gives.
    pub fn new(merges: &[Merge], products: Vec<u32>) -> Result<Self> {
        if products.len() >= 1 << RANK_BITS {
            return Err(Error::unsupported(format!("more than {} merges", (1 << RANK_BITS) - 1)));
        }
        let size = (2 * merges.len() + 2).next_power_of_two();
        let filter = vec![0; (1 << FILTER_BITS) / 64];
        let mut table = Self { slots: vec![EMPTY; size], filter, products, tied: Vec::new() };
        for &(left, right, rank) in merges {
            debug_assert!(left.max(right) < MOST_IDS as u32 && (rank as usize) < table.products.len());
            let key = pair(left, right);
            let hash = hash(key);
            table.filter[(hash >> (70 - FILTER_BITS)) as usize] |= 1 << (hash >> (64 - FILTER_BITS) & 63);
            let mut at = table.home(hash);
            while table.slots[at] != EMPTY && table.slots[at] >> RANK_BITS != key {
                at = (at + 1) & (size - 1);
            }
            table.slots[at] = key << RANK_BITS | u64::from(rank);
        }
        Ok(table)
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        (hash >> 32) as usize & (self.slots.len() - 1)
    }

    /// Rank of a pair.
    #[inline(always)]
    pub fn rank(&self, left: u32, right: u32) -> u32 {
        let key = pair(left, right);
        let hash = hash(key);
        if self.filter[(hash >> (70 - FILTER_BITS)) as usize] >> (hash >> (64 - FILTER_BITS) & 63) & 1 == 0 {
            return NONE;
        }
        let mut at = self.home(hash);
        loop {
            let slot = self.slots[at];
            if slot >> RANK_BITS == key {
                return slot as u32 & ((1 << RANK_BITS) - 1);
            }
            if slot == EMPTY {
                return NONE;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    /// The same, where pairs (left, right, product) of the ranks whose product is [`TIED`] each have their own.
    #[must_use]
    pub fn with_ties(mut self, ties: impl IntoIterator<Item = (u32, u32, u32)>) -> Self {
        self.tied = ties.into_iter().map(|(left, right, product)| (pair(left, right), product)).collect();
        self.tied.sort_unstable();
        self
    }

    /// The id that a rank gives.
    pub fn product(&self, rank: u32) -> u32 {
        self.products[rank as usize]
    }

    /// The id that a pair of this rank gives.
    #[inline(always)]
    fn merged(&self, rank: u32, left: u32, right: u32) -> u32 {
        match self.products[rank as usize] {
            TIED => self.merged_tied(pair(left, right)),
            product => product,
        }
    }

    #[cold]
    fn merged_tied(&self, pair: u64) -> u32 {
        let found = self.tied.binary_search_by_key(&pair, |&(pair, _)| pair);
        found.map_or(TIED, |at| self.tied[at].1)
    }

    /// Appends to `out` what `symbols` merge to.
    pub fn merge(&self, symbols: &[u32], list: &mut List, out: &mut Vec<u32>) {
        if symbols.len() <= WINDOW {
            merge_linear(InstructionSet::current(), self, symbols, list);
            list.each(|id, _| out.push(id));
        } else {
            self.merge_long(symbols, list, out);
        }
    }

    /// Windows of a long piece, joined where they agree.
    fn merge_long(&self, symbols: &[u32], list: &mut List, out: &mut Vec<u32>) {
        let (mut joined, mut next) = (Tokens::default(), Tokens::default());
        let mut size = WINDOW;
        self.merge_from(symbols, 0, size, list, &mut joined);
        while joined.end < symbols.len() {
            // The next window starts on a border of the last one, some symbols and some tokens before its end.
            let reach = joined.end.saturating_sub(size / 8);
            let first = joined.starts.partition_point(|&start| start as usize <= reach) - 1;
            let first = first.min(joined.starts.len().saturating_sub(3));
            let start = joined.starts[first] as usize;
            self.merge_from(symbols, start, size, list, &mut next);
            if next.end > joined.end && (start == 0 || joined.join(first, &next)) {
                if start == 0 {
                    std::mem::swap(&mut joined, &mut next);
                }
                size = size.min(MOST_LINEAR);
            } else {
                size *= 2;
            }
        }
        out.extend_from_slice(&joined.ids);
    }

    /// Merges the window of `size` symbols from `start`.
    fn merge_from(&self, symbols: &[u32], start: usize, size: usize, list: &mut List, tokens: &mut Tokens) {
        let end = symbols.len().min(start + size);
        tokens.ids.clear();
        tokens.starts.clear();
        tokens.end = end;
        let symbols = &symbols[start..end];
        if symbols.len() <= MOST_LINEAR {
            merge_linear(InstructionSet::current(), self, symbols, list);
            list.each(|id, at| {
                tokens.ids.push(id);
                tokens.starts.push((start + at) as u32);
            });
        } else {
            self.merge_heap(symbols, start as u32, tokens);
        }
    }

    /// Any number of symbols, by a heap of pairs over a linked list.
    fn merge_heap(&self, symbols: &[u32], offset: u32, tokens: &mut Tokens) {
        use std::cmp::Reverse;
        use std::collections::BinaryHeap;

        let n = symbols.len();
        let mut ids = symbols.to_vec();
        // `after[i]` is the next living symbol, n for none; `before` likewise, NONE for none.
        let mut after: Vec<u32> = (1..=n as u32).collect();
        let mut before: Vec<u32> = (0..n as u32).map(|i| i.wrapping_sub(1)).collect();
        const DEAD: u32 = NONE;
        let mut heap: BinaryHeap<Reverse<(u32, u32)>> = (0..n.saturating_sub(1))
            .map(|i| Reverse((self.rank(ids[i], ids[i + 1]), i as u32)))
            .filter(|Reverse((rank, _))| *rank != NONE)
            .collect();
        while let Some(Reverse((rank, at))) = heap.pop() {
            let i = at as usize;
            let next = after[i] as usize;
            // A pair that has changed since it was pushed is stale.
            if ids[i] == DEAD || next >= n || self.rank(ids[i], ids[next]) != rank {
                continue;
            }
            ids[i] = self.merged(rank, ids[i], ids[next]);
            ids[next] = DEAD;
            after[i] = after[next];
            let following = after[next] as usize;
            if following < n {
                before[following] = at;
                let rank = self.rank(ids[i], ids[following]);
                if rank != NONE {
                    heap.push(Reverse((rank, at)));
                }
            }
            if before[i] != NONE {
                let rank = self.rank(ids[before[i] as usize], ids[i]);
                if rank != NONE {
                    heap.push(Reverse((rank, before[i])));
                }
            }
        }
        for (i, &id) in ids.iter().enumerate() {
            if id != DEAD {
                tokens.ids.push(id);
                tokens.starts.push(i as u32 + offset);
            }
        }
    }
}

impl Table for Merges {
    fn write(&self, out: &mut Writer) {
        out.longs(&self.slots);
        out.longs(&self.filter);
        out.words(&self.products);
        out.longs(&self.tied.iter().map(|&(pair, _)| pair).collect::<Vec<_>>());
        out.words(&self.tied.iter().map(|&(_, product)| product).collect::<Vec<_>>());
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let (slots, filter, products) = (from.longs()?, from.longs()?, from.words()?);
        let (pairs, tied) = (from.longs()?, from.words()?);
        let is_table = slots.len().is_power_of_two() && slots.contains(&EMPTY);
        let rank = |slot: u64| slot as usize & ((1 << RANK_BITS) - 1);
        let all_there = slots.iter().all(|&slot| slot == EMPTY || rank(slot) < products.len());
        let is_tied = pairs.len() == tied.len() && pairs.is_sorted();
        (is_table && all_there && is_tied && filter.len() == (1 << FILTER_BITS) / 64).then_some(Self {
            slots,
            filter,
            products,
            tied: pairs.into_iter().zip(tied).collect(),
        })
    }
}

/// Tokens, the symbols that they start on, and the end of the last.
#[derive(Default)]
struct Tokens {
    ids: Vec<u32>,
    starts: Vec<u32>,
    end: usize,
}

impl Tokens {
    /// Replaces what follows two tokens that both have side by side, from `first` on. False if there are none.
    fn join(&mut self, first: usize, next: &Tokens) -> bool {
        let (mut i, mut j) = (first, 0);
        while i + 1 < self.ids.len() && j + 1 < next.ids.len() {
            match self.starts[i].cmp(&next.starts[j]) {
                std::cmp::Ordering::Less => i += 1,
                std::cmp::Ordering::Greater => j += 1,
                std::cmp::Ordering::Equal => {
                    if self.bounds(i) == next.bounds(j) && self.bounds(i + 1) == next.bounds(j + 1) {
                        self.ids.truncate(i);
                        self.starts.truncate(i);
                        self.ids.extend_from_slice(&next.ids[j..]);
                        self.starts.extend_from_slice(&next.starts[j..]);
                        self.end = next.end;
                        return true;
                    }
                    i += 1;
                    j += 1;
                }
            }
        }
        false
    }

    /// Id, start and end of a token.
    fn bounds(&self, i: usize) -> (u32, u32, u32) {
        (self.ids[i], self.starts[i], self.starts.get(i + 1).map_or(self.end as u32, |&end| end))
    }
}

/// A linked list of at most [`MOST_LINEAR`] symbols that stay in place; kept from piece to piece.
pub struct List {
    ids: [u32; MOST_LINEAR],
    /// Rank of each symbol with the next one, and below it its position: the least key is the leftmost pair of
    /// the lowest rank.
    keys: [u32; MOST_LINEAR],
    before: [u16; MOST_LINEAR],
    after: [u16; MOST_LINEAR],
    len: usize,
}

impl Default for List {
    fn default() -> Self {
        Self {
            ids: [0; MOST_LINEAR],
            keys: [NONE; MOST_LINEAR],
            before: [0; MOST_LINEAR],
            after: [0; MOST_LINEAR],
            len: 0,
        }
    }
}

/// Keys compared side by side.
const LANES: usize = 16;
/// Keeps an index inside the arrays without a check.
const MASK: usize = MOST_LINEAR - 1;

impl List {
    #[inline(always)]
    fn fill(&mut self, merges: &Merges, symbols: &[u32]) {
        self.len = symbols.len().min(MOST_LINEAR);
        self.keys[..self.len.next_multiple_of(LANES)].fill(NONE);
        let mut last = 0;
        for (i, &id) in symbols.iter().enumerate().take(MOST_LINEAR) {
            self.ids[i] = id;
            self.before[i] = (i as u16).wrapping_sub(1);
            self.after[i] = i as u16 + 1;
            if i > 0 {
                self.keys[i - 1] = key(merges.rank(last, id), i - 1);
            }
            last = id;
        }
    }

    #[inline(always)]
    fn least(&self) -> u32 {
        let mut lanes = [NONE; LANES];
        for block in self.keys[..self.len.next_multiple_of(LANES)].as_chunks::<LANES>().0 {
            for (lane, &key) in lanes.iter_mut().zip(block) {
                *lane = (*lane).min(key);
            }
        }
        lanes.into_iter().fold(NONE, u32::min)
    }

    /// Makes the pair of this key one symbol. Returns the key of the pair right after if that is now the least.
    #[inline(always)]
    fn merge(&mut self, merges: &Merges, least: u32) -> Option<u32> {
        let at = least as usize & MASK;
        let next = usize::from(self.after[at]) & MASK;
        let following = usize::from(self.after[next]);
        let id = merges.merged(least >> POSITION_BITS, self.ids[at], self.ids[next]);
        self.ids[at] = id;
        self.keys[next] = NONE;
        self.after[at] = following as u16;
        let (mut right, mut left, mut after) = (NONE, NONE, NONE);
        if following < self.len {
            self.before[following & MASK] = at as u16;
            right = key(merges.rank(id, self.ids[following & MASK]), at);
            after = self.keys[following & MASK];
        }
        self.keys[at] = right;
        if at > 0 {
            let previous = usize::from(self.before[at]) & MASK;
            left = key(merges.rank(self.ids[previous], id), previous);
            self.keys[previous] = left;
        }
        let is_same = after >> POSITION_BITS == least >> POSITION_BITS;
        (is_same && after < right.min(left)).then_some(after)
    }

    /// Hands each symbol that is left, and where it starts, to `take`.
    #[inline(always)]
    fn each(&self, mut take: impl FnMut(u32, usize)) {
        let mut at = 0;
        while at < self.len {
            take(self.ids[at], at);
            at = usize::from(self.after[at]);
        }
    }
}

multiversion! {
    fn merge_linear(merges: &Merges, symbols: &[u32], list: &mut List) {
        list.fill(merges, symbols);
        loop {
            let mut least = list.least();
            if least == NONE {
                break;
            }
            // In a run of one symbol the next pair is often the next to merge, and need not be searched for.
            while let Some(next) = list.merge(merges, least) {
                least = next;
            }
        }
    }
}

#[inline(always)]
fn key(rank: u32, position: usize) -> u32 {
    if rank == NONE { NONE } else { rank << POSITION_BITS | position as u32 }
}

#[inline(always)]
fn hash(key: u64) -> u64 {
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[inline(always)]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << ID_BITS | u64::from(right)
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: the leftmost pair of lowest rank, again and again.
    fn naive(merges: &Merges, symbols: &[u32]) -> Vec<u32> {
        let mut ids = symbols.to_vec();
        loop {
            let ranks = ids.windows(2).enumerate().map(|(i, p)| (merges.rank(p[0], p[1]), i));
            match ranks.min() {
                Some((rank, i)) if rank != NONE => {
                    ids[i] = merges.merged(rank, ids[i], ids[i + 1]);
                    ids.remove(i + 1);
                }
                _ => return ids,
            }
        }
    }

    /// Merges over few symbols; with `backwards` parts may come from later merges, as no training makes them. So many
    /// neighbouring merges as `ties` have one rank.
    fn table(picks: &[(u32, u32)], symbols: u32, backwards: bool, ties: u32) -> Merges {
        let n = picks.len() as u32;
        let mut merges: Vec<_> = picks
            .iter()
            .zip(0..)
            .map(|(&(a, b), i)| {
                let known = symbols + if backwards { n } else { i };
                (a % known, b % known, i)
            })
            .collect();
        if ties == 1 {
            return Merges::new(&merges, (symbols..symbols + n).collect()).unwrap();
        }
        let mut seen = std::collections::HashSet::new();
        merges.retain(|&(a, b, _)| seen.insert((a, b)));
        let ranked: Vec<_> = merges.iter().map(|&(a, b, i)| (a, b, i / ties)).collect();
        let products = vec![TIED; (n / ties + 1) as usize];
        Merges::new(&ranked, products).unwrap().with_ties(merges.iter().map(|&(a, b, i)| (a, b, symbols + i)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn every_length_is_the_definition(
            picks in prop::collection::vec(any::<(u32, u32)>(), 0..60),
            backwards in any::<bool>(),
            ties in prop_oneof![2 => 1..2u32, 1 => 2..20u32],
            kinds in 1..4u32,
            length in prop_oneof![0..40usize, 100..150usize, 200..1500usize],
            seed in any::<u64>(),
        ) {
            let merges = table(&picks, kinds, backwards, ties);
            let mut state = seed;
            let symbols: Vec<u32> = (0..length)
                .map(|_| {
                    state = crate::vocab::fold(state ^ 0x1234_5678, 0x9e37_79b9_7f4a_7c15).wrapping_add(1);
                    (state >> 32) as u32 % kinds
                })
                .collect();
            let expected = naive(&merges, &symbols);
            let mut out = Vec::new();
            merges.merge(&symbols, &mut List::default(), &mut out);
            prop_assert_eq!(&out, &expected);
            let mut tokens = Tokens::default();
            merges.merge_heap(&symbols, 0, &mut tokens);
            prop_assert_eq!(&tokens.ids, &expected);
        }
    }
}

//! Byte-pair merges: the pair of lowest rank first, the leftmost of equals.
//!
//! Whether a sequence of tokens is the one that merging gives can be told from its neighbouring pairs alone: it
//! is if merging each pair's bytes gives the pair back. For what happens inside two neighbours, and whether they
//! merge across their border, does not depend on the rest of the text. So a long piece is merged in windows that
//! overlap, and two windows are joined where both have the same two tokens side by side.

use archzoo_simd::{InstructionSet, multiversion};

use crate::cache::prefetch;
use crate::cache_file::{Reader, Table, Writer};
use crate::error::{Error, Result};
use crate::vocab::MOST_IDS;

/// No rank: the pair does not merge.
pub const NONE: u32 = u32::MAX;
const ID_BITS: u32 = MOST_IDS.ilog2();
const RANK_BITS: u32 = 21;
const EMPTY: u64 = u64::MAX;
/// Symbols of a long piece's first window.
const WINDOW: usize = 64;
const POSITION_BITS: u32 = 11;
/// Symbols that are merged without a heap, at most.
const MOST_LINEAR: usize = 1 << POSITION_BITS;

/// Two tokens that merge to a third.
#[derive(Debug, Clone, Copy)]
pub struct Merge {
    /// The first.
    pub left: u32,
    /// The second.
    pub right: u32,
    /// The lowest is merged first, and of equal ones the leftmost.
    pub rank: u32,
    /// What they merge to.
    pub product: u32,
}

/// Merges by pair.
#[derive(Debug, Clone)]
pub struct Merges {
    /// Left id, right id, rank, then a word for the product; a power of two of such slots, at most half full.
    slots: Vec<u64>,
    /// A bit for each hash of [`FILTER_BITS`] that some pair has: it tells most pairs without a merge, and stays in
    /// a nearer cache than the slots.
    filter: Vec<u64>,
}

/// A pair, its rank, and its product.
type Slot = [u64; 2];

const FILTER_BITS: u32 = 20;
const MOST_RANKS: u32 = 1 << RANK_BITS;

impl Merges {
    /// Merges, of which a later one for the same pair counts.
    pub fn new(merges: &[Merge]) -> Result<Self> {
        if merges.iter().any(|merge| merge.rank >= MOST_RANKS - 1) {
            return Err(Error::unsupported(format!("more than {} merges", MOST_RANKS - 1)));
        }
        let size = (2 * merges.len() + 2).next_power_of_two();
        let mut slots: Vec<Slot> = vec![[EMPTY, 0]; size];
        let mut filter = vec![0; (1 << FILTER_BITS) / 64];
        for (i, merge) in merges.iter().enumerate() {
            if let Some(later) = merges.get(i + 16) {
                prefetch(&slots[home(hash(pair(later.left, later.right)), size)]);
            }
            debug_assert!(merge.left.max(merge.right).max(merge.product) < MOST_IDS as u32);
            let key = pair(merge.left, merge.right);
            let hash = hash(key);
            filter[(hash >> (70 - FILTER_BITS)) as usize] |= 1 << (hash >> (64 - FILTER_BITS) & 63);
            let mut at = home(hash, size);
            while slots[at][0] != EMPTY && slots[at][0] >> RANK_BITS != key {
                at = (at + 1) & (size - 1);
            }
            slots[at] = [key << RANK_BITS | u64::from(merge.rank), u64::from(merge.product)];
        }
        Ok(Self { slots: slots.into_flattened(), filter })
    }

    #[inline(always)]
    fn slots(&self) -> &[Slot] {
        self.slots.as_chunks().0
    }

    /// Starts to load the slot of a pair.
    #[inline(always)]
    pub fn prefetch(&self, left: u32, right: u32) {
        let slots = self.slots();
        prefetch(&slots[home(hash(pair(left, right)), slots.len())]);
    }

    /// Rank and product of a pair; [`NONE`] for both if it does not merge.
    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> (u32, u32) {
        let key = pair(left, right);
        let hash = hash(key);
        if self.filter[(hash >> (70 - FILTER_BITS)) as usize] >> (hash >> (64 - FILTER_BITS) & 63) & 1 == 0 {
            return (NONE, NONE);
        }
        let slots = self.slots();
        let mut at = home(hash, slots.len());
        loop {
            let [slot, product] = slots[at];
            if slot >> RANK_BITS == key {
                return (slot as u32 & (MOST_RANKS - 1), product as u32);
            }
            if slot == EMPTY {
                return (NONE, NONE);
            }
            at = (at + 1) & (slots.len() - 1);
        }
    }

    /// Rank of a pair.
    #[inline(always)]
    pub fn rank(&self, left: u32, right: u32) -> u32 {
        self.get(left, right).0
    }

    /// All merges, in no order.
    pub fn each(&self) -> impl Iterator<Item = Merge> {
        let id = |slot: u64, shift: u32| (slot >> shift) as u32 & (MOST_IDS as u32 - 1);
        self.slots().iter().filter(|slot| slot[0] != EMPTY).map(move |&[slot, product]| Merge {
            left: id(slot, ID_BITS + RANK_BITS),
            right: id(slot, RANK_BITS),
            rank: slot as u32 & (MOST_RANKS - 1),
            product: product as u32,
        })
    }

    /// Whether all ids are below a number.
    pub fn is_below(&self, count: usize) -> bool {
        self.each().all(|merge| (merge.left.max(merge.right).max(merge.product) as usize) < count)
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
            if ids[i] == DEAD || next >= n {
                continue;
            }
            let (now, product) = self.get(ids[i], ids[next]);
            if now != rank {
                continue;
            }
            ids[i] = product;
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
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let made = Self { slots: from.longs()?, filter: from.longs()? };
        let slots = made.slots();
        let is_table = slots.len().is_power_of_two() && slots.iter().any(|slot| slot[0] == EMPTY);
        (is_table && made.filter.len() == (1 << FILTER_BITS) / 64).then_some(made)
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
    /// What each symbol and the next one merge to.
    products: [u32; MOST_LINEAR],
    before: [u16; MOST_LINEAR],
    after: [u16; MOST_LINEAR],
    len: usize,
}

impl Default for List {
    fn default() -> Self {
        Self {
            ids: [0; MOST_LINEAR],
            keys: [NONE; MOST_LINEAR],
            products: [NONE; MOST_LINEAR],
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
        // All at once, for the same reason as in `merge`.
        symbols.windows(2).for_each(|pair| merges.prefetch(pair[0], pair[1]));
        let mut last = 0;
        for (i, &id) in symbols.iter().enumerate().take(MOST_LINEAR) {
            self.ids[i] = id;
            self.before[i] = (i as u16).wrapping_sub(1);
            self.after[i] = i as u16 + 1;
            if i > 0 {
                self.pair(merges, i - 1, last, id);
            }
            last = id;
        }
    }

    /// Looks up the symbol at a place and the next one. Returns their key.
    #[inline(always)]
    fn pair(&mut self, merges: &Merges, at: usize, left: u32, right: u32) -> u32 {
        let (rank, product) = merges.get(left, right);
        let key = if rank == NONE { NONE } else { rank << POSITION_BITS | at as u32 };
        (self.keys[at], self.products[at]) = (key, product);
        key
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
        let id = self.products[at];
        self.ids[at] = id;
        self.keys[next] = NONE;
        self.after[at] = following as u16;
        let previous = usize::from(self.before[at]) & MASK;
        // Both at once: a look at a pair ends in a branch that is often foreseen wrongly.
        merges.prefetch(self.ids[previous], id);
        let (mut right, mut left, mut after) = (NONE, NONE, NONE);
        if following < self.len {
            self.before[following & MASK] = at as u16;
            after = self.keys[following & MASK];
            right = self.pair(merges, at, id, self.ids[following & MASK]);
        } else {
            self.keys[at] = NONE;
        }
        if at > 0 {
            left = self.pair(merges, previous, self.ids[previous], id);
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
fn hash(key: u64) -> u64 {
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[inline(always)]
fn home(hash: u64, size: usize) -> usize {
    (hash >> 32) as usize & (size - 1)
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
                    ids[i] = merges.get(ids[i], ids[i + 1]).1;
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
        let mut seen = std::collections::HashSet::new();
        merges.retain(|&(a, b, _)| ties == 1 || seen.insert((a, b)));
        let list: Vec<_> = merges
            .iter()
            .map(|&(left, right, i)| Merge { left, right, rank: i / ties, product: symbols + i })
            .collect();
        Merges::new(&list).unwrap()
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

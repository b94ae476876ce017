//! Byte-pair merges: the pair of lowest rank first, the leftmost of equals.
//!
//! Whether a sequence of tokens is the one that merging gives can be told from its neighbouring pairs alone: it
//! is if merging each pair's bytes gives the pair back. For what happens inside two neighbours, and whether they
//! merge across their border, does not depend on the rest of the text. So a long piece is merged in windows that
//! overlap, and two windows are joined where both have the same two tokens side by side.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hint::select_unpredictable;

use archzoo_simd::{InstructionSet, multiversion};

use crate::cache::prefetch;
use crate::cache_file::{Reader, Table, Writer};
use crate::error::{Error, Result};
use crate::vocab::{ID_BITS, NO_ID};

/// No rank: the pair does not merge.
pub const NONE: u32 = u32::MAX;
const RANK_BITS: u32 = 21;
/// The ids where there is no pair: two, so that no id beside itself is taken for them.
const EMPTY: [u32; 2] = [u32::MAX, u32::MAX - 1];
/// Symbols of a window of a long piece, but for those that are wider because others do not agree.
const WINDOW: usize = SHORT;
/// Symbols of a window that follows one that agrees, at most.
const WIDE: usize = 1 << 11;
/// Symbols from the start of one stretch of a long piece to that of the next, at most; that one begins before this ends.
const STRETCH: usize = if cfg!(test) { 100 } else { 200 };
const OVERLAP: usize = 16;
/// Stretches that are merged before they are joined.
const STRETCHES: usize = if cfg!(test) { 2 } else { 64 };
/// Symbols before the end of the last window whose tokens are kept to join the next one.
const KEPT: usize = if cfg!(test) { WINDOW } else { 512 };

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

impl Merge {
    fn greatest(&self) -> u32 {
        self.left.max(self.right).max(self.product)
    }
}

/// Merges by pair.
#[derive(Debug, Clone)]
pub struct Merges {
    /// A power of two of them, and one that stays free.
    buckets: Vec<Bucket>,
    /// A bit for each hash of [`FILTER_BITS`] that some pair has: most pairs do not merge, and this tells it from a
    /// nearer cache than the buckets.
    filter: Vec<u64>,
    /// Rank and product of each pair of the [`FEW`] ids from the first one on: bytes mostly are among them.
    few: Vec<[u32; 2]>,
    first: u32,
}

const FILTER_BITS: u32 = 20;
const FEW: usize = 320;

/// Pairs whose hashes share a cache line.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
struct Bucket {
    lefts: [u32; PAIRS],
    rights: [u32; PAIRS],
    /// Of the first, a bit more: [`IS_OVER`].
    ranks: [u32; PAIRS],
    products: [u32; PAIRS],
}

/// Pairs of a bucket, at most.
const PAIRS: usize = 4;
const FREE: Bucket =
    Bucket { lefts: [EMPTY[0]; PAIRS], rights: [EMPTY[1]; PAIRS], ranks: [0; PAIRS], products: [0; PAIRS] };
/// Whether a pair that belongs to a bucket, or before, is behind it.
const IS_OVER: u32 = 1 << 31;
const MOST_RANKS: u32 = 1 << RANK_BITS;

impl Bucket {
    /// The slots that have a pair, as bits.
    #[inline(always)]
    fn find(&self, left: u32, right: u32) -> u32 {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{
                __m128i, _mm_and_si128, _mm_castsi128_ps, _mm_cmpeq_epi32, _mm_loadu_si128, _mm_movemask_ps,
                _mm_set1_epi32,
            };
            // From plain code the compiler makes bits one by one where it has registers for masks.
            // SAFETY: SSE2 is part of x86-64 and the loads are of 16 bytes that are there.
            unsafe {
                let is = |ids: &[u32; PAIRS], id: u32| -> __m128i {
                    _mm_cmpeq_epi32(_mm_loadu_si128(ids.as_ptr().cast()), _mm_set1_epi32(id as i32))
                };
                let both = _mm_and_si128(is(&self.lefts, left), is(&self.rights, right));
                _mm_movemask_ps(_mm_castsi128_ps(both)) as u32
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        (0..PAIRS).fold(0, |bits, i| bits | u32::from(self.lefts[i] == left && self.rights[i] == right) << i)
    }

    /// Whether a pair that belongs here, or before, is behind this bucket.
    #[inline(always)]
    fn is_over(&self) -> bool {
        self.ranks[0] & IS_OVER != 0
    }
}

impl Merges {
    /// Merges, of which a later one for the same pair counts.
    pub fn new(merges: &[Merge]) -> Result<Self> {
        if merges.iter().any(|merge| merge.rank >= MOST_RANKS - 1) {
            return Err(Error::unsupported(format!("more than {} merges", MOST_RANKS - 1)));
        }
        let size = ((2 * merges.len() + 2) / PAIRS).next_power_of_two();
        let mut made = Self {
            buckets: vec![FREE; size + 1],
            filter: vec![0; (1 << FILTER_BITS) / 64],
            few: Vec::new(),
            first: 0,
        };
        for (i, merge) in merges.iter().enumerate() {
            if let Some(later) = merges.get(i + 16) {
                prefetch(&made.buckets[home(hash(pair(later.left, later.right)), size)]);
            }
            debug_assert!(merge.greatest() < NO_ID);
            let hash = hash(pair(merge.left, merge.right));
            let (word, bit) = filter_bit(hash);
            made.filter[word] |= 1 << bit;
            let mut at = home(hash, size);
            let slot = loop {
                let bucket = &mut made.buckets[at];
                let found = bucket.find(merge.left, merge.right) | bucket.find(EMPTY[0], EMPTY[1]);
                if found != 0 {
                    break found.trailing_zeros() as usize;
                }
                bucket.ranks[0] |= IS_OVER;
                at = (at + 1) & (size - 1);
            };
            let bucket = &mut made.buckets[at];
            (bucket.lefts[slot], bucket.rights[slot]) = (merge.left, merge.right);
            bucket.ranks[slot] = bucket.ranks[slot] & IS_OVER | merge.rank;
            bucket.products[slot] = merge.product;
        }
        Ok(made.with_few())
    }

    fn with_few(mut self) -> Self {
        self.first = self.each().map(|merge| merge.left.min(merge.right)).min().unwrap_or(0);
        let mut few = vec![[NONE; 2]; FEW * FEW];
        self.each().for_each(|Merge { left, right, rank, product }| {
            let [left, right] = [left, right].map(|id| self.nth_few(id));
            if left.max(right) < FEW {
                few[left * FEW + right] = [rank, product];
            }
        });
        self.few = few;
        self
    }

    /// The number of an id among the few, or a larger one.
    #[inline(always)]
    fn nth_few(&self, id: u32) -> usize {
        id.wrapping_sub(self.first) as usize
    }

    /// The same as [`Self::get`] for a pair of the few.
    #[inline(always)]
    fn get_few(&self, left: u32, right: u32) -> (u32, u32) {
        let i = self.nth_few(left) * FEW + self.nth_few(right);
        self.few.get(i).copied().unwrap_or([NONE; 2]).into()
    }

    /// Number of buckets that pairs have.
    #[inline(always)]
    fn size(&self) -> usize {
        self.buckets.len() - 1
    }

    /// Starts to load where a pair would be. Returns the place.
    #[inline(always)]
    pub fn seek(&self, left: u32, right: u32) -> usize {
        let hash = hash(pair(left, right));
        let (word, bit) = filter_bit(hash);
        // Whether two symbols merge follows no pattern that a processor could foresee.
        let at =
            select_unpredictable(self.filter[word] >> bit & 1 == 1, home(hash, self.size()), self.size());
        prefetch(&self.buckets[at]);
        at
    }

    /// Rank and product of a pair at its place; [`NONE`] for both if it does not merge.
    #[inline(always)]
    fn get_at(&self, mut at: usize, left: u32, right: u32) -> (u32, u32) {
        loop {
            let bucket = &self.buckets[at];
            let found = bucket.find(left, right);
            let slot = found.trailing_zeros() as usize % PAIRS;
            let rank = bucket.ranks[slot] & !IS_OVER;
            let is_there = found != 0;
            if is_there | !bucket.is_over() {
                return (
                    select_unpredictable(is_there, rank, NONE),
                    select_unpredictable(is_there, bucket.products[slot], NONE),
                );
            }
            at = (at + 1) & (self.size() - 1);
        }
    }

    /// Rank and product of a pair; [`NONE`] for both if it does not merge.
    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> (u32, u32) {
        self.get_at(self.seek(left, right), left, right)
    }

    /// Rank of a pair.
    #[inline(always)]
    pub fn rank(&self, left: u32, right: u32) -> u32 {
        self.get(left, right).0
    }

    /// All merges, in no order.
    pub fn each(&self) -> impl Iterator<Item = Merge> {
        let merges = self.buckets.iter().flat_map(|bucket| {
            let Bucket { lefts, rights, ranks, products } = *bucket;
            (0..PAIRS).map(move |i| Merge {
                left: lefts[i],
                right: rights[i],
                rank: ranks[i] & !IS_OVER,
                product: products[i],
            })
        });
        merges.filter(|merge| [merge.left, merge.right] != EMPTY)
    }

    /// Whether all ids are below a number: to be asked of a table that was read.
    pub fn is_below(&self, count: usize) -> bool {
        // No iteration by `next` or `all`: over slots of buckets it is slow.
        self.each().fold(true, |all, merge| all & ((merge.greatest() as usize) < count))
    }

    /// Merges the symbols of several pieces.
    pub fn merge_each(&self, lists: &mut Lists, pieces: &mut impl Pieces) {
        merge_side_by_side(InstructionSet::current(), self, lists, pieces);
    }

    /// Appends to `out` what `symbols` merge to: windows of a long piece, joined where they agree.
    pub fn merge(&self, symbols: &[u32], long: &mut Long, out: &mut Vec<u32>) {
        let Long { lists, stretches, window } = long;
        let (mut joined, mut next) = (Tokens::default(), Tokens::default());
        let stride = (symbols.len() / BESIDE).clamp(WINDOW - OVERLAP, STRETCH);
        let count = 1 + symbols.len().saturating_sub(stride + OVERLAP).div_ceil(stride);
        let (mut size, mut failed, before) = (WINDOW, 0, out.len());
        for first in (0..count).step_by(STRETCHES) {
            // Where tokens are long, windows that start anywhere have too few in common.
            if failed > STRETCHES / 4 {
                break;
            }
            let these = first..count.min(first + STRETCHES);
            stretches.resize_with(stretches.len().max(these.len()), Stretch::default);
            let stretches = &mut stretches[..these.len()];
            for (i, stretch) in these.zip(&mut *stretches) {
                stretch.begin(i * stride, symbols.len().min((i + 1) * stride + OVERLAP));
            }
            self.merge_each(
                lists,
                &mut Stretches { symbols, stretches: &mut *stretches, next: 0, taken: None, window },
            );
            failed = 0;
            for Stretch { tokens, goal, .. } in stretches {
                failed += usize::from(tokens.end < *goal);
                if tokens.has_start() {
                    std::mem::swap(&mut joined, tokens);
                }
                while tokens.end > joined.end && !joined.join(joined.first_from(tokens), tokens) {
                    self.merge_on(symbols, &mut size, &mut joined, &mut next);
                }
            }
            // As long as no window had to be wider, none begins further back.
            if size == WINDOW {
                let done = joined.list.partition_point(|&(_, start)| start as usize + KEPT < joined.end);
                out.extend(joined.list.drain(..done).map(|(id, _)| id));
            }
        }
        while joined.end < symbols.len() {
            self.merge_on(symbols, &mut size, &mut joined, &mut next);
        }
        if joined.has_start() {
            out.truncate(before);
        }
        out.extend(joined.list.iter().map(|&(id, _)| id));
    }

    /// Joins one more window, which starts on a border of the last one, some symbols and some tokens before its end; or
    /// doubles the size where they do not agree.
    fn merge_on(&self, symbols: &[u32], size: &mut usize, joined: &mut Tokens, next: &mut Tokens) {
        let first = joined.border(*size / 8);
        // What is before the first token here may matter.
        let start = if first == 0 { 0 } else { joined.list[first].1 as usize };
        self.merge_from(symbols, start, *size, next);
        if next.end > joined.end && (start == 0 || joined.join(first, next)) {
            if start == 0 {
                std::mem::swap(joined, next);
            }
            *size = (*size).min(WIDE);
        } else {
            *size *= 2;
        }
    }

    /// Merges the window of `size` symbols from `start`, by a heap of pairs over a linked list.
    fn merge_from(&self, symbols: &[u32], start: usize, size: usize, tokens: &mut Tokens) {
        let end = symbols.len().min(start + size);
        tokens.clear();
        tokens.end = end;
        let symbols = &symbols[start..end];
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
                tokens.list.push((id, (start + i) as u32));
            }
        }
    }
}

impl Table for Merges {
    fn write(&self, out: &mut Writer) {
        let words = self.buckets.iter().flat_map(|bucket| {
            let Bucket { lefts, rights, ranks, products } = *bucket;
            [lefts, rights, ranks, products].into_iter().flatten()
        });
        out.words(&words.collect::<Vec<_>>());
        out.longs(&self.filter);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let (buckets, rest) = from.bytes()?.as_chunks::<{ size_of::<Bucket>() }>();
        let buckets = buckets.iter().map(|bucket| {
            let word = |i: usize| u32::from_le_bytes(bucket.as_chunks().0[i]);
            let [lefts, rights, ranks, products] =
                std::array::from_fn(|row| std::array::from_fn(|i| word(PAIRS * row + i)));
            Bucket { lefts, rights, ranks, products }
        });
        let made = Self { buckets: buckets.collect(), filter: from.longs()?, few: Vec::new(), first: 0 };
        let is_table = made.buckets.last() == Some(&FREE)
            && made.size().is_power_of_two()
            && made.buckets[..made.size()].iter().any(|bucket| !bucket.is_over())
            && made.each().fold(true, |all, merge| all & (merge.rank < MOST_RANKS - 1));
        let is_sound = is_table && rest.is_empty() && made.filter.len() == (1 << FILTER_BITS) / 64;
        is_sound.then(|| made.with_few())
    }
}

/// Tokens, each with the symbol that it starts on, and the end of the last.
#[derive(Default)]
struct Tokens {
    list: Vec<(u32, u32)>,
    end: usize,
}

impl Tokens {
    fn clear(&mut self) {
        self.list.clear();
        self.end = 0;
    }

    /// Whether the first symbol of a piece is there.
    fn has_start(&self) -> bool {
        self.list.first().is_some_and(|&(_, start)| start == 0)
    }

    /// The token that the next window starts on: `back` symbols and some tokens before the end, as these may merge with
    /// what follows.
    fn border(&self, back: usize) -> usize {
        let last = self.end.saturating_sub(back);
        let first = self.list.iter().rposition(|&(_, start)| start as usize <= last).unwrap_or(0);
        first.min(self.list.len().saturating_sub(3))
    }

    /// The first token that starts where others do, or behind.
    fn first_from(&self, others: &Tokens) -> usize {
        let begin = others.list.first().map_or(0, |&(_, start)| start);
        self.list.partition_point(|&(_, start)| start < begin)
    }

    /// Appends tokens and where they start, counted from `offset`.
    #[inline(always)]
    fn extend(&mut self, tokens: impl Iterator<Item = (u32, usize)>, offset: usize) {
        self.list.extend(tokens.map(|(id, at)| (id, (offset + at) as u32)));
    }

    /// Replaces what follows two tokens that both have side by side, from `first` on. False if there are none.
    fn join(&mut self, first: usize, next: &Tokens) -> bool {
        let (mut i, mut j) = (first, 0);
        while i + 1 < self.list.len() && j + 1 < next.list.len() {
            match self.list[i].1.cmp(&next.list[j].1) {
                std::cmp::Ordering::Less => i += 1,
                std::cmp::Ordering::Greater => j += 1,
                std::cmp::Ordering::Equal => {
                    if self.bounds(i) == next.bounds(j) && self.bounds(i + 1) == next.bounds(j + 1) {
                        self.list.truncate(i);
                        self.list.extend_from_slice(&next.list[j..]);
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
        let (id, start) = self.list[i];
        (id, start, self.list.get(i + 1).map_or(self.end as u32, |&(_, end)| end))
    }
}

/// Symbols of a list, and its two ends.
const PLACES: usize = 64;
/// Symbols of a piece that is merged beside others, at most.
pub const SHORT: usize = PLACES - 2;
/// Keeps an index inside the arrays without a check.
const MASK: usize = PLACES - 1;
/// The places before and after each.
const LINKS: [[u8; PLACES]; 2] = {
    let mut links = [[0; PLACES]; 2];
    let mut at = 0;
    while at < PLACES {
        links[0][at] = (at + MASK) as u8 & MASK as u8;
        links[1][at] = (at + 1) as u8;
        at += 1;
    }
    links
};

/// A linked list of symbols that stay in place, between two ends that merge with nothing; kept from piece to piece.
pub struct List {
    ids: [u32; PLACES],
    /// Rank of each symbol with the next one, and below it its position: the least key is the leftmost pair of
    /// the lowest rank.
    keys: [u32; PLACES],
    /// What each symbol and the next one merge to.
    products: [u32; PLACES],
    before: [u8; PLACES],
    after: [u8; PLACES],
    len: usize,
    /// Whether all pairs of the symbols that it starts with are in the table of few ids.
    all_few: bool,
}

impl Default for List {
    fn default() -> Self {
        let [before, after] = LINKS;
        let (ids, keys, products) = ([NO_ID; PLACES], [NONE; PLACES], [NONE; PLACES]);
        Self { ids, keys, products, before, after, len: 0, all_few: false }
    }
}

/// A merge of which what the new symbol and its neighbours merge to is still to be found.
#[derive(Clone, Copy)]
struct Begun {
    at: usize,
    before: usize,
    after: usize,
    /// Where the two pairs would be.
    places: [usize; 2],
}

impl List {
    /// Takes new symbols, of which no neighbours are merged yet.
    #[inline(always)]
    fn start(&mut self, merges: &Merges, symbols: &[u32]) {
        self.len = symbols.len().min(SHORT);
        self.all_few = symbols.iter().fold(0, |most, &id| merges.nth_few(id).max(most)) < FEW;
        if !self.all_few {
            // All at once, so that they load beside each other.
            symbols.windows(2).for_each(|pair| _ = merges.seek(pair[0], pair[1]));
        }
        self.ids[1..=self.len].copy_from_slice(&symbols[..self.len]);
        let end = self.len + 1;
        self.ids[end] = NO_ID;
        self.keys[self.len..].fill(NONE);
        [self.before, self.after] = LINKS;
    }

    /// Looks up the pairs of new symbols.
    #[inline(always)]
    fn look_up(&mut self, merges: &Merges) {
        for i in 1..self.len {
            let (left, right) = (self.ids[i], self.ids[i + 1]);
            let (rank, product) =
                if self.all_few { merges.get_few(left, right) } else { merges.get(left, right) };
            self.keep(i, rank, product);
        }
    }

    /// Keeps what a symbol and the next one merge to.
    #[inline(always)]
    fn keep(&mut self, at: usize, rank: u32, product: u32) {
        let key = select_unpredictable(rank == NONE, NONE, rank << PLACES.ilog2() | at as u32);
        (self.keys[at], self.products[at]) = (key, product);
    }

    /// In steps that a compiler makes vectors of.
    #[inline(always)]
    fn least(&self) -> u32 {
        let half: [u32; PLACES / 2] = std::array::from_fn(|i| self.keys[i].min(self.keys[i + PLACES / 2]));
        let quarter: [u32; PLACES / 4] = std::array::from_fn(|i| half[i].min(half[i + PLACES / 4]));
        quarter.into_iter().fold(NONE, u32::min)
    }

    /// Makes the pair of this key one symbol.
    #[inline(always)]
    fn begin(&mut self, merges: &Merges, least: u32) -> Begun {
        let at = least as usize & MASK;
        let next = usize::from(self.after[at]) & MASK;
        let after = usize::from(self.after[next]) & MASK;
        let before = usize::from(self.before[at]) & MASK;
        self.ids[at] = self.products[at];
        self.keys[next] = NONE;
        self.after[at] = after as u8;
        self.before[after] = at as u8;
        // Both at once, so that they load beside each other, and while other lists go on.
        let places =
            [merges.seek(self.ids[before], self.ids[at]), merges.seek(self.ids[at], self.ids[after])];
        Begun { at, before, after, places }
    }

    /// Looks up the pairs of the new symbol.
    #[inline(always)]
    fn finish(&mut self, merges: &Merges, begun: Begun) {
        let Begun { at, before, after, places } = begun;
        let (rank, product) = merges.get_at(places[1], self.ids[at], self.ids[after]);
        self.keep(at, rank, product);
        let (rank, product) = merges.get_at(places[0], self.ids[before], self.ids[at]);
        self.keep(before, rank, product);
    }

    /// Each symbol that is left, and where it starts.
    #[inline(always)]
    fn tokens(&self) -> impl Iterator<Item = (u32, usize)> {
        let mut at = 1;
        std::iter::from_fn(move || {
            let start = at - 1;
            (at <= self.len).then(|| {
                at = usize::from(self.after[at & MASK]);
                (self.ids[start + 1], start)
            })
        })
    }
}

/// What merging a long piece needs.
#[derive(Default)]
pub struct Long {
    lists: Lists,
    stretches: Vec<Stretch>,
    window: Tokens,
}

/// A part of a long piece, merged window by window, up to one that does not agree with the windows before.
#[derive(Default)]
struct Stretch {
    tokens: Tokens,
    /// Where it should end.
    goal: usize,
    /// Where the window that is merged starts.
    start: usize,
    /// How many symbols before the end of the others it starts, at least.
    back: usize,
}

/// What it is at first, and after a window that agrees; else it is doubled, as far as this.
const BACK: usize = WINDOW / 8;
const MOST_BACK: usize = 4 * BACK;

impl Stretch {
    fn begin(&mut self, start: usize, goal: usize) {
        self.tokens.clear();
        (self.start, self.goal, self.back) = (start, goal, BACK);
    }

    /// The end of the window that is merged.
    fn end(&self) -> usize {
        self.goal.min(self.start + WINDOW)
    }
}

/// Stretches on their way through [`Merges::merge_each`].
struct Stretches<'a> {
    symbols: &'a [u32],
    stretches: &'a mut [Stretch],
    /// The next to begin.
    next: usize,
    /// That of which a window was just taken, if it goes on.
    taken: Option<usize>,
    window: &'a mut Tokens,
}

impl Pieces for Stretches<'_> {
    fn next(&mut self, symbols: &mut Vec<u32>) -> Option<usize> {
        let i = self.taken.take().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        });
        let stretch = self.stretches.get(i)?;
        symbols.clear();
        symbols.extend_from_slice(&self.symbols[stretch.start..stretch.end()]);
        Some(i)
    }

    fn take(&mut self, i: usize, tokens: impl Iterator<Item = (u32, usize)>) {
        let stretch = &mut self.stretches[i];
        self.window.clear();
        self.window.extend(tokens, stretch.start);
        self.window.end = stretch.end();
        let all = &mut stretch.tokens;
        if all.list.is_empty() {
            std::mem::swap(all, self.window);
        } else if self.window.end > all.end && all.join(all.border(stretch.back), self.window) {
            stretch.back = BACK;
        } else {
            stretch.back *= 2;
        }
        if all.end < stretch.goal && stretch.back <= MOST_BACK {
            stretch.start = all.list[all.border(stretch.back)].1 as usize;
            self.taken = Some(i);
        }
    }
}

/// Pieces to merge.
pub trait Pieces {
    /// Puts the symbols of the next piece, at most [`SHORT`], in place of others. None if there is no more, unless one
    /// that is taken later goes on.
    fn next(&mut self, symbols: &mut Vec<u32>) -> Option<usize>;

    /// Takes what the symbols of a piece merge to, and the symbols that each starts on.
    fn take(&mut self, piece: usize, tokens: impl Iterator<Item = (u32, usize)>);
}

/// Pieces that are merged side by side.
const BESIDE: usize = 8;

/// What merging several pieces needs.
#[derive(Default)]
pub struct Lists {
    lists: [List; BESIDE],
    symbols: Vec<u32>,
}

multiversion! {
    /// While a bucket is loaded that one piece's merge needs, the others are merged.
    fn merge_side_by_side<P: Pieces>(merges: &Merges, lists: &mut Lists, pieces: &mut P) {
        let Lists { lists, symbols } = lists;
        let mut busy = 0;
        let mut order: [usize; BESIDE] = std::array::from_fn(|i| i);
        let mut of = [0; BESIDE];
        // None for new symbols.
        let mut begun = [None; BESIDE];
        for i in 0..BESIDE {
            let Some(piece) = pieces.next(symbols) else { break };
            lists[i].start(merges, symbols);
            (of[i], busy) = (piece, i + 1);
        }
        while busy > 0 {
            for &i in &order[..busy] {
                match begun[i] {
                    Some(begun) => lists[i].finish(merges, begun),
                    None => lists[i].look_up(merges),
                }
            }
            let mut nth = 0;
            while nth < busy {
                let i = order[nth];
                let list = &mut lists[i];
                let least = list.least();
                if least != NONE {
                    begun[i] = Some(list.begin(merges, least));
                    nth += 1;
                    continue;
                }
                pieces.take(of[i], list.tokens());
                begun[i] = None;
                if let Some(piece) = pieces.next(symbols) {
                    list.start(merges, symbols);
                    of[i] = piece;
                    nth += 1;
                } else {
                    busy -= 1;
                    order.swap(nth, busy);
                }
            }
        }
    }
}

#[inline(always)]
fn hash(key: u64) -> u64 {
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The word of a hash in the filter, and its bit there.
#[inline(always)]
fn filter_bit(hash: u64) -> (usize, u64) {
    ((hash >> (70 - FILTER_BITS)) as usize, hash >> (64 - FILTER_BITS) & 63)
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
    use std::collections::HashMap;

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

    struct Each<'a> {
        pieces: &'a [Vec<u32>],
        next: usize,
        merged: Vec<Option<Vec<u32>>>,
    }

    impl Pieces for Each<'_> {
        fn next(&mut self, symbols: &mut Vec<u32>) -> Option<usize> {
            symbols.clear();
            symbols.extend(self.pieces.get(self.next)?);
            self.next += 1;
            Some(self.next - 1)
        }

        fn take(&mut self, piece: usize, tokens: impl Iterator<Item = (u32, usize)>) {
            assert_eq!(self.merged[piece].replace(tokens.map(|(id, _)| id).collect()), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn pairs_are_those_of_the_list(
            picks in prop::collection::vec((0..40u32, 0..40u32), 0..800),
            first in prop_oneof![Just(0), 0..400u32, Just(NO_ID - 1000)],
            spread in prop_oneof![Just(1), Just(10), Just(20)],
        ) {
            let list: Vec<_> = picks
                .iter()
                .zip(0..)
                .map(|(&(left, right), rank)| Merge {
                    left: first + left * spread,
                    right: first + right * spread,
                    rank,
                    product: rank,
                })
                .collect();
            let expected: HashMap<_, _> =
                list.iter().map(|merge| ((merge.left, merge.right), (merge.rank, merge.product))).collect();
            let made = Merges::new(&list).unwrap();
            let mut out = Writer::default();
            made.write(&mut out);
            let read = Merges::read(&mut Reader(&out.0)).unwrap();
            for merges in [made, read] {
                let each: HashMap<_, _> =
                    merges.each().map(|merge| ((merge.left, merge.right), (merge.rank, merge.product))).collect();
                prop_assert_eq!(&each, &expected);
                for (left, right) in (0..40).flat_map(|left| (0..40).map(move |right| (left, right))) {
                    let (left, right) = (first + left * spread, first + right * spread);
                    let found = expected.get(&(left, right)).copied().unwrap_or((NONE, NONE));
                    prop_assert_eq!(merges.get(left, right), found);
                    if merges.nth_few(left).max(merges.nth_few(right)) < FEW {
                        prop_assert_eq!(merges.get_few(left, right), found);
                    }
                }
                prop_assert_eq!(merges.get(u32::MAX, u32::MAX), (NONE, NONE));
                prop_assert_eq!(merges.get(NO_ID, first), (NONE, NONE));
                prop_assert_eq!(merges.get(first, NO_ID), (NONE, NONE));
            }
        }

        #[test]
        fn pieces_beside_each_other_are_the_definition(
            picks in prop::collection::vec(any::<(u32, u32)>(), 0..60),
            backwards in any::<bool>(),
            ties in prop_oneof![2 => 1..2u32, 1 => 2..20u32],
            kinds in prop_oneof![1..4u32, Just(2 * FEW as u32)],
            pieces in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..=SHORT), 0..12),
        ) {
            let merges = table(&picks, kinds, backwards, ties);
            // Such that most symbols have merges.
            let known = |pick: u32| match picks.len() as u32 {
                count if pick & 1 == 1 && count > 0 => picks[(pick >> 1) as usize % count as usize].0 % kinds,
                _ => pick % kinds,
            };
            let pieces: Vec<Vec<u32>> =
                pieces.into_iter().map(|piece| piece.into_iter().map(known).collect()).collect();
            let mut each = Each { pieces: &pieces, next: 0, merged: vec![None; pieces.len()] };
            let mut lists = Lists::default();
            // The lists have been used before.
            for _ in 0..2 {
                (each.next, each.merged) = (0, vec![None; pieces.len()]);
                merges.merge_each(&mut lists, &mut each);
                for (piece, merged) in pieces.iter().zip(&each.merged) {
                    prop_assert_eq!(merged.as_ref(), Some(&naive(&merges, piece)));
                }
            }
        }

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
            merges.merge(&symbols, &mut Long::default(), &mut out);
            prop_assert_eq!(&out, &expected);
            let mut tokens = Tokens::default();
            merges.merge_from(&symbols, 0, symbols.len(), &mut tokens);
            prop_assert_eq!(tokens.list.iter().map(|&(id, _)| id).collect::<Vec<_>>(), expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        /// After text whose windows agree, so that its tokens are done with, a run of which tokens are so long that
        /// they depend on more than is kept.
        #[test]
        fn long_tokens_after_short_ones_are_the_definition(
            (levels, kinds) in (6..9u32, 2..5u32),
            picks in prop::collection::vec(any::<(u32, u32)>(), 0..20),
            noise in prop::collection::vec(any::<u32>(), 250..400),
            (run, rest) in (400..1000usize, 0..100usize),
            backwards in any::<bool>(),
        ) {
            let doubled: Vec<_> = (0..levels).map(|i| if i == 0 { (0, 0) } else { (kinds + i - 1, kinds + i - 1) }).collect();
            let merges = table(&[doubled, picks].concat(), kinds, backwards, 1);
            let noise: Vec<_> = noise.into_iter().map(|pick| 1 + pick % (kinds - 1)).collect();
            let symbols = [&noise[..], &vec![0; run], &noise[..rest]].concat();
            let mut out = vec![7];
            merges.merge(&symbols, &mut Long::default(), &mut out);
            prop_assert_eq!(&out[1..], &naive(&merges, &symbols));
        }
    }
}

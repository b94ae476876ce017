//! The longest token that a text starts with, by a double-array trie.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// A slot per node: its label (a byte, and a bit that says the slot is taken), whether it has a token, and the base of
/// its children. The child for a byte is at the base xor the byte; no two nodes share a base.
#[derive(Debug, Clone)]
pub struct Trie {
    slots: Vec<u32>,
    /// Of slots that have a token. Only the last one's is looked at, so that they would be in the slots' way.
    ids: Vec<u32>,
    root: u32,
}

const LABEL: u32 = (1 << 9) - 1;
const TAKEN: u32 = 1 << 8;
const HAS_TOKEN: u32 = 1 << 9;
const BASE_SHIFT: u32 = 10;
const MOST_SLOTS: usize = 1 << (32 - BASE_SHIFT);
/// Slots of a block: the children of a node are in one.
const BLOCK: usize = 256;
/// Blocks that are searched for room.
const OPEN: usize = 4;
/// A block with fewer free slots is done: what fits is long to find.
const FEW: usize = 24;

impl Trie {
    /// A trie of tokens, no two alike and none empty, each with its id.
    pub fn new(tokens: &[(&[u8], u32)]) -> Result<Self> {
        let mut order: Vec<Entry> =
            tokens.iter().zip(0..).map(|((token, _), i)| Entry::new(token, i)).collect();
        let bytes = |entry: &Entry| tokens[entry.index as usize].0;
        order.par_sort_unstable_by(|a, b| a.start.cmp(&b.start).then_with(|| bytes(a).cmp(bytes(b))));
        // Block 0 stays empty: it has the children of leaves.
        let mut builder = Builder {
            slots: vec![0; BLOCK],
            ids: vec![0; BLOCK],
            blocks: vec![Room::FULL],
            open: Vec::new(),
            labels: Vec::new(),
        };
        let mut root = 0;
        let mut nodes = vec![Node { first: 0, last: order.len(), depth: 0, slot: None }];
        let mut children: Vec<(u8, usize, usize)> = Vec::new();
        while let Some(Node { first, last, depth, slot }) = nodes.pop() {
            let (mut start, mut token) = (first, None);
            if first < last && order[first].length as usize == depth {
                token = Some(tokens[order[first].index as usize].1);
                start += 1;
            }
            children.clear();
            let byte_of = |entry: &Entry| match depth {
                0..8 => entry.start.to_be_bytes()[depth],
                _ => bytes(entry)[depth],
            };
            while start < last {
                let byte = byte_of(&order[start]);
                let has_byte = |entry: &Entry| byte_of(entry) == byte;
                // Most nodes have one child.
                let is_only = has_byte(&order[last - 1]);
                let end = if is_only { last } else { start + order[start..last].partition_point(has_byte) };
                children.push((byte, start, end));
                start = end;
            }
            let base = if children.is_empty() { 0 } else { builder.place(&children) };
            if builder.slots.len() > MOST_SLOTS {
                return Err(Error::unsupported(format!("a vocabulary with more than {MOST_SLOTS} prefixes")));
            }
            match slot {
                Some(slot) => {
                    builder.slots[slot] |= (base as u32) << BASE_SHIFT;
                    if let Some(id) = token {
                        builder.slots[slot] |= HAS_TOKEN;
                        builder.ids[slot] = id;
                    }
                }
                None => root = base as u32,
            }
            for &(byte, first, last) in &children {
                let slot = base ^ usize::from(byte);
                builder.slots[slot] = TAKEN | u32::from(byte);
                nodes.push(Node { first, last, depth: depth + 1, slot: Some(slot) });
            }
        }
        Ok(Self { slots: builder.slots, ids: builder.ids, root })
    }

    /// The longest token that `text` starts with, and its length; 0 for none.
    #[inline(always)]
    pub fn longest(&self, text: &[u8]) -> (u32, usize) {
        let (mut slot, mut length) = (0, 0);
        self.walk(text, |at, end| (slot, length) = (at, end));
        (self.ids[slot], length)
    }

    /// Calls `take` with every token that `text` starts with and its length, the shortest first.
    #[inline(always)]
    pub fn prefixes(&self, text: &[u8], mut take: impl FnMut(u32, usize)) {
        self.walk(text, |slot, length| take(self.ids[slot], length));
    }

    /// The slots and lengths of the tokens that `text` starts with.
    #[inline(always)]
    fn walk(&self, text: &[u8], mut take: impl FnMut(usize, usize)) {
        let mut base = self.root;
        for (i, &byte) in text.iter().enumerate() {
            let at = (base ^ u32::from(byte)) as usize;
            let slot = self.slots[at];
            if slot & LABEL != TAKEN | u32::from(byte) {
                return;
            }
            if slot & HAS_TOKEN != 0 {
                take(at, i + 1);
            }
            base = slot >> BASE_SHIFT;
        }
    }
}

struct Node {
    /// Its tokens, in order.
    first: usize,
    last: usize,
    depth: usize,
    /// None for the root.
    slot: Option<usize>,
}

/// A token to be sorted.
struct Entry {
    /// Its first bytes, the first one highest.
    start: u64,
    length: u32,
    index: u32,
}

impl Entry {
    fn new(token: &[u8], index: u32) -> Self {
        let mut padded = [0; 8];
        let length = token.len().min(8);
        padded[..length].copy_from_slice(&token[..length]);
        Self { start: u64::from_be_bytes(padded), length: token.len() as u32, index }
    }
}

/// Free slots and free bases of a block, a bit each.
#[derive(Clone, Copy)]
struct Room {
    slots: [u64; 4],
    bases: [u64; 4],
}

impl Room {
    const FULL: Self = Self { slots: [0; 4], bases: [0; 4] };
    const EMPTY: Self = Self { slots: [u64::MAX; 4], bases: [u64::MAX; 4] };

    /// Number of free slots.
    fn free(&self) -> usize {
        self.slots.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// A base whose slots for all labels are free.
    fn base(&self, labels: &[u8]) -> Option<usize> {
        if let [label] = labels {
            return self.base_of_one(*label);
        }
        if self.free() < labels.len() {
            return None;
        }
        let mut fit = self.bases;
        for &label in labels {
            let free = permuted(self.slots, label);
            for (fit, free) in fit.iter_mut().zip(free) {
                *fit &= free;
            }
        }
        bits(fit).next()
    }

    fn base_of_one(&self, label: u8) -> Option<usize> {
        let free = |&base: &usize| self.bases[base / 64] >> (base % 64) & 1 == 1;
        bits(self.slots).map(|slot| slot ^ usize::from(label)).find(free)
    }
}

/// The places of bits that are set.
fn bits(words: [u64; 4]) -> impl Iterator<Item = usize> {
    words.into_iter().enumerate().flat_map(|(i, word)| {
        std::iter::successors(Some(word), |w| Some(w & w.wrapping_sub(1)))
            .take_while(|&w| w != 0)
            .map(move |w| 64 * i + w.trailing_zeros() as usize)
    })
}

/// Bit i of the result is bit `i ^ label`.
fn permuted(bits: [u64; 4], label: u8) -> [u64; 4] {
    const MASKS: [u64; 6] = [
        0x5555_5555_5555_5555,
        0x3333_3333_3333_3333,
        0x0f0f_0f0f_0f0f_0f0f,
        0x00ff_00ff_00ff_00ff,
        0x0000_ffff_0000_ffff,
        0x0000_0000_ffff_ffff,
    ];
    let mut out = [0; 4];
    for (i, out) in out.iter_mut().enumerate() {
        let mut word = bits[i ^ usize::from(label >> 6)];
        for (step, mask) in MASKS.into_iter().enumerate() {
            if label >> step & 1 == 1 {
                let shift = 1 << step;
                word = (word >> shift & mask) | (word & mask) << shift;
            }
        }
        *out = word;
    }
    out
}

struct Builder {
    slots: Vec<u32>,
    ids: Vec<u32>,
    blocks: Vec<Room>,
    /// Blocks with room.
    open: Vec<usize>,
    /// A buffer.
    labels: Vec<u8>,
}

impl Builder {
    /// A base for these children, whose slots are then taken.
    fn place(&mut self, children: &[(u8, usize, usize)]) -> usize {
        self.labels.clear();
        self.labels.extend(children.iter().map(|&(byte, ..)| byte));
        let labels = &self.labels;
        let found = self.open.iter().find_map(|&block| Some((block, self.blocks[block].base(labels)?)));
        let (block, base) = found.unwrap_or_else(|| {
            let block = self.blocks.len();
            self.blocks.push(Room::EMPTY);
            self.slots.resize(self.slots.len() + BLOCK, 0);
            self.ids.resize(self.slots.len(), 0);
            if self.open.len() == OPEN {
                self.open.remove(0);
            }
            self.open.push(block);
            (block, 0)
        });
        let room = &mut self.blocks[block];
        room.bases[base / 64] &= !(1 << (base % 64));
        for &label in labels {
            let slot = base ^ usize::from(label);
            room.slots[slot / 64] &= !(1 << (slot % 64));
        }
        if room.free() < FEW {
            self.open.retain(|&open| open != block);
        }
        BLOCK * block + base
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn longest_is_that_of_a_search(
            tokens in prop::collection::btree_set(prop::collection::vec(prop_oneof![4 => 0..3u8, 1 => any::<u8>()], 1..9), 0..400),
            text in prop::collection::vec(prop_oneof![4 => 0..3u8, 1 => any::<u8>()], 0..200),
        ) {
            let tokens: BTreeSet<Vec<u8>> = tokens;
            let listed: Vec<(&[u8], u32)> = tokens.iter().rev().map(Vec::as_slice).zip(0..).collect();
            let search = |text: &[u8], below: usize| {
                listed.iter().filter(|(t, _)| t.len() < below && text.starts_with(t)).max_by_key(|(t, _)| t.len())
            };
            let trie = Trie::new(&listed).unwrap();
            for start in 0..text.len() {
                let expected = search(&text[start..], usize::MAX).map_or((0, 0), |(t, id)| (*id, t.len()));
                prop_assert_eq!(trie.longest(&text[start..]), expected);
                let mut found = Vec::new();
                trie.prefixes(&text[start..], |id, length| found.push((length, id)));
                let lengths = 1..=text.len() - start;
                let all = lengths.filter_map(|n| search(&text[start..start + n], n + 1).filter(|(t, _)| t.len() == n));
                prop_assert_eq!(found, all.map(|(t, id)| (t.len(), *id)).collect::<Vec<_>>());
            }
            for (token, id) in &listed {
                prop_assert_eq!(trie.longest(token), (*id, token.len()));
            }
        }
    }
}

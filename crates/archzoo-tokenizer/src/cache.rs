//! The ids of pieces seen before, for short pieces.

use std::hint::select_unpredictable;

use crate::vocab::fold;

/// Ids kept in a slot; those of a piece with more are kept beside the slots.
pub const INLINE: usize = 4;
/// The count of a slot's ids lies above the bits of the first id.
const COUNT_SHIFT: u32 = 28;
/// A count that says: the slot has the start and the end of the ids among those beside the slots.
const MANY: u64 = 15;
/// Ids kept beside the slots, at most.
const MOST_BESIDE: usize = 1 << 20;

/// A piece's bytes, zeros, and its length in the last byte.
pub type Key = [u64; 2];

/// Longest piece that has a key.
pub const LONGEST: usize = 15;

/// The bits of a key's bytes, by their number.
const BITS: [[u64; 2]; 16] = {
    let mut bits = [[0; 2]; 16];
    let mut length = 0;
    while length < 16 {
        let all = (1u128 << (8 * length)) - 1;
        bits[length] = [all as u64, (all >> 64) as u64];
        length += 1;
    }
    bits
};

/// The key of `text[start..start + length]`, which must fit.
#[inline(always)]
pub fn key(text: &[u8], start: usize, length: usize) -> Key {
    let there = &text[start..];
    let mut words = [0; 2];
    if let Some(block) = there.first_chunk::<16>() {
        let [low, high] =
            [0, 8].map(|i| block[i..].first_chunk().map_or(0, |half| u64::from_le_bytes(*half)));
        let [low_bits, high_bits] = BITS[length & LONGEST];
        words = [low & low_bits, high & high_bits];
    } else {
        for (word, bytes) in words.iter_mut().zip(there[..length].chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(padded);
        }
    }
    words[1] |= (length as u64) << 56;
    words
}

/// A hash of a key.
#[inline(always)]
pub fn hash(key: &Key) -> u64 {
    fold(key[0] ^ 0x9e37_79b9_7f4a_7c15, key[1] ^ 0xc2b2_ae3d_27d4_eb4f)
}

/// A key, then four ids, two in a word.
type Slot = [u64; 4];
/// Slots that are compared together: a cache line.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Pair([Slot; 2]);

const FREE: Pair = Pair([[0; 4]; 2]);

/// Open addressing, at most three quarters full, emptied when it may not grow.
pub struct Cache {
    pairs: Vec<Pair>,
    used: usize,
    most_slots: usize,
    beside: Vec<u32>,
}

impl Cache {
    /// An empty cache that grows to `most_slots`, a power of two.
    pub fn new(most_slots: usize) -> Self {
        let pairs = vec![FREE; most_slots.min(1 << 13) / 2];
        Self { pairs, used: 0, most_slots, beside: Vec::new() }
    }

    /// Starts to load the slots of a hash.
    #[inline(always)]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.pairs[self.home(hash)]);
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.pairs.len() - 1)
    }

    #[inline(always)]
    fn find(&self, key: &Key, hash: u64) -> Option<&Slot> {
        let mut at = self.home(hash);
        loop {
            let Pair(pair) = &self.pairs[at];
            let differs = |slot: &Slot| slot[0] ^ key[0] | slot[1] ^ key[1];
            // Which of the two it is follows no pattern that a processor could foresee.
            let slot = select_unpredictable(differs(&pair[1]) == 0, &pair[1], &pair[0]);
            if differs(slot) == 0 {
                return Some(slot);
            }
            if pair[1][1] == 0 {
                return None;
            }
            at = (at + 1) & (self.pairs.len() - 1);
        }
    }

    /// Whether the ids of a piece are there.
    pub fn has(&self, key: &Key, hash: u64) -> bool {
        self.find(key, hash).is_some()
    }

    /// Appends the ids of a piece to `out`, or returns false.
    #[inline(always)]
    pub fn append(&self, key: &Key, hash: u64, out: &mut Vec<u32>) -> bool {
        let Some(slot) = self.find(key, hash) else { return false };
        let (count, first) = (slot[2] >> COUNT_SHIFT & 15, slot[2] & !(15 << COUNT_SHIFT));
        if count == MANY {
            let (start, end) = ((slot[2] >> 32) as usize, slot[3] as usize);
            out.extend_from_slice(&self.beside[start..end]);
        } else {
            push(out, [first, slot[3]], count as usize);
        }
        true
    }

    /// Keeps the ids of a piece that is not there.
    pub fn insert(&mut self, key: &Key, hash: u64, ids: &[u32]) {
        if 2 * self.used >= 3 * self.pairs.len() || self.beside.len() + ids.len() > MOST_BESIDE {
            self.make_room();
        }
        let mut four = [0; INLINE];
        if ids.len() <= INLINE {
            four[..ids.len()].copy_from_slice(ids);
            four[0] |= (ids.len() as u32) << COUNT_SHIFT;
        } else {
            let start = self.beside.len();
            self.beside.extend_from_slice(ids);
            four = [(MANY as u32) << COUNT_SHIFT, start as u32, self.beside.len() as u32, 0];
        }
        let two = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        self.place([key[0], key[1], two(four[0], four[1]), two(four[2], four[3])], hash);
        self.used += 1;
    }

    fn place(&mut self, slot: Slot, hash: u64) {
        let mut at = self.home(hash);
        loop {
            if let Some(free) = self.pairs[at].0.iter_mut().find(|slot| slot[1] == 0) {
                *free = slot;
                return;
            }
            at = (at + 1) & (self.pairs.len() - 1);
        }
    }

    #[cold]
    fn make_room(&mut self) {
        if 2 * self.pairs.len() >= self.most_slots || self.beside.len() > MOST_BESIDE / 2 {
            self.pairs.fill(FREE);
            self.beside.clear();
            self.used = 0;
            return;
        }
        let larger = vec![FREE; 2 * self.pairs.len()];
        for Pair(pair) in std::mem::replace(&mut self.pairs, larger) {
            for slot in pair.into_iter().filter(|slot| slot[1] != 0) {
                self.place(slot, hash(&[slot[0], slot[1]]));
            }
        }
    }
}

/// Starts to load what is at a place.
#[inline(always)]
pub fn prefetch<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch touches nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>((&raw const *place).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Appends the first `count` of ids that are two in a word.
#[inline(always)]
fn push(out: &mut Vec<u32>, ids: [u64; 2], count: usize) {
    const { assert!(cfg!(target_endian = "little")) };
    let length = out.len();
    if out.capacity() - length >= INLINE && count <= INLINE {
        // SAFETY: all four fit the capacity; the length then covers only what was written.
        unsafe {
            // Word by word: ids that are put together before they are written wait for each other.
            let end = out.as_mut_ptr().add(length).cast::<u64>();
            end.write_unaligned(ids[0]);
            end.add(1).write_unaligned(ids[1]);
            out.set_len(length + count);
        }
    } else {
        let ids = ids.map(|two| [two as u32, (two >> 32) as u32]);
        out.extend_from_slice(&ids.as_flattened()[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_not_depend_on_what_follows() {
        let text = b"abcdefghijklmnopqrstuvwxyz";
        for length in 1..=LONGEST {
            let alone = key(&text[..length], 0, length);
            assert_eq!(alone, key(text, 0, length));
            assert_eq!(alone[1] >> 56, length as u64);
        }
        assert_ne!(key(b"a\0", 0, 1), key(b"a\0", 0, 2));
    }

    #[test]
    fn a_full_cache_forgets() {
        let mut cache = Cache::new(4096);
        for i in 0..100_000u32 {
            let text = i.to_le_bytes();
            let key = key(&text, 0, 4);
            let hash = hash(&key);
            let mut out = vec![9];
            assert!(!cache.append(&key, hash, &mut out));
            let ids: Vec<u32> = (i..=i + i % 7).collect();
            cache.insert(&key, hash, &ids);
            assert!(cache.append(&key, hash, &mut out));
            assert_eq!(out[1..], ids);
        }
        assert_eq!(cache.pairs.len(), 2048);
        assert!(cache.beside.len() <= MOST_BESIDE);
    }
}

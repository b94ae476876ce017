use crate::vocab::fold;

/// Ids kept in a slot; a piece with more of them is not cached.
pub const INLINE: usize = 4;
/// The count of a slot's ids lies above the bits of the first id.
const COUNT_SHIFT: u32 = 28;

/// A piece as `W` words: its bytes, zeros, and its length in the last byte.
pub type Key<const W: usize> = [u64; W];

/// Longest piece of a key of `W` words.
pub const fn longest(words: usize) -> usize {
    words * 8 - 1
}

/// The key of `text[start..start + length]`, which must fit.
#[inline(always)]
pub fn key<const W: usize>(text: &[u8], start: usize, length: usize) -> Key<W> {
    let mut words = [0; W];
    let there = &text[start..];
    if there.len() >= 8 * W {
        for (i, word) in words.iter_mut().enumerate() {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&there[8 * i..8 * i + 8]);
            // Of this word's 8 bytes those beyond the piece are cleared.
            let kept = length.saturating_sub(8 * i).min(8) as u32;
            *word = u64::from_le_bytes(bytes) & 1u64.unbounded_shl(8 * kept).wrapping_sub(1);
        }
    } else {
        for (word, bytes) in words.iter_mut().zip(there[..length].chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(padded);
        }
    }
    words[W - 1] |= (length as u64) << 56;
    words
}

/// A hash of a key.
#[inline(always)]
pub fn hash<const W: usize>(key: &Key<W>) -> u64 {
    let mut state = 0;
    for pair in key.chunks_exact(2) {
        state = fold(pair[0] ^ 0x9e37_79b9_7f4a_7c15 ^ state, pair[1] ^ 0xc2b2_ae3d_27d4_eb4f);
    }
    state
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Slot<const W: usize> {
    key: Key<W>,
    ids: [u32; INLINE],
}

/// The ids of pieces seen before: open addressing, at most half full, emptied when it may not grow.
pub struct Cache<const W: usize> {
    slots: Vec<Slot<W>>,
    used: usize,
    most_slots: usize,
}

impl<const W: usize> Cache<W> {
    const EMPTY: Slot<W> = Slot { key: [0; W], ids: [0; INLINE] };

    /// An empty cache that grows to `most_slots`, a power of two.
    pub fn new(most_slots: usize) -> Self {
        Self { slots: vec![Self::EMPTY; 1024.min(most_slots)], used: 0, most_slots }
    }

    /// Starts to load the slot of a hash.
    #[inline(always)]
    pub fn prefetch(&self, hash: u64) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let slot = &raw const self.slots[self.home(hash)];
            // SAFETY: SSE is part of x86-64; a prefetch touches nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(slot.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = hash;
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.slots.len() - 1)
    }

    /// The ids of a piece, padded, and their number.
    #[inline(always)]
    pub fn get(&self, key: &Key<W>, hash: u64) -> Option<([u32; INLINE], usize)> {
        let mut at = self.home(hash);
        loop {
            let slot = &self.slots[at];
            if slot.key == *key {
                let mut ids = slot.ids;
                let count = (ids[0] >> COUNT_SHIFT) as usize;
                ids[0] &= (1 << COUNT_SHIFT) - 1;
                return Some((ids, count));
            }
            if slot.key[W - 1] == 0 {
                return None;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    /// Keeps the ids of a piece that is not there, if they fit.
    pub fn insert(&mut self, key: &Key<W>, hash: u64, ids: &[u32]) {
        if ids.len() > INLINE {
            return;
        }
        if 2 * (self.used + 1) > self.slots.len() {
            self.make_room();
        }
        let mut slot = Slot { key: *key, ids: [0; INLINE] };
        slot.ids[..ids.len()].copy_from_slice(ids);
        slot.ids[0] |= (ids.len() as u32) << COUNT_SHIFT;
        self.place(slot, hash);
        self.used += 1;
    }

    fn place(&mut self, slot: Slot<W>, hash: u64) {
        let mut at = self.home(hash);
        while self.slots[at].key[W - 1] != 0 {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = slot;
    }

    #[cold]
    fn make_room(&mut self) {
        if self.slots.len() >= self.most_slots {
            self.slots.fill(Self::EMPTY);
            self.used = 0;
            return;
        }
        let larger = vec![Self::EMPTY; (self.slots.len() * 4).min(self.most_slots)];
        for slot in std::mem::replace(&mut self.slots, larger) {
            if slot.key[W - 1] != 0 {
                let hash = hash(&slot.key);
                self.place(slot, hash);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_not_depend_on_what_follows() {
        let text =
            "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz".as_bytes();
        for length in 1..=longest(6) {
            let alone = key::<6>(&text[..length], 0, length);
            assert_eq!(alone, key::<6>(text, 0, length));
            assert_eq!(alone[5] >> 56, length as u64);
            if length <= longest(2) {
                assert_eq!(key::<2>(&text[..length], 0, length), key::<2>(text, 0, length));
            }
        }
        assert_ne!(key::<2>(b"a\0", 0, 1), key::<2>(b"a\0", 0, 2));
    }

    #[test]
    fn a_full_cache_forgets() {
        let mut cache = Cache::<2>::new(4096);
        for i in 0..100_000u32 {
            let text = i.to_le_bytes();
            let key = key::<2>(&text, 0, 4);
            let hash = hash(&key);
            assert!(cache.get(&key, hash).is_none());
            cache.insert(&key, hash, &[i, 1][..1 + i as usize % 2]);
            let (ids, count) = cache.get(&key, hash).unwrap();
            assert_eq!((ids[0], count), (i, 1 + i as usize % 2));
        }
        assert_eq!(cache.slots.len(), 4096);
    }
}

//! The ids of pieces seen before, for short pieces.

use std::hint::select_unpredictable;

use crate::vocab::{MIX, fold};

/// Ids kept in a slot; those of a piece with more are kept beside the slots.
const INLINE: usize = 4;
/// The count of a slot's ids lies above the bits of the last id.
const COUNT_SHIFT: u32 = 60;
/// A count that says: the slot has the start and the end of the ids among those beside the slots.
const MANY: u64 = 15;
/// Ids kept beside the slots, at most.
const MOST_BESIDE: usize = 1 << 20;

/// A piece's bytes, zeros, and its length in the last byte: two words, which a processor can hold in registers.
type Key = (u64, u64);

/// Pairs that a piece is looked for in, at most: whoever writes pieces that hash alike makes nobody wait.
const PROBES: usize = 64;

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

/// What a piece is looked up by.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sought {
    key: Key,
    hash: u64,
}

impl Sought {
    /// The piece `text[start..start + length]`, which must be there and have a key.
    #[inline(always)]
    pub fn new(text: &[u8], start: usize, length: usize) -> Self {
        let key = key(text, start, length);
        Self { key, hash: hash(key) }
    }

    /// A piece without a key, by a hash that the caller knows it by: no slot has it.
    #[inline(always)]
    pub fn long(hash: u64) -> Self {
        Self { key: (hash, u64::MAX), hash: 0 }
    }

    /// The hash that a piece without a key was given.
    pub fn long_hash(&self) -> Option<u64> {
        (self.key.1 == u64::MAX).then_some(self.key.0)
    }

    /// A hash of the piece.
    pub fn hash(&self) -> u64 {
        self.long_hash().unwrap_or(self.hash)
    }
}

/// The key of `text[start..start + length]`, which must be there.
#[inline(always)]
fn key(text: &[u8], start: usize, length: usize) -> Key {
    let (low, high) = if start < text.windows(16).len() {
        // SAFETY: 16 bytes are there.
        let block = unsafe { text.as_ptr().add(start).cast::<[[u8; 8]; 2]>().read() };
        let [low, high] = BITS[length & LONGEST];
        (u64::from_le_bytes(block[0]) & low, u64::from_le_bytes(block[1]) & high)
    } else {
        last_words(&text[start..start + length])
    };
    (low, high | (length as u64) << 56)
}

/// The words of a piece behind which nothing may be read.
#[cold]
fn last_words(piece: &[u8]) -> (u64, u64) {
    let mut padded = [0; 16];
    padded[..piece.len()].copy_from_slice(piece);
    let both = u128::from_le_bytes(padded);
    (both as u64, (both >> 64) as u64)
}

/// A first word that no text has: it would make a hash 0 whatever follows.
const NO_TEXT: u64 = 0xffff_ffff_9f4a_7c15;

#[inline(always)]
fn hash((low, high): Key) -> u64 {
    fold(low ^ NO_TEXT, high ^ MIX[1])
}

/// A key, then four ids, two in a word.
type Slot = [u64; 4];
/// Slots that are compared together: a cache line.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Pair([Slot; 2]);

impl Pair {
    /// The slot of a piece, if one of the two is.
    #[inline(always)]
    fn slot(&self, sought: &Sought) -> &Slot {
        // Which of the two it is follows no pattern that a processor could foresee.
        select_unpredictable(is_of(&self.0[1], sought), &self.0[1], &self.0[0])
    }
}

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

    /// Starts to load the slots of a piece.
    #[inline(always)]
    pub fn prefetch(&self, sought: &Sought) {
        prefetch(self.pairs.as_ptr().wrapping_add(self.home(sought.hash)));
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.pairs.len() - 1)
    }

    /// Whether the ids of a piece are there.
    pub fn has(&self, sought: &Sought) -> bool {
        find(&self.pairs, sought).is_some()
    }

    /// Appends the ids of pieces up to the first that is not there to `out`. Returns the number of pieces.
    #[inline(never)]
    pub fn append(&self, sought: &[Sought], out: &mut Vec<u32>) -> usize {
        const { assert!(cfg!(target_endian = "little")) };
        out.reserve(INLINE * sought.len());
        let pairs = &self.pairs[..];
        let (mut start, mut length) = (out.as_mut_ptr(), out.len());
        let mut found = 0;
        for piece in sought {
            let Some(slot) = find(pairs, piece) else { break };
            found += 1;
            let count = slot[3] >> COUNT_SHIFT;
            if count != MANY {
                // SAFETY: the capacity has room for four ids of each piece; no other count is above four, so the
                // length then covers only what was written.
                unsafe {
                    // Word by word: ids that are put together before they are written wait for each other.
                    let end = start.add(length).cast::<u64>();
                    end.write_unaligned(slot[2]);
                    end.add(1).write_unaligned(slot[3] & !(MANY << COUNT_SHIFT));
                }
                length += count as usize;
            } else {
                // SAFETY: as many ids were written.
                unsafe { out.set_len(length) };
                let (from, to) = (slot[2] as u32 as usize, (slot[2] >> 32) as usize);
                out.extend_from_slice(&self.beside[from..to]);
                out.reserve(INLINE * (sought.len() - found));
                (start, length) = (out.as_mut_ptr(), out.len());
            }
        }
        // SAFETY: as many ids were written.
        unsafe { out.set_len(length) };
        found
    }

    /// Keeps the ids of a piece that is not there.
    pub fn insert(&mut self, sought: &Sought, ids: &[u32]) {
        if 2 * self.used >= 3 * self.pairs.len() || self.beside.len() + ids.len() > MOST_BESIDE {
            self.make_room();
        }
        let two = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let (low, high, count) = if ids.len() <= INLINE {
            let mut four = [0; INLINE];
            four[..ids.len()].copy_from_slice(ids);
            (two(four[0], four[1]), two(four[2], four[3]), ids.len() as u64)
        } else {
            let start = self.beside.len() as u32;
            self.beside.extend_from_slice(ids);
            (two(start, self.beside.len() as u32), 0, MANY)
        };
        // `append` relies on the count.
        assert_eq!(high >> COUNT_SHIFT, 0, "an id of more than 28 bits");
        self.place([sought.key.0, sought.key.1, low, high | count << COUNT_SHIFT], sought.hash);
    }

    /// Takes a free slot, or if none is near, that of another piece.
    fn place(&mut self, slot: Slot, hash: u64) {
        let home = self.home(hash);
        for at in home..home + PROBES {
            let at = at & (self.pairs.len() - 1);
            if let Some(free) = self.pairs[at].0.iter_mut().find(|slot| slot[1] == 0) {
                *free = slot;
                self.used += 1;
                return;
            }
        }
        self.pairs[home].0[0] = slot;
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
        self.used = 0;
        for Pair(pair) in std::mem::replace(&mut self.pairs, larger) {
            for slot in pair.into_iter().filter(|slot| slot[1] != 0) {
                self.place(slot, hash((slot[0], slot[1])));
            }
        }
    }
}

#[inline(always)]
fn find<'a>(pairs: &'a [Pair], sought: &Sought) -> Option<&'a Slot> {
    let pair = &pairs[sought.hash as usize & (pairs.len() - 1)];
    let slot = pair.slot(sought);
    if is_of(slot, sought) {
        return Some(slot);
    }
    if pair.0[1][1] == 0 { None } else { find_behind(pairs, sought) }
}

/// The same, not in the first pair.
#[inline(never)]
fn find_behind<'a>(pairs: &'a [Pair], sought: &Sought) -> Option<&'a Slot> {
    let mut at = sought.hash as usize;
    for _ in 1..PROBES {
        at = at.wrapping_add(1);
        let pair = &pairs[at & (pairs.len() - 1)];
        let slot = pair.slot(sought);
        if is_of(slot, sought) {
            return Some(slot);
        }
        if pair.0[1][1] == 0 {
            break;
        }
    }
    None
}

#[inline(always)]
fn is_of(slot: &Slot, sought: &Sought) -> bool {
    (slot[0] ^ sought.key.0 | slot[1] ^ sought.key.1) == 0
}

/// Starts to load what is at a place.
#[inline(always)]
pub fn prefetch<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64; a prefetch touches nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
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
            assert_eq!(alone, key(&[b"12", &text[..]].concat(), 2, length));
            assert_eq!(alone.1 >> 56, length as u64);
        }
        assert_ne!(key(b"a\0", 0, 1), key(b"a\0", 0, 2));
    }

    #[test]
    fn a_full_cache_forgets() {
        let mut cache = Cache::new(4096);
        for i in 0..100_000u32 {
            let text = i.to_le_bytes();
            let piece = Sought::new(&text, 0, 4);
            let mut out = vec![9];
            assert!(!cache.has(&piece));
            let ids: Vec<u32> = (i..=i + i % 7).collect();
            cache.insert(&piece, &ids);
            // Neither a long piece nor what comes behind it.
            let pieces = [piece, piece, Sought::long(piece.hash()), piece];
            assert_eq!(cache.append(&pieces, &mut out), 2);
            assert_eq!(out[1..], [&ids[..], &ids].concat());
        }
        assert_eq!(cache.pairs.len(), 2048);
        assert!(cache.beside.len() <= MOST_BESIDE);
    }

    #[test]
    fn pieces_of_one_hash_take_no_longer() {
        let mut cache = Cache::new(1 << 18);
        let text = |i: u64| [NO_TEXT.to_le_bytes(), i.to_le_bytes()].concat();
        for i in 0..100_000 {
            let piece = Sought::new(&text(i), 0, 15);
            assert_eq!(piece.hash, 0);
            cache.insert(&piece, &[i as u32]);
            let mut out = Vec::new();
            assert_eq!((cache.append(&[piece], &mut out), &out[..]), (1, &[i as u32][..]));
        }
        assert!(cache.used <= 2 * PROBES);
    }
}

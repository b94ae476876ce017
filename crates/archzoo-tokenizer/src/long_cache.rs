//! The ids of pieces seen before, for pieces of any length.

use crate::cache::prefetch;
use crate::vocab::{self, MIX};

/// Where a piece's bytes and ids are among all, and its hash; free if it has no bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    hash: u64,
    text: u32,
    length: u32,
    ids: u32,
    count: u32,
}

/// Slots, at most, and bytes and ids of all pieces: together about 19 MB.
const MOST_SLOTS: usize = 1 << 17;
const MOST_TEXT: usize = 1 << 23;
const MOST_IDS: usize = 1 << 21;

/// Slots that a piece is looked for in, at most: whoever writes pieces that hash alike makes nobody wait.
const PROBES: usize = 32;

/// Open addressing, at most half full, emptied when it may not grow.
pub struct LongCache {
    slots: Vec<Slot>,
    used: usize,
    text: Vec<u8>,
    ids: Vec<u32>,
}

impl Default for LongCache {
    fn default() -> Self {
        Self { slots: vec![Slot::default(); 1 << 10], used: 0, text: Vec::new(), ids: Vec::new() }
    }
}

impl LongCache {
    /// The hash of a piece, whose slot is loaded meanwhile.
    #[inline(never)]
    pub fn seek(&self, piece: &[u8]) -> u64 {
        let hash = hash(piece);
        prefetch(&self.slots[self.home(hash)]);
        hash
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.slots.len() - 1)
    }

    /// The ids of a piece.
    #[inline]
    pub fn get(&self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let mut at = self.home(hash);
        for _ in 0..PROBES {
            let slot = &self.slots[at];
            if slot.length == 0 {
                break;
            }
            if slot.hash == hash && slot.length as usize == piece.len() {
                let text = slot.text as usize;
                if is_same(&self.text[text..text + piece.len()], piece) {
                    let ids = slot.ids as usize;
                    return Some(&self.ids[ids..ids + slot.count as usize]);
                }
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
        None
    }

    /// Keeps the ids of a piece that is not there, unless it is too long.
    pub fn insert(&mut self, piece: &[u8], hash: u64, ids: &[u32]) {
        if piece.is_empty() || piece.len() > MOST_TEXT / 4 || ids.len() > MOST_IDS / 2 {
            return;
        }
        if self.text.len() + piece.len() > MOST_TEXT || self.ids.len() + ids.len() > MOST_IDS {
            self.clear();
        }
        if 2 * (self.used + 1) > self.slots.len() {
            self.make_room();
        }
        let slot = Slot {
            hash,
            text: self.text.len() as u32,
            length: piece.len() as u32,
            ids: self.ids.len() as u32,
            count: ids.len() as u32,
        };
        self.text.extend_from_slice(piece);
        self.ids.extend_from_slice(ids);
        self.place(slot);
    }

    fn clear(&mut self) {
        self.slots.fill(Slot::default());
        self.text.clear();
        self.ids.clear();
        self.used = 0;
    }

    /// Takes a free slot, or if none is near, that of another piece.
    fn place(&mut self, slot: Slot) {
        let (home, last) = (self.home(slot.hash), self.slots.len() - 1);
        let free = (home..home + PROBES).map(|at| at & last).find(|&at| self.slots[at].length == 0);
        self.used += usize::from(free.is_some());
        self.slots[free.unwrap_or(home)] = slot;
    }

    #[cold]
    fn make_room(&mut self) {
        if self.slots.len() >= MOST_SLOTS {
            self.clear();
            return;
        }
        let larger = vec![Slot::default(); (self.slots.len() * 4).min(MOST_SLOTS)];
        self.used = 0;
        for slot in std::mem::replace(&mut self.slots, larger) {
            if slot.length != 0 {
                self.place(slot);
            }
        }
    }
}

/// A hash of a piece, faster than that of the vocabulary where there are 16 bytes.
pub fn hash(piece: &[u8]) -> u64 {
    let Some(last) = piece.last_chunk() else { return vocab::hash(piece) };
    let mix = |state: u64, block: &[u8; 16]| {
        let both = u128::from_le_bytes(*block);
        let (a, b) = (state ^ both as u64, (both >> 64) as u64 ^ MIX[1]);
        // So that a factor of 0 does not swallow the other.
        vocab::fold(a, b) ^ a ^ b
    };
    let (blocks, rest) = piece.as_chunks();
    let (fours, blocks) = blocks.as_chunks::<4>();
    let mut state = piece.len() as u64 ^ MIX[0];
    if !fours.is_empty() {
        // Side by side, as each waits for the multiplication before.
        let lanes: [u64; 4] = std::array::from_fn(|i| state ^ i as u64);
        let lanes = fours.iter().fold(lanes, |lanes, four| std::array::from_fn(|i| mix(lanes[i], &four[i])));
        state = lanes.into_iter().fold(0, |state, lane| vocab::fold(state ^ lane, MIX[1]) ^ lane);
    }
    let state = blocks.iter().fold(state, mix);
    if rest.is_empty() { state } else { mix(state, last) }
}

/// Whether two pieces of one length are equal; most are of 16 to 32 bytes.
#[inline(always)]
fn is_same(a: &[u8], b: &[u8]) -> bool {
    let ends = |piece: &[u8]| Some((*piece.first_chunk::<16>()?, *piece.last_chunk::<16>()?));
    match (ends(a), ends(b)) {
        (Some(of_a), Some(of_b)) => {
            of_a == of_b && (a.len() <= 32 || a[16..a.len() - 16] == b[16..b.len() - 16])
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_hashes_and_a_full_cache() {
        let mut cache = LongCache::default();
        for i in 0..300_000u32 {
            let piece = [&i.to_le_bytes()[..], &[7; 40]].concat();
            // Many pieces share a hash.
            let hash = u64::from(i / 3).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            assert!(cache.get(&piece, hash).is_none());
            let ids: Vec<u32> = (i..i + i % 20).collect();
            cache.insert(&piece, hash, &ids);
            assert_eq!(cache.get(&piece, hash), Some(&ids[..]));
            assert!(cache.text.len() <= MOST_TEXT && cache.ids.len() <= MOST_IDS);
            assert!(cache.slots.len() <= MOST_SLOTS);
        }
        let giant = vec![1; MOST_TEXT];
        cache.insert(&giant, 5, &[1]);
        assert!(cache.get(&giant, 5).is_none());
    }

    #[test]
    fn pieces_of_one_hash_take_no_longer() {
        let mut cache = LongCache::default();
        for i in 0..60_000u32 {
            let piece = [&[7; 40][..], &i.to_le_bytes()].concat();
            cache.insert(&piece, 5, &[i]);
            assert_eq!(cache.get(&piece, 5), Some(&[i][..]));
        }
        assert_eq!(cache.used, PROBES);
    }

    #[test]
    fn every_byte_of_a_piece_counts() {
        for length in [16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 80, 127, 128, 200] {
            let piece: Vec<u8> = (0..length).collect();
            assert!(is_same(&piece, &piece.clone()));
            for i in 0..usize::from(length) {
                let mut other = piece.clone();
                other[i] ^= 1;
                assert!(!is_same(&piece, &other) && hash(&piece) != hash(&other), "{length} {i}");
            }
        }
    }
}

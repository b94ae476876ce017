//! The ids of long pieces that any thread has seen.

use std::sync::{Mutex, PoisonError, TryLockError};

use crate::long_cache::LongCache;

/// Parts with a lock each, so that threads seldom meet.
const PARTS: usize = 256;

/// Where a thread looks for a long piece that it has not seen itself before it encodes it: at most 19 MB. No thread
/// waits for another: to encode a piece takes less time.
pub struct SharedCache(Vec<Mutex<LongCache>>);

impl Default for SharedCache {
    fn default() -> Self {
        Self((0..PARTS).map(|_| Mutex::new(LongCache::new(PARTS))).collect())
    }
}

impl SharedCache {
    /// Appends the ids of a piece to `out`: those that are known, else what `encode` appends.
    pub fn append(&self, piece: &[u8], hash: u64, out: &mut Vec<u32>, encode: impl FnOnce(&mut Vec<u32>)) {
        // The caches themselves use the lowest bits.
        let mut part = match self.0[(hash >> 32) as usize % PARTS].try_lock() {
            Ok(part) => part,
            Err(TryLockError::Poisoned(part)) => PoisonError::into_inner(part),
            Err(TryLockError::WouldBlock) => return encode(out),
        };
        if let Some(ids) = part.get(piece, hash) {
            out.extend_from_slice(ids);
        } else {
            let before = out.len();
            encode(out);
            part.insert(piece, hash, &out[before..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn threads_find_what_others_have_encoded() {
        let cache = SharedCache::default();
        let pieces: Vec<Vec<u8>> = (0..2000u32).map(|i| i.to_le_bytes().repeat(4 + i as usize % 9)).collect();
        let ids = |piece: &[u8]| piece.chunks(3).map(|c| u32::from(c[0])).collect::<Vec<_>>();
        let encoded = |piece: &[u8]| {
            let (mut out, mut was_encoded) = (vec![7], false);
            cache.append(piece, crate::vocab::hash(piece), &mut out, |out| {
                was_encoded = true;
                out.extend(ids(piece));
            });
            assert_eq!(out[1..], ids(piece));
            was_encoded
        };
        (0..8).into_par_iter().for_each(|_| pieces.iter().for_each(|piece| _ = encoded(piece)));
        assert!(!pieces.iter().any(|piece| encoded(piece)));
    }
}

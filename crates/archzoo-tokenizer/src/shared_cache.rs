//! The ids of long pieces that any thread has seen.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

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
    /// Hands the ids of a piece to `found`, or returns false.
    pub fn get(&self, piece: &[u8], hash: u64, found: impl FnOnce(&[u32])) -> bool {
        let part = self.part(hash);
        part.as_ref().and_then(|part| part.get(piece, hash)).map(found).is_some()
    }

    /// Keeps the ids of a piece, unless another thread is at it.
    pub fn insert(&self, piece: &[u8], hash: u64, ids: &[u32]) {
        if let Some(mut part) = self.part(hash)
            && part.get(piece, hash).is_none()
        {
            part.insert(piece, hash, ids);
        }
    }

    fn part(&self, hash: u64) -> Option<MutexGuard<'_, LongCache>> {
        // The caches themselves use the lowest bits.
        match self.0[(hash >> 32) as usize % PARTS].try_lock() {
            Ok(part) => Some(part),
            Err(TryLockError::Poisoned(part)) => Some(PoisonError::into_inner(part)),
            Err(TryLockError::WouldBlock) => None,
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
            let hash = crate::long_cache::hash(piece);
            let is_known = cache.get(piece, hash, |found| assert_eq!(found, ids(piece)));
            if !is_known {
                cache.insert(piece, hash, &ids(piece));
            }
            !is_known
        };
        (0..8).into_par_iter().for_each(|_| pieces.iter().for_each(|piece| _ = encoded(piece)));
        assert!(!pieces.iter().any(|piece| encoded(piece)));
    }
}

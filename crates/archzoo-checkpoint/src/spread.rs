use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// What an item costs besides its bytes.
const CALL: u64 = 4096;

/// The results of `work` on the items, in their order, on the threads of rayon's current pool; the first error
/// ends it.
///
/// Each thread goes through its own run of neighbouring items, so that a file's bytes are asked for in their
/// order (rayon's own division cuts finer, and reading a cold file that way takes half as long again). Then it
/// takes from the far end of what others have left. `bytes` tells the size of an item.
pub(crate) fn spread<T: Send, R: Send, E: Send>(
    items: Vec<T>,
    bytes: impl Fn(&T) -> u64,
    work: impl Fn(T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let threads = rayon::current_num_threads().max(1);
    let total: u64 = items.iter().map(|item| bytes(item) + CALL).sum();
    let mut shares: Vec<VecDeque<(usize, T)>> = (0..threads).map(|_| VecDeque::new()).collect();
    let mut before = 0;
    for (i, item) in items.into_iter().enumerate() {
        let share = (u128::from(before) * threads as u128 / u128::from(total)) as usize;
        before += bytes(&item) + CALL;
        shares[share].push_back((i, item));
    }
    let shares: Vec<Mutex<VecDeque<(usize, T)>>> = shares.into_iter().map(Mutex::new).collect();
    let lock = |share: usize| shares[share].lock().unwrap_or_else(PoisonError::into_inner);
    let next = |own: usize| {
        let mine = lock(own).pop_front();
        mine.or_else(|| {
            let fullest = (0..threads).max_by_key(|&share| lock(share).len())?;
            lock(fullest).pop_back()
        })
    };
    let failed = AtomicBool::new(false);
    let results = rayon::broadcast(|context| {
        let mut results = Vec::new();
        while !failed.load(Ordering::Relaxed)
            && let Some((i, item)) = next(context.index())
        {
            match work(item) {
                Ok(result) => results.push((i, result)),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(results)
    });
    let mut all = Vec::new();
    for results in results {
        all.extend(results?);
    }
    all.sort_unstable_by_key(|&(i, _)| i);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once_and_in_order() {
        for count in [0, 1, 2, 3, 100, 1001] {
            let found = spread((0..count).collect(), |&i| i * 1000, |i| Ok::<_, ()>(i * 2));
            assert_eq!(found, Ok((0..count).map(|i| i * 2).collect()));
        }
    }

    #[test]
    fn an_error_ends_it() {
        let found = spread((0..1000).collect(), |_| 0, |i: u64| if i == 500 { Err(i) } else { Ok(i) });
        assert_eq!(found, Err(500));
    }
}

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::ThreadPool;

/// Threads that share a piece of work; the calling thread is one of them.
#[derive(Clone, Copy)]
pub struct Threads<'a> {
    /// Where the others come from.
    pub pool: &'a ThreadPool,
    /// How many may work, the caller included.
    pub count: usize,
}

impl Threads<'_> {
    /// Runs `work(0..shares)`, share 0 on this thread. `shares` does not exceed the threads.
    pub(crate) fn share(self, shares: usize, work: impl Fn(usize) + Sync) {
        if shares <= 1 {
            return work(0);
        }
        self.pool.in_place_scope(|scope| {
            let work = &work;
            for index in 1..shares {
                scope.spawn(move |_| work(index));
            }
            work(0);
        });
    }

    /// Calls `work(0..count)`, neighbours on one thread; of `size`, the values that all of it touches, no thread
    /// takes fewer than `least`.
    pub(crate) fn split(self, count: usize, size: usize, least: usize, work: impl Fn(usize) + Sync) {
        let shares = self.count.min(size / least).max(1);
        self.share(shares, |share| {
            (count * share / shares..count * (share + 1) / shares).for_each(&work);
        });
    }

    /// Calls `work(0..tasks)`; a thread that is done takes the next.
    pub(crate) fn each(self, tasks: usize, work: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        self.share(self.count.min(tasks), |_| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    return;
                }
                work(task);
            }
        });
    }
}

/// A pointer that shares of one job write through, each to places of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared(pub *mut f32);

// SAFETY: whoever makes one promises that the shares write disjoint places that outlive the job.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// `len` values from `start`.
    ///
    /// # Safety
    /// They lie inside the allocation and no other share touches them.
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

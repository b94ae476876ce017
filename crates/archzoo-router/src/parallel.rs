use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::ThreadPool;

/// Threads that share a piece of work; the calling thread is one of them.
#[derive(Clone, Copy)]
pub struct Threads<'a> {
    pool: Option<&'a ThreadPool>,
    count: usize,
}

impl<'a> Threads<'a> {
    /// The calling thread alone.
    pub const ONE: Threads<'static> = Threads { pool: None, count: 1 };

    /// `count` threads: the caller and others from the pool.
    pub fn new(pool: &'a ThreadPool, count: usize) -> Self {
        Self { pool: Some(pool), count }
    }

    /// How many may work.
    pub(crate) fn count(self) -> usize {
        self.count.max(1)
    }

    /// Runs `work(0..jobs)`; whoever is free takes the next.
    pub(crate) fn run(self, jobs: usize, work: impl Fn(usize) + Sync) {
        let Some(pool) = self.pool.filter(|_| self.count > 1 && jobs > 1) else {
            return (0..jobs).for_each(work);
        };
        let next = AtomicUsize::new(0);
        let take = || {
            loop {
                let job = next.fetch_add(1, Ordering::Relaxed);
                if job >= jobs {
                    return;
                }
                work(job);
            }
        };
        pool.in_place_scope(|scope| {
            for _ in 1..self.count.min(jobs) {
                scope.spawn(|_| take());
            }
            take();
        });
    }
}

/// A slice that jobs write through, each to places of its own.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: the jobs write disjoint places (promised where they write) of a slice that outlives them.
unsafe impl<T: Send> Send for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// Places `start..start + len`, cut at the end of the slice.
    ///
    /// # Safety
    /// No other job touches them, and the slice is alive.
    pub unsafe fn part<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        let start = start.min(self.len);
        // SAFETY: inside the slice; promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len.min(self.len - start)) }
    }

    /// # Safety
    /// As `part`; `place` is inside the slice.
    pub unsafe fn write(self, place: usize, value: T) {
        debug_assert!(place < self.len);
        // SAFETY: promised by the caller.
        unsafe { self.start.add(place).write(value) }
    }
}

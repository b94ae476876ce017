use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);

/// Runs `work` on the threads of this process. Threads do not survive a fork, so a child gets its own.
pub fn run<R: Send>(work: impl FnOnce() -> R + Send) -> PyResult<R> {
    Ok(current()?.install(work))
}

/// The threads of this process.
pub fn current() -> PyResult<Arc<ThreadPool>> {
    let process = std::process::id();
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((owner, pool)) = &*pool
        && *owner == process
    {
        return Ok(pool.clone());
    }
    let new = ThreadPoolBuilder::new()
        .thread_name(|i| format!("archzoo-{i}"))
        .build()
        .map_err(|e| PyRuntimeError::new_err(format!("cannot start threads: {e}")))?;
    let new = Arc::new(new);
    // The parent's pool is not ours to stop.
    std::mem::forget(pool.replace((process, new.clone())));
    Ok(new)
}

/// How many threads the work of this process is shared by.
#[pyfunction]
pub fn threads() -> PyResult<usize> {
    Ok(current()?.current_num_threads())
}

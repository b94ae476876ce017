//! Routing over the addresses of contiguous CPU tensors, as in `decode`; `archzoo.ops.moe` is the only caller.

use archzoo_router::{Plan, Threads};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::decode::{slice, slice_mut};

/// Sorts `n` assignments `ids` by expert; out: order, inverse, token i64 `[n]`, counts, offsets i32 `[experts]`.
#[pyfunction]
pub fn plan(
    py: Python<'_>,
    ids: usize,
    n: usize,
    experts: usize,
    top_k: usize,
    out: (usize, usize, usize, usize, usize),
    threads: usize,
) -> PyResult<()> {
    let pool = crate::pool::current()?;
    py.detach(|| {
        // SAFETY: the caller passes live, contiguous tensors of these sizes that nobody else writes.
        unsafe {
            let to = Plan {
                order: slice_mut(out.0, n),
                inverse: slice_mut(out.1, n),
                token: slice_mut(out.2, n),
                counts: slice_mut(out.3, experts),
                offsets: slice_mut(out.4, experts),
            };
            archzoo_router::plan(Threads::new(&pool, threads), slice(ids, n), experts, top_k, to)
        }
    })
    .map_err(|error| PyValueError::new_err(error.to_string()))
}

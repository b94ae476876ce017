//! Placement of experts over addresses, as in `decode`; `archzoo.parallel` is the only caller.

use archzoo_router::{Cluster, Placement, Threads};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::decode::{slice, slice_mut};

/// Places experts by load f32 `[layers, experts]`; cluster = (experts, replicas, groups, nodes, gpus); out i64:
/// expert and rank of each slot `[layers, replicas]`, replicas of each expert `[layers, experts]`.
#[pyfunction]
pub fn eplb(
    py: Python<'_>,
    load: usize,
    layers: usize,
    cluster: (usize, usize, usize, usize, usize),
    out: (usize, usize, usize),
    threads: usize,
) -> PyResult<()> {
    let (experts, replicas, groups, nodes, gpus) = cluster;
    let cluster = Cluster { experts, replicas, groups, nodes, gpus };
    let pool = crate::pool::current()?;
    py.detach(|| {
        // SAFETY: the caller passes live, contiguous tensors of these sizes that nobody else writes.
        unsafe {
            let to = Placement {
                physical_to_logical: slice_mut(out.0, layers * replicas),
                rank: slice_mut(out.1, layers * replicas),
                counts: slice_mut(out.2, layers * experts),
            };
            archzoo_router::eplb(Threads::new(&pool, threads), slice(load, layers * experts), cluster, to)
        }
    })
    .map_err(|error| PyValueError::new_err(error.to_string()))
}

//! The gate over the addresses of contiguous CPU tensors, as in `decode`; `archzoo.ops.moe` is the only caller.

use archzoo_router::{Error, Gate, Logits, Threads};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::decode::{slice, slice_mut};

/// Weights f32 and ids i64 `[tokens, top_k]` of logits `[tokens, experts]`, at the addresses in `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments)] // addresses and sizes, flat because a tuple costs more to unpack
pub fn gate(
    py: Python<'_>,
    logits: usize,
    dtype: &str,
    tokens: usize,
    experts: usize,
    top_k: usize,
    score: &str,
    bias: usize,
    groups: usize,
    top_groups: usize,
    group_score: &str,
    renormalize: bool,
    scale: f32,
    out: (usize, usize),
    threads: usize,
) -> PyResult<()> {
    let (score, group_score) = (score.parse().map_err(to_python)?, group_score.parse().map_err(to_python)?);
    let n = tokens * experts;
    // SAFETY: the caller passes live, contiguous tensors of these sizes that nobody else writes.
    let (logits, bias, weights, ids) = unsafe {
        let logits = match dtype {
            "float32" => Logits::F32(slice(logits, n)),
            "bfloat16" => Logits::Bf16(slice(logits, n)),
            "float16" => Logits::F16(slice(logits, n)),
            _ => {
                return Err(PyValueError::new_err(format!(
                    "dtype must be float32, bfloat16 or float16, found {dtype}"
                )));
            }
        };
        let bias = (bias != 0).then(|| slice(bias, experts));
        (logits, bias, slice_mut(out.0, tokens * top_k), slice_mut(out.1, tokens * top_k))
    };
    let gate = Gate { experts, top_k, score, bias, groups, top_groups, group_score, renormalize, scale };
    let pool = crate::pool::current()?;
    py.detach(|| archzoo_router::gate(Threads::new(&pool, threads), logits, &gate, weights, ids))
        .map_err(to_python)
}

fn to_python(error: Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

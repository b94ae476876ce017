//! Decode kernels over the addresses of contiguous CPU tensors: wrapping each tensor in an array would cost as
//! much as the work. `archzoo.ops` is the only caller; it checks shapes and keeps the tensors alive meanwhile.

#![allow(clippy::too_many_arguments)] // addresses and sizes, flat because a tuple costs more to unpack

use archzoo_decode::{
    Activation, Attention, Cached, Conv, Experts, Gate, Latent, Matrix, Rope, SsdScan, SsdStep, Threads,
    Value,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Address and rows of a weight, address of its bias (0: none), address of its output.
type Part = (usize, usize, usize, usize);

/// `out = x Wᵀ + b` for several weights on one x `[rows, k]`; x, weights, biases and outputs share a dtype.
#[pyfunction]
pub fn linear(
    py: Python<'_>,
    x: usize,
    rows: usize,
    k: usize,
    bfloat16: bool,
    threads: usize,
    parts: Vec<Part>,
) -> PyResult<()> {
    if rows == 0 || k == 0 {
        return Err(PyValueError::new_err(format!("linear: found {rows} rows of {k} values")));
    }
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        // SAFETY: the caller passes live, contiguous tensors of these sizes that nobody else writes.
        unsafe {
            if bfloat16 {
                let x: Vec<f32> = slice::<u16>(x, rows * k).iter().map(|v| v.widen()).collect();
                let mut sums: Vec<Vec<f32>> = parts.iter().map(|p| vec![0.0; rows * p.1]).collect();
                let mut views: Vec<&mut [f32]> = sums.iter_mut().map(|s| &mut s[..]).collect();
                archzoo_decode::linear(threads, &x, rows, k, &matrices::<u16>(&parts, k), &mut views);
                for (part, sums) in parts.iter().zip(&sums) {
                    for (to, from) in slice_mut::<u16>(part.3, sums.len()).iter_mut().zip(sums) {
                        *to = narrow(*from);
                    }
                }
            } else {
                let mut views: Vec<&mut [f32]> = parts.iter().map(|p| slice_mut(p.3, rows * p.1)).collect();
                let x = slice(x, rows * k);
                archzoo_decode::linear(threads, x, rows, k, &matrices::<f32>(&parts, k), &mut views);
            }
        }
    });
    Ok(())
}

/// # Safety
/// As `linear`.
unsafe fn matrices<'a, T>(parts: &[Part], k: usize) -> Vec<Matrix<'a, T>> {
    // SAFETY: promised by the caller.
    let matrix = |p: &Part| unsafe {
        Matrix { weights: slice(p.0, p.1 * k), bias: (p.2 != 0).then(|| slice(p.2, p.1)) }
    };
    parts.iter().map(matrix).collect()
}

/// `out[token[r]] += scale[r] · FFN(x[token[r]])` in f32 for assignments sorted by expert, over weights and
/// biases in f32 or bf16. shape = (tokens, assignments, experts, d, hidden); weights = addresses of up, down and
/// their biases (0: none); keep (0: none) takes what is before the activation.
#[pyfunction]
pub fn experts(
    py: Python<'_>,
    shape: (usize, usize, usize, usize, usize),
    x: usize,
    token: usize,
    scale: usize,
    counts: usize,
    weights: [usize; 4],
    bfloat16: bool,
    activation: &str,
    scale_input: bool,
    keep: usize,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let (tokens, rows, count, d, hidden) = shape;
    let activation = match activation {
        "swiglu" => Activation::Swiglu,
        "clamped_swiglu" => Activation::ClampedSwiglu,
        _ => return Err(PyValueError::new_err(format!("experts: unknown activation {activation:?}"))),
    };
    // SAFETY: as in `linear`.
    let counts = unsafe { slice::<i32>(counts, count) };
    // SAFETY: as in `linear`.
    let token = unsafe { slice::<i64>(token, rows) };
    let total = counts.iter().try_fold(0i64, |sum, c| (*c >= 0).then(|| sum + i64::from(*c)));
    if d == 0 || hidden == 0 || total.is_none_or(|t| t > rows as i64) {
        return Err(PyValueError::new_err(format!(
            "experts: the counts must be at least 0 and sum to at most the {rows} assignments"
        )));
    }
    if let Some(bad) = token.iter().find(|t| !(0..tokens as i64).contains(t)) {
        return Err(PyValueError::new_err(format!("experts: token {bad} of {tokens} does not exist")));
    }
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        // SAFETY: as in `linear`.
        unsafe {
            let (x, out) = (slice(x, tokens * d), slice_mut(out, tokens * d));
            let scale = slice(scale, rows);
            let keep = (keep != 0).then(|| slice_mut(keep, rows * 2 * hidden));
            if bfloat16 {
                let layer = layer::<u16>(count, d, hidden, weights, activation, scale_input);
                archzoo_decode::experts(threads, &layer, x, token, scale, counts, keep, out);
            } else {
                let layer = layer::<f32>(count, d, hidden, weights, activation, scale_input);
                archzoo_decode::experts(threads, &layer, x, token, scale, counts, keep, out);
            }
        }
    });
    Ok(())
}

/// # Safety
/// As `linear`.
unsafe fn layer<'a, T>(
    count: usize,
    d: usize,
    hidden: usize,
    [up, down, up_bias, down_bias]: [usize; 4],
    activation: Activation,
    scale_input: bool,
) -> Experts<'a, T> {
    // SAFETY: promised by the caller.
    unsafe {
        let both = slice(up, count * 2 * hidden * d); // of each expert gate, then up
        Experts {
            d,
            hidden,
            gate: both,
            up: both.get(hidden * d..).unwrap_or_default(),
            stride: 2 * hidden * d,
            down: slice(down, count * d * hidden),
            up_bias: (up_bias != 0).then(|| slice(up_bias, count * 2 * hidden)),
            down_bias: (down_bias != 0).then(|| slice(down_bias, count * d)),
            activation,
            scale_input,
        }
    }
}

/// RMSNorm of `[rows, d]` in f32; with a residual (address not 0) of x + residual, which goes to `sum`.
#[pyfunction]
pub fn rms_norm(
    x: usize,
    residual: usize,
    weight: usize,
    rows: usize,
    d: usize,
    eps: f32,
    scale: f32,
    out: usize,
    sum: usize,
) {
    // SAFETY: as in `linear`.
    unsafe {
        let n = rows * d;
        let both = (residual != 0).then(|| (slice(residual, n), slice_mut(sum, n)));
        let weight = (weight != 0).then(|| slice(weight, d));
        archzoo_decode::rms_norm(slice(x, n), both, weight, d, eps, scale, slice_mut(out, n));
    }
}

/// Gated RMSNorm of `[rows, d]` in f32, over groups of channels; the gate's rows lie `stride` values apart.
#[pyfunction]
pub fn gated_rms_norm(
    py: Python<'_>,
    y: usize,
    gate: (usize, usize),
    weight: usize,
    rows: usize,
    d: usize,
    group: usize,
    eps: f32,
    before: bool,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    let (gate, stride) = gate;
    py.detach(|| {
        let n = rows * d;
        // SAFETY: as in `linear`.
        unsafe {
            let gate = Gate { values: slice(gate, rows.saturating_sub(1) * stride + d), stride };
            let weight = slice(weight, d);
            let out = slice_mut(out, n);
            archzoo_decode::gated_rms_norm(threads, slice(y, n), gate, weight, group, eps, before, out);
        }
    });
    Ok(())
}

/// A causal convolution in f32 over x `[rows, tokens, c]` (address, strides of row and token), after state
/// `[rows, k, c]`; weight `[c, k]`, out `[rows, tokens, c]`.
#[pyfunction]
pub fn conv(
    py: Python<'_>,
    shape: (usize, usize, usize, usize),
    x: (usize, usize, usize),
    state: usize,
    weight: usize,
    bias: usize,
    silu: bool,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let (rows, tokens, c, k) = shape;
    let (x, row, token) = x;
    if rows * tokens * c == 0 {
        return Ok(());
    }
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        // SAFETY: as in `linear`.
        unsafe {
            let conv = Conv {
                rows,
                tokens,
                x: slice(x, (rows - 1) * row + (tokens - 1) * token + c),
                strides: (row, token),
                state: (state != 0).then(|| slice(state, rows * k * c)),
                weight: slice(weight, c * k),
                bias: (bias != 0).then(|| slice(bias, c)),
                k,
                silu,
            };
            archzoo_decode::conv(threads, conv, slice_mut(out, rows * tokens * c));
        }
    });
    Ok(())
}

/// Rotary embedding of f32 heads; shape = (batch, tokens, heads, channels, pairs), x = (address, strides of row,
/// token and head), table = (cos, sin, whether each row has its own).
#[pyfunction]
pub fn rope(
    py: Python<'_>,
    shape: (usize, usize, usize, usize, usize),
    x: (usize, [usize; 3]),
    table: (usize, usize, bool),
    interleaved: bool,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let (batch, tokens, heads, d, half) = shape;
    let size = batch * tokens * heads * d;
    if size == 0 {
        return Ok(());
    }
    let (x, strides) = x;
    let last: usize = [batch, tokens, heads].iter().zip(strides).map(|(n, s)| (n - 1) * s).sum();
    let (cos, sin, each) = table;
    let n = if each { batch } else { 1 } * tokens * half;
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        // SAFETY: as in `linear`.
        unsafe {
            let (x, cos, sin) = (slice(x, last + d), slice(cos, n), slice(sin, n));
            let rope = Rope { batch, tokens, heads, d, x, strides, half, cos, sin, interleaved };
            archzoo_decode::rope(threads, rope, slice_mut(out, size));
        }
    });
    Ok(())
}

/// One step of a causal convolution in f32: x, out `[rows, c]`, state `[rows, k, c]`, weight `[c, k]`.
#[pyfunction]
pub fn conv_step(
    x: usize,
    state: usize,
    weight: usize,
    bias: usize,
    rows: usize,
    c: usize,
    k: usize,
    silu: bool,
    out: usize,
) {
    // SAFETY: as in `linear`.
    unsafe {
        let bias = (bias != 0).then(|| slice(bias, c));
        let state = slice_mut(state, rows * k * c);
        archzoo_decode::conv_step(
            slice(x, rows * c),
            state,
            slice(weight, c * k),
            bias,
            k,
            silu,
            slice_mut(out, rows * c),
        );
    }
}

/// One step of the Mamba-2 recurrence in f32; shape = (batch, heads, head_dim, state_size, B groups, C groups).
#[pyfunction]
pub fn ssd_step(
    py: Python<'_>,
    shape: (usize, usize, usize, usize, usize, usize),
    x: usize,
    decay: usize,
    b: usize,
    c: usize,
    state: usize,
    y: usize,
    threads: usize,
) -> PyResult<()> {
    let (batch, heads, head_dim, state_size, b_groups, c_groups) = shape;
    let pool = crate::pool::current()?;
    py.detach(|| {
        let n = batch * heads * head_dim;
        // SAFETY: as in `linear`.
        unsafe {
            let step = SsdStep {
                batch,
                heads,
                head_dim,
                state_size,
                x: slice(x, n),
                decay: slice(decay, batch * heads),
                b: slice(b, batch * b_groups * state_size),
                c: slice(c, batch * c_groups * state_size),
            };
            let threads = Threads { pool: &pool, count: threads };
            archzoo_decode::ssd_step(threads, step, slice_mut(state, n * state_size), slice_mut(y, n));
        }
    });
    Ok(())
}

/// The Mamba-2 recurrence in f32, state in place; shape = (batch, tokens, heads, head_dim, state_size, B groups,
/// C groups), B and C `[batch, groups, tokens, state_size]`.
#[pyfunction]
pub fn ssd_scan(
    py: Python<'_>,
    shape: (usize, usize, usize, usize, usize, usize, usize),
    x: usize,
    a: usize,
    b: usize,
    c: usize,
    state: usize,
    y: usize,
    threads: usize,
) -> PyResult<()> {
    let (batch, tokens, heads, head_dim, state_size, b_groups, c_groups) = shape;
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        let n = batch * tokens * heads * head_dim;
        let wide = |groups: usize| batch * groups * tokens * state_size;
        // SAFETY: as in `linear`.
        unsafe {
            let scan = SsdScan {
                batch,
                tokens,
                heads,
                head_dim,
                state_size,
                x: slice(x, n),
                a: slice(a, batch * tokens * heads),
                b: slice(b, wide(b_groups)),
                c: slice(c, wide(c_groups)),
            };
            let state = slice_mut(state, batch * heads * head_dim * state_size);
            archzoo_decode::ssd_scan(threads, scan, state, slice_mut(y, n));
        }
    });
    Ok(())
}

/// Attention of one query per row and head over a cache; shape = (batch, heads, groups, slots, key and value
/// channels); keys and values are an address and the strides of row, head and slot, f32 or bf16; q, out f32.
#[pyfunction]
pub fn attention(
    py: Python<'_>,
    shape: (usize, usize, usize, usize, usize, usize),
    q: usize,
    k: (usize, [usize; 3]),
    v: (usize, [usize; 3]),
    scale: f32,
    bfloat16: bool,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let (batch, heads, groups, slots, key_dim, value_dim) = shape;
    let shape = Attention { batch, heads, groups, slots, key_dim, value_dim, scale };
    if groups == 0 || heads % groups != 0 {
        return Err(PyValueError::new_err("attention: heads must be a multiple of groups"));
    }
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        // SAFETY: as in `linear`.
        unsafe {
            let q = slice(q, batch * heads * key_dim);
            let out = slice_mut(out, batch * heads * value_dim);
            if bfloat16 {
                let (k, v) = (cached::<u16>(shape, k, key_dim), cached::<u16>(shape, v, value_dim));
                archzoo_decode::attention(threads, shape, q, k, v, out);
            } else {
                let (k, v) = (cached::<f32>(shape, k, key_dim), cached::<f32>(shape, v, value_dim));
                archzoo_decode::attention(threads, shape, q, k, v, out);
            }
        }
    });
    Ok(())
}

/// Absorbed latent attention of one query per row and head; shape = (batch, heads, up-projection heads, slots,
/// rank, nope, rope and value channels); keys are an address and the strides of row and slot; all in f32.
#[pyfunction]
pub fn latent_attention(
    py: Python<'_>,
    shape: (usize, usize, usize, usize, usize, usize, usize, usize),
    q: usize,
    keys: (usize, [usize; 2]),
    weight: usize,
    scale: f32,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let (batch, heads, groups, slots, rank, nope_dim, rope_dim, v_dim) = shape;
    let shape = Latent { batch, heads, groups, slots, rank, nope_dim, rope_dim, v_dim, scale };
    if groups == 0 || heads % groups != 0 {
        return Err(PyValueError::new_err("latent_attention: heads must be a multiple of groups"));
    }
    let single =
        Attention { batch, heads, groups: 1, slots, key_dim: rank + rope_dim, value_dim: rank, scale };
    let keys = (keys.0, [keys.1[0], 0, keys.1[1]]);
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        let up = groups * (nope_dim + v_dim) * rank;
        // SAFETY: as in `linear`.
        unsafe {
            let q = slice(q, batch * heads * (nope_dim + rope_dim));
            let out = slice_mut(out, batch * heads * v_dim);
            let keys = cached(single, keys, rank + rope_dim);
            archzoo_decode::latent_attention(threads, shape, q, keys, slice(weight, up), out);
        }
    });
    Ok(())
}

/// A SwiGLU in f32 over weights in f32 or bf16: x, out `[rows, d]`; weights = addresses of gate and up
/// `[hidden, d]` and down `[d, hidden]`.
#[pyfunction]
pub fn swiglu(
    py: Python<'_>,
    shape: (usize, usize, usize),
    x: usize,
    weights: (usize, usize, usize),
    bfloat16: bool,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let (rows, d, hidden) = shape;
    if d == 0 || hidden == 0 {
        return Err(PyValueError::new_err("swiglu: no channels"));
    }
    let pool = crate::pool::current()?;
    let threads = Threads { pool: &pool, count: threads };
    py.detach(|| {
        // SAFETY: as in `linear`.
        unsafe {
            let (x, out) = (slice(x, rows * d), slice_mut::<f32>(out, rows * d));
            out.fill(0.0);
            if bfloat16 {
                one_expert::<u16>(threads, x, d, hidden, weights, out);
            } else {
                one_expert::<f32>(threads, x, d, hidden, weights, out);
            }
        }
    });
    Ok(())
}

/// # Safety
/// As `linear`.
unsafe fn one_expert<T: Value>(
    threads: Threads<'_>,
    x: &[f32],
    d: usize,
    hidden: usize,
    (gate, up, down): (usize, usize, usize),
    out: &mut [f32],
) {
    let rows = x.len() / d;
    // SAFETY: promised by the caller.
    let layer = unsafe {
        Experts::<T> {
            d,
            hidden,
            gate: slice(gate, hidden * d),
            up: slice(up, hidden * d),
            stride: 0,
            down: slice(down, d * hidden),
            up_bias: None,
            down_bias: None,
            activation: Activation::Swiglu,
            scale_input: false,
        }
    };
    let token: Vec<i64> = (0..rows as i64).collect();
    archzoo_decode::experts(threads, &layer, x, &token, &vec![1.0; rows], &[rows as i32], None, out);
}

/// # Safety
/// The address points at a tensor of this shape and these strides.
unsafe fn cached<'a, T>(shape: Attention, at: (usize, [usize; 3]), dim: usize) -> Cached<'a, T> {
    let (address, strides) = at;
    let sizes = [shape.batch, shape.groups, shape.slots];
    let len = if sizes.contains(&0) {
        0
    } else {
        sizes.iter().zip(strides).map(|(n, s)| (n - 1) * s).sum::<usize>() + dim
    };
    // SAFETY: promised by the caller.
    Cached { values: unsafe { slice(address, len) }, strides }
}

/// # Safety
/// `address` points at `len` values that live for `'a`, or `len` is 0.
pub(crate) unsafe fn slice<'a, T>(address: usize, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

/// # Safety
/// As `slice`, and nobody else uses the values.
pub(crate) unsafe fn slice_mut<'a, T>(address: usize, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, len) }
}

/// Round to nearest even; NaN stays NaN.
fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

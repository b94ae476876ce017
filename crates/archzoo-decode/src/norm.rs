use archzoo_simd::math::silu;
use archzoo_simd::{InstructionSet, multiversion};

use crate::parallel::{Shared, Threads};
use crate::value::dot;

/// `out = s / sqrt(mean(s²) + eps) · weight · scale` per row of `d`, where `s = x (+ residual)` is written to
/// `sum` when there is a residual. `x`, `out`, `sum` are `[rows, d]`.
///
/// # Panics
/// When a length does not fit.
pub fn rms_norm(
    x: &[f32],
    residual: Option<(&[f32], &mut [f32])>,
    weight: Option<&[f32]>,
    d: usize,
    eps: f32,
    scale: f32,
    out: &mut [f32],
) {
    assert!(d > 0 && x.len().is_multiple_of(d) && out.len() == x.len(), "lengths do not fit");
    assert!(weight.is_none_or(|w| w.len() == d), "the weight does not fit");
    let set = InstructionSet::current();
    match residual {
        None => rows(set, x, weight, d, eps, scale, out),
        Some((residual, sum)) => {
            assert!(residual.len() == x.len() && sum.len() == x.len(), "the residual does not fit");
            for ((s, a), b) in sum.iter_mut().zip(x).zip(residual) {
                *s = a + b;
            }
            rows(set, sum, weight, d, eps, scale, out);
        }
    }
}

multiversion! {
    fn rows(x: &[f32], weight: Option<&[f32]>, d: usize, eps: f32, scale: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            let factor = scale / (dot(x, x) / d as f32 + eps).sqrt();
            match weight {
                Some(weight) => {
                    for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
                        *o = v * factor * w;
                    }
                }
                None => {
                    for (o, v) in out.iter_mut().zip(x) {
                        *o = v * factor;
                    }
                }
            }
        }
    }
}

/// A gate whose rows lie `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub struct Gate<'a> {
    /// From the first row's first value to the last row's last.
    pub values: &'a [f32],
    /// Values from a row to the next.
    pub stride: usize,
}

/// A share of work smaller than this many values is not worth another thread.
const SHARE: usize = 1 << 15;

/// Mamba-2's gated norm of `[rows, d]`, statistics over each `group` of channels: RMSNorm(y·silu(gate))·weight,
/// or RMSNorm(y)·weight·silu(gate) with `before`.
///
/// # Panics
/// When a length does not fit.
#[allow(clippy::too_many_arguments)]
pub fn gated_rms_norm(
    threads: Threads<'_>,
    y: &[f32],
    gate: Gate<'_>,
    weight: &[f32],
    group: usize,
    eps: f32,
    before: bool,
    out: &mut [f32],
) {
    let d = weight.len();
    assert!(group > 0 && d > 0 && d.is_multiple_of(group), "the group does not divide the channels");
    assert!(y.len().is_multiple_of(d) && out.len() == y.len(), "lengths do not fit");
    let rows = y.len() / d;
    assert!(
        rows == 0 || gate.stride >= d && gate.values.len() >= (rows - 1) * gate.stride + d,
        "the gate does not fit"
    );
    let (set, outs) = (InstructionSet::current(), Shared(out.as_mut_ptr()));
    threads.split(rows, y.len(), SHARE, |row| {
        let at = row * d;
        // SAFETY: each row is handled once.
        let out = unsafe { outs.slice(at, d) };
        let gate = &gate.values[row * gate.stride..][..d];
        gated(set, &y[at..at + d], gate, weight, group, eps, before, out);
    });
}

multiversion! {
    fn gated(y: &[f32], gate: &[f32], weight: &[f32], group: usize, eps: f32, before: bool, out: &mut [f32]) {
        let groups = weight.len() / group;
        for (i, ((y, gate), out)) in
            y.chunks_exact(group).zip(gate.chunks_exact(group)).zip(out.chunks_exact_mut(group)).enumerate()
        {
            for (o, g) in out.iter_mut().zip(gate) {
                *o = silu(*g);
            }
            if !before {
                for (o, y) in out.iter_mut().zip(y) {
                    *o *= y;
                }
            }
            let square = if before { dot(y, y) } else { dot(out, out) };
            let factor = 1.0 / (square / group as f32 + eps).sqrt();
            let weight = &weight[i % groups * group..][..group];
            if before {
                for ((o, y), w) in out.iter_mut().zip(y).zip(weight) {
                    *o *= y * factor * w;
                }
            } else {
                for (o, w) in out.iter_mut().zip(weight) {
                    *o *= factor * w;
                }
            }
        }
    }
}

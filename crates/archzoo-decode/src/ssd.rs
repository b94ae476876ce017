use archzoo_simd::math::exp;
use archzoo_simd::{InstructionSet, multiversion};

use crate::parallel::{Shared, Threads};
use crate::value::dot;

/// Shapes and inputs of one step of the Mamba-2 recurrence for `batch` sequences of `heads` heads.
#[derive(Clone, Copy, Debug)]
pub struct SsdStep<'a> {
    /// Sequences.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// State size of a channel.
    pub state_size: usize,
    /// `[batch, heads, head_dim]`, already times dt.
    pub x: &'a [f32],
    /// Decay of the state in (0, 1], `[batch, heads]`.
    pub decay: &'a [f32],
    /// `[batch, groups of B, state_size]`; head i reads group i / (heads / groups).
    pub b: &'a [f32],
    /// `[batch, groups of C, state_size]`.
    pub c: &'a [f32],
}

/// A share of work smaller than this many state values is not worth another thread.
const SHARE: usize = 1 << 14;

/// `S = decay·S + x ⊗ B` in place and `y = S·C`; `state` is `[batch, heads, head_dim, state_size]`.
///
/// # Panics
/// When a length does not fit.
pub fn ssd_step(threads: Threads<'_>, step: SsdStep<'_>, state: &mut [f32], y: &mut [f32]) {
    let SsdStep { batch, heads, head_dim, state_size, x, decay, b, c } = step;
    let count = batch * heads;
    assert!(
        x.len() == count * head_dim && y.len() == x.len() && decay.len() == count,
        "x, y or decay do not fit"
    );
    assert!(state.len() == x.len() * state_size, "the state does not fit");
    if state.is_empty() {
        return y.fill(0.0);
    }
    let group = |t: &[f32]| {
        let groups = t.len() / (batch * state_size);
        assert!(
            groups > 0 && t.len() == batch * groups * state_size && heads.is_multiple_of(groups),
            "B or C do not fit"
        );
        groups
    };
    let (b_groups, c_groups) = (group(b), group(c));
    let shares = threads.count.min(state.len() / SHARE).max(1);
    let (states, ys) = (Shared(state.as_mut_ptr()), Shared(y.as_mut_ptr()));
    let set = InstructionSet::current();
    threads.share(shares, |share| {
        for i in count * share / shares..count * (share + 1) / shares {
            let (row, head) = (i / heads, i % heads);
            let pick = |groups: usize| {
                let at = (row * groups + head / (heads / groups)) * state_size;
                at..at + state_size
            };
            // SAFETY: head i has these places to itself.
            let (s, y) = unsafe {
                (
                    states.slice(i * head_dim * state_size, head_dim * state_size),
                    ys.slice(i * head_dim, head_dim),
                )
            };
            let x = &x[i * head_dim..(i + 1) * head_dim];
            one(set, s, y, x, decay[i], &b[pick(b_groups)], &c[pick(c_groups)]);
        }
    });
}

multiversion! {
    fn one(state: &mut [f32], y: &mut [f32], x: &[f32], decay: f32, b: &[f32], c: &[f32]) {
        for ((s, y), x) in state.chunks_exact_mut(b.len()).zip(y.iter_mut()).zip(x) {
            for (s, b) in s.iter_mut().zip(b) {
                *s = *s * decay + x * b;
            }
            *y = dot(s, c);
        }
    }
}

/// `out[n, h, i, j] = scores[n, g, i, j] · exp(sums[n, h, i] - sums[n, h, j])` up to the diagonal, 0 above it.
///
/// `scores` is `[n, groups, q, q]`, `sums` (running sums of the log-decays) `[n, heads, q]`, `out`
/// `[n, heads, q, q]`; head h reads group h / (heads / groups).
///
/// # Panics
/// When a length does not fit.
pub fn ssd_decay(
    threads: Threads<'_>,
    scores: &[f32],
    sums: &[f64],
    heads: usize,
    groups: usize,
    q: usize,
    out: &mut [f32],
) {
    assert!(
        groups > 0 && heads > 0 && q > 0 && heads.is_multiple_of(groups),
        "heads, groups or q do not fit"
    );
    assert!(sums.len().is_multiple_of(heads * q), "the sums do not fit");
    let count = sums.len() / q;
    assert!(out.len() == count * q * q && scores.len() == out.len() / heads * groups, "scores do not fit");
    let shares = threads.count.min(out.len() / SHARE).max(1);
    let (set, outs) = (InstructionSet::current(), Shared(out.as_mut_ptr()));
    threads.share(shares, |share| {
        for i in count * share / shares..count * (share + 1) / shares {
            let from = (i / heads * groups + i % heads / (heads / groups)) * q * q;
            // SAFETY: head i has this place to itself.
            let out = unsafe { outs.slice(i * q * q, q * q) };
            decayed(set, &scores[from..from + q * q], &sums[i * q..(i + 1) * q], out);
        }
    });
}

multiversion! {
    fn decayed(scores: &[f32], sums: &[f64], out: &mut [f32]) {
        let q = sums.len();
        for (i, (scores, out)) in scores.chunks_exact(q).zip(out.chunks_exact_mut(q)).enumerate() {
            let here = sums[i];
            let (out, above) = out.split_at_mut(i + 1);
            // The difference of long sums loses digits in f32.
            for ((o, s), sum) in out.iter_mut().zip(scores).zip(sums) {
                *o = s * exp((here - sum) as f32);
            }
            above.fill(0.0);
        }
    }
}

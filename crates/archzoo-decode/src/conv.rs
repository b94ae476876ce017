use archzoo_simd::math;
use archzoo_simd::{InstructionSet, multiversion};

use crate::parallel::{Shared, Threads};

/// One step of a causal depthwise convolution: `state` `[rows, k, c]` moves one input to the left and takes
/// in `x` `[rows, c]`; `out = silu?(Σ_k state·weight + bias)`. `weight` is `[c, k]`.
///
/// # Panics
/// When a length does not fit.
pub fn conv_step(
    x: &[f32],
    state: &mut [f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    k: usize,
    silu: bool,
    out: &mut [f32],
) {
    assert!(k > 0 && weight.len().is_multiple_of(k), "the weight does not fit");
    let c = weight.len() / k;
    if c == 0 {
        return;
    }
    assert!(
        x.len().is_multiple_of(c) && out.len() == x.len() && state.len() == x.len() * k,
        "lengths do not fit"
    );
    assert!(bias.is_none_or(|b| b.len() == c), "the bias does not fit");
    step(InstructionSet::current(), x, state, weight, bias, k, silu, out);
}

multiversion! {
    fn step(x: &[f32], state: &mut [f32], weight: &[f32], bias: Option<&[f32]>, k: usize, silu: bool, out: &mut [f32]) {
        let c = weight.len() / k;
        for ((x, out), state) in
            x.chunks_exact(c).zip(out.chunks_exact_mut(c)).zip(state.chunks_exact_mut(k * c))
        {
            state.copy_within(c.., 0);
            state[(k - 1) * c..].copy_from_slice(x);
            match bias {
                Some(bias) => out.copy_from_slice(bias),
                None => out.fill(0.0),
            }
            for (tap, state) in state.chunks_exact(c).enumerate() {
                for ((o, s), w) in out.iter_mut().zip(state).zip(weight.chunks_exact(k)) {
                    *o += s * w[tap];
                }
            }
            if silu {
                for o in out.iter_mut() {
                    *o = math::silu(*o);
                }
            }
        }
    }
}

/// A causal depthwise convolution over `tokens` of `rows` sequences.
#[derive(Clone, Copy, Debug)]
pub struct Conv<'a> {
    /// Sequences.
    pub rows: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Inputs; token t of row b starts at b · strides.0 + t · strides.1 and has one value a channel.
    pub x: &'a [f32],
    /// See `x`.
    pub strides: (usize, usize),
    /// The last `k` inputs before, `[rows, k, c]`; zeros without.
    pub state: Option<&'a [f32]>,
    /// `[c, k]`.
    pub weight: &'a [f32],
    /// `[c]`.
    pub bias: Option<&'a [f32]>,
    /// Taps.
    pub k: usize,
    /// Apply SiLU.
    pub silu: bool,
}

/// A share of work smaller than this many values is not worth another thread.
const SHARE: usize = 1 << 15;

/// `out[b, t] = silu?(Σ_k x[b, t - K + 1 + k]·weight[:, k] + bias)`; `out` is `[rows, tokens, c]`.
///
/// # Panics
/// When a length does not fit.
pub fn conv(threads: Threads<'_>, conv: Conv<'_>, out: &mut [f32]) {
    let Conv { rows, tokens, x, strides, state, weight, bias, k, silu } = conv;
    assert!(k > 0 && weight.len().is_multiple_of(k), "the weight does not fit");
    let c = weight.len() / k;
    if rows * tokens * c == 0 {
        return;
    }
    assert!(out.len() == rows * tokens * c, "the output does not fit");
    assert!(x.len() >= (rows - 1) * strides.0 + (tokens - 1) * strides.1 + c, "x does not fit");
    assert!(state.is_none_or(|s| s.len() == rows * k * c), "the state does not fit");
    assert!(bias.is_none_or(|b| b.len() == c), "the bias does not fit");
    let taps: Vec<f32> = (0..k * c).map(|i| weight[i % c * k + i / c]).collect(); // [k, c]
    let (set, outs) = (InstructionSet::current(), Shared(out.as_mut_ptr()));
    let size = out.len();
    threads.split(rows * tokens, size, SHARE, |i| {
        let (b, t) = (i / tokens, i % tokens);
        // SAFETY: each token is handled once.
        let out = unsafe { outs.slice(i * c, c) };
        match bias {
            Some(bias) => out.copy_from_slice(bias),
            None => out.fill(0.0),
        }
        for (tap, w) in taps.chunks_exact(c).enumerate() {
            let input = match ((t + tap + 1).checked_sub(k), state) {
                (Some(t), _) => &x[b * strides.0 + t * strides.1..][..c],
                (None, Some(state)) => &state[(b * k + t + tap + 1) * c..][..c],
                (None, None) => continue,
            };
            add_product(set, out, input, w);
        }
        if silu {
            apply_silu(set, out);
        }
    });
}

multiversion! {
    fn add_product(out: &mut [f32], x: &[f32], w: &[f32]) {
        for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
            *o += x * w;
        }
    }
}

multiversion! {
    fn apply_silu(out: &mut [f32]) {
        for o in out.iter_mut() {
            *o = math::silu(*o);
        }
    }
}

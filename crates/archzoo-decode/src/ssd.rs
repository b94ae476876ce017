use archzoo_simd::math::exp;
use archzoo_simd::{InstructionSet, multiversion};

use crate::outer::{Strided, add_product};
use crate::parallel::{Shared, Threads};
use crate::product::product;
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
    let size = state.len();
    let (states, ys) = (Shared(state.as_mut_ptr()), Shared(y.as_mut_ptr()));
    let set = InstructionSet::current();
    threads.split(count, size, SHARE, |i| {
        let (row, head) = (i / heads, i % heads);
        let pick = |groups: usize| {
            let at = (row * groups + head / (heads / groups)) * state_size;
            at..at + state_size
        };
        // SAFETY: head i has these places to itself.
        let (s, y) = unsafe {
            (states.slice(i * head_dim * state_size, head_dim * state_size), ys.slice(i * head_dim, head_dim))
        };
        let x = &x[i * head_dim..(i + 1) * head_dim];
        one(set, s, y, x, decay[i], &b[pick(b_groups)], &c[pick(c_groups)]);
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

/// The recurrence over `tokens` tokens of `batch` sequences, each chunk of them as products of matrices.
#[derive(Clone, Copy, Debug)]
pub struct SsdScan<'a> {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// State size of a channel.
    pub state_size: usize,
    /// `[batch, tokens, heads, head_dim]`, already times dt.
    pub x: &'a [f32],
    /// Log-decay of the state, `[batch, tokens, heads]`.
    pub a: &'a [f32],
    /// `[batch, groups of B, tokens, state_size]`; head i reads group i / (heads / groups).
    pub b: &'a [f32],
    /// `[batch, groups of C, tokens, state_size]`.
    pub c: &'a [f32],
}

/// Tokens of a chunk.
const CHUNK: usize = 64;

/// `S_t = exp(a_t)·S + x_t ⊗ B_t` in place and `y_t = S_t·C_t`; `state` is `[batch, heads, head_dim, state_size]`
/// and `y` is like x.
///
/// # Panics
/// When a length does not fit.
pub fn ssd_scan(threads: Threads<'_>, scan: SsdScan<'_>, state: &mut [f32], y: &mut [f32]) {
    let SsdScan { batch, tokens, heads, head_dim, state_size, x, a, b, c } = scan;
    let count = batch * heads;
    assert!(x.len() == count * tokens * head_dim && y.len() == x.len(), "x or y do not fit");
    assert!(
        a.len() == count * tokens && state.len() == count * head_dim * state_size,
        "a or state do not fit"
    );
    if y.is_empty() || state.is_empty() {
        return y.fill(0.0);
    }
    let groups = |t: &[f32]| {
        let groups = t.len() / (batch * tokens * state_size);
        let fits = groups > 0 && t.len() == batch * groups * tokens * state_size;
        assert!(fits && heads.is_multiple_of(groups), "B or C do not fit");
        groups
    };
    let (b_groups, c_groups) = (groups(b), groups(c));
    let set = InstructionSet::current();
    let group = |row: usize, groups: usize, head: usize| {
        let at = (row * groups + head / (heads / groups)) * tokens * state_size;
        at..at + tokens * state_size
    };

    // C_i·B_j inside each chunk, once for the heads that share both.
    let pairs = if b_groups.is_multiple_of(c_groups) || c_groups.is_multiple_of(b_groups) {
        b_groups.max(c_groups)
    } else {
        heads
    };
    let chunks = tokens.div_ceil(CHUNK);
    let mut scores = vec![0.0f32; batch * pairs * chunks * CHUNK * CHUNK];
    let all = Shared(scores.as_mut_ptr());
    threads.each(batch * pairs * chunks, |i| {
        let (pair, chunk) = (i / chunks, i % chunks);
        let (row, head) = (pair / pairs, pair % pairs * (heads / pairs));
        let (start, stop) = (chunk * CHUNK, tokens.min((chunk + 1) * CHUNK));
        let rows: Vec<&[f32]> = c[group(row, c_groups, head)][start * state_size..stop * state_size]
            .chunks_exact(state_size)
            .collect();
        let weights = &b[group(row, b_groups, head)][start * state_size..stop * state_size];
        // SAFETY: this chunk has its place to itself.
        let out = unsafe { all.slice(i * CHUNK * CHUNK, CHUNK * CHUNK) };
        product(set, &rows, state_size, weights, 0..stop - start, |r, j, sums| {
            out[r * CHUNK + j..][..sums.len()].copy_from_slice(sums);
        });
    });

    let (states, ys) = (Shared(state.as_mut_ptr()), Shared(y.as_mut_ptr()));
    let width = heads * head_dim; // from a token to the next
    threads.each(count, |i| {
        let (row, head) = (i / heads, i % heads);
        let (b, c) = (&b[group(row, b_groups, head)], &c[group(row, c_groups, head)]);
        let pair = row * pairs + head / (heads / pairs);
        // SAFETY: head i has this place to itself.
        let state = unsafe { states.slice(i * head_dim * state_size, head_dim * state_size) };
        let mut turned: Vec<f32> = vec![0.0; state.len()]; // [state_size, head_dim]
        for (p, values) in state.chunks_exact(state_size).enumerate() {
            for (n, value) in values.iter().enumerate() {
                turned[n * head_dim + p] = *value;
            }
        }
        let mut mixing = vec![0.0f32; CHUNK * CHUNK];
        let mut scaled = vec![0.0f32; CHUNK * head_dim.max(state_size)];
        let mut sums = [0.0f64; CHUNK];
        for chunk in 0..chunks {
            let (start, stop) = (chunk * CHUNK, tokens.min((chunk + 1) * CHUNK));
            let size = stop - start;
            let mut sum = 0.0;
            for (t, s) in sums[..size].iter_mut().enumerate() {
                sum += f64::from(a[(row * tokens + start + t) * heads + head]);
                *s = sum;
            }
            let scores = &scores[(pair * chunks + chunk) * CHUNK * CHUNK..][..CHUNK * CHUNK];
            decayed(set, scores, &sums[..size], &mut mixing);
            let c = &c[start * state_size..stop * state_size];
            decay_rows(set, c, &sums[..size], &mut scaled);
            let at = (row * tokens + start) * width + head * head_dim;
            // SAFETY: the rows of this head in x and y, and whole local matrices.
            unsafe {
                let (x, y) = (x.as_ptr().add(at), ys.0.add(at));
                for t in 0..size {
                    ys.slice(at + t * width, head_dim).fill(0.0);
                }
                for t in (0..size).step_by(4) {
                    let m = (size - t).min(4); // what is right of the diagonal is 0
                    let rows = Strided { start: mixing.as_ptr().add(t * CHUNK), row: CHUNK, column: 1 };
                    add_product(set, rows, m, t + m, x, width, head_dim, y.add(t * width), width);
                }
                let rows = Strided { start: scaled.as_ptr(), row: state_size, column: 1 };
                let state = turned.as_mut_ptr();
                add_product(set, rows, size, state_size, state, head_dim, head_dim, y, width);
                let last = sums[size - 1];
                let whole = exp(last as f32);
                for value in &mut turned {
                    *value *= whole;
                }
                for (t, sum) in sums[..size].iter().enumerate() {
                    let factor = exp((last - sum) as f32);
                    let row = std::slice::from_raw_parts(x.add(t * width), head_dim);
                    for (to, from) in scaled[t * head_dim..].iter_mut().zip(row) {
                        *to = from * factor;
                    }
                }
                let b = Strided { start: b.as_ptr().add(start * state_size), row: 1, column: state_size };
                let (state, scaled) = (turned.as_mut_ptr(), scaled.as_ptr());
                add_product(set, b, state_size, size, scaled, head_dim, head_dim, state, head_dim);
            }
        }
        for (p, values) in state.chunks_exact_mut(state_size).enumerate() {
            for (n, value) in values.iter_mut().enumerate() {
                *value = turned[n * head_dim + p];
            }
        }
    });
}

multiversion! {
    /// `out[i, j] = scores[i, j] · exp(sums[i] - sums[j])` up to the diagonal, 0 right of it; rows of [`CHUNK`].
    fn decayed(scores: &[f32], sums: &[f64], out: &mut [f32]) {
        for (i, (scores, out)) in scores.chunks_exact(CHUNK).zip(out.chunks_exact_mut(CHUNK)).take(sums.len()).enumerate() {
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

multiversion! {
    /// Row i of `out` is row i of `rows` times exp(sums[i]).
    fn decay_rows(rows: &[f32], sums: &[f64], out: &mut [f32]) {
        let width = rows.len() / sums.len();
        for ((row, out), sum) in rows.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(sums) {
            let factor = exp(*sum as f32);
            for (o, v) in out.iter_mut().zip(row) {
                *o = v * factor;
            }
        }
    }
}

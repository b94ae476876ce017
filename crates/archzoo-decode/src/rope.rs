use archzoo_simd::{InstructionSet, multiversion};

use crate::parallel::{Shared, Threads};

/// A rotary position embedding of `batch` sequences of `tokens` with `heads` of `d` channels.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub d: usize,
    /// Inputs; head h of token t of row b starts at b · strides.0 + t · strides.1 + h · strides.2.
    pub x: &'a [f32],
    /// See `x`.
    pub strides: [usize; 3],
    /// Pairs of channels to rotate.
    pub half: usize,
    /// `[tokens, half]` or `[batch, tokens, half]`.
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
    /// Channels (2p, 2p + 1) make a pair, not (p, p + half).
    pub interleaved: bool,
}

/// A share of work smaller than this many values is not worth another thread.
const SHARE: usize = 1 << 15;

/// Rotates the first 2 · half channels of every head, whose order becomes half-split; the others stay.
/// `out` is `[batch, tokens, heads, d]`.
///
/// # Panics
/// When a length does not fit.
pub fn rope(threads: Threads<'_>, rope: Rope<'_>, out: &mut [f32]) {
    let Rope { batch, tokens, heads, d, x, strides, half, cos, sin, interleaved } = rope;
    assert!(out.len() == batch * tokens * heads * d, "the output does not fit");
    if out.is_empty() {
        return;
    }
    let rows = if cos.len() == tokens * half { 1 } else { batch };
    let fits = cos.len() == rows * tokens * half && sin.len() == cos.len() && 2 * half <= d;
    assert!(fits, "cos or sin does not fit");
    let last = [batch, tokens, heads].iter().zip(strides).map(|(n, s)| (n - 1) * s).sum::<usize>();
    assert!(x.len() >= last + d, "x does not fit");
    let (set, size, outs) = (InstructionSet::current(), out.len(), Shared(out.as_mut_ptr()));
    threads.split(batch * tokens, size, SHARE, |i| {
        let (b, t) = (i / tokens, i % tokens);
        let at = (b % rows * tokens + t) * half;
        // SAFETY: each token is handled once.
        let out = unsafe { outs.slice(i * heads * d, heads * d) };
        let x = &x[b * strides[0] + t * strides[1]..];
        rotate(set, x, strides[2], &cos[at..at + half], &sin[at..at + half], interleaved, out, d);
    });
}

multiversion! {
    fn rotate(x: &[f32], stride: usize, cos: &[f32], sin: &[f32], interleaved: bool, out: &mut [f32], d: usize) {
        let half = cos.len();
        for (h, out) in out.chunks_exact_mut(d).enumerate() {
            let x = &x[h * stride..][..d];
            let (first, rest) = out.split_at_mut(half);
            let (second, rest) = rest.split_at_mut(half);
            rest.copy_from_slice(&x[2 * half..]);
            let to = first.iter_mut().zip(second).zip(cos.iter().zip(sin));
            if interleaved {
                for (((f, s), (cos, sin)), pair) in to.zip(x.as_chunks::<2>().0) {
                    let [a, b] = *pair;
                    (*f, *s) = (a * cos - b * sin, b * cos + a * sin);
                }
            } else {
                for (((f, s), (cos, sin)), (a, b)) in to.zip(x[..half].iter().zip(&x[half..2 * half])) {
                    (*f, *s) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
    }
}

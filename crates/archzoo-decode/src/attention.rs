use archzoo_simd::math::exp;
use archzoo_simd::{InstructionSet, multiversion};

use crate::parallel::{Shared, Threads};
use crate::product::product;
use crate::value::{Value, dot};

/// Keys handled at a time: scores and widened rows of a block stay in the first cache level.
const BLOCK: usize = 64;

/// A share of fewer keys than this is not worth another thread.
const SHARE: usize = 256;

/// Keys or values of a cache: element `(row, head, slot, i)` is at
/// `row * strides[0] + head * strides[1] + slot * strides[2] + i`.
#[derive(Clone, Copy, Debug)]
pub struct Cached<'a, T> {
    /// Everything up to the last element that is read.
    pub values: &'a [T],
    /// Of batch row, head and slot.
    pub strides: [usize; 3],
}

/// Shapes of one decode step: a query per row and head over `slots` cached keys.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key heads; query head i reads key head i / (heads / groups).
    pub groups: usize,
    /// Cached keys, all of which are seen.
    pub slots: usize,
    /// Channels of queries and keys.
    pub key_dim: usize,
    /// Channels of values.
    pub value_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
}

/// `out = softmax(q·kᵀ·scale)·v`: q `[batch, heads, key_dim]`, out `[batch, heads, value_dim]`.
///
/// # Panics
/// When a length does not fit.
pub fn attention<T: Value>(
    threads: Threads<'_>,
    shape: Attention,
    q: &[f32],
    k: Cached<'_, T>,
    v: Cached<'_, T>,
    out: &mut [f32],
) {
    let Attention { batch, heads, groups, slots, key_dim, value_dim, scale } = shape;
    assert!(groups > 0 && heads.is_multiple_of(groups), "heads must be a multiple of groups");
    assert!(
        q.len() == batch * heads * key_dim && out.len() == batch * heads * value_dim,
        "q or out do not fit"
    );
    if out.is_empty() || slots == 0 {
        return out.fill(0.0);
    }
    for (cached, dim) in [(k, key_dim), (v, value_dim)] {
        let [row, head, slot] = cached.strides;
        let last = (batch - 1) * row + (groups - 1) * head + (slots - 1) * slot + dim;
        assert!(last <= cached.values.len(), "keys or values do not fit");
    }
    let queries = heads / groups;
    let q: Vec<f32> = q.iter().map(|v| v * scale).collect();
    let shares = threads.count.min(batch * groups * slots / SHARE).max(1);
    let splits = if batch * groups >= shares { 1 } else { shares.div_ceil(batch * groups) };
    // Per task and query: the largest score, the sum of exponentials, the weighted values.
    let width = value_dim + 2;
    let tasks = batch * groups * splits;
    let mut partial = vec![0.0f32; tasks * queries * width];
    let places = Shared(partial.as_mut_ptr());
    let set = InstructionSet::current();
    threads.share(shares, |share| {
        for task in (share..tasks).step_by(shares) {
            let (pair, split) = (task / splits, task % splits);
            let (row, group) = (pair / groups, pair % groups);
            let (start, stop) = (slots * split / splits, slots * (split + 1) / splits);
            let q = &q[(row * heads + group * queries) * key_dim..][..queries * key_dim];
            let at = |c: Cached<'_, T>| row * c.strides[0] + group * c.strides[1];
            // SAFETY: this task's places.
            let partial = unsafe { places.slice(task * queries * width, queries * width) };
            let (keys, values) = (&k.values[at(k)..], &v.values[at(v)..]);
            span(set, q, keys, k.strides[2], values, v.strides[2], start, stop, key_dim, value_dim, partial);
        }
    });
    for (pair, parts) in partial.chunks_exact(splits * queries * width).enumerate() {
        for query in 0..queries {
            let part = |split: usize| &parts[(split * queries + query) * width..][..width];
            let top = (0..splits).map(|s| part(s)[0]).fold(f32::NEG_INFINITY, f32::max);
            let weight = |s: usize| if part(s)[0] == f32::NEG_INFINITY { 0.0 } else { exp(part(s)[0] - top) };
            let total: f32 = (0..splits).map(|s| weight(s) * part(s)[1]).sum();
            let (row, group) = (pair / groups, pair % groups);
            let out = &mut out[(row * heads + group * queries + query) * value_dim..][..value_dim];
            out.fill(0.0);
            for s in 0..splits {
                let factor = weight(s) / total;
                for (o, p) in out.iter_mut().zip(&part(s)[2..]) {
                    *o += factor * p;
                }
            }
        }
    }
}

/// Shapes of one step of absorbed latent attention (MLA): a query per row and head over cached latents.
#[derive(Clone, Copy, Debug)]
pub struct Latent {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of the up-projection; query head i uses head i / (heads / groups).
    pub groups: usize,
    /// Cached latents, all of which are seen.
    pub slots: usize,
    /// Channels of a latent.
    pub rank: usize,
    /// Channels of a head's query that meet the latent through the up-projection.
    pub nope_dim: usize,
    /// Channels that are rotated and meet the cache as they are.
    pub rope_dim: usize,
    /// Channels of a head's result.
    pub v_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
}

/// Attention over the latents themselves: the up-projection `weight` `[groups, nope_dim + v_dim, rank]` moves
/// into queries and results. q `[batch, heads, nope_dim + rope_dim]`, out `[batch, heads, v_dim]`; `keys` holds
/// `rank + rope_dim` channels a slot.
///
/// # Panics
/// When a length does not fit.
pub fn latent_attention(
    threads: Threads<'_>,
    shape: Latent,
    q: &[f32],
    keys: Cached<'_, f32>,
    weight: &[f32],
    out: &mut [f32],
) {
    let Latent { batch, heads, groups, slots, rank, nope_dim, rope_dim, v_dim, scale } = shape;
    assert!(groups > 0 && heads.is_multiple_of(groups), "heads must be a multiple of groups");
    let (count, width) = (batch * heads, rank + rope_dim);
    assert!(q.len() == count * (nope_dim + rope_dim) && out.len() == count * v_dim, "q or out do not fit");
    assert!(weight.len() == groups * (nope_dim + v_dim) * rank, "the weight does not fit");
    let set = InstructionSet::current();
    let up = |head: usize| &weight[head / (heads / groups) * (nope_dim + v_dim) * rank..];
    let mut queries = vec![0.0f32; count * width];
    let into = Shared(queries.as_mut_ptr());
    let products = count * rank * nope_dim;
    threads.split(count, products, UP_SHARE, |i| {
        let q = &q[i * (nope_dim + rope_dim)..][..nope_dim + rope_dim];
        // SAFETY: head i has this place to itself.
        let to = unsafe { into.slice(i * width, width) };
        absorb(set, &q[..nope_dim], up(i % heads), &mut to[..rank]);
        to[rank..].copy_from_slice(&q[nope_dim..]);
    });
    let mut mixed = vec![0.0f32; count * rank];
    let single = Attention { batch, heads, groups: 1, slots, key_dim: width, value_dim: rank, scale };
    attention(threads, single, &queries, keys, keys, &mut mixed);
    let into = Shared(out.as_mut_ptr());
    threads.split(count, products, UP_SHARE, |i| {
        let rows = [&mixed[i * rank..(i + 1) * rank]];
        let weight = &up(i % heads)[nope_dim * rank..(nope_dim + v_dim) * rank];
        // SAFETY: head i has this place to itself.
        let to = unsafe { into.slice(i * v_dim, v_dim) };
        product(set, &rows, rank, weight, 0..v_dim, |_, j, sums| {
            to[j..j + sums.len()].copy_from_slice(sums);
        });
    });
}

/// A share of fewer products than this is not worth another thread.
const UP_SHARE: usize = 1 << 16;

multiversion! {
    /// `out = Σ_j q[j] · rows[j]` over rows of the length of `out`.
    fn absorb(q: &[f32], rows: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for (q, row) in q.iter().zip(rows.chunks_exact(out.len())) {
            for (o, w) in out.iter_mut().zip(row) {
                *o += q * w;
            }
        }
    }
}

multiversion! {
    /// The queries of one group over the keys `start..stop`.
    fn span<T: Value>(
        q: &[f32],
        keys: &[T],
        key_stride: usize,
        values: &[T],
        value_stride: usize,
        start: usize,
        stop: usize,
        key_dim: usize,
        value_dim: usize,
        partial: &mut [f32],
    ) {
        let queries = q.len() / key_dim;
        let width = value_dim + 2;
        let mut rows = vec![0.0f32; BLOCK * key_dim.max(value_dim)];
        let mut scores = vec![0.0f32; queries * BLOCK];
        for part in partial.chunks_exact_mut(width) {
            part.fill(0.0);
            part[0] = f32::NEG_INFINITY;
        }
        let mut first = start;
        while first < stop {
            let count = BLOCK.min(stop - first);
            for (j, row) in rows.chunks_exact_mut(key_dim).take(count).enumerate() {
                for (r, k) in row.iter_mut().zip(&keys[(first + j) * key_stride..][..key_dim]) {
                    *r = k.widen();
                }
            }
            for (query, scores) in q.chunks_exact(key_dim).zip(scores.chunks_exact_mut(BLOCK)) {
                for (score, row) in scores.iter_mut().zip(rows.chunks_exact(key_dim)).take(count) {
                    *score = dot(query, row);
                }
            }
            for (j, row) in rows.chunks_exact_mut(value_dim).take(count).enumerate() {
                for (r, v) in row.iter_mut().zip(&values[(first + j) * value_stride..][..value_dim]) {
                    *r = v.widen();
                }
            }
            for (part, scores) in partial.chunks_exact_mut(width).zip(scores.chunks_exact_mut(BLOCK)) {
                let scores = &mut scores[..count];
                let mut top = part[0];
                for &score in scores.iter() {
                    top = if score > top { score } else { top };
                }
                let shrink = if part[0] == f32::NEG_INFINITY { 0.0 } else { exp(part[0] - top) };
                let mut sum = 0.0;
                for score in scores.iter_mut() {
                    *score = exp(*score - top);
                }
                for &score in scores.iter() {
                    sum += score;
                }
                part[0] = top;
                part[1] = part[1] * shrink + sum;
                add_weighted(&mut part[2..], shrink, scores, &rows, value_dim);
            }
            first += count;
        }
    }
}

/// `acc = acc·shrink + Σ_j weights[j]·rows[j]`, a strip of channels at a time so that it stays in registers.
#[inline(always)]
fn add_weighted(acc: &mut [f32], shrink: f32, weights: &[f32], rows: &[f32], dim: usize) {
    const STRIP: usize = 32;
    let mut at = 0;
    while at + STRIP <= dim {
        let mut strip = [0.0f32; STRIP];
        for (s, a) in strip.iter_mut().zip(&acc[at..at + STRIP]) {
            *s = a * shrink;
        }
        for (j, w) in weights.iter().enumerate() {
            let row = &rows[j * dim + at..j * dim + at + STRIP];
            for i in 0..STRIP {
                strip[i] += w * row[i];
            }
        }
        acc[at..at + STRIP].copy_from_slice(&strip);
        at += STRIP;
    }
    for i in at..dim {
        let mut sum = acc[i] * shrink;
        for (j, w) in weights.iter().enumerate() {
            sum += w * rows[j * dim + i];
        }
        acc[i] = sum;
    }
}

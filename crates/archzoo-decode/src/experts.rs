use archzoo_simd::math::{exp, larger, silu, smaller};
use archzoo_simd::{InstructionSet, multiversion};

use crate::parallel::{Shared, Threads};
use crate::product::product;
use crate::value::Value;

/// Rows of an expert handled together: they stay in the second cache level.
const ROWS: usize = 64;

/// Rows between two meetings of the threads.
const BATCH: usize = 512;

/// Columns that a thread takes at a time.
const COLUMNS: usize = 64;

/// Between the two products of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// silu(gate) · up.
    Swiglu,
    /// (up + 1) · gate · sigmoid(1.702 gate), gate at most 7, up within 7 of 0 (gpt-oss).
    ClampedSwiglu,
}

/// The routed experts of a layer: `count` gated feed-forwards from `d` over `hidden` to `d` channels.
#[derive(Clone, Copy, Debug)]
pub struct Experts<'a, T> {
    /// Channels of the model.
    pub d: usize,
    /// Channels between.
    pub hidden: usize,
    /// The gate's rows `[hidden, d]` of the first expert; those of the next are `stride` values on.
    pub gate: &'a [T],
    /// The same of the other factor.
    pub up: &'a [T],
    /// Values from an expert to the next in `gate` and `up`.
    pub stride: usize,
    /// `[count, d, hidden]`.
    pub down: &'a [T],
    /// `[count, 2 · hidden]`.
    pub up_bias: Option<&'a [T]>,
    /// `[count, d]`.
    pub down_bias: Option<&'a [T]>,
    /// Between the products.
    pub activation: Activation,
    /// The scale is on the input instead of the result (Llama 4).
    pub scale_input: bool,
}

/// A part of one expert's rows: `start..stop` of the assignments.
#[derive(Clone, Copy)]
struct Segment {
    expert: usize,
    start: usize,
    stop: usize,
}

/// `out[token[r]] += scale[r] · FFN(x[token[r]])` for assignments sorted by expert, `counts[e]` of each.
///
/// `x` and `out` are `[tokens, d]`. Only the experts that have rows are read. `keep` `[rows, 2 · hidden]` takes
/// what is before the activation.
///
/// # Panics
/// When a length does not fit or a token does not exist.
#[allow(clippy::too_many_arguments)]
pub fn experts<T: Value>(
    threads: Threads<'_>,
    experts: &Experts<'_, T>,
    x: &[f32],
    token: &[i64],
    scale: &[f32],
    counts: &[i32],
    keep: Option<&mut [f32]>,
    out: &mut [f32],
) {
    let Experts { d, hidden, gate, up, stride, down, up_bias, down_bias, activation, scale_input } = *experts;
    let rows: usize = counts.iter().map(|c| usize::try_from(*c).unwrap_or(usize::MAX)).sum();
    assert!(d > 0 && hidden > 0 && x.len().is_multiple_of(d) && out.len() == x.len(), "x or out do not fit");
    assert!(token.len() >= rows && scale.len() >= rows, "the assignments do not fit");
    assert!(down.len() == counts.len() * d * hidden, "weights do not fit");
    let reach = (counts.len().max(1) - 1) * stride + hidden * d;
    assert!(counts.is_empty() || gate.len() >= reach && up.len() >= reach, "weights do not fit");
    assert!(up_bias.is_none_or(|b| b.len() == counts.len() * 2 * hidden), "the bias does not fit");
    assert!(down_bias.is_none_or(|b| b.len() == counts.len() * d), "the bias does not fit");
    assert!(keep.as_ref().is_none_or(|k| k.len() >= rows * 2 * hidden), "the kept values do not fit");
    let keep = keep.map(|k| Shared(k.as_mut_ptr()));
    let tokens = x.len() / d;
    let at: Vec<usize> = token[..rows].iter().map(|t| usize::try_from(*t).unwrap_or(usize::MAX)).collect();
    assert!(at.iter().all(|t| *t < tokens), "a token does not exist");

    let set = InstructionSet::current();
    let batches = batches(counts);
    let most = batches.iter().map(|b| b.iter().map(|s| s.stop - s.start).sum()).max().unwrap_or(0);
    let mut between = vec![0.0f32; most * 2 * hidden]; // gate | up, then the activation in gate's place
    let (between, out) = (Shared(between.as_mut_ptr()), Shared(out.as_mut_ptr()));
    for batch in &batches {
        let first = batch[0].start;
        let size = batch.iter().map(|s| s.stop - s.start).sum::<usize>();
        let xs: Vec<&[f32]> = at[first..first + size].iter().map(|t| &x[t * d..(t + 1) * d]).collect();
        share(threads, batch, hidden, |segment, from, to| {
            let Segment { expert, start, stop } = segment;
            for (part, weights) in [(0, gate), (hidden, up)] {
                product(
                    set,
                    &xs[start - first..stop - first],
                    d,
                    &weights[expert * stride..][..hidden * d],
                    from..to,
                    |r, j, sums| {
                        let j = part + j;
                        let at = (start - first + r) * 2 * hidden + j;
                        // SAFETY: these columns of the segment belong to this call.
                        let to = unsafe { between.slice(at, sums.len()) };
                        to.copy_from_slice(sums);
                        if scale_input {
                            to.iter_mut().for_each(|v| *v *= scale[start + r]);
                        }
                        if let Some(bias) = up_bias {
                            for (v, b) in to.iter_mut().zip(&bias[expert * 2 * hidden + j..]) {
                                *v += b.widen();
                            }
                        }
                    },
                );
            }
            for r in start - first..stop - first {
                // SAFETY: as above; the two ranges are apart.
                let (gate, up) = unsafe {
                    let gate = between.slice(r * 2 * hidden + from, to - from);
                    (gate, between.slice(r * 2 * hidden + hidden + from, to - from))
                };
                if let Some(keep) = keep {
                    for (part, values) in [(0, &*gate), (hidden, &*up)] {
                        // SAFETY: as above.
                        let kept = unsafe { keep.slice((first + r) * 2 * hidden + part + from, to - from) };
                        kept.copy_from_slice(values);
                    }
                }
                match activation {
                    Activation::Swiglu => gated(set, gate, up),
                    Activation::ClampedSwiglu => clamped_swiglu(set, gate, up),
                }
            }
        });
        // SAFETY: nobody writes until the next batch.
        let acts: Vec<&[f32]> =
            (0..size).map(|r| unsafe { &*between.slice(r * 2 * hidden, hidden) }).collect();
        // Two assignments of a token may meet in a batch: a call owns columns of all its segments.
        threads.each(d.div_ceil(COLUMNS), |i| {
            let (from, to) = (i * COLUMNS, d.min((i + 1) * COLUMNS));
            for &Segment { expert, start, stop } in batch {
                let weights = &down[expert * d * hidden..(expert + 1) * d * hidden];
                let acts = &acts[start - first..stop - first];
                product(set, acts, hidden, weights, from..to, |r, j, sums| {
                    let scale = if scale_input { 1.0 } else { scale[start + r] };
                    // SAFETY: these columns of the output belong to this call.
                    let to = unsafe { out.slice(at[start + r] * d + j, sums.len()) };
                    for (v, sum) in to.iter_mut().zip(sums) {
                        *v += sum * scale;
                    }
                    if let Some(bias) = down_bias {
                        for (v, b) in to.iter_mut().zip(&bias[expert * d + j..]) {
                            *v += b.widen() * scale;
                        }
                    }
                });
            }
        });
    }
}

/// The assignments in parts of at most [`BATCH`] rows, an expert with more than [`ROWS`] in several segments.
fn batches(counts: &[i32]) -> Vec<Vec<Segment>> {
    let mut out: Vec<Vec<Segment>> = Vec::new();
    let (mut start, mut room) = (0, 0);
    for (expert, count) in counts.iter().enumerate() {
        let end = start + *count as usize;
        while start < end {
            if room == 0 {
                out.push(Vec::new());
                room = BATCH;
            }
            let stop = end.min(start + room.min(ROWS));
            if let Some(last) = out.last_mut() {
                last.push(Segment { expert, start, stop });
            }
            room -= stop - start;
            start = stop;
        }
    }
    out
}

/// Calls `work(segment, from, to)` for blocks of `width` columns of every segment, on several threads.
fn share(threads: Threads<'_>, batch: &[Segment], width: usize, work: impl Fn(Segment, usize, usize) + Sync) {
    let blocks = width.div_ceil(COLUMNS);
    threads.each(batch.len() * blocks, |i| {
        let from = i % blocks * COLUMNS;
        work(batch[i / blocks], from, width.min(from + COLUMNS));
    });
}

multiversion! {
    fn gated(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = silu(*g) * u;
        }
    }
}

multiversion! {
    fn clamped_swiglu(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            let gate = smaller(*g, 7.0);
            let up = smaller(larger(*u, -7.0), 7.0);
            *g = (up + 1.0) * gate / (1.0 + exp(-1.702 * gate));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rayon::ThreadPoolBuilder;

    proptest! {
        #[test]
        fn equals_the_definition(
            counts in prop::collection::vec(0i32..90, 1..5),
            tokens in 1usize..20,
            d in 1usize..150,
            hidden in 1usize..80,
            threads in 1usize..4,
            clamped in any::<bool>(),
            scale_input in any::<bool>(),
            seed in any::<u32>(),
        ) {
            let mut state = seed;
            let mut draw = |count: usize| -> Vec<f32> {
                (0..count)
                    .map(|_| {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
                    })
                    .collect()
            };
            let e = counts.len();
            let (x, up, down) = (draw(tokens * d), draw(e * 2 * hidden * d), draw(e * d * hidden));
            let (up_bias, down_bias) = (draw(e * 2 * hidden), draw(e * d));
            let rows = counts.iter().sum::<i32>() as usize;
            let token: Vec<i64> = draw(rows).iter().map(|v| ((v + 0.5) * tokens as f32) as i64).collect();
            let token: Vec<i64> = token.iter().map(|t| (*t).min(tokens as i64 - 1)).collect();
            let scale = draw(rows);
            let layer = Experts {
                d,
                hidden,
                gate: &up[..],
                up: &up[hidden * d..],
                stride: 2 * hidden * d,
                down: &down[..],
                up_bias: Some(&up_bias[..]),
                down_bias: Some(&down_bias[..]),
                activation: if clamped { Activation::ClampedSwiglu } else { Activation::Swiglu },
                scale_input,
            };
            let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
            let mut out = vec![0.0f32; tokens * d];
            let mut kept = vec![f32::NAN; rows * 2 * hidden];
            experts(Threads { pool: &pool, count: threads }, &layer, &x, &token, &scale, &counts, Some(&mut kept), &mut out);

            // What is summed may be much larger than the sum.
            let (mut exact, mut size) = (vec![0.0f64; tokens * d], vec![0.0f64; tokens * d]);
            let owner: Vec<usize> = (0..e).flat_map(|i| vec![i; counts[i] as usize]).collect();
            for r in 0..rows {
                let (expert, t, s) = (owner[r], token[r] as usize, f64::from(scale[r]));
                let h: Vec<f64> = (0..2 * hidden)
                    .map(|j| {
                        let w = &up[(expert * 2 * hidden + j) * d..][..d];
                        let sum: f64 = w.iter().zip(&x[t * d..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        (if scale_input { sum * s } else { sum }) + f64::from(up_bias[expert * 2 * hidden + j])
                    })
                    .collect();
                for (a, b) in kept[r * 2 * hidden..].iter().zip(&h) {
                    prop_assert!((f64::from(*a) - b).abs() < 1e-4);
                }
                let act: Vec<f64> = (0..hidden)
                    .map(|j| {
                        let (g, u) = (h[j], h[hidden + j]);
                        if clamped {
                            let (g, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
                            (u + 1.0) * g / (1.0 + (-1.702 * g).exp())
                        } else {
                            g / (1.0 + (-g).exp()) * u
                        }
                    })
                    .collect();
                for j in 0..d {
                    let w = &down[(expert * d + j) * hidden..][..hidden];
                    let sum: f64 = w.iter().zip(&act).map(|(a, b)| f64::from(*a) * b).sum();
                    let sum = sum + f64::from(down_bias[expert * d + j]);
                    let part = if scale_input { sum } else { sum * s };
                    exact[t * d + j] += part;
                    size[t * d + j] += part.abs();
                }
            }
            for ((a, b), size) in out.iter().zip(&exact).zip(&size) {
                prop_assert!((f64::from(*a) - b).abs() < 1e-4 * (1.0 + b.abs()) + 1e-5 * size, "{a} {b}");
            }
        }
    }
}

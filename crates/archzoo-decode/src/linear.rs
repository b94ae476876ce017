use std::ops::Range;

use crate::parallel::{Shared, Threads};
use crate::product::product;
use crate::value::Value;
use archzoo_simd::InstructionSet;

/// Rows of x that are multiplied together: they stay in the second cache level.
const BLOCK: usize = 64;

/// A share smaller than this is not worth another thread.
const TASK_BYTES: usize = 1 << 17;

/// One weight matrix, row-major, with its optional bias `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    /// Values `[n, k]`.
    pub weights: &'a [T],
    /// Bias `[n]`.
    pub bias: Option<&'a [T]>,
}

/// `out[m][r, j] = Σ_i x[r, i] · matrices[m][j, i] (+ bias)`, for all matrices in one parallel pass.
///
/// `x` is `[rows, k]`, `out[m]` is `[rows, n_m]`, all row-major. Threads share the
/// columns of every matrix.
///
/// # Panics
/// When a length does not fit `rows` and `k`.
pub fn linear<T: Value>(
    threads: Threads<'_>,
    x: &[f32],
    rows: usize,
    k: usize,
    matrices: &[Matrix<'_, T>],
    out: &mut [&mut [f32]],
) {
    assert!(rows > 0 && k > 0 && x.len() == rows * k, "x does not fit");
    assert!(matrices.len() == out.len(), "one output a matrix");
    let mut bytes = 0;
    let parts: Vec<(Matrix<'_, T>, usize, Shared)> = matrices
        .iter()
        .zip(out.iter_mut())
        .map(|(matrix, out)| {
            let n = matrix.weights.len() / k;
            assert!(matrix.weights.len() == n * k && out.len() == rows * n, "output does not fit");
            assert!(matrix.bias.is_none_or(|bias| bias.len() == n), "bias does not fit");
            bytes += size_of_val(matrix.weights);
            (*matrix, n, Shared(out.as_mut_ptr()))
        })
        .collect();
    let set = InstructionSet::current();
    let xs: Vec<&[f32]> = x.chunks_exact(k).collect();
    let shares = threads.count.min(bytes / TASK_BYTES).max(1);
    threads.share(shares, |share| {
        for (matrix, n, out) in &parts {
            let at = |i: usize| (n * i / shares).next_multiple_of(4).min(*n);
            let columns: Range<usize> = at(share)..at(share + 1);
            for (block, xs) in xs.chunks(BLOCK).enumerate() {
                product(set, xs, k, matrix.weights, columns.clone(), |r, j, sums| {
                    // SAFETY: the row exists and the columns too; shares have columns of their own.
                    let out = unsafe { out.slice((block * BLOCK + r) * n + j, sums.len()) };
                    out.copy_from_slice(sums);
                    if let Some(bias) = matrix.bias {
                        for (o, b) in out.iter_mut().zip(&bias[j..]) {
                            *o += b.widen();
                        }
                    }
                });
            }
        }
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rayon::ThreadPoolBuilder;

    fn check<T: Value>(
        x: &[f32],
        rows: usize,
        k: usize,
        weights: &[Vec<T>],
        biases: &[Vec<T>],
        threads: usize,
    ) -> Result<(), TestCaseError> {
        let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let count = |m: usize| biases[m].len();
        let mut outs: Vec<Vec<f32>> = (0..weights.len()).map(|m| vec![f32::NAN; rows * count(m)]).collect();
        let matrices: Vec<Matrix<'_, T>> = (0..weights.len())
            .map(|m| Matrix { weights: &weights[m], bias: (m % 2 == 0).then_some(&biases[m][..]) })
            .collect();
        let mut views: Vec<&mut [f32]> = outs.iter_mut().map(|o| &mut o[..]).collect();
        linear(Threads { pool: &pool, count: threads }, x, rows, k, &matrices, &mut views);
        for (m, out) in outs.iter().enumerate() {
            for r in 0..rows {
                for j in 0..count(m) {
                    let exact: f64 = (0..k)
                        .map(|i| f64::from(x[r * k + i]) * f64::from(weights[m][j * k + i].widen()))
                        .sum::<f64>()
                        + if m % 2 == 0 { f64::from(biases[m][j].widen()) } else { 0.0 };
                    prop_assert!((f64::from(out[r * count(m) + j]) - exact).abs() < 1e-4);
                }
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            rows in prop_oneof![1usize..12, 60usize..140],
            k in 1usize..200,
            ns in prop::collection::vec(0usize..150, 1..4),
            threads in 1usize..4,
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
            let x = draw(rows * k);
            let weights: Vec<Vec<f32>> = ns.iter().map(|n| draw(n * k)).collect();
            let biases: Vec<Vec<f32>> = ns.iter().map(|n| draw(*n)).collect();
            check(&x, rows, k, &weights, &biases, threads)?;
            let halves = |all: &[Vec<f32>]| -> Vec<Vec<u16>> {
                all.iter().map(|v| v.iter().map(|v| (v.to_bits() >> 16) as u16).collect()).collect()
            };
            check(&x, rows, k, &halves(&weights), &halves(&biases), threads)?;
        }
    }
}

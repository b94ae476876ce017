use std::ops::Range;

use crate::parallel::Threads;
use archzoo_simd::InstructionSet;

/// The most rows of x that one call takes; more are better served by a blocked product.
pub const MAX_ROWS: usize = 8;

/// A share smaller than this is not worth another thread.
const TASK_BYTES: usize = 1 << 16;

/// Weight values, row-major `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// bfloat16 bit patterns.
    Bf16(&'a [u16]),
}

impl Weights<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    fn item_bytes(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::Bf16(_) => 2,
        }
    }
}

/// One weight matrix with its optional bias `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Values `[n, k]`.
    pub weights: Weights<'a>,
    /// Bias `[n]`.
    pub bias: Option<&'a [f32]>,
}

/// `out[m][r, j] = Σ_i x[r, i] · matrices[m][j, i] (+ bias)`, for all matrices in one parallel pass.
///
/// `x` is `[rows, k]`, `out[m]` is `[rows, n_m]`, all row-major. Threads share the
/// columns of every matrix.
///
/// # Panics
/// When a length does not fit `rows` and `k`, or `rows` exceeds [`MAX_ROWS`].
pub fn linear(
    threads: Threads<'_>,
    x: &[f32],
    rows: usize,
    k: usize,
    matrices: &[Matrix<'_>],
    out: &mut [&mut [f32]],
) {
    assert!((1..=MAX_ROWS).contains(&rows) && k > 0 && x.len() == rows * k, "x does not fit");
    assert!(matrices.len() == out.len(), "one output a matrix");
    let mut bytes = 0;
    let parts: Vec<Part<'_>> = matrices
        .iter()
        .zip(out.iter_mut())
        .map(|(matrix, out)| {
            let n = matrix.weights.len() / k;
            assert!(matrix.weights.len() == n * k && out.len() == rows * n, "output does not fit");
            assert!(matrix.bias.is_none_or(|bias| bias.len() == n), "bias does not fit");
            bytes += n * k * matrix.weights.item_bytes();
            Part { matrix: *matrix, n, out: out.as_mut_ptr() }
        })
        .collect();
    let set = InstructionSet::current();
    let shares = threads.count.min(bytes / TASK_BYTES).max(1);
    let share = |index: usize| {
        for part in &parts {
            let at = |i: usize| (part.n * i / shares).next_multiple_of(4).min(part.n);
            // SAFETY: shares are disjoint columns of outputs that outlive the scope.
            unsafe { columns(set, x, rows, k, part, at(index)..at(index + 1)) };
        }
    };
    threads.share(shares, share);
}

/// One matrix and where its product goes: column j of row r is `out[r * n + j]`.
struct Part<'a> {
    matrix: Matrix<'a>,
    n: usize,
    out: *mut f32,
}

// SAFETY: shares write disjoint columns, and the slice behind `out` outlives the parallel pass.
unsafe impl Sync for Part<'_> {}

/// # Safety
/// `part.out` is valid for `rows * part.n` writes, and nobody else writes the columns.
unsafe fn columns(
    set: InstructionSet,
    x: &[f32],
    rows: usize,
    k: usize,
    part: &Part<'_>,
    columns: Range<usize>,
) {
    let mut sums = [0.0f32; MAX_ROWS];
    for j in columns {
        let at = j * k..(j + 1) * k;
        let weights = part.matrix.weights;
        match set {
            // SAFETY: the CPU has the instructions of the set.
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => unsafe { x86::dots512(x, rows, k, weights, at, &mut sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 if is_x86_feature_detected!("fma") => unsafe {
                x86::dots256(x, rows, k, weights, at, &mut sums);
            },
            _ => dots(x, rows, k, weights, at, &mut sums),
        }
        let bias = part.matrix.bias.map_or(0.0, |bias| bias[j]);
        for (r, sum) in sums[..rows].iter().enumerate() {
            // SAFETY: r < rows and j < n.
            unsafe { *part.out.add(r * part.n + j) = sum + bias };
        }
    }
}

fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The definition: one row of weights against all rows of x.
fn dots(
    x: &[f32],
    rows: usize,
    k: usize,
    weights: Weights<'_>,
    at: Range<usize>,
    sums: &mut [f32; MAX_ROWS],
) {
    for r in 0..rows {
        let row = &x[r * k..(r + 1) * k];
        sums[r] = match weights {
            Weights::F32(w) => row.iter().zip(&w[at.clone()]).map(|(a, b)| a * b).sum(),
            Weights::Bf16(w) => row.iter().zip(&w[at.clone()]).map(|(a, b)| a * bf16(*b)).sum(),
        };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{MAX_ROWS, Weights, bf16};
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Bytes that weights are fetched ahead of their use.
    const AHEAD: usize = 1024;

    macro_rules! dots {
        ($name:ident, $feature:literal, $lanes:literal, $zero:ident, $load:ident, $fma:ident, $add:ident, $reduce:ident, $widen:ident) => {
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $name(
                x: &[f32],
                rows: usize,
                k: usize,
                weights: Weights<'_>,
                at: Range<usize>,
                sums: &mut [f32; MAX_ROWS],
            ) {
                let mut r = 0;
                while r < rows {
                    // SAFETY: the callee stays inside x[r * k ..] and weights[at].
                    unsafe {
                        match rows - r {
                            1 => {
                                block::<1>(x, r, k, weights, at.clone(), sums);
                                r += 1;
                            }
                            2 | 3 => {
                                block::<2>(x, r, k, weights, at.clone(), sums);
                                r += 2;
                            }
                            _ => {
                                block::<4>(x, r, k, weights, at.clone(), sums);
                                r += 4;
                            }
                        }
                    }
                }

                #[target_feature(enable = $feature)]
                unsafe fn block<const R: usize>(
                    x: &[f32],
                    first: usize,
                    k: usize,
                    weights: Weights<'_>,
                    at: Range<usize>,
                    sums: &mut [f32; MAX_ROWS],
                ) {
                    let xs: [*const f32; R] = std::array::from_fn(|i| x[(first + i) * k..].as_ptr());
                    let whole = k / (2 * $lanes) * (2 * $lanes);
                    let mut acc = [[$zero(); 2]; R];
                    // SAFETY: i + 2 * lanes <= k inside the loop; prefetching never faults.
                    unsafe {
                        match weights {
                            Weights::F32(w) => {
                                let w = w[at.clone()].as_ptr();
                                let mut i = 0;
                                while i < whole {
                                    _mm_prefetch::<_MM_HINT_T0>(w.add(i).cast::<i8>().wrapping_add(AHEAD));
                                    let a = $load(w.add(i));
                                    let b = $load(w.add(i + $lanes));
                                    for r in 0..R {
                                        acc[r][0] = $fma(a, $load(xs[r].add(i)), acc[r][0]);
                                        acc[r][1] = $fma(b, $load(xs[r].add(i + $lanes)), acc[r][1]);
                                    }
                                    i += 2 * $lanes;
                                }
                            }
                            Weights::Bf16(w) => {
                                let w = w[at.clone()].as_ptr();
                                let mut i = 0;
                                while i < whole {
                                    _mm_prefetch::<_MM_HINT_T0>(w.add(i).cast::<i8>().wrapping_add(AHEAD));
                                    let a = $widen(w.add(i));
                                    let b = $widen(w.add(i + $lanes));
                                    for r in 0..R {
                                        acc[r][0] = $fma(a, $load(xs[r].add(i)), acc[r][0]);
                                        acc[r][1] = $fma(b, $load(xs[r].add(i + $lanes)), acc[r][1]);
                                    }
                                    i += 2 * $lanes;
                                }
                            }
                        }
                        for r in 0..R {
                            let mut sum = $reduce($add(acc[r][0], acc[r][1]));
                            for i in whole..k {
                                let w = match weights {
                                    Weights::F32(w) => w[at.start + i],
                                    Weights::Bf16(w) => bf16(w[at.start + i]),
                                };
                                sum += w * *xs[r].add(i);
                            }
                            sums[first + r] = sum;
                        }
                    }
                }
            }
        };
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn sum256(v: __m256) -> f32 {
        let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)))
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn widen256(p: *const u16) -> __m256 {
        // SAFETY: the caller has 8 values at p.
        let raw = unsafe { _mm_loadu_si128(p.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(raw)))
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn sum512(v: __m512) -> f32 {
        _mm512_reduce_add_ps(v)
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn widen512(p: *const u16) -> __m512 {
        // SAFETY: the caller has 16 values at p.
        let raw = unsafe { _mm256_loadu_si256(p.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
    }

    dots!(
        dots256,
        "avx2,fma",
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        sum256,
        widen256
    );
    dots!(
        dots512,
        "avx512f,avx512bw",
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        sum512,
        widen512
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rayon::ThreadPoolBuilder;

    fn to_bf16(v: f32) -> u16 {
        (v.to_bits() >> 16) as u16
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            rows in 1usize..=MAX_ROWS,
            k in 1usize..200,
            ns in prop::collection::vec(0usize..150, 1..4),
            threads in 1usize..4,
            seed in any::<u32>(),
        ) {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            };
            let x: Vec<f32> = (0..rows * k).map(|_| next()).collect();
            let ws: Vec<Vec<f32>> = ns.iter().map(|n| (0..n * k).map(|_| next()).collect()).collect();
            let halves: Vec<Vec<u16>> = ws.iter().map(|w| w.iter().map(|v| to_bf16(*v)).collect()).collect();
            let biases: Vec<Vec<f32>> = ns.iter().map(|n| (0..*n).map(|_| next()).collect()).collect();
            let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
            for half in [false, true] {
                let mut outs: Vec<Vec<f32>> = ns.iter().map(|n| vec![f32::NAN; rows * n]).collect();
                let matrices: Vec<Matrix<'_>> = (0..ns.len())
                    .map(|m| Matrix {
                        weights: if half { Weights::Bf16(&halves[m]) } else { Weights::F32(&ws[m]) },
                        bias: (m % 2 == 0).then_some(&biases[m][..]),
                    })
                    .collect();
                let mut views: Vec<&mut [f32]> = outs.iter_mut().map(|o| &mut o[..]).collect();
                linear(Threads { pool: &pool, count: threads }, &x, rows, k, &matrices, &mut views);
                for (m, out) in outs.iter().enumerate() {
                    for r in 0..rows {
                        for j in 0..ns[m] {
                            let exact: f64 = (0..k)
                                .map(|i| {
                                    let w = if half { bf16(halves[m][j * k + i]) } else { ws[m][j * k + i] };
                                    f64::from(x[r * k + i]) * f64::from(w)
                                })
                                .sum::<f64>() + if m % 2 == 0 { f64::from(biases[m][j]) } else { 0.0 };
                            prop_assert!((f64::from(out[r * ns[m] + j]) - exact).abs() < 1e-4);
                        }
                    }
                }
            }
        }
    }
}

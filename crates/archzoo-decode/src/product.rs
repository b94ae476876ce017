//! Rows times the rows of a weight matrix: both lie along k, so nothing is packed, and a tile of 3 x 4 sums
//! stays in registers for the whole of k. Few rows are bound by reading the weights once; many rows reuse a
//! tile of weights from the first cache level.

use std::ops::Range;

use crate::value::Value;
use archzoo_simd::InstructionSet;

/// Rows of x and rows of weights of a tile.
const TILE: (usize, usize) = (3, 4);

/// Calls `store(r, j, sums)` with sums of neighbouring columns from j, Σ_i rows[r][i] · weights[j][i] first, until
/// every row and every column of `columns` had its turn.
///
/// `weights` is row-major `[n, k]`. A row of x and a row of weights may each be read several times.
///
/// # Panics
/// When a row is shorter than `k` or `columns` exceeds the weights.
pub(crate) fn product<T: Value>(
    set: InstructionSet,
    rows: &[&[f32]],
    k: usize,
    weights: &[T],
    columns: Range<usize>,
    mut store: impl FnMut(usize, usize, &[f32]),
) {
    assert!(rows.iter().all(|row| row.len() == k), "the rows do not fit");
    assert!(columns.end * k <= weights.len(), "the columns do not fit");
    let mut j = columns.start;
    if rows.len() >= TILE.0 {
        while j + TILE.1 <= columns.end {
            strip::<T, { TILE.1 }>(set, rows, k, &weights[j * k..(j + TILE.1) * k], j, &mut store);
            j += TILE.1;
        }
    }
    for j in j..columns.end {
        strip::<T, 1>(set, rows, k, &weights[j * k..(j + 1) * k], j, &mut store);
    }
}

/// All rows times C rows of weights, which are columns `j..` of the product.
#[inline(always)]
fn strip<T: Value, const C: usize>(
    set: InstructionSet,
    rows: &[&[f32]],
    k: usize,
    weights: &[T],
    j: usize,
    store: &mut impl FnMut(usize, usize, &[f32]),
) {
    let (threes, rest) = rows.as_chunks::<{ TILE.0 }>();
    let mut put = |r: usize, sums: &[[f32; C]]| {
        for (i, sums) in sums.iter().enumerate() {
            store(r + i, j, sums);
        }
    };
    for (i, xs) in threes.iter().enumerate() {
        put(TILE.0 * i, &tile::<T, 3, C>(set, *xs, k, weights, i == 0));
    }
    let done = TILE.0 * threes.len();
    match *rest {
        [a] => put(done, &tile::<T, 1, C>(set, [a], k, weights, done == 0)),
        [a, b] => put(done, &tile::<T, 2, C>(set, [a, b], k, weights, done == 0)),
        _ => {}
    }
}

/// The R x C products of rows of x and of weights; `fetch` the weights that come next.
#[inline(always)]
fn tile<T: Value, const R: usize, const C: usize>(
    set: InstructionSet,
    xs: [&[f32]; R],
    k: usize,
    weights: &[T],
    fetch: bool,
) -> [[f32; C]; R] {
    match set {
        // SAFETY: the CPU has the instructions; every row has k values.
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => unsafe {
            let (xs, weights) = (xs.map(<[f32]>::as_ptr), weights.as_ptr());
            if fetch {
                x86::tile512::<T, R, C, true>(xs, weights, k)
            } else {
                x86::tile512::<T, R, C, false>(xs, weights, k)
            }
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 if is_x86_feature_detected!("fma") => unsafe {
            let (xs, weights) = (xs.map(<[f32]>::as_ptr), weights.as_ptr());
            if fetch {
                x86::tile256::<T, R, C, true>(xs, weights, k)
            } else {
                x86::tile256::<T, R, C, false>(xs, weights, k)
            }
        },
        _ => {
            let mut sums = [[0.0; C]; R];
            for (sums, x) in sums.iter_mut().zip(xs) {
                for (sum, w) in sums.iter_mut().zip(weights.chunks_exact(k)) {
                    *sum = x.iter().zip(w).map(|(a, b)| a * b.widen()).sum();
                }
            }
            sums
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::value::Value;
    use std::arch::x86_64::*;

    /// Bytes that a single row of weights is fetched ahead of its use.
    const AHEAD: usize = 1024;

    /// Sums of a tile with one row of weights, side by side so that they do not wait for each other.
    const SIDE: usize = 2;

    macro_rules! tile {
        ($name:ident, $feature:literal, $lanes:literal, $zero:ident, $load:ident, $fma:ident, $add:ident, $reduce:ident, $reduce4:ident, $widen:ident) => {
            /// # Safety
            /// Every row of x and of the weights, which follow each other, has k values.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $name<T: Value, const R: usize, const C: usize, const FETCH: bool>(
                xs: [*const f32; R],
                weights: *const T,
                k: usize,
            ) -> [[f32; C]; R] {
                let side = if C == 1 { SIDE } else { 1 };
                let whole = k / ($lanes * side) * ($lanes * side);
                let ahead = if C == 1 { AHEAD } else { C * k * size_of::<T>() };
                let mut acc = [[[$zero(); SIDE]; C]; R];
                let mut sums = [[0.0; C]; R];
                // SAFETY: i + lanes * side <= k inside the loop; prefetching never faults.
                unsafe {
                    let mut i = 0;
                    while i < whole {
                        for s in 0..side {
                            let mut x = [$zero(); R];
                            for r in 0..R {
                                x[r] = $load(xs[r].add(i));
                            }
                            for c in 0..C {
                                let at = weights.add(c * k + i);
                                if FETCH {
                                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(ahead));
                                }
                                let w = T::$widen(at);
                                for r in 0..R {
                                    acc[r][c][s] = $fma(x[r], w, acc[r][c][s]);
                                }
                            }
                            i += $lanes;
                        }
                    }
                    for r in 0..R {
                        if C == 4 {
                            let four = $reduce4(acc[r][0][0], acc[r][1][0], acc[r][2][0], acc[r][3][0]);
                            sums[r].copy_from_slice(&four[..C]);
                        } else {
                            for c in 0..C {
                                sums[r][c] = $reduce($add(acc[r][c][0], acc[r][c][1]));
                            }
                        }
                        for c in 0..C {
                            for i in whole..k {
                                sums[r][c] += *xs[r].add(i) * (*weights.add(c * k + i)).widen();
                            }
                        }
                    }
                }
                sums
            }
        };
    }

    #[target_feature(enable = "avx2,fma")]
    fn sum256(v: __m256) -> f32 {
        let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)))
    }

    /// The sums of four vectors.
    #[target_feature(enable = "avx2,fma")]
    fn sums256(a: __m256, b: __m256, c: __m256, d: __m256) -> [f32; 4] {
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        let four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
        let mut out = [0.0; 4];
        // SAFETY: four values fit.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), four) };
        out
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    fn sum512(v: __m512) -> f32 {
        _mm512_reduce_add_ps(v)
    }

    /// The sums of four vectors.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn sums512(a: __m512, b: __m512, c: __m512, d: __m512) -> [f32; 4] {
        [a, b, c, d].map(|v| _mm512_reduce_add_ps(v))
    }

    tile!(
        tile256,
        "avx2,fma",
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        sum256,
        sums256,
        load256
    );
    tile!(
        tile512,
        "avx512f,avx512bw",
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        sum512,
        sums512,
        load512
    );
}

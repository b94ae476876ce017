//! Small products whose right side has its columns side by side: sums of multiples of rows.

use archzoo_simd::InstructionSet;

/// A matrix of which element (i, k) is at `start[i * row + k * column]`.
#[derive(Clone, Copy)]
pub(crate) struct Strided {
    pub start: *const f32,
    pub row: usize,
    pub column: usize,
}

/// `c[i, ..n] += Σ_k a[i, k] · b[k, ..n]` for i < m, k < depth; rows of b and c lie `b_row`, `c_row` apart.
///
/// # Safety
/// All these elements exist, and nobody else uses those of c.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn add_product(
    set: InstructionSet,
    a: Strided,
    m: usize,
    depth: usize,
    b: *const f32,
    b_row: usize,
    n: usize,
    c: *mut f32,
    c_row: usize,
) {
    // SAFETY: promised by the caller; the CPU has the instructions.
    unsafe {
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if set >= InstructionSet::Avx2 && is_x86_feature_detected!("fma") {
            done = n / x86::WIDTH * x86::WIDTH;
            for from in (0..done).step_by(x86::WIDTH) {
                let (b, c) = (b.add(from), c.add(from));
                let mut i = 0;
                while i + 4 <= m {
                    let a = Strided { start: a.start.add(i * a.row), ..a };
                    x86::tile::<4>(a, depth, b, b_row, c.add(i * c_row), c_row);
                    i += 4;
                }
                for i in i..m {
                    let a = Strided { start: a.start.add(i * a.row), ..a };
                    x86::tile::<1>(a, depth, b, b_row, c.add(i * c_row), c_row);
                }
            }
        }
        for i in 0..m {
            for k in 0..depth {
                let factor = *a.start.add(i * a.row + k * a.column);
                for j in done..n {
                    *c.add(i * c_row + j) += factor * *b.add(k * b_row + j);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Strided;
    use std::arch::x86_64::*;

    /// Columns of a tile: two vectors.
    pub(super) const WIDTH: usize = 16;

    /// # Safety
    /// As `add_product`, for R rows and [`WIDTH`] columns.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile<const R: usize>(
        a: Strided,
        depth: usize,
        b: *const f32,
        b_row: usize,
        c: *mut f32,
        c_row: usize,
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = [_mm256_loadu_ps(c.add(r * c_row)), _mm256_loadu_ps(c.add(r * c_row + 8))];
            }
            for k in 0..depth {
                let row = b.add(k * b_row);
                let (left, right) = (_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(8)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let factor = _mm256_set1_ps(*a.start.add(r * a.row + k * a.column));
                    acc[0] = _mm256_fmadd_ps(factor, left, acc[0]);
                    acc[1] = _mm256_fmadd_ps(factor, right, acc[1]);
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * c_row), acc[0]);
                _mm256_storeu_ps(c.add(r * c_row + 8), acc[1]);
            }
        }
    }
}

use archzoo_linear::{MAX_ROWS, Matrix, Weights};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Address and rows of a weight, address of its bias (0: none), address of its output.
type Part = (usize, usize, usize, usize);

/// `out = x Wᵀ + b` for several weights on one x `[rows, k]`; x, weights, biases and outputs share a dtype.
///
/// The arguments are addresses of contiguous CPU tensors, because wrapping each in an array would cost as
/// much as the product. `archzoo.ops.linear` is the only caller and keeps the tensors alive meanwhile.
#[pyfunction]
pub fn linear(
    py: Python<'_>,
    x: usize,
    rows: usize,
    k: usize,
    bfloat16: bool,
    threads: usize,
    parts: Vec<Part>,
) -> PyResult<()> {
    if rows == 0 || rows > MAX_ROWS || k == 0 {
        return Err(PyValueError::new_err(format!(
            "linear: rows must be 1 to {MAX_ROWS} and k at least 1, found {rows} and {k}"
        )));
    }
    let pool = crate::pool::current()?;
    py.detach(|| {
        // SAFETY: the caller passes live, contiguous tensors of these sizes that nobody else writes.
        unsafe {
            if bfloat16 {
                let x: Vec<f32> = slice::<u16>(x, rows * k).iter().map(|v| widen(*v)).collect();
                let biases: Vec<Vec<f32>> = parts
                    .iter()
                    .map(|p| {
                        slice::<u16>(p.2, if p.2 == 0 { 0 } else { p.1 }).iter().map(|v| widen(*v)).collect()
                    })
                    .collect();
                let matrices: Vec<Matrix<'_>> = parts
                    .iter()
                    .zip(&biases)
                    .map(|(p, bias)| Matrix {
                        weights: Weights::Bf16(slice(p.0, p.1 * k)),
                        bias: (p.2 != 0).then_some(&bias[..]),
                    })
                    .collect();
                let mut sums: Vec<Vec<f32>> = parts.iter().map(|p| vec![0.0; rows * p.1]).collect();
                let mut views: Vec<&mut [f32]> = sums.iter_mut().map(|s| &mut s[..]).collect();
                archzoo_linear::linear(&pool, threads, &x, rows, k, &matrices, &mut views);
                for (part, sums) in parts.iter().zip(&sums) {
                    let out = std::slice::from_raw_parts_mut(part.3 as *mut u16, sums.len());
                    for (to, from) in out.iter_mut().zip(sums) {
                        *to = narrow(*from);
                    }
                }
            } else {
                let matrices: Vec<Matrix<'_>> = parts
                    .iter()
                    .map(|p| Matrix {
                        weights: Weights::F32(slice(p.0, p.1 * k)),
                        bias: (p.2 != 0).then(|| slice(p.2, p.1)),
                    })
                    .collect();
                let mut views: Vec<&mut [f32]> = parts
                    .iter()
                    .map(|p| std::slice::from_raw_parts_mut(p.3 as *mut f32, rows * p.1))
                    .collect();
                archzoo_linear::linear(&pool, threads, slice(x, rows * k), rows, k, &matrices, &mut views);
            }
        }
    });
    Ok(())
}

/// # Safety
/// `address` points at `len` values that live for `'a`, or `len` is 0.
unsafe fn slice<'a, T>(address: usize, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Round to nearest even; NaN stays NaN.
fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

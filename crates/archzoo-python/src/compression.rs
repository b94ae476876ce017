use archzoo_checkpoint::{Buffers, Dtype, Encoder, count_exponents};
use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::checkpoint::CheckpointError;
use crate::pool;

type Bytes<'py> = Bound<'py, PyArray1<u8>>;
/// luts, encoded_exponent, sign_mantissa, output_positions, gaps.
type PyBuffers<T> = (T, T, T, T, T);

fn dtype_of(name: &str) -> PyResult<Dtype> {
    Dtype::from_name(name).ok_or_else(|| PyValueError::new_err(format!("dtype is unknown: {name:?}")))
}

/// The container of a tensor's bytes, or None where that is no smaller.
#[pyfunction]
pub fn compress<'py>(
    py: Python<'py>,
    dtype: &str,
    bytes: PyReadonlyArray1<u8>,
) -> PyResult<Option<Bytes<'py>>> {
    let (dtype, bytes) = (dtype_of(dtype)?, bytes.as_slice()?);
    let stored = py.detach(|| pool::run(|| archzoo_checkpoint::compress(dtype, bytes)))?;
    Ok(stored.map(|stored| PyArray1::from_vec(py, stored)))
}

/// Fills `out` with the bytes of the tensor that a container holds.
#[pyfunction]
pub fn decompress(
    py: Python,
    dtype: &str,
    stored: PyReadonlyArray1<u8>,
    mut out: PyReadwriteArray1<u8>,
) -> PyResult<()> {
    let (dtype, stored, out) = (dtype_of(dtype)?, stored.as_slice()?, out.as_slice_mut()?);
    py.detach(|| pool::run(|| archzoo_checkpoint::decompress(dtype, stored, out)))?
        .map_err(|error| CheckpointError::new_err(error.to_string()))
}

/// Hands the weights that a Python iterable gives to `work`, one at a time, on this process's threads.
fn each(weights: &Bound<PyAny>, mut work: impl FnMut(&[u8]) + Send) -> PyResult<()> {
    for weight in weights.try_iter()? {
        let weight = weight?.extract::<PyReadonlyArray1<u8>>()?;
        let bytes = weight.as_slice()?;
        if !bytes.len().is_multiple_of(2) {
            return Err(PyValueError::new_err(format!("expected bfloat16, found {} bytes", bytes.len())));
        }
        weights.py().detach(|| pool::run(|| work(bytes)))?;
    }
    Ok(())
}

/// How often the exponents of a group of bfloat16 weights occur, and the sizes of DFloat11's buffers; None where
/// it cannot hold them or is no smaller.
#[pyfunction]
pub fn measure_dfloat11(weights: &Bound<PyAny>) -> PyResult<Option<(Vec<u64>, [usize; 5])>> {
    let mut counts = [0; 256];
    each(weights, |weight| {
        counts.iter_mut().zip(count_exponents(weight)).for_each(|(all, own)| *all += own);
    })?;
    Ok(Encoder::new(counts).map(|encoder| (counts.to_vec(), encoder.sizes())))
}

/// DFloat11's buffers of the weights that were measured.
#[pyfunction]
pub fn encode_dfloat11<'py>(
    py: Python<'py>,
    counts: [u64; 256],
    weights: &Bound<'py, PyAny>,
) -> PyResult<PyBuffers<Bytes<'py>>> {
    let refused = || CheckpointError::new_err("expected exponents that DFloat11 can hold, found others");
    let mut encoder = Encoder::new(counts).ok_or_else(refused)?;
    each(weights, |weight| encoder.push(weight))?;
    let e = encoder.finish().map_err(|error| CheckpointError::new_err(error.to_string()))?;
    let array = |bytes| PyArray1::from_vec(py, bytes);
    let tables = (array(e.luts), array(e.encoded_exponent), array(e.sign_mantissa));
    Ok((tables.0, tables.1, tables.2, array(e.output_positions), array(e.gaps)))
}

/// Fills weights from the buffers of their group.
#[pyfunction]
pub fn decode_dfloat11(
    py: Python,
    buffers: PyBuffers<PyReadonlyArray1<u8>>,
    mut weights: Vec<PyReadwriteArray1<u8>>,
) -> PyResult<()> {
    let buffers = Buffers {
        luts: buffers.0.as_slice()?,
        encoded_exponent: buffers.1.as_slice()?,
        sign_mantissa: buffers.2.as_slice()?,
        output_positions: buffers.3.as_slice()?,
        gaps: buffers.4.as_slice()?,
    };
    let mut weights =
        weights.iter_mut().map(|w| Ok(w.as_slice_mut()?)).collect::<PyResult<Vec<&mut [u8]>>>()?;
    py.detach(|| pool::run(|| archzoo_checkpoint::decode_dfloat11(buffers, &mut weights)))?
        .map_err(|error| CheckpointError::new_err(error.to_string()))
}

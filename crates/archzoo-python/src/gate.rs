use archzoo_router::{Error, Gate, Logits, PARALLEL};
use numpy::{Element, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::pool;

type Routed<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<i64>>);

/// Chooses each token's experts. Returns (weights float32 [T, k], ids int64 [T, k]), by descending choice
/// score, the lowest id first among equals.
#[pyfunction]
#[pyo3(signature = (logits, dtype, top_k, score, bias, groups, top_groups, group_score, renormalize, scale))]
#[expect(clippy::too_many_arguments)]
pub fn gate<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    dtype: &str,
    top_k: i64,
    score: &str,
    bias: Option<PyReadonlyArray1<'py, f32>>,
    groups: i64,
    top_groups: i64,
    group_score: &str,
    renormalize: bool,
    scale: f64,
) -> PyResult<Routed<'py>> {
    let call = |experts: usize, tokens: usize, logits: Logits| {
        let config = Gate {
            experts,
            top_k: positive("top_k", top_k)?,
            score: score.parse().map_err(to_python)?,
            bias: bias.as_ref().map(|b| contiguous("bias", b.as_slice())).transpose()?,
            groups: positive("groups", groups)?,
            top_groups: positive("top_groups", top_groups)?,
            group_score: group_score.parse().map_err(to_python)?,
            renormalize,
            scale: scale as f32,
        };
        config.check().map_err(to_python)?; // before top_k sizes an allocation
        let weights = PyArray2::<f32>::zeros(py, [tokens, config.top_k], false);
        let ids = PyArray2::<i64>::zeros(py, [tokens, config.top_k], false);
        {
            let (mut weights, mut ids) = (weights.try_readwrite()?, ids.try_readwrite()?);
            let weights = contiguous("weights", weights.as_slice_mut())?;
            let ids = contiguous("ids", ids.as_slice_mut())?;
            py.detach(|| {
                let mut work = || archzoo_router::gate(logits, &config, weights, ids).map_err(to_python);
                if tokens * experts < PARALLEL { work() } else { pool::run(work)? }
            })?;
        }
        Ok((weights, ids))
    };
    match dtype {
        "float32" => {
            let x = array::<f32>(logits, dtype, "float32")?;
            call(x.shape()[1], x.shape()[0], Logits::F32(contiguous("logits", x.as_slice())?))
        }
        "bfloat16" => {
            let x = array::<u16>(logits, dtype, "uint16")?;
            call(x.shape()[1], x.shape()[0], Logits::Bf16(contiguous("logits", x.as_slice())?))
        }
        "float16" => {
            let x = array::<u16>(logits, dtype, "uint16")?;
            call(x.shape()[1], x.shape()[0], Logits::F16(contiguous("logits", x.as_slice())?))
        }
        _ => Err(PyValueError::new_err(format!(
            "dtype must be \"float32\", \"bfloat16\" or \"float16\", found {dtype:?}"
        ))),
    }
}

fn to_python(error: Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn positive(name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value)
        .map_err(|_| PyValueError::new_err(format!("{name} must be at least 1, found {value}")))
}

fn contiguous<T, E>(name: &str, slice: Result<T, E>) -> PyResult<T> {
    slice.map_err(|_| PyValueError::new_err(format!("{name} must be C-contiguous")))
}

fn array<'py, T: Element>(
    array: &Bound<'py, PyAny>,
    dtype: &str,
    storage: &str,
) -> PyResult<PyReadonlyArray2<'py, T>> {
    array.extract().map_err(|_| {
        PyTypeError::new_err(format!(
            "logits of dtype {dtype:?} must be a 2-D numpy array of {storage}, found {}",
            array.repr().map_or_else(|_| "something else".to_owned(), |r| r.to_string())
        ))
    })
}

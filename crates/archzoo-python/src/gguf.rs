use std::path::PathBuf;

use archzoo_checkpoint::{Gguf, gguf_dtype};
use archzoo_gguf::{Array, Value};
use numpy::PyReadwriteArray1;
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::checkpoint::to_python;
use crate::pool;

/// Name, dtype, shape, type.
type PyTensor<'a, 'py> = (&'a str, &'a str, Bound<'py, PyTuple>, &'a str);

/// An open GGUF file, checked before a tensor is read.
#[pyclass(frozen, module = "archzoo._rust")]
pub struct GgufReader(Gguf);

#[pymethods]
impl GgufReader {
    /// Opens a file of version 2 or 3.
    #[new]
    fn new(py: Python, path: PathBuf) -> PyResult<Self> {
        py.detach(|| Gguf::open(&path)).map(Self).map_err(to_python)
    }

    /// Values by key: numbers, strings, booleans and lists of them.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let values = PyDict::new(py);
        for (key, value) in self.0.metadata().map_err(to_python)?.values {
            values.set_item(key, value_to_python(py, &value)?)?;
        }
        Ok(values)
    }

    /// Name, dtype once read, shape (rows first) and ggml's type of every tensor, in the file's order.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Vec<PyTensor<'_, 'py>>> {
        let tensors = self.0.tensors().iter();
        tensors
            .map(|tensor| {
                let shape = PyTuple::new(py, &tensor.shape)?;
                Ok((tensor.name.as_str(), gguf_dtype(tensor.kind).name(), shape, tensor.kind.name()))
            })
            .collect()
    }

    /// Reads tensors into contiguous byte arrays of their length, quantised ones as float32.
    fn read_into(&self, py: Python, mut requests: Vec<(String, PyReadwriteArray1<u8>)>) -> PyResult<()> {
        let requests = requests
            .iter_mut()
            .map(|(name, array)| Ok((name.as_str(), array.as_slice_mut()?)))
            .collect::<PyResult<Vec<(&str, &mut [u8])>>>()?;
        py.detach(|| pool::run(|| self.0.read_into(requests)))?.map_err(to_python)
    }
}

fn value_to_python(py: Python, value: &Value) -> PyResult<Py<PyAny>> {
    match value {
        Value::U8(value) => value.into_py_any(py),
        Value::I8(value) => value.into_py_any(py),
        Value::U16(value) => value.into_py_any(py),
        Value::I16(value) => value.into_py_any(py),
        Value::U32(value) => value.into_py_any(py),
        Value::I32(value) => value.into_py_any(py),
        Value::F32(value) => value.into_py_any(py),
        Value::U64(value) => value.into_py_any(py),
        Value::I64(value) => value.into_py_any(py),
        Value::F64(value) => value.into_py_any(py),
        Value::Bool(value) => value.into_py_any(py),
        Value::String(value) => value.into_py_any(py),
        Value::Array(array) => array_to_python(py, array),
    }
}

fn array_to_python(py: Python, array: &Array) -> PyResult<Py<PyAny>> {
    match array {
        Array::U8(values) => PyList::new(py, values)?.into_py_any(py),
        Array::I8(values) => values.into_py_any(py),
        Array::U16(values) => values.into_py_any(py),
        Array::I16(values) => values.into_py_any(py),
        Array::U32(values) => values.into_py_any(py),
        Array::I32(values) => values.into_py_any(py),
        Array::F32(values) => values.into_py_any(py),
        Array::U64(values) => values.into_py_any(py),
        Array::I64(values) => values.into_py_any(py),
        Array::F64(values) => values.into_py_any(py),
        Array::Bool(values) => values.into_py_any(py),
        Array::String(values) => values.into_py_any(py),
        Array::Array(arrays) => {
            let arrays =
                arrays.iter().map(|array| array_to_python(py, array)).collect::<PyResult<Vec<_>>>()?;
            arrays.into_py_any(py)
        }
    }
}

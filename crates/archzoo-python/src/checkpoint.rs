use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use archzoo_checkpoint::{Dtype, Elements, Error, FolderWriter, Reader, Request, Tensor};
use numpy::PyReadonlyArray1;
use pyo3::exceptions::{PyException, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::pool;

pyo3::create_exception!(
    archzoo._rust,
    CheckpointError,
    PyException,
    "A checkpoint that cannot be read or written: names the file, the tensor, what was expected and found."
);

pub fn to_python(error: Error) -> PyErr {
    CheckpointError::new_err(error.to_string())
}

/// An open safetensors checkpoint, one file or sharded, checked as a whole before a tensor is read.
#[pyclass(frozen, module = "archzoo._rust")]
pub struct CheckpointReader(Reader);

/// Name, address and bytes of the destination, ranges of the first dimensions, dtype of the destination.
type PyRequest = (String, usize, usize, Vec<(u64, u64)>, Option<String>);

#[pymethods]
impl CheckpointReader {
    /// Opens a `.safetensors` file, an index file, or a folder that holds one of them.
    #[new]
    fn new(py: Python, path: PathBuf) -> PyResult<Self> {
        py.detach(|| pool::run(|| Reader::open(&path)))?.map(Self).map_err(to_python)
    }

    /// Dtype as the format writes it, shape, path of the file and first byte there of every tensor: by file
    /// name, then in the order of their bytes.
    fn infos<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = PyDict::new(py);
        let mut paths: HashMap<&Path, Bound<PyString>> = HashMap::new();
        for (tensor, file) in self.0.tensors() {
            let path = paths.entry(file).or_insert_with(|| PyString::new(py, &file.to_string_lossy()));
            let dtype = PyString::intern(py, tensor.dtype.name());
            let start = (!tensor.is_compressed()).then_some(tensor.start);
            all.set_item(&tensor.name, (dtype, PyTuple::new(py, &tensor.shape)?, &*path, start))?;
        }
        Ok(all)
    }

    /// The headers' free-form strings; of shards that disagree, the first.
    #[getter]
    fn metadata(&self) -> BTreeMap<&str, &str> {
        self.0.metadata()
    }

    /// Bytes that have been read from the tensors so far, also by a read that is under way.
    #[getter]
    fn bytes_read(&self) -> u64 {
        self.0.bytes_read()
    }

    /// Files whose tensors have no checksums.
    #[getter]
    fn unchecked_files(&self) -> Vec<PathBuf> {
        self.0.unchecked_files().map(Path::to_owned).collect()
    }

    /// Reads every byte and compares it with the manifest and the checksums, where there are such: what is
    /// wrong, in the order of the files.
    fn verify(&self, py: Python) -> PyResult<Vec<String>> {
        let faults = py.detach(|| pool::run(|| self.0.verify()))?;
        Ok(faults.iter().map(Error::to_string).collect())
    }

    /// Reads tensors, or boxes of them, straight into memory of their length; what is cast is rounded to
    /// nearest even. With `verify` whole tensors are compared with their checksums.
    #[pyo3(signature = (requests, verify = false))]
    fn read_into(&self, py: Python, requests: Vec<PyRequest>, verify: bool) -> PyResult<()> {
        refuse_overlaps(&requests)?;
        let requests = requests
            .iter()
            .map(|(name, address, bytes, ranges, dtype)| {
                let destination: &mut [u8] = match bytes {
                    0 => &mut [],
                    // SAFETY: the caller holds the memory, and no two destinations meet.
                    _ => unsafe { std::slice::from_raw_parts_mut(*address as *mut u8, *bytes) },
                };
                let dtype = dtype.as_deref().map(|dtype| dtype_of(dtype, name)).transpose()?;
                Ok(Request { name, destination, ranges, dtype })
            })
            .collect::<PyResult<Vec<Request>>>()?;
        py.detach(|| pool::run(|| self.0.read_into(requests, verify)))?.map_err(to_python)
    }
}

fn dtype_of(dtype: &str, tensor: &str) -> PyResult<Dtype> {
    Dtype::from_name(dtype)
        .ok_or_else(|| PyValueError::new_err(format!("dtype of {tensor:?} is unknown: {dtype:?}")))
}

fn refuse_overlaps(requests: &[PyRequest]) -> PyResult<()> {
    let mut ranges: Vec<(usize, usize, &str)> = requests
        .iter()
        .filter(|(_, _, bytes, ..)| *bytes > 0)
        .map(|(name, address, bytes, ..)| (*address, address.saturating_add(*bytes), name.as_str()))
        .collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            let message = format!("destinations of {first:?} and {second:?} overlap");
            return Err(PyValueError::new_err(message));
        }
    }
    Ok(())
}

fn not_contiguous(what: &str, name: &str) -> PyErr {
    PyValueError::new_err(format!("{what} of {name:?} must be contiguous"))
}

/// Name, dtype, shape, bytes.
type PyTensor<'py> = (String, String, Vec<u64>, Bound<'py, PyAny>);

type Make = dyn Fn() -> Result<Vec<u8>, String> + Sync + Send;

enum Source<'py> {
    Array(PyReadonlyArray1<'py, u8>),
    Call(Box<Make>),
}

impl<'py> Source<'py> {
    fn of((name, _, _, bytes): &PyTensor<'py>) -> PyResult<Self> {
        if bytes.is_callable() {
            let call = bytes.clone().unbind();
            return Ok(Self::Call(Box::new(move || {
                Python::attach(|py| {
                    let array = call.call0(py)?.extract::<PyReadonlyArray1<u8>>(py)?;
                    Ok(array.as_slice()?.to_vec())
                })
                .map_err(|error: PyErr| error.to_string())
            })));
        }
        bytes.extract().map(Self::Array).map_err(|_| {
            PyTypeError::new_err(format!("bytes of {name:?} must be a 1-D numpy array of uint8"))
        })
    }
}

/// Writes `model.safetensors`, or shards of at most `max_shard_bytes` and their index, into an existing
/// folder, through to the disk. Bytes may also be calls that give them while they are written. Tensors are dealt to shards in the given order. `compress`: as containers where
/// these are smaller.
#[pyfunction]
#[pyo3(signature = (folder, tensors, max_shard_bytes, compress=false))]
pub fn write_shards(
    py: Python,
    folder: PathBuf,
    tensors: Vec<PyTensor>,
    max_shard_bytes: u64,
    compress: bool,
) -> PyResult<()> {
    let sources = tensors.iter().map(Source::of).collect::<PyResult<Vec<Source>>>()?;
    let tensors = tensors
        .iter()
        .zip(&sources)
        .map(|((name, dtype, shape, _), source)| {
            let dtype = dtype_of(dtype, name)?;
            let elements = match source {
                Source::Array(array) => {
                    Elements::Bytes(array.as_slice().map_err(|_| not_contiguous("bytes", name))?)
                }
                Source::Call(make) => Elements::Made(make.as_ref()),
            };
            Ok(Tensor { name, dtype, shape, elements })
        })
        .collect::<PyResult<Vec<Tensor>>>()?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let save = || archzoo_checkpoint::save(&folder, &tensors, max_shard_bytes, &metadata, compress);
    py.detach(|| pool::run(save))?.map_err(to_python)
}

/// Builds a folder beside its final place and puts it there in one step. As a context manager it aborts unless
/// committed.
#[pyclass(name = "FolderWriter", module = "archzoo._rust")]
pub struct PyFolderWriter(Option<FolderWriter>);

#[pymethods]
impl PyFolderWriter {
    /// Locks `final` against other writers and makes the temporary folder.
    #[new]
    #[pyo3(signature = (r#final))]
    fn new(py: Python, r#final: PathBuf) -> PyResult<Self> {
        py.detach(|| FolderWriter::new(&r#final)).map(|writer| Self(Some(writer))).map_err(to_python)
    }

    /// The temporary folder.
    #[getter]
    fn path(&self) -> PyResult<&Path> {
        self.0.as_ref().map(FolderWriter::path).ok_or_else(ended)
    }

    /// Puts the folder in its final place. Other files of an older folder are carried over, not its weights nor
    /// those that are `obsolete`.
    #[pyo3(signature = (obsolete = Vec::new()))]
    fn commit(&mut self, py: Python, obsolete: Vec<String>) -> PyResult<()> {
        let writer = self.0.take().ok_or_else(ended)?;
        py.detach(|| writer.commit(&obsolete)).map_err(to_python)
    }

    /// Removes the temporary folder. Does nothing after a commit.
    fn abort(&mut self, py: Python) {
        let writer = self.0.take();
        py.detach(|| drop(writer));
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&mut self, py: Python, _exception: &Bound<PyTuple>) {
        self.abort(py);
    }
}

fn ended() -> PyErr {
    CheckpointError::new_err("this writer has ended: it was committed or aborted")
}

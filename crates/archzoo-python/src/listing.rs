//! The files of a folder.

use std::ffi::OsString;
use std::fs::{self, DirEntry, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::pool;

/// A path, the bytes there, and the time of their last change in ns.
type Listed = (OsString, u64, u64);

/// The files in a folder and those in it whose names end in one of `suffixes`, in the order of their paths. Links lead to
/// files, not to folders.
#[pyfunction]
pub fn list_files(py: Python, folder: PathBuf, suffixes: Vec<String>) -> PyResult<Vec<Listed>> {
    py.detach(|| pool::run(|| list(&folder, &suffixes)))?.map_err(PyOSError::new_err)
}

fn list(folder: &Path, suffixes: &[String]) -> Result<Vec<Listed>, String> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect);
    let mut entries: Vec<DirEntry> = entries.map_err(|e| failed(folder, &e))?;
    entries.sort_by_cached_key(DirEntry::file_name);
    let listed = entries.into_par_iter().with_min_len(64).map(|entry| {
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| failed(&path, &e))?;
        if kind.is_dir() {
            return list(&path, suffixes);
        }
        let name = entry.file_name();
        if !suffixes.iter().any(|suffix| name.as_encoded_bytes().ends_with(suffix.as_bytes())) {
            return Ok(Vec::new());
        }
        if kind.is_symlink() {
            // One that leads nowhere, or to itself, is no file.
            let found = fs::metadata(&path).ok().filter(Metadata::is_file);
            return Ok(found.map(|found| described(&path, &found)).into_iter().collect());
        }
        let found = entry.metadata().map_err(|e| failed(&path, &e))?;
        Ok(if found.is_file() { vec![described(&path, &found)] } else { Vec::new() })
    });
    Ok(listed.collect::<Result<Vec<_>, _>>()?.concat())
}

fn described(path: &Path, found: &Metadata) -> Listed {
    let changed = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let path = path.strip_prefix(".").unwrap_or(path);
    (path.into(), found.len(), changed.map_or(0, |age| age.as_nanos() as u64))
}

fn failed(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

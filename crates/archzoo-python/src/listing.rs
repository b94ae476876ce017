//! The files of a folder.

use std::fs::{self, DirEntry, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::pool;
use crate::texts::not_read;

/// A path, the bytes there, and the time of their last change in ns.
type Listed = (String, u64, i64);

enum Entry {
    Folder(PathBuf),
    File(Listed),
}

/// The files in a folder and those in it whose names end in one of `suffixes`: each folder by name, what is in a folder at
/// its place. Links lead to files, not to folders.
#[pyfunction]
pub fn list_files(py: Python, folder: PathBuf, suffixes: Vec<String>) -> PyResult<Vec<Listed>> {
    py.detach(|| pool::run(|| list(&folder, &suffixes)))?
}

fn list(folder: &Path, suffixes: &[String]) -> PyResult<Vec<Listed>> {
    let mut files = Vec::new();
    // No recursion: a folder may be deeper than a stack.
    let mut open = vec![entries(folder, suffixes)?.into_iter()];
    while let Some(here) = open.last_mut() {
        match here.next() {
            Some(Entry::File(file)) => files.push(file),
            Some(Entry::Folder(inner)) => open.push(entries(&inner, suffixes)?.into_iter()),
            None => _ = open.pop(),
        }
    }
    Ok(files)
}

/// What is in one folder, by name.
fn entries(folder: &Path, suffixes: &[String]) -> PyResult<Vec<Entry>> {
    let found = fs::read_dir(folder).and_then(Iterator::collect);
    let mut found: Vec<DirEntry> = found.map_err(|e| not_read(folder, &e))?;
    found.sort_by_cached_key(DirEntry::file_name);
    let entries = found.into_par_iter().with_min_len(64).map(|entry| {
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| not_read(&path, &e))?;
        if kind.is_dir() {
            return Ok(Some(Entry::Folder(path)));
        }
        let name = entry.file_name();
        if !suffixes.iter().any(|suffix| name.as_encoded_bytes().ends_with(suffix.as_bytes())) {
            return Ok(None);
        }
        let found = match kind.is_symlink() {
            // One that leads nowhere, or to itself, is no file.
            true => fs::metadata(&path).ok(),
            false => Some(entry.metadata().map_err(|e| not_read(&path, &e))?),
        };
        found.filter(Metadata::is_file).map(|found| described(&path, &found)).transpose()
    });
    let entries: Vec<_> = entries.collect::<PyResult<_>>()?;
    Ok(entries.into_iter().flatten().collect())
}

fn described(path: &Path, found: &Metadata) -> PyResult<Entry> {
    let path = path.strip_prefix(".").unwrap_or(path);
    let unnamed = || PyOSError::new_err(format!("{}: a name that is not UTF-8", path.display()));
    let name = path.to_str().ok_or_else(unnamed)?;
    let changed = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
    Ok(Entry::File((name.to_owned(), found.len(), changed)))
}

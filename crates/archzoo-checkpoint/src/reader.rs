use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::container::{Container, Section};
use crate::header::{Header, MAX_HEADER, TensorInfo, UniqueMap};
use crate::{Error, INDEX_FILE, Result, SINGLE_FILE};

/// An open checkpoint. Its headers have been checked, and its files stay open: a folder that is replaced in
/// the meantime does not change what is read.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    pub(crate) shards: Vec<Shard>,
    /// Shard and position in its header.
    places: HashMap<String, (usize, usize)>,
    pub(crate) bytes_read: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    file: File,
    pub(crate) header: Header,
}

impl Reader {
    /// Opens a `.safetensors` file, an index file, or a folder with `model.safetensors` or
    /// `model.safetensors.index.json`.
    pub fn open(path: &Path) -> Result<Self> {
        let kind = fs::metadata(path).map_err(Error::io(path, "open"))?;
        if !kind.is_dir() {
            return match path.file_name().and_then(|name| name.to_str()) {
                Some(name) if name.ends_with(".index.json") => Self::open_index(path, path),
                _ => Ok(Self::new(path, vec![Shard::open(path)?])),
            };
        }
        let (single, index) = (path.join(SINGLE_FILE), path.join(INDEX_FILE));
        match (single.exists(), index.exists()) {
            (true, false) => Ok(Self::new(path, vec![Shard::open(&single)?])),
            (false, true) => Self::open_index(path, &index),
            (true, true) => Err(Error::new(
                path,
                format!("expected {SINGLE_FILE} or {INDEX_FILE}, found both: open one of them by its path"),
            )),
            (false, false) => {
                Err(Error::new(path, format!("expected {SINGLE_FILE} or {INDEX_FILE}, found neither")))
            }
        }
    }

    fn open_index(path: &Path, index: &Path) -> Result<Self> {
        let files = read_index(index)?;
        let mut names: Vec<&str> = files.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        let folder = index.parent().unwrap_or(Path::new(""));
        let shards: Vec<Shard> = names
            .par_iter()
            .map(|name| {
                let path = folder.join(name);
                if path.exists() { Shard::open(&path) } else { Err(missing(&path, name, &files)) }
            })
            .collect::<Vec<_>>()
            .into_iter()
            .collect::<Result<_>>()?;
        for (shard, name) in shards.iter().zip(&names) {
            for tensor in &shard.header.tensors {
                let message = match files.get(&tensor.name) {
                    None => format!("expected in {INDEX_FILE}, found in no entry of it"),
                    Some(file) if file == name => continue,
                    Some(file) => format!("expected in {file} (by {INDEX_FILE}), found here"),
                };
                return Err(Error::tensor(&shard.path, &tensor.name, message));
            }
        }
        let reader = Self::new(path, shards);
        match files.iter().find(|(tensor, _)| !reader.places.contains_key(*tensor)) {
            Some((tensor, file)) => {
                let message = format!("expected in {file} (by {INDEX_FILE}), found in no shard");
                Err(Error::tensor(&folder.join(file), tensor, message))
            }
            None => Ok(reader),
        }
    }

    fn new(path: &Path, shards: Vec<Shard>) -> Self {
        let mut places = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for (j, tensor) in shard.header.tensors.iter().enumerate() {
                places.insert(tensor.name.clone(), (i, j));
            }
        }
        Self { path: path.to_owned(), shards, places, bytes_read: AtomicU64::new(0) }
    }

    /// All tensors with their files: by file name, then in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (&TensorInfo, &Path)> {
        self.shards
            .iter()
            .flat_map(|shard| shard.header.tensors.iter().map(|tensor| (tensor, shard.path.as_path())))
    }

    /// A tensor and its file.
    pub fn tensor(&self, name: &str) -> Result<(&TensorInfo, &Path)> {
        let &(shard, tensor) = self
            .places
            .get(name)
            .ok_or_else(|| Error::tensor(&self.path, name, "expected in the checkpoint, found in no file"))?;
        let shard = &self.shards[shard];
        Ok((&shard.header.tensors[tensor], &shard.path))
    }

    /// The headers' free-form strings; of shards that disagree, the first.
    pub fn metadata(&self) -> BTreeMap<&str, &str> {
        let all = self.shards.iter().rev().flat_map(|shard| &shard.header.metadata);
        all.map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    /// The folder that was opened, by its own name or that of its index.
    pub(crate) fn folder(&self) -> Option<&Path> {
        let is_index =
            self.path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(".index.json"));
        if is_index { self.path.parent() } else { Some(&*self.path).filter(|path| path.is_dir()) }
    }

    /// Files whose tensors have no checksums.
    pub fn unchecked_files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().filter(|shard| !shard.header.has_checksums).map(|shard| shard.path.as_path())
    }

    /// Bytes that have been read from the tensors of this reader, also by a read that is under way.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// The shard of a tensor that [`tensor`](Self::tensor) has found.
    pub(crate) fn shard_of(&self, name: &str) -> Option<&Shard> {
        self.places.get(name).map(|&(shard, _)| &self.shards[shard])
    }
}

/// A shard that the index names and the folder lacks.
fn missing(path: &Path, name: &str, files: &BTreeMap<String, String>) -> Error {
    let mut tensors = files.iter().filter(|(_, file)| *file == name).map(|(tensor, _)| tensor);
    let first = tensors.next().map_or("", String::as_str);
    let others = match tensors.count() {
        0 => String::new(),
        count => format!(" with {count} more"),
    };
    Error::tensor(path, first, format!("expected here{others} (by {INDEX_FILE}), found no such file"))
}

impl Shard {
    /// Fills `bytes` from `offset` on, for tensor `name`, and counts them.
    pub(crate) fn read(&self, bytes: &mut [u8], offset: u64, name: &str, count: &AtomicU64) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(|error| self.unreadable(name, error))?;
        count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The container of a compressed tensor.
    pub(crate) fn container(&self, tensor: &TensorInfo) -> Result<Container<Section<'_>>> {
        let section = Section { file: &self.file, start: tensor.start, size: tensor.stored };
        Container::open(tensor.dtype, section, tensor.bytes)
            .map_err(|error| self.unreadable(&tensor.name, error))
    }

    /// A tensor that could not be read.
    pub(crate) fn unreadable(&self, name: &str, error: io::Error) -> Error {
        Error { tensor: Some(name.to_owned()), ..Error::io(&self.path, "read")(error) }
    }

    fn open(path: &Path) -> Result<Self> {
        let kind = fs::metadata(path).map_err(Error::io(path, "open"))?;
        if !kind.is_file() {
            return Err(Error::new(path, "expected a regular file"));
        }
        let mut file = File::open(path).map_err(Error::io(path, "open"))?;
        let size = file.metadata().map_err(Error::io(path, "open"))?.len();
        if size < 8 {
            return Err(Error::new(path, format!("expected a header length of 8 bytes, found {size} bytes")));
        }
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(Error::io(path, "read"))?;
        let mut json = vec![0; Header::length(prefix, size, path)? as usize];
        file.read_exact(&mut json).map_err(Error::io(path, "read"))?;
        Ok(Self { path: path.to_owned(), file, header: Header::parse(&json, size, path)? })
    }
}

/// The JSON of an index file: the file name of each tensor, none of which leads out of the folder.
pub fn parse_index(json: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: UniqueMap,
    }
    let index: Index = serde_json::from_slice(json).map_err(|e| Error::new(path, e.to_string()))?;
    let files = index.weight_map.0;
    let plain =
        |name: &str| !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0']);
    match files.values().find(|name| !plain(name)) {
        None => Ok(files),
        Some(name) => Err(Error::new(path, format!("weight_map: expected plain file names, found {name:?}"))),
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let size = fs::metadata(path).map_err(Error::io(path, "open"))?.len();
    if size > MAX_HEADER {
        return Err(Error::new(path, format!("expected at most {MAX_HEADER} bytes, found {size}")));
    }
    let read = |path: &Path| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_HEADER).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    parse_index(&read(path).map_err(Error::io(path, "read"))?, path)
}

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use rayon::prelude::*;

use crate::header::{MAX_HEADER, METADATA_KEY};
use crate::{Dtype, Error, INDEX_FILE, Result, SINGLE_FILE};

/// A tensor to save.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: &'a [u64],
    /// Contiguous elements, little-endian.
    pub bytes: &'a [u8],
}

/// Smaller writes are gathered.
const BUFFER: usize = 1 << 20;

/// Writes `model.safetensors`, or shards of at most `max_shard_bytes` of data (a larger tensor gets its own)
/// and their index, into an existing folder. Same input, same bytes. When it returns, all is on the disk.
///
/// Tensors are dealt to shards in the given order; shards are written on the threads of rayon's current pool.
pub fn save(
    folder: &Path,
    tensors: &[Tensor],
    max_shard_bytes: u64,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    if max_shard_bytes == 0 {
        return Err(Error::new(folder, "max_shard_bytes: expected at least 1, found 0"));
    }
    let mut names = HashSet::new();
    for tensor in tensors {
        let fault = |message: String| Err(Error::tensor(folder, tensor.name, message));
        if tensor.name == METADATA_KEY {
            return fault("this name is reserved by the format".into());
        }
        if !names.insert(tensor.name) {
            return fault("expected once, found twice".into());
        }
        if tensor.dtype.bytes(tensor.shape) != Some(tensor.bytes.len() as u64) {
            return fault(format!(
                "expected the bytes of shape {:?} of {}, found {} bytes",
                tensor.shape,
                tensor.dtype,
                tensor.bytes.len()
            ));
        }
    }
    let shards = plan(tensors, max_shard_bytes);
    let file_name = |i: usize| match shards.len() {
        1 => SINGLE_FILE.to_owned(),
        count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    shards
        .par_iter()
        .enumerate()
        .map(|(i, shard)| write_shard(&folder.join(file_name(i)), shard, metadata))
        .collect::<Vec<_>>()
        .into_iter()
        .collect::<Result<()>>()?;
    if shards.len() > 1 {
        let weight_map: BTreeMap<&str, String> = shards
            .iter()
            .enumerate()
            .flat_map(|(i, shard)| shard.iter().map(move |tensor| (tensor.name, i)))
            .map(|(name, i)| (name, file_name(i)))
            .collect();
        let total_size: u64 = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
        write_index(&folder.join(INDEX_FILE), total_size, &weight_map)?;
    }
    sync_folder(folder)
}

/// Tensors of each shard, in the order of their bytes in the file.
fn plan<'a>(tensors: &[Tensor<'a>], max_shard_bytes: u64) -> Vec<Vec<Tensor<'a>>> {
    let mut shards = vec![Vec::new()];
    let mut size = 0;
    for &tensor in tensors {
        let bytes = tensor.bytes.len() as u64;
        if size > 0 && size + bytes > max_shard_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    for shard in &mut shards {
        // Widest elements first, so that each tensor is aligned to its own.
        shard.sort_by(|a, b| b.dtype.cmp(&a.dtype).then(a.name.cmp(b.name)));
    }
    shards
}

fn write_shard(path: &Path, tensors: &[Tensor], metadata: &BTreeMap<String, String>) -> Result<()> {
    let header = header(tensors, metadata).map_err(Error::io(path, "write the header"))?;
    if header.len() as u64 > MAX_HEADER {
        let message = format!("header length: expected at most {MAX_HEADER} bytes, found {}", header.len());
        return Err(Error::new(path, message));
    }
    write(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        tensors.iter().try_for_each(|tensor| file.write_all(tensor.bytes))
    })
}

fn header(tensors: &[Tensor], metadata: &BTreeMap<String, String>) -> io::Result<Vec<u8>> {
    let mut json = b"{".to_vec();
    if !metadata.is_empty() {
        write!(json, "{}:{},", serde_json::to_string(METADATA_KEY)?, serde_json::to_string(metadata)?)?;
    }
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes.len();
        write!(
            json,
            r#"{}:{{"dtype":"{}","shape":{},"data_offsets":[{start},{end}]}},"#,
            serde_json::to_string(tensor.name)?,
            tensor.dtype,
            serde_json::to_string(tensor.shape)?,
        )?;
        start = end;
    }
    if json.len() > 1 {
        json.pop();
    }
    json.push(b'}');
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(json)
}

fn write_index(path: &Path, total_size: u64, weight_map: &BTreeMap<&str, String>) -> Result<()> {
    let index = serde_json::json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    write(path, |file| {
        serde_json::to_writer_pretty(&mut *file, &index)?;
        file.write_all(b"\n")
    })
}

/// Writes a new file through to the disk.
fn write(path: &Path, content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let write = || {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        let mut file = BufWriter::with_capacity(BUFFER, file);
        content(&mut file)?;
        file.into_inner()?.sync_all()
    };
    write().map_err(Error::io(path, "write"))
}

pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(folder, "write through to disk"))
}

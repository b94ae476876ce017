use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::checksum::{self, CHECKSUMS_KEY, Checksum};
use crate::compressed::{self, COMPRESSED_KEY};
use crate::header::{MAX_HEADER, METADATA_KEY};
use crate::manifest::{Entry, Manifest};
use crate::spread::spread;
use crate::stream::Stream;
use crate::{Dtype, Error, INDEX_FILE, MANIFEST_FILE, Result, SINGLE_FILE};

/// Where the elements of a tensor come from: contiguous, little-endian.
#[derive(Clone, Copy)]
pub enum Elements<'a> {
    /// Memory.
    Bytes(&'a [u8]),
    /// A call when they are written, on the thread that writes; no thread holds more than one tensor so.
    Made(&'a (dyn Fn() -> std::result::Result<Vec<u8>, String> + Sync)),
}

/// A tensor to save.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    /// Name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: &'a [u64],
    /// Elements.
    pub elements: Elements<'a>,
}

impl Tensor<'_> {
    /// Bytes of the elements; of a shape without a size, which is not saved, none.
    fn bytes(&self) -> u64 {
        self.dtype.bytes(self.shape).unwrap_or(0)
    }

    fn check(&self, file: &Path, found: &[u8]) -> Result<()> {
        if self.dtype.bytes(self.shape) == Some(found.len() as u64) {
            return Ok(());
        }
        let message = format!(
            "expected the bytes of shape {:?} of {}, found {} bytes",
            self.shape,
            self.dtype,
            found.len()
        );
        Err(Error::tensor(file, self.name, message))
    }
}

/// Bytes that are hashed and copied as one, while they are in a core's cache.
const CHUNK: usize = 256 << 10;

/// Writes `model.safetensors`, or shards of at most `max_shard_bytes` of data (a larger tensor gets its own)
/// and their index, and the manifest, into an existing folder. Same input, same bytes. When it returns, all
/// is on the disk.
///
/// Tensors are dealt to shards in the given order; shards are written on the threads of rayon's current pool.
/// With `compress`, floating-point tensors are stored as [`compress`](crate::compress) gives them where that is
/// smaller; shards are planned as without.
pub fn save(
    folder: &Path,
    tensors: &[Tensor],
    max_shard_bytes: u64,
    metadata: &BTreeMap<String, String>,
    compress: bool,
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
        match tensor.elements {
            Elements::Bytes(bytes) => tensor.check(folder, bytes)?,
            Elements::Made(_) if tensor.dtype.bytes(tensor.shape).is_some() => {}
            Elements::Made(_) => {
                return fault(format!("expected whole bytes, found shape {:?}", tensor.shape));
            }
        }
    }
    let shards = plan(tensors, max_shard_bytes);
    let file_name = |i: usize| match shards.len() {
        1 => SINGLE_FILE.to_owned(),
        count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    let size = |&i: &usize| shards[i].iter().map(Tensor::bytes).sum();
    let written = spread((0..shards.len()).collect(), size, |i| {
        Ok((file_name(i), write_shard(&folder.join(file_name(i)), &shards[i], metadata, compress)?))
    })?;
    // At the end: a thread that waits for its shard gives the disk nothing to do in the meantime.
    for (name, _) in &written {
        sync(&folder.join(name))?;
    }
    let mut entries: BTreeMap<String, Entry> = written.into_iter().collect();
    if shards.len() > 1 {
        let weight_map: BTreeMap<&str, String> = shards
            .iter()
            .enumerate()
            .flat_map(|(i, shard)| shard.iter().map(move |tensor| (tensor.name, i)))
            .map(|(name, i)| (name, file_name(i)))
            .collect();
        let total_size: u64 = tensors.iter().map(Tensor::bytes).sum();
        let index = serde_json::json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        entries.insert(INDEX_FILE.to_owned(), write(&folder.join(INDEX_FILE), pretty(&index))?);
    }
    write(&folder.join(MANIFEST_FILE), pretty(&Manifest::new(entries)))?;
    sync(folder)
}

/// Tensors of each shard, in the order of their bytes in the file.
fn plan<'a>(tensors: &[Tensor<'a>], max_shard_bytes: u64) -> Vec<Vec<Tensor<'a>>> {
    let mut shards = vec![Vec::new()];
    let mut size = 0;
    for &tensor in tensors {
        let bytes = tensor.bytes();
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

/// How a tensor is stored.
#[derive(Clone, Copy)]
struct Stored {
    bytes: u64,
    checksum: u64,
    is_compressed: bool,
}

/// Writes a shard, not yet through to the disk, and returns its entry in the manifest.
fn write_shard(
    path: &Path,
    tensors: &[Tensor],
    metadata: &BTreeMap<String, String>,
    compress: bool,
) -> Result<Entry> {
    let json =
        |stored: &[Stored]| header(tensors, stored, metadata).map_err(Error::io(path, "write the header"));
    // Every checksum has the same length, so the header's is known before they are; of what is compressed, the
    // most that it can have.
    let plain = |tensor: &Tensor| Stored { bytes: tensor.bytes(), checksum: 0, is_compressed: compress };
    let length = json(&tensors.iter().map(plain).collect::<Vec<_>>())?.len();
    if length as u64 > MAX_HEADER {
        let message = format!("header length: expected at most {MAX_HEADER} bytes, found {length}");
        return Err(Error::new(path, message));
    }
    let failed = |tensor: Option<&Tensor>| {
        let tensor = tensor.map(|tensor| tensor.name.to_owned());
        move |error| Error { tensor, ..Error::io(path, "write")(error) }
    };
    let most = tensors.iter().map(Tensor::bytes).sum::<u64>() + 8 + length as u64;
    // Space is taken for all of them; the first stands for what does not fit.
    let first = tensors.first();
    let mut stream = Stream::create(path, if compress { 0 } else { most }).map_err(failed(first))?;
    stream.write(&vec![0; 8 + length]).map_err(failed(first))?;
    let mut stored = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        stored.push(match tensor.elements {
            Elements::Bytes(bytes) => {
                write_tensor(&mut stream, tensor.dtype, bytes, compress).map_err(failed(Some(tensor)))?
            }
            Elements::Made(make) => {
                let bytes = make().map_err(|message| Error::tensor(path, tensor.name, message))?;
                tensor.check(path, &bytes)?;
                write_tensor(&mut stream, tensor.dtype, &bytes, compress).map_err(failed(Some(tensor)))?
            }
        });
    }
    let file = stream.finish().map_err(failed(tensors.last()))?;
    let mut head = (length as u64).to_le_bytes().to_vec();
    head.extend(json(&stored)?);
    head.resize(8 + length, b' ');
    file.write_all_at(&head, 0).map_err(failed(first))?;
    let bytes = head.len() as u64 + stored.iter().map(|stored| stored.bytes).sum::<u64>();
    Ok(Entry::new(bytes, &head))
}

fn write_tensor(stream: &mut Stream, dtype: Dtype, bytes: &[u8], compress: bool) -> io::Result<Stored> {
    let compressed = if compress { crate::compress(dtype, bytes) } else { None };
    let bytes = compressed.as_deref().unwrap_or(bytes);
    let mut checksum = Checksum::default();
    for chunk in bytes.chunks(CHUNK) {
        checksum.update(chunk);
        stream.write(chunk)?;
    }
    Ok(Stored { bytes: bytes.len() as u64, checksum: checksum.finish(), is_compressed: compressed.is_some() })
}

fn header(tensors: &[Tensor], stored: &[Stored], metadata: &BTreeMap<String, String>) -> io::Result<Vec<u8>> {
    let both = || tensors.iter().zip(stored);
    let by_name: BTreeMap<&str, String> =
        both().map(|(tensor, stored)| (tensor.name, checksum::hex(stored.checksum))).collect();
    let mut metadata = metadata.clone();
    metadata.insert(CHECKSUMS_KEY.to_owned(), serde_json::to_string(&by_name)?);
    if stored.iter().any(|stored| stored.is_compressed) {
        let compressed = both().filter(|(_, stored)| stored.is_compressed).map(|(tensor, _)| tensor);
        metadata.insert(COMPRESSED_KEY.to_owned(), compressed::describe(compressed)?);
    }
    let mut json = Vec::new();
    write!(json, "{{{}:{},", serde_json::to_string(METADATA_KEY)?, serde_json::to_string(&metadata)?)?;
    let mut start = 0;
    for (tensor, stored) in both() {
        let end = start + stored.bytes;
        let (dtype, shape) = match stored.is_compressed {
            true => ("U8", &[stored.bytes][..]),
            false => (tensor.dtype.name(), tensor.shape),
        };
        write!(
            json,
            r#"{}:{{"dtype":"{dtype}","shape":{},"data_offsets":[{start},{end}]}},"#,
            serde_json::to_string(tensor.name)?,
            serde_json::to_string(shape)?,
        )?;
        start = end;
    }
    json.pop();
    json.push(b'}');
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(json)
}

/// Pretty JSON with a line end.
fn pretty(value: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(value)?;
    json.push(b'\n');
    Ok(json)
}

pub(crate) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

/// Writes a new file through to the disk.
fn write(path: &Path, content: io::Result<Vec<u8>>) -> Result<Entry> {
    let write = || {
        let content = content?;
        let mut file = create(path)?;
        file.write_all(&content)?;
        file.sync_all()?;
        Ok(Entry::new(content.len() as u64, &content))
    };
    write().map_err(Error::io(path, "write"))
}

/// Waits until a file or the list of a folder is on the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path, "write through to disk"))
}

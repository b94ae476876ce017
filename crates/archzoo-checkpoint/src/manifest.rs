use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::checksum;
use crate::header::{MAX_HEADER, UniqueMap};
use crate::{Error, MANIFEST_FILE, Reader, Result};

/// What a folder's files should be: of each, its size and the checksum of its head.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Manifest {
    version: u64,
    files: BTreeMap<String, Entry>,
}

/// The head of a shard is its header with the 8 bytes before it; that of another file is all of it.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    bytes: u64,
    head: u64,
    xxh3: String,
}

const VERSION: u64 = 1;

impl Entry {
    pub(crate) fn new(bytes: u64, head: &[u8]) -> Self {
        Self { bytes, head: head.len() as u64, xxh3: checksum::hex(checksum::of(head)) }
    }
}

impl Manifest {
    pub(crate) fn new(files: BTreeMap<String, Entry>) -> Self {
        Self { version: VERSION, files }
    }

    fn parse(json: &[u8], path: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Raw {
            version: u64,
            files: UniqueMap<Entry>,
        }
        let raw: Raw = serde_json::from_slice(json).map_err(|e| Error::new(path, e.to_string()))?;
        if raw.version != VERSION {
            return Err(Error::new(path, format!("version: expected {VERSION}, found {}", raw.version)));
        }
        Ok(Self { version: VERSION, files: raw.files.0 })
    }
}

impl Reader {
    /// Compares the files with the folder's manifest, if there is one.
    pub(crate) fn verify_heads(&self) -> Vec<Error> {
        let Some(folder) = self.folder() else { return Vec::new() };
        let path = folder.join(MANIFEST_FILE);
        if !path.exists() {
            return Vec::new();
        }
        let manifest = match read_head(&path, u64::MAX).and_then(|json| Manifest::parse(&json, &path)) {
            Ok(manifest) => manifest,
            Err(error) => return vec![error],
        };
        let mut faults: Vec<Error> = manifest
            .files
            .iter()
            .filter_map(|(name, entry)| verify_head(&folder.join(name), entry).err())
            .collect();
        for shard in &self.shards {
            let known = shard.path.file_name().and_then(|name| name.to_str());
            if !known.is_some_and(|name| manifest.files.contains_key(name)) {
                let message = format!("expected in {MANIFEST_FILE}, found in no entry of it");
                faults.push(Error::new(&shard.path, message));
            }
        }
        faults
    }
}

fn verify_head(path: &Path, entry: &Entry) -> Result<()> {
    let bytes = fs::metadata(path).map_err(Error::io(path, "open"))?.len();
    if bytes != entry.bytes {
        let message = format!("expected {} bytes (by {MANIFEST_FILE}), found {bytes}", entry.bytes);
        return Err(Error::new(path, message));
    }
    let found = checksum::hex(checksum::of(&read_head(path, entry.head)?));
    if found != entry.xxh3 {
        let message = format!(
            "damaged: expected checksum {} of the first {} bytes (by {MANIFEST_FILE}), found {found}",
            entry.xxh3, entry.head
        );
        return Err(Error::new(path, message));
    }
    Ok(())
}

/// The first bytes of a file, as many as asked for and as a header may have.
fn read_head(path: &Path, bytes: u64) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(bytes.min(MAX_HEADER + 8)).read_to_end(&mut head))
        .map_err(Error::io(path, "read"))?;
    Ok(head)
}

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::checksum::{self, CHECKSUMS_KEY};
use crate::compressed::{self, COMPRESSED_KEY};
use crate::{Dtype, Error, Result};

/// Longest header that the format allows, in bytes.
pub(crate) const MAX_HEADER: u64 = 100_000_000;
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Length in the file: less where the tensor is compressed, else the same.
    pub stored: u64,
    /// What its bytes should hash to, where the header says.
    pub checksum: Option<u64>,
}

impl TensorInfo {
    /// Whether the file holds a container instead of the elements.
    pub fn is_compressed(&self) -> bool {
        self.stored != self.bytes
    }
}

/// The checked header of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Free-form strings, but for the checksums and what is compressed.
    pub metadata: BTreeMap<String, String>,
    /// Tensors in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// Whether the tensors have checksums.
    pub has_checksums: bool,
}

impl Header {
    /// Length of the JSON, from the first 8 bytes of a file of `file_size` bytes.
    pub fn length(prefix: [u8; 8], file_size: u64, file: &Path) -> Result<u64> {
        let length = u64::from_le_bytes(prefix);
        if length > MAX_HEADER {
            let message = format!("header length: expected at most {MAX_HEADER} bytes, found {length}");
            return Err(Error::new(file, message));
        }
        let rest = file_size.saturating_sub(8);
        if length > rest {
            let message =
                format!("header length: expected at most the file's remaining {rest} bytes, found {length}");
            return Err(Error::new(file, message));
        }
        Ok(length)
    }

    /// Checks the JSON of a file of `file_size` bytes.
    pub fn parse(json: &[u8], file_size: u64, file: &Path) -> Result<Self> {
        let fault = |message: String| Error::new(file, message);
        let json =
            std::str::from_utf8(json).map_err(|e| fault(format!("header: expected UTF-8, found {e}")))?;
        if !json.starts_with('{') {
            return Err(fault(format!("header: expected '{{' first, found {:?}", json.chars().next())));
        }
        let mut raw: RawHeader = serde_json::from_str(json).map_err(|e| fault(format!("header: {e}")))?;

        let checksums = raw.metadata.remove(CHECKSUMS_KEY);
        let has_checksums = checksums.is_some();
        let checksums = match checksums.as_deref().map(checksum::parse_all) {
            None => BTreeMap::new(),
            Some(parsed) => parsed.map_err(|e| fault(format!("header: {CHECKSUMS_KEY}: {e}")))?,
        };
        let compressed = raw.metadata.remove(COMPRESSED_KEY);
        let mut compressed = match compressed.as_deref().map(compressed::parse_all) {
            None => BTreeMap::new(),
            Some(parsed) => parsed.map_err(|e| fault(format!("header: {COMPRESSED_KEY}: {e}")))?,
        };

        let data_start = 8 + json.len() as u64;
        let data_size = file_size - data_start.min(file_size);
        let mut entries = raw.tensors;
        entries.sort_by_key(|(_, raw)| raw.data_offsets);
        let mut tensors = Vec::with_capacity(entries.len());
        let mut position = 0;
        for (name, raw) in entries {
            let fault = |message: String| Error::tensor(file, &name, message);
            let [start, end] = raw.data_offsets;
            let dtype = Dtype::from_name(&raw.dtype).ok_or_else(|| {
                fault(format!("dtype: expected one of {}, found {:?}", Dtype::names(), raw.dtype))
            })?;
            if end < start {
                return Err(fault(format!("data_offsets: expected start <= end, found [{start}, {end}]")));
            }
            let bytes = dtype.bytes(&raw.shape).ok_or_else(|| {
                fault(format!(
                    "shape {:?} of {dtype}: expected a whole number of bytes below 2^64",
                    raw.shape
                ))
            })?;
            if bytes != end - start {
                let message = format!(
                    "data_offsets: expected {bytes} bytes for shape {:?} of {dtype}, found {}",
                    raw.shape,
                    end - start
                );
                return Err(fault(message));
            }
            if start != position {
                let what = if start > position { "a hole" } else { "an overlap" };
                let message = format!(
                    "data_offsets: expected to start at {position}, where the tensor before ends, \
                     found {start} ({what})"
                );
                return Err(fault(message));
            }
            if end > data_size {
                let message = format!(
                    "data_offsets: expected to end within the file's {data_size} data bytes, found {end}"
                );
                return Err(fault(message));
            }
            position = end;
            let checksum = checksums.get(&name).copied();
            let start = data_start + start;
            let mut tensor =
                TensorInfo { name, dtype, shape: raw.shape, start, bytes, stored: bytes, checksum };
            if let Some(original) = compressed.remove(&tensor.name) {
                original.describe(&mut tensor).map_err(|e| Error::tensor(file, &tensor.name, e))?;
            }
            tensors.push(tensor);
        }
        if let Some((name, _)) = compressed.first_key_value() {
            let message = format!("expected in the file (by {COMPRESSED_KEY}), found nowhere");
            return Err(Error::tensor(file, name, message));
        }
        if position != data_size {
            let message = format!(
                "expected a file of {} bytes (the end of the last tensor), found {file_size}",
                data_start + position
            );
            return Err(fault(message));
        }
        Ok(Self { metadata: raw.metadata, tensors, has_checksums })
    }
}

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut header = RawHeader { metadata: BTreeMap::new(), tensors: Vec::new() };
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format!("tensor {key:?}: expected once, found twice")));
                    }
                    if key == METADATA_KEY {
                        header.metadata = map.next_value::<UniqueMap>()?.0;
                    } else {
                        let tensor =
                            map.next_value().map_err(|e| A::Error::custom(format!("tensor {key:?}: {e}")))?;
                        header.tensors.push((key, tensor));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// A map in which no key comes twice.
pub(crate) struct UniqueMap<V = String>(pub BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Map<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Map<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<UniqueMap<V>, A::Error> {
                let mut all = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if all.contains_key(&key) {
                        return Err(A::Error::custom(format!("key {key:?}: expected once, found twice")));
                    }
                    all.insert(key, value);
                }
                Ok(UniqueMap(all))
            }
        }
        deserializer.deserialize_map(Map(PhantomData))
    }
}

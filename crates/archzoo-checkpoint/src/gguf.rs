//! GGUF files, versions 2 and 3: metadata and tensors, which are dequantised while they are read.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::dequantize::Kind;
use crate::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT: u64 = 32;
/// Arrays within arrays.
const DEPTH: u32 = 4;
/// Blocks that are read at once, and about as many bytes as they become.
const PIECE: usize = 1 << 20;

macro_rules! values {
    ($($name:ident: $rust:ty = $id:literal),* $(,)?) => {
        /// A value of the metadata.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum Value {
            $($name($rust),)*
            Bool(bool),
            String(String),
            Array(Array),
        }

        /// An array of the metadata, of one type.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum Array {
            $($name(Vec<$rust>),)*
            Bool(Vec<bool>),
            String(Vec<String>),
            Array(Vec<Array>),
        }

        impl<R: Read> Input<R> {
            fn value(&mut self, id: u32) -> Fallible<Value> {
                Ok(match id {
                    $($id => Value::$name(<$rust>::from_le_bytes(self.bytes()?)),)*
                    7 => Value::Bool(self.boolean()?),
                    8 => Value::String(self.string()?),
                    9 => Value::Array(self.array(DEPTH)?),
                    _ => return Err(format!("expected a value type of 0 to 12, found {id}")),
                })
            }

            fn array(&mut self, depth: u32) -> Fallible<Array> {
                let id = u32::from_le_bytes(self.bytes()?);
                let count = u64::from_le_bytes(self.bytes()?);
                let smallest = match id {
                    $($id => size_of::<$rust>() as u64,)*
                    7 => 1,
                    8 => 8,
                    9 if depth > 0 => 12,
                    9 => return Err(format!("expected at most {DEPTH} arrays in arrays, found more")),
                    _ => return Err(format!("expected an array of type 0 to 12, found {id}")),
                };
                let count = self.fits(count, smallest, "array elements")?;
                Ok(match id {
                    $($id => Array::$name(
                        (0..count).map(|_| Ok(<$rust>::from_le_bytes(self.bytes()?))).collect::<Fallible<_>>()?
                    ),)*
                    7 => Array::Bool((0..count).map(|_| self.boolean()).collect::<Fallible<_>>()?),
                    8 => Array::String((0..count).map(|_| self.string()).collect::<Fallible<_>>()?),
                    _ => Array::Array((0..count).map(|_| self.array(depth - 1)).collect::<Fallible<_>>()?),
                })
            }
        }
    };
}

values! {
    U8: u8 = 0, I8: i8 = 1, U16: u16 = 2, I16: i16 = 3, U32: u32 = 4, I32: i32 = 5, F32: f32 = 6,
    U64: u64 = 10, I64: i64 = 11, F64: f64 = 12,
}

type Fallible<T> = std::result::Result<T, String>;

/// A file that is read from its start, and how many bytes are left of it.
struct Input<R> {
    reader: R,
    left: u64,
    position: u64,
}

impl<R: Read> Input<R> {
    fn bytes<const N: usize>(&mut self) -> Fallible<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Fallible<()> {
        let left = self.left.checked_sub(bytes.len() as u64);
        let at = self.position;
        self.left =
            left.ok_or_else(|| format!("expected {} more bytes at {at}, found {}", bytes.len(), self.left))?;
        self.position += bytes.len() as u64;
        self.reader.read_exact(bytes).map_err(|error| format!("cannot read at {at}: {error}"))
    }

    /// A count of things of at least `smallest` bytes each that the rest of the file can hold.
    fn fits(&self, count: u64, smallest: u64, what: &str) -> Fallible<usize> {
        match count.checked_mul(smallest) {
            Some(bytes) if bytes <= self.left => Ok(count as usize),
            _ => Err(format!(
                "expected at most {} {what} in what follows byte {}, found {count}",
                self.left / smallest,
                self.position
            )),
        }
    }

    fn boolean(&mut self) -> Fallible<bool> {
        match self.bytes()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("expected 0 or 1 for a boolean, found {other}")),
        }
    }

    fn string(&mut self) -> Fallible<String> {
        let length = u64::from_le_bytes(self.bytes()?);
        let mut bytes = vec![0; self.fits(length, 1, "bytes of a string")?];
        self.read(&mut bytes)?;
        String::from_utf8(bytes).map_err(|error| format!("expected a string of UTF-8, found {error}"))
    }
}

/// A tensor of a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name.
    pub name: String,
    /// How it is stored.
    pub kind: Kind,
    /// Shape, rows first (the file lists the fastest dimension first).
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub start: u64,
    /// Bytes in the file.
    pub stored: u64,
    /// Bytes of its elements once they are read.
    pub bytes: u64,
}

/// The checked head of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufHead {
    /// Values by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the order of the file's list.
    pub tensors: Vec<GgufTensor>,
}

impl GgufHead {
    /// Checks the head of a file of `size` bytes.
    pub fn parse(reader: impl Read, size: u64) -> std::result::Result<Self, String> {
        let mut input = Input { reader, left: size, position: 0 };
        let magic: [u8; 4] = input.bytes()?;
        if magic != *MAGIC {
            return Err(format!("expected \"GGUF\" first, found {:?}", magic.escape_ascii().to_string()));
        }
        let version = u32::from_le_bytes(input.bytes()?);
        if !(2..=3).contains(&version) {
            return Err(format!("expected version 2 or 3, little-endian, found {version}"));
        }
        let tensors = u64::from_le_bytes(input.bytes()?);
        let values = u64::from_le_bytes(input.bytes()?);
        let values = input.fits(values, 13, "metadata values")?;
        let tensors = input.fits(tensors, 24, "tensors")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..values {
            let key = input.string()?;
            let id = u32::from_le_bytes(input.bytes()?);
            let value = input.value(id).map_err(|error| format!("metadata {key:?}: {error}"))?;
            if metadata.contains_key(&key) {
                return Err(format!("metadata {key:?}: expected once, found twice"));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(Value::U32(alignment)) if alignment.is_power_of_two() => u64::from(*alignment),
            Some(other) => {
                return Err(format!("{ALIGNMENT_KEY}: expected a power of two as u32, found {other:?}"));
            }
        };
        let mut list = Vec::new();
        for _ in 0..tensors {
            list.push(input.tensor(alignment)?);
        }
        let data = if list.is_empty() { size } else { input.position.next_multiple_of(alignment) };
        let available = size.checked_sub(data);
        let available =
            available.ok_or_else(|| format!("expected data from byte {data} on, found {size} bytes"))?;
        let mut names = HashSet::new();
        for tensor in &mut list {
            if !names.insert(tensor.name.clone()) {
                return Err(format!("tensor {:?}: expected once, found twice", tensor.name));
            }
            if tensor.start.checked_add(tensor.stored).is_none_or(|end| end > available) {
                return Err(format!(
                    "tensor {:?}: expected {} bytes from {} on within the {available} bytes of data",
                    tensor.name, tensor.stored, tensor.start
                ));
            }
            tensor.start += data;
        }
        let mut order: Vec<&GgufTensor> = list.iter().filter(|tensor| tensor.stored > 0).collect();
        order.sort_unstable_by_key(|tensor| tensor.start);
        for pair in order.windows(2) {
            if pair[0].start + pair[0].stored > pair[1].start {
                return Err(format!(
                    "tensors {:?} and {:?}: expected apart, found an overlap",
                    pair[0].name, pair[1].name
                ));
            }
        }
        Ok(Self { metadata, tensors: list })
    }
}

impl<R: Read> Input<R> {
    /// An entry of the list; its start counts from that of the data.
    fn tensor(&mut self, alignment: u64) -> Fallible<GgufTensor> {
        let name = self.string()?;
        let fault = |message: String| format!("tensor {name:?}: {message}");
        let dims = u32::from_le_bytes(self.bytes()?);
        if dims > 4 {
            return Err(fault(format!("expected at most 4 dimensions, found {dims}")));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.insert(0, u64::from_le_bytes(self.bytes()?));
        }
        let kind = Kind::from_id(u32::from_le_bytes(self.bytes()?)).map_err(fault)?;
        let start = u64::from_le_bytes(self.bytes()?);
        if !start.is_multiple_of(alignment) {
            return Err(fault(format!("expected an offset of whole {alignment} bytes, found {start}")));
        }
        let (elements, size) = kind.block();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(elements as u64) {
            return Err(fault(format!(
                "expected rows of whole {} blocks of {elements}, found {row}",
                kind.name()
            )));
        }
        let total = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let stored = total.and_then(|total| (total / elements as u64).checked_mul(size as u64));
        let bytes = kind.dtype().bytes(&shape);
        let (Some(stored), Some(bytes)) = (stored, bytes) else {
            return Err(fault(format!("expected fewer than 2^64 bytes, found the shape {shape:?}")));
        };
        Ok(GgufTensor { name, kind, shape, start, stored, bytes })
    }
}

/// An open GGUF file whose head has been checked.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    head: GgufHead,
}

impl Gguf {
    /// Opens and checks a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let kind = file.metadata().map_err(Error::io(path, "open"))?;
        if !kind.is_file() {
            return Err(Error::new(path, "expected a regular file"));
        }
        let head = GgufHead::parse(BufReader::new(&file), kind.len()).map_err(|e| Error::new(path, e))?;
        Ok(Self { path: path.to_owned(), file, head })
    }

    /// Metadata and the list of tensors.
    pub fn head(&self) -> &GgufHead {
        &self.head
    }

    /// Reads tensors into the bytes of their elements, on the threads of rayon's current pool: quantised ones as
    /// float32, others as they are.
    pub fn read_into(&self, requests: Vec<(&str, &mut [u8])>) -> Result<()> {
        let mut pieces = Vec::new();
        for (name, destination) in requests {
            let fault = |message: String| Error::tensor(&self.path, name, message);
            let tensor = self.head.tensors.iter().find(|tensor| tensor.name == name);
            let tensor = tensor.ok_or_else(|| fault("expected in the file, found nowhere".into()))?;
            if destination.len() as u64 != tensor.bytes {
                let found = destination.len();
                return Err(fault(format!("destination: expected {} bytes, found {found}", tensor.bytes)));
            }
            let (elements, size) = tensor.kind.block();
            let width = elements * tensor.kind.dtype().bits() as usize / 8;
            let blocks = (PIECE / width).max(1);
            let starts = (tensor.start..).step_by(blocks * size);
            pieces.extend(
                destination.chunks_mut(blocks * width).zip(starts).map(|(out, start)| (tensor, start, out)),
            );
        }
        pieces.into_par_iter().try_for_each_init(Vec::new, |buffer, (tensor, start, out)| {
            self.read_piece(tensor, start, out, buffer).map_err(|error| Error {
                tensor: Some(tensor.name.clone()),
                ..Error::io(&self.path, "read")(error)
            })
        })
    }

    fn read_piece(
        &self,
        tensor: &GgufTensor,
        start: u64,
        out: &mut [u8],
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        let (elements, size) = tensor.kind.block();
        if elements == 1 {
            return self.file.read_exact_at(out, start);
        }
        let (out, _) = out.as_chunks_mut::<4>();
        buffer.resize(out.len() / elements * size, 0);
        self.file.read_exact_at(buffer, start)?;
        tensor.kind.dequantize(buffer, out);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    /// A value by key, type number and bytes.
    fn value(key: &str, id: u32, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        text(&mut out, key);
        out.extend(id.to_le_bytes());
        out.extend(bytes);
        out
    }

    fn tensor(name: &str, shape: &[u64], kind: u32, start: u64) -> Vec<u8> {
        let mut out = Vec::new();
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(start.to_le_bytes());
        out
    }

    fn file(values: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        out.extend(values.concat());
        out.extend(tensors.concat());
        out.resize(out.len().next_multiple_of(32) + data, 7);
        out
    }

    fn parse(bytes: &[u8]) -> std::result::Result<GgufHead, String> {
        GgufHead::parse(bytes, bytes.len() as u64)
    }

    fn refused(bytes: &[u8], message: &str) {
        let error = parse(bytes).unwrap_err();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn values_of_every_type() {
        let nested =
            [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &0u32.to_le_bytes(), &2u64.to_le_bytes(), &[5, 6]];
        let mut words = 8u32.to_le_bytes().to_vec();
        words.extend(2u64.to_le_bytes());
        text(&mut words, "a");
        text(&mut words, "é");
        let values = [
            value("u8", 0, &[200]),
            value("i8", 1, &[200]),
            value("i16", 3, &(-2i16).to_le_bytes()),
            value("f32", 6, &1.5f32.to_le_bytes()),
            value("bool", 7, &[1]),
            value("u64", 10, &u64::MAX.to_le_bytes()),
            value("f64", 12, &0.1f64.to_le_bytes()),
            value("nested", 9, &nested.concat()),
            value("words", 9, &words),
        ];
        let head = parse(&file(&values, &[], 0)).unwrap();
        assert_eq!(head.metadata["u8"], Value::U8(200));
        assert_eq!(head.metadata["i8"], Value::I8(-56));
        assert_eq!(head.metadata["i16"], Value::I16(-2));
        assert_eq!(head.metadata["f32"], Value::F32(1.5));
        assert_eq!(head.metadata["bool"], Value::Bool(true));
        assert_eq!(head.metadata["u64"], Value::U64(u64::MAX));
        assert_eq!(head.metadata["f64"], Value::F64(0.1));
        assert_eq!(head.metadata["nested"], Value::Array(Array::Array(vec![Array::U8(vec![5, 6])])));
        assert_eq!(head.metadata["words"], Value::Array(Array::String(vec!["a".into(), "é".into()])));
    }

    #[test]
    fn tensors_and_their_places() {
        let tensors = [tensor("a", &[2, 32], 2, 64), tensor("b", &[3], 0, 0), tensor("c", &[], 30, 32)];
        let bytes = file(&[value(ALIGNMENT_KEY, 4, &32u32.to_le_bytes())], &tensors, 100);
        let head = parse(&bytes).unwrap();
        let data = bytes.len() as u64 - 100;
        let places: Vec<_> =
            head.tensors.iter().map(|t| (t.start - data, t.stored, t.bytes, &t.shape[..])).collect();
        assert_eq!(places, [(64, 36, 256, &[2, 32][..]), (0, 12, 12, &[3]), (32, 2, 2, &[])]);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        std::fs::write(&path, &bytes).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        let (mut a, mut b) = (vec![0; 256], vec![0; 12]);
        gguf.read_into(vec![("a", &mut a), ("b", &mut b)]).unwrap();
        assert_eq!(b, [7; 12]);
        // 7 in both nibbles, less 8.
        let scale = archzoo_simd::math::from_f16(0x0707);
        let (low, high) = (-scale, scale * -8.0);
        let expected: Vec<u8> =
            (0..64).flat_map(|i| if i % 32 < 16 { low } else { high }.to_le_bytes()).collect();
        assert_eq!(a, expected);
        let error = gguf.read_into(vec![("a", &mut b)]).unwrap_err().to_string();
        assert!(error.contains("a.gguf: tensor \"a\": destination: expected 256 bytes, found 12"), "{error}");
        assert!(gguf.read_into(vec![("d", &mut b)]).is_err());
    }

    #[test]
    fn what_is_wrong_is_said() {
        refused(b"GGUG", "expected \"GGUF\" first");
        refused(b"GGUF\x01\0\0\0", "expected version 2 or 3, little-endian, found 1");
        refused(b"GGUF\0\0\0\x03", "found 50331648");
        let one = |value: Vec<u8>| file(&[value], &[], 0);
        refused(&one(value("a", 13, &[])), "metadata \"a\": expected a value type of 0 to 12, found 13");
        refused(&one(value("a", 7, &[2])), "expected 0 or 1");
        let long = [&0u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        refused(&one(value("a", 9, &long)), "array elements");
        let deep: Vec<u8> =
            (0..6).flat_map(|_| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat()).collect();
        refused(&one(value("a", 9, &deep)), "expected at most 4 arrays in arrays");
        refused(
            &file(&[value("a", 0, &[1]), value("a", 0, &[1])], &[], 0),
            "\"a\": expected once, found twice",
        );
        refused(&one(value(ALIGNMENT_KEY, 4, &33u32.to_le_bytes())), "expected a power of two");
        let tensors = |tensors: &[Vec<u8>]| file(&[], tensors, 64);
        refused(&tensors(&[tensor("a", &[1], 0, 0), tensor("a", &[1], 0, 32)]), "\"a\": expected once");
        refused(&tensors(&[tensor("a", &[17], 0, 0)]), "expected 68 bytes from 0 on within the 64");
        refused(&tensors(&[tensor("a", &[1], 0, 64)]), "expected 4 bytes from 64 on");
        refused(&tensors(&[tensor("a", &[1], 0, 8)]), "expected an offset of whole 32 bytes");
        refused(&tensors(&[tensor("a", &[33], 8, 0)]), "expected rows of whole Q8_0 blocks of 32, found 33");
        refused(&tensors(&[tensor("a", &[1 << 62, 4], 0, 0)]), "expected fewer than 2^64 bytes");
        refused(&tensors(&[tensor("a", &[1; 5], 0, 0)]), "expected at most 4 dimensions");
        refused(&tensors(&[tensor("a", &[9], 0, 0), tensor("b", &[1], 0, 32)]), "found an overlap");
        refused(&tensors(&[tensor("a", &[256], 23, 0)]), "found IQ4_XS");
    }

    #[test]
    fn no_cut_is_read() {
        let bytes = file(&[value("key", 6, &[0; 4])], &[tensor("a", &[2, 32], 8, 0)], 68);
        assert!(parse(&bytes).is_ok());
        for end in 0..bytes.len() {
            assert!(parse(&bytes[..end]).is_err(), "{end}");
        }
    }
}

//! The head of a GGUF file, versions 2 and 3: metadata, and the list of tensors with their places.
//!
//! Nothing is allocated that the file has no room for, and text is borrowed from it.

mod cursor;
mod kind;
mod value;

use std::collections::{BTreeMap, HashSet};
use std::io::Read;

use cursor::{Cursor, Parsed};
pub use kind::Kind;
pub use value::{Array, Value};

/// What a file starts with.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Metadata that says of what the places of tensors are multiples.
const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT: u64 = 32;
/// Bytes of a file that are read first.
const START: usize = 1 << 20;

/// Why a head cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The content ends before the head does; the file has more.
    Short,
    /// What was expected and what was found.
    Wrong(String),
}

fn wrong<T>(message: String) -> Parsed<T> {
    Err(Fault::Wrong(message))
}

/// Says where a fault is.
fn within(place: &str) -> impl Fn(Fault) -> Fault {
    move |fault| match fault {
        Fault::Wrong(message) => Fault::Wrong(format!("{place}: {message}")),
        Fault::Short => Fault::Short,
    }
}

/// The metadata of a file, which comes before the list of tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata<'a> {
    /// Values by key.
    pub values: BTreeMap<&'a str, Value<'a>>,
    /// Bytes of the file up to the end of the metadata.
    pub end: usize,
    tensors: u64,
}

impl<'a> Metadata<'a> {
    /// Checks the metadata in the first bytes of a file of `size` bytes.
    pub fn parse(content: &'a [u8], size: u64) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(content, size);
        let magic: [u8; 4] = cursor.array()?;
        if magic != MAGIC {
            return wrong(format!("expected \"GGUF\" first, found {:?}", magic.escape_ascii().to_string()));
        }
        let version = cursor.u32()?;
        if !(2..=3).contains(&version) {
            return wrong(format!("expected GGUF of version 2 or 3, little-endian, found {version}"));
        }
        let (tensors, count) = (cursor.u64()?, cursor.u64()?);
        let count = cursor.fits(count, 13, "metadata values")?;
        let mut values = BTreeMap::new();
        for _ in 0..count {
            let key = cursor.string()?;
            let id = cursor.u32()?;
            let place = || format!("metadata {key:?}");
            let value = Value::parse(&mut cursor, id).map_err(|fault| within(&place())(fault))?;
            if values.insert(key, value).is_some() {
                return wrong(format!("{}: expected once, found twice", place()));
            }
        }
        Ok(Self { values, end: cursor.position(), tensors })
    }

    fn alignment(&self) -> Parsed<u64> {
        match self.values.get(ALIGNMENT_KEY) {
            None => Ok(ALIGNMENT),
            Some(Value::U32(alignment)) if alignment.is_power_of_two() => Ok(u64::from(*alignment)),
            Some(other) => wrong(format!("{ALIGNMENT_KEY}: expected a power of two as u32, found {other:?}")),
        }
    }
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// How it is stored.
    pub kind: Kind,
    /// Shape, rows first (the file lists the fastest dimension first).
    pub shape: Vec<u64>,
    /// Product of the shape; eight times as much fits an u64.
    pub elements: u64,
    /// First byte in the file.
    pub start: u64,
    /// Bytes in the file.
    pub stored: u64,
}

impl Tensor {
    /// An entry of the list; its start counts from that of the data.
    fn parse(cursor: &mut Cursor, alignment: u64) -> Parsed<Self> {
        let name = cursor.string()?.to_owned();
        let fault = |message: String| Fault::Wrong(format!("tensor {name:?}: {message}"));
        let dims = cursor.u32()?;
        if dims > 4 {
            return Err(fault(format!("expected at most 4 dimensions, found {dims}")));
        }
        let mut shape = (0..dims).map(|_| cursor.u64()).collect::<Parsed<Vec<_>>>()?;
        shape.reverse();
        let kind = Kind::from_id(cursor.u32()?).map_err(fault)?;
        let start = cursor.u64()?;
        if !start.is_multiple_of(alignment) {
            return Err(fault(format!("expected an offset of whole {alignment} bytes, found {start}")));
        }
        let (elements, size) = kind.block();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(elements as u64) {
            let name = kind.name();
            return Err(fault(format!("expected rows of whole {name} blocks of {elements}, found {row}")));
        }
        let total = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let Some(total) = total.filter(|total| total.checked_mul(8).is_some()) else {
            return Err(fault(format!("expected fewer than 2^64 bytes, found the shape {shape:?}")));
        };
        // No block has more than eight bytes an element.
        Ok(Self { name, kind, shape, elements: total, start, stored: total / elements as u64 * size as u64 })
    }
}

/// The head of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Head<'a> {
    /// What comes before the list of tensors.
    pub metadata: Metadata<'a>,
    /// Tensors in the order of the file's list, all within the file and apart.
    pub tensors: Vec<Tensor>,
    /// Bytes of the file up to the end of the list.
    pub end: usize,
}

impl<'a> Head<'a> {
    /// Checks the head in the first bytes of a file of `size` bytes.
    pub fn parse(content: &'a [u8], size: u64) -> Result<Self, Fault> {
        let metadata = Metadata::parse(content, size)?;
        let alignment = metadata.alignment()?;
        let mut cursor = Cursor::new(content, size);
        cursor.take(metadata.end)?;
        let count = cursor.fits(metadata.tensors, 24, "tensors")?;
        let mut tensors =
            (0..count).map(|_| Tensor::parse(&mut cursor, alignment)).collect::<Parsed<Vec<_>>>()?;
        let end = cursor.position();
        place(&mut tensors, end, alignment, size)?;
        Ok(Self { metadata, tensors, end })
    }
}

/// Makes starts count from that of the file of `size` bytes, whose head ends at `end`.
fn place(tensors: &mut [Tensor], end: usize, alignment: u64, size: u64) -> Parsed<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let data = (end as u64).next_multiple_of(alignment);
    let Some(available) = size.checked_sub(data) else {
        return wrong(format!("expected data from byte {data} on, found {size} bytes"));
    };
    let mut names = HashSet::new();
    for tensor in tensors.iter_mut() {
        if !names.insert(tensor.name.as_str()) {
            return wrong(format!("tensor {:?}: expected once, found twice", tensor.name));
        }
        if tensor.start.checked_add(tensor.stored).is_none_or(|end| end > available) {
            return wrong(format!(
                "tensor {:?}: expected {} bytes from {} on within the {available} bytes of data",
                tensor.name, tensor.stored, tensor.start
            ));
        }
        tensor.start += data;
    }
    let mut order: Vec<&Tensor> = tensors.iter().filter(|tensor| tensor.stored > 0).collect();
    order.sort_unstable_by_key(|tensor| tensor.start);
    for pair in order.windows(2) {
        if pair[0].start + pair[0].stored > pair[1].start {
            let (first, second) = (&pair[0].name, &pair[1].name);
            return wrong(format!("tensors {first:?} and {second:?}: expected apart, found an overlap"));
        }
    }
    Ok(())
}

/// Reads the first bytes of a file, as many as `end` says, which may ask for more.
pub fn read_start(
    mut reader: impl Read,
    end: impl Fn(&[u8]) -> Result<usize, Fault>,
) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    loop {
        let more = content.len().max(START) as u64;
        let count = reader.by_ref().take(more).read_to_end(&mut content);
        match (end(&content), count) {
            (_, Err(error)) => return Err(format!("cannot read: {error}")),
            (Ok(end), _) => {
                content.truncate(end);
                return Ok(content);
            }
            (Err(Fault::Wrong(message)), _) => return Err(message),
            (Err(Fault::Short), Ok(0)) => return Err("the file ends within its head".to_owned()),
            (Err(Fault::Short), Ok(_)) => {}
        }
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

    fn parse(bytes: &[u8]) -> Result<Head<'_>, Fault> {
        Head::parse(bytes, bytes.len() as u64)
    }

    fn refused(bytes: &[u8], message: &str) {
        let Fault::Wrong(error) = parse(bytes).unwrap_err() else {
            panic!("expected more than a short file")
        };
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
        let bytes = file(&values, &[], 0);
        let head = parse(&bytes).unwrap();
        assert_eq!(head.metadata.values["u8"], Value::U8(200));
        assert_eq!(head.metadata.values["i8"], Value::I8(-56));
        assert_eq!(head.metadata.values["i16"], Value::I16(-2));
        assert_eq!(head.metadata.values["f32"], Value::F32(1.5));
        assert_eq!(head.metadata.values["bool"], Value::Bool(true));
        assert_eq!(head.metadata.values["u64"], Value::U64(u64::MAX));
        assert_eq!(head.metadata.values["f64"], Value::F64(0.1));
        assert_eq!(head.metadata.values["nested"], Value::Array(Array::Array(vec![Array::U8(vec![5, 6])])));
        assert_eq!(head.metadata.values["words"], Value::Array(Array::String(vec!["a", "é"])));
    }

    #[test]
    fn tensors_and_their_places() {
        let tensors = [tensor("a", &[2, 32], 2, 64), tensor("b", &[3], 0, 0), tensor("c", &[], 30, 32)];
        let bytes = file(&[value(ALIGNMENT_KEY, 4, &32u32.to_le_bytes())], &tensors, 100);
        let head = parse(&bytes).unwrap();
        let data = bytes.len() as u64 - 100;
        let places: Vec<_> =
            head.tensors.iter().map(|t| (t.start - data, t.stored, t.elements, &t.shape[..])).collect();
        assert_eq!(places, [(64, 36, 64, &[2, 32][..]), (0, 12, 3, &[3]), (32, 2, 1, &[])]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        refused(b"GGUG", "expected \"GGUF\" first");
        refused(b"GGUF\x01\0\0\0", "expected GGUF of version 2 or 3, little-endian, found 1");
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
            assert!(matches!(parse(&bytes[..end]), Err(Fault::Wrong(_))), "{end}");
        }
    }

    #[test]
    fn the_start_of_a_file_is_enough() {
        let long = [&0u32.to_le_bytes()[..], &(2 * START as u64).to_le_bytes(), &vec![5; 2 * START]].concat();
        let bytes = file(&[value("long", 9, &long)], &[tensor("a", &[2, 32], 8, 0)], 68);
        let size = bytes.len() as u64;
        let head = parse(&bytes).unwrap();
        for cut in [0, 20, START, head.metadata.end - 1] {
            assert_eq!(Head::parse(&bytes[..cut], size), Err(Fault::Short));
        }
        assert_eq!(Head::parse(&bytes[..head.end], size), Ok(head.clone()));
        let end = |content: &[u8]| Head::parse(content, size).map(|head| head.end);
        assert_eq!(read_start(&bytes[..], end).unwrap(), bytes[..head.end]);
        let error = read_start(&bytes[..START + 5], end).unwrap_err();
        assert!(error.contains("the file ends within its head"), "{error}");
    }
}

//! The compressed form of one tensor: exponents in a prefix code, everything else as it is.
//!
//! All integers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `archzoo` and the version, 1 |
//! | 1 | planes: 0 bfloat16, 1 float32, 2 float16, 3 float8 |
//! | 7 | zeros |
//! | 8 | number of elements |
//! | 128 | code length of each byte value (0 to 11), two a byte, the even one in the low half |
//! | 16 a block | end of the block, counted from the start; XXH3-64 of its elements |
//! | | blocks of 65,536 elements |
//!
//! The code is canonical. A block holds four 16-bit sizes and four streams of as many bytes, each a quarter of
//! the block's coded bytes (rounded up), most significant bit first; then the plane of the other bytes. A
//! float32's sign and upper mantissa form one plane, its lower mantissa another, which is left out where all
//! of it is zero.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use archzoo_simd::InstructionSet;
use rayon::prelude::*;
use twox_hash::XxHash3_64;

use crate::Dtype;
use crate::bitstream::{Code, Cursor, SLACK, STREAMS, Table, WINDOW, count, decode, encode, room};
use crate::huffman::{codes, lengths};
use crate::planes::Planes;

const MAGIC: [u8; 8] = *b"archzoo\x01";
const HEADER: usize = 152;
const ENTRY: usize = 16;
/// Elements of a block.
const BLOCK: usize = 1 << 16;
const SIZES: usize = 2 * STREAMS;

/// Compresses the little-endian elements of a tensor, on the threads of rayon's current pool. `None` where that
/// does not make them smaller. Same input, same bytes.
pub fn compress(dtype: Dtype, bytes: &[u8]) -> Option<Vec<u8>> {
    let planes = Planes::of(dtype)?;
    if bytes.len() <= HEADER || !bytes.len().is_multiple_of(planes.width()) {
        return None;
    }
    let set = InstructionSet::current();
    let elements = bytes.len() / planes.width();
    let blocks = || bytes.par_chunks(BLOCK * planes.width());
    let counts: Vec<[[u16; 256]; STREAMS]> = blocks()
        .map_init(
            || vec![0; BLOCK],
            |symbols, numbers| {
                let symbols = &mut symbols[..numbers.len() / planes.width()];
                planes.symbols(set, numbers, symbols);
                let mut counts = [[0; 256]; STREAMS];
                for (range, counts) in segments(symbols.len()).zip(&mut counts) {
                    count(set, &symbols[range], counts);
                }
                counts
            },
        )
        .collect();
    let mut totals = [0; 256];
    for counts in counts.as_flattened() {
        totals.iter_mut().zip(counts).for_each(|(total, &count)| *total += u64::from(count));
    }
    let lengths = lengths(&totals, WINDOW);
    let stream = |counts: &[u16; 256]| -> usize {
        let bits =
            counts.iter().zip(&lengths).map(|(&count, &length)| usize::from(count) * usize::from(length));
        bits.sum::<usize>().div_ceil(8)
    };
    let has_lower: Vec<bool> = match planes {
        Planes::F32 => {
            blocks().map(|numbers| numbers.as_chunks::<4>().0.iter().any(|n| n[..2] != [0, 0])).collect()
        }
        _ => vec![true; counts.len()],
    };
    let sizes: Vec<usize> = counts
        .iter()
        .zip(&has_lower)
        .enumerate()
        .map(|(i, (counts, &has_lower))| {
            let elements = BLOCK.min(elements - i * BLOCK);
            SIZES
                + counts.iter().map(stream).sum::<usize>()
                + elements * if has_lower { planes.width() - 1 } else { 1 }
        })
        .collect();

    let table = HEADER + ENTRY * sizes.len();
    let total = table + sizes.iter().sum::<usize>();
    if total >= bytes.len() {
        return None;
    }
    let mut out = vec![0; total];
    let (header, mut rest) = out.split_at_mut(table);
    header[..8].copy_from_slice(&MAGIC);
    header[8] = planes as u8;
    header[16..24].copy_from_slice(&(elements as u64).to_le_bytes());
    for (byte, [even, odd]) in header[24..HEADER].iter_mut().zip(lengths.as_chunks::<2>().0) {
        *byte = even | odd << 4;
    }
    let mut end = table;
    let mut parts = Vec::with_capacity(sizes.len());
    for (&size, entry) in sizes.iter().zip(header[HEADER..].as_chunks_mut::<ENTRY>().0) {
        end += size;
        entry[..8].copy_from_slice(&(end as u64).to_le_bytes());
        let (part, later) = rest.split_at_mut(size);
        rest = later;
        parts.push((part, entry));
    }
    let codes = codes(&lengths);
    let codes = std::array::from_fn(|s| (codes[s] as u16, u16::from(lengths[s])));
    blocks().zip(parts).for_each_init(
        || (vec![0; BLOCK], vec![0; 3 * BLOCK], vec![0; room(BLOCK / STREAMS)]),
        |(symbols, rest, buffer), (numbers, (part, entry))| {
            let n = numbers.len() / planes.width();
            let (symbols, rest) = (&mut symbols[..n], &mut rest[..numbers.len() - n]);
            planes.split(set, numbers, symbols, rest);
            let mut position = SIZES;
            for (i, range) in segments(n).enumerate() {
                let mut size = 0;
                encode(set, &codes, &symbols[range], buffer, &mut size);
                part[2 * i..2 * i + 2].copy_from_slice(&(size as u16).to_le_bytes());
                part[position..position + size].copy_from_slice(&buffer[..size]);
                position += size;
            }
            let part = &mut part[position..];
            part.copy_from_slice(&rest[..part.len()]);
            entry[8..].copy_from_slice(&XxHash3_64::oneshot(numbers).to_le_bytes());
        },
    );
    Some(out)
}

/// The elements of each stream of a block.
fn segments(elements: usize) -> impl Iterator<Item = Range<usize>> {
    let size = elements.div_ceil(STREAMS);
    (0..STREAMS).map(move |i| (i * size).min(elements)..((i + 1) * size).min(elements))
}

/// Decompresses what [`compress`] gave, on the threads of rayon's current pool, into the bytes of the elements.
pub fn decompress(dtype: Dtype, stored: &[u8], out: &mut [u8]) -> io::Result<()> {
    let container = Container::open(dtype, stored, out.len() as u64)?;
    let task = 4 * BLOCK * container.planes.width();
    out.par_chunks_mut(task)
        .enumerate()
        .try_for_each(|(i, part)| container.read_exact_at(part, (i * task) as u64))
}

/// Bytes at positions: memory, or a part of a file.
pub(crate) trait Source {
    /// Number of bytes.
    fn size(&self) -> u64;
    /// Some of the bytes, which lie within the size; read into `buffer` where they are not in memory.
    fn bytes<'a>(&'a self, range: Range<u64>, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]>;
}

impl Source for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn bytes<'a>(&'a self, range: Range<u64>, _: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        Ok(&self[range.start as usize..range.end as usize])
    }
}

/// `size` bytes of a file from `start` on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section<'a> {
    pub file: &'a File,
    pub start: u64,
    pub size: u64,
}

impl Source for Section<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn bytes<'a>(&'a self, range: Range<u64>, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        buffer.resize((range.end - range.start) as usize, 0);
        self.file.read_exact_at(buffer, self.start + range.start)?;
        Ok(buffer)
    }
}

/// A compressed tensor of which parts can be read.
pub(crate) struct Container<S> {
    source: S,
    planes: Planes,
    elements: u64,
    code: Canonical,
    table: Table,
}

impl<S: Source> Container<S> {
    /// Checks the header, which must be that of a tensor of `bytes` bytes.
    pub(crate) fn open(dtype: Dtype, source: S, bytes: u64) -> io::Result<Self> {
        if source.size() < HEADER as u64 {
            return Err(fault(format!("expected a header of {HEADER} bytes, found {}", source.size())));
        }
        let mut buffer = Vec::new();
        let header = source.bytes(0..HEADER as u64, &mut buffer)?;
        if header[..8] != MAGIC {
            return Err(fault(format!(
                "expected {:?} first, found {:?}",
                MAGIC.escape_ascii().to_string(),
                header[..8].escape_ascii().to_string()
            )));
        }
        let planes = Planes::ALL.get(header[8] as usize).copied();
        let planes = match planes {
            Some(planes) if Planes::of(dtype) == Some(planes) => planes,
            _ => return Err(fault(format!("expected the planes of {dtype}, found planes {}", header[8]))),
        };
        if header[9..16] != [0; 7] {
            return Err(fault("expected zeros after the planes, found something else".into()));
        }
        let elements = header[16..24].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        if elements == 0 || elements.checked_mul(planes.width() as u64) != Some(bytes) {
            return Err(fault(format!(
                "expected the elements of {bytes} bytes of {dtype}, found {elements}"
            )));
        }
        let code = Canonical::new(std::array::from_fn(|s| header[24 + s / 2] >> (4 * (s % 2)) & 15))?;
        let table = Table::new(|prefix, known| code.within(prefix, known));
        let blocks = elements.div_ceil(BLOCK as u64);
        let first = (HEADER as u64).saturating_add(blocks.saturating_mul(ENTRY as u64));
        if first > source.size() {
            return Err(fault(format!("expected a table of {blocks} blocks, found {} bytes", source.size())));
        }
        let container = Self { source, planes, elements, code, table };
        let end = container.entries(blocks - 1..blocks)?[0].0.end;
        match container.source.size() {
            size if size == end => Ok(container),
            size => Err(fault(format!("expected {end} bytes by its table, found {size}"))),
        }
    }

    /// Place and checksum of some blocks.
    fn entries(&self, blocks: Range<u64>) -> io::Result<Vec<(Range<u64>, u64)>> {
        let count = self.elements.div_ceil(BLOCK as u64);
        let first = HEADER as u64 + count * ENTRY as u64;
        let start = blocks.start.saturating_sub(1); // a block starts where the one before ends
        let at = |block: u64| HEADER as u64 + block * ENTRY as u64;
        let mut buffer = Vec::new();
        let bytes = self.source.bytes(at(start)..at(blocks.end), &mut buffer)?;
        let mut entries =
            bytes.as_chunks::<8>().0.as_chunks::<2>().0.iter().map(|pair| pair.map(u64::from_le_bytes));
        let mut position = match blocks.start {
            0 => first,
            _ => entries.next().map_or(0, |[end, _]| end),
        };
        entries
            .zip(blocks)
            .map(|([end, checksum], block)| {
                let range = position..end;
                if range.start < first || range.end > self.source.size() || range.start > range.end {
                    return Err(fault(format!(
                        "block {block}: expected within bytes {first}..{}, found {range:?}",
                        self.source.size()
                    )));
                }
                position = end;
                Ok((range, checksum))
            })
            .collect()
    }

    /// Reads elements, as bytes, from the byte `offset` of the tensor on.
    pub(crate) fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let width = self.planes.width() as u64;
        let size = BLOCK as u64 * width;
        let end = offset + out.len() as u64;
        if end > self.elements * width {
            return Err(fault(format!(
                "expected to read within {} bytes, found {offset}..{end}",
                self.elements * width
            )));
        }
        if out.is_empty() {
            return Ok(());
        }
        let set = InstructionSet::current();
        let blocks = offset / size..end.div_ceil(size);
        let entries = self.entries(blocks.clone())?;
        let (mut buffer, mut symbols) =
            (Vec::new(), vec![0; BLOCK.min(self.elements as usize) + STREAMS * SLACK]);
        let mut out = out;
        for (block, (range, checksum)) in blocks.zip(entries) {
            let start = block * size;
            let length = size.min(self.elements * width - start) as usize;
            let stored = self.source.bytes(range, &mut buffer)?;
            let skip = offset.saturating_sub(start) as usize;
            let take = (length - skip).min(out.len());
            let (part, rest) = std::mem::take(&mut out).split_at_mut(take);
            out = rest;
            let fault = |message: String| fault(format!("block {block}: {message}"));
            if take == length {
                self.decode_block(set, stored, part, checksum, &mut symbols).map_err(fault)?;
            } else {
                let mut whole = vec![0; length];
                self.decode_block(set, stored, &mut whole, checksum, &mut symbols).map_err(fault)?;
                part.copy_from_slice(&whole[skip..skip + take]);
            }
        }
        Ok(())
    }

    fn decode_block(
        &self,
        set: InstructionSet,
        stored: &[u8],
        out: &mut [u8],
        checksum: u64,
        symbols: &mut [u8],
    ) -> Result<(), String> {
        let elements = out.len() / self.planes.width();
        let Some((sizes, _)) = stored.split_at_checked(SIZES) else {
            return Err(format!("expected {SIZES} bytes of sizes, found {}", stored.len()));
        };
        let mut cursors = [Cursor::default(); STREAMS];
        let mut position = SIZES;
        for (i, range) in segments(elements).enumerate() {
            // The symbols of each stream are apart by what may be written after them.
            let gap = i * SLACK;
            cursors[i] = Cursor { bit: 8 * position, out: range.start + gap, end: range.end + gap };
            position += usize::from(u16::from_le_bytes([sizes[2 * i], sizes[2 * i + 1]]));
        }
        let rest = stored.get(position..).unwrap_or_default();
        let is_short = self.planes == Planes::F32 && rest.len() == elements;
        if position > stored.len() || !(rest.len() == out.len() - elements || is_short) {
            return Err(format!(
                "expected {position} bytes of streams and {} others, found {} in all",
                out.len() - elements,
                stored.len()
            ));
        }
        if !decode(set, &self.code, &self.table, stored, symbols, &mut cursors) {
            return Err("expected streams of codes, found something else".into());
        }
        for (i, range) in segments(elements).enumerate() {
            let symbols = &symbols[range.start + i * SLACK..range.end + i * SLACK];
            self.planes.join(set, symbols, rest, range, out);
        }
        match XxHash3_64::oneshot(out) {
            found if found == checksum => Ok(()),
            found => Err(format!("expected the checksum {checksum:016x}, found {found:016x}")),
        }
    }
}

pub(crate) fn fault(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// A canonical code without codes longer than [`WINDOW`]: symbol and length by window.
struct Canonical(Box<[(u8, u8); 1 << WINDOW]>);

impl Canonical {
    fn new(lengths: [u8; 256]) -> io::Result<Self> {
        let mut windows = Box::new([(0, 0); 1 << WINDOW]);
        let used: Vec<usize> = (0..256).filter(|&s| lengths[s] > 0).collect();
        if let [lone] = used[..]
            && lengths[lone] == 1
        {
            windows.fill((lone as u8, 1));
            return Ok(Self(windows));
        }
        // The codes of a complete code cover every window once.
        let share = |&s: &usize| 1usize << WINDOW >> lengths[s];
        let is_short = used.iter().all(|&s| u32::from(lengths[s]) <= WINDOW);
        if !is_short || used.iter().map(share).sum::<usize>() != windows.len() {
            return Err(fault("expected the lengths of a complete code, found others".into()));
        }
        let codes = codes(&lengths);
        for symbol in used {
            let first = (codes[symbol] as usize) << (WINDOW - u32::from(lengths[symbol]));
            windows[first..first + share(&symbol)].fill((symbol as u8, lengths[symbol]));
        }
        Ok(Self(windows))
    }

    fn within(&self, prefix: u32, known: u32) -> Option<(u8, u32)> {
        let (symbol, length) = self.0[(prefix << (WINDOW - known)) as usize];
        let length = u32::from(length);
        (length <= known).then_some((symbol, length))
    }
}

impl Code for Canonical {
    #[inline(always)]
    fn first(&self, window: u32) -> Option<(u8, u32)> {
        let (symbol, length) = self.0[(window >> (32 - WINDOW)) as usize];
        Some((symbol, u32::from(length)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dtype(name: &str) -> Dtype {
        Dtype::from_name(name).unwrap()
    }

    fn round_trip(name: &str, bytes: &[u8]) -> Option<Vec<u8>> {
        let stored = compress(dtype(name), bytes)?;
        assert!(stored.len() < bytes.len());
        let mut out = vec![0xaa; bytes.len()];
        decompress(dtype(name), &stored, &mut out).unwrap();
        assert!(out == bytes, "{name}");
        Some(stored)
    }

    /// bfloat16 of about a normal distribution, by the sum of uniform numbers.
    fn normal(n: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n)
            .flat_map(|_| {
                let value = (0..12).map(|_| uniform()).sum::<f32>() * 0.02;
                ((value.to_bits() >> 16) as u16).to_le_bytes()
            })
            .collect()
    }

    #[test]
    fn every_bfloat16_comes_back() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        // All patterns are as many bits as they are bytes; beside enough zeros they are coded.
        assert!(compress(dtype("BF16"), &all).is_none());
        round_trip("BF16", &[all, vec![0; 1 << 18]].concat()).unwrap();
    }

    #[test]
    fn blocks_of_every_size() {
        for n in [1, 2, 3, 4, 5, 63, 300, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7] {
            let bytes = normal(n);
            let stored = round_trip("BF16", &bytes);
            assert_eq!(stored.is_some(), n >= 300, "{n}");
            assert_eq!(stored, compress(dtype("BF16"), &bytes));
        }
    }

    #[test]
    fn a_normal_distribution_takes_two_thirds() {
        let bytes = normal(1 << 20);
        let share = round_trip("BF16", &bytes).unwrap().len() as f64 / bytes.len() as f64;
        assert!((0.65..0.68).contains(&share), "{share}");
    }

    #[test]
    fn constants_take_one_bit_and_the_rest() {
        let stored = round_trip("BF16", &[0x80, 0xff].repeat(100_000)).unwrap();
        assert!((112_500..113_000).contains(&stored.len()), "{}", stored.len());
        let stored = round_trip("F8_E4M3", &[7; 80_000]).unwrap();
        assert!((10_000..10_300).contains(&stored.len()), "{}", stored.len());
    }

    #[test]
    fn float32_without_lower_mantissas_is_a_bfloat16() {
        let narrow = normal(2 * BLOCK);
        let mut wide: Vec<u8> = narrow.as_chunks::<2>().0.iter().flat_map(|&[a, b]| [0, 0, a, b]).collect();
        let short = round_trip("F32", &wide).unwrap();
        assert_eq!(short.len(), compress(dtype("BF16"), &narrow).unwrap().len());
        wide[4 * BLOCK] = 1; // in the second block
        assert_eq!(round_trip("F32", &wide).unwrap().len(), short.len() + 2 * BLOCK);
    }

    #[test]
    fn other_floats() {
        let narrow = normal(100_000);
        let floats = |scale: f32| {
            let value =
                |&[a, b]: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16) * scale;
            narrow.as_chunks::<2>().0.iter().map(value).collect::<Vec<f32>>()
        };
        let f32s: Vec<u8> = floats(1.1).iter().flat_map(|x| x.to_le_bytes()).collect();
        let share = round_trip("F32", &f32s).unwrap().len() as f64 / f32s.len() as f64;
        assert!(share < 0.84, "{share}");
        // The upper bits of a float32 with their exponent moved are those of a float16.
        let half = |x: &f32| {
            ((x.to_bits() >> 16 & 0x8000) | (x.to_bits() >> 13).wrapping_sub(112 << 10) & 0x7fff) as u16
        };
        let f16s: Vec<u8> = floats(1.1).iter().flat_map(|x| half(x).to_le_bytes()).collect();
        let share = round_trip("F16", &f16s).unwrap().len() as f64 / f16s.len() as f64;
        assert!(share < 0.87, "{share}");
        let f8s: Vec<u8> = f16s.as_chunks::<2>().0.iter().map(|x| x[1]).collect();
        for name in ["F8_E5M2", "F8_E4M3"] {
            let share = round_trip(name, &f8s).unwrap().len() as f64 / f8s.len() as f64;
            assert!(share < 0.75, "{share}");
        }
    }

    #[test]
    fn instruction_sets_agree_with_the_definition() {
        let mut state = 7u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let numbers: Vec<u8> = (0..4 * 1003).map(|_| random()).collect();
        for planes in Planes::ALL {
            let width = planes.width();
            let n = numbers.len() / width;
            for set in InstructionSet::ALL.into_iter().filter(|set| set.is_supported()) {
                let (mut symbols, mut rest) = (vec![0; n], vec![0; numbers.len() - n]);
                planes.split(set, &numbers, &mut symbols, &mut rest);
                let mut same = vec![1; n];
                planes.symbols(set, &numbers, &mut same);
                assert_eq!(symbols, same);
                for (i, number) in numbers.chunks_exact(width).enumerate() {
                    let bits = number.iter().rev().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte));
                    let upper = if width == 4 { bits >> 16 } else { bits };
                    let (symbol, own) = match planes {
                        Planes::Bf16 | Planes::F32 => {
                            (upper >> 7 & 255, Some(upper >> 8 & 128 | upper & 127))
                        }
                        Planes::F16 => (bits >> 8, Some(bits & 255)),
                        Planes::F8 => (bits, None),
                    };
                    assert_eq!(u32::from(symbols[i]), symbol);
                    assert_eq!(own.map_or(0, |_| u32::from(rest[i])), own.unwrap_or(0));
                    if planes == Planes::F32 {
                        assert_eq!(rest[n + 2 * i..n + 2 * i + 2], number[..2]);
                    }
                }
                let mut out = vec![0; numbers.len()];
                for range in [0..n / 3, n / 3..n] {
                    planes.join(set, &symbols[range.clone()], &rest, range, &mut out);
                }
                assert!(out == numbers, "{planes:?} {set:?}");
            }
        }
    }

    #[test]
    fn instruction_sets_decode_alike() {
        let bytes = normal(3 * BLOCK);
        let stored = compress(dtype("BF16"), &bytes).unwrap();
        let container = Container::open(dtype("BF16"), &stored[..], bytes.len() as u64).unwrap();
        for set in InstructionSet::ALL.into_iter().filter(|set| set.is_supported()) {
            let mut symbols = vec![0; BLOCK + STREAMS * SLACK];
            let mut out = vec![0; 2 * BLOCK];
            for (block, (range, checksum)) in container.entries(0..3).unwrap().into_iter().enumerate() {
                let block_bytes = &stored[range.start as usize..range.end as usize];
                container.decode_block(set, block_bytes, &mut out, checksum, &mut symbols).unwrap();
                assert!(out == bytes[2 * block * BLOCK..][..2 * BLOCK]);
            }
        }
    }

    #[test]
    fn parts_are_read_alone() {
        let bytes = normal(3 * BLOCK + 100);
        let stored = compress(dtype("BF16"), &bytes).unwrap();
        let container = Container::open(dtype("BF16"), &stored[..], bytes.len() as u64).unwrap();
        let end = bytes.len();
        for range in
            [0..1, 1..4, 2 * BLOCK - 1..2 * BLOCK + 1, 3..end - 3, 5 * BLOCK..5 * BLOCK, end - 1..end]
        {
            let mut part = vec![0; range.len()];
            container.read_exact_at(&mut part, range.start as u64).unwrap();
            assert!(part == bytes[range.clone()], "{range:?}");
        }
        let past = container.read_exact_at(&mut [0; 2], end as u64 - 1).unwrap_err();
        assert!(past.to_string().contains("expected to read within"), "{past}");
    }

    #[test]
    fn damage_is_found() {
        let bytes = normal(2 * BLOCK + 100);
        let stored = compress(dtype("BF16"), &bytes).unwrap();
        let mut out = vec![0; bytes.len()];
        for at in (0..HEADER + 3 * ENTRY).chain((0..stored.len()).step_by(977)) {
            let mut broken = stored.clone();
            broken[at] ^= 0x10;
            assert!(decompress(dtype("BF16"), &broken, &mut out).is_err(), "byte {at}");
        }
        for end in (0..400).chain([stored.len() - 1]) {
            assert!(decompress(dtype("BF16"), &stored[..end], &mut out).is_err(), "cut at {end}");
        }
        assert!(decompress(dtype("F16"), &stored, &mut out).is_err());
        assert!(decompress(dtype("BF16"), &stored, &mut out[2..]).is_err());
    }

    #[test]
    fn incomplete_codes_are_refused() {
        let mut lengths = [0; 256];
        assert!(Canonical::new(lengths).is_err());
        (lengths[1], lengths[2]) = (1, 2);
        assert!(Canonical::new(lengths).is_err()); // a hole
        (lengths[3], lengths[4]) = (2, 2);
        assert!(Canonical::new(lengths).is_err()); // too many
        lengths[4] = 15;
        assert!(Canonical::new(lengths).is_err()); // too long
    }

    proptest! {
        #[test]
        fn anything_comes_back(
            name in prop::sample::select(vec!["BF16", "F32", "F16", "F8_E4M3", "F8_E5M2"]),
            values in prop::collection::vec(any::<u32>(), 1..40),
            picks in prop::collection::vec(0usize..1 << 16, 100..5000),
        ) {
            // Few values, the first ones often.
            let pick = |&pick: &usize| values[pick.leading_zeros() as usize % values.len()].to_le_bytes();
            let bytes: Vec<u8> = picks.iter().flat_map(pick).collect();
            round_trip(name, &bytes);
        }
    }
}

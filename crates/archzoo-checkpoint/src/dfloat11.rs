//! The public DFloat11 container of bfloat16 weights (arXiv 2504.11651, version 0.5.0).
//!
//! The weights of a group, one after the other, share one prefix code over their exponents and one stream, most
//! significant bit first. A GPU thread decodes 8 bytes of it, a block 512 threads.

use std::io;

use archzoo_simd::InstructionSet;
use rayon::prelude::*;

use crate::bitstream::{Code, Cursor, SLACK, STREAMS, Table, WINDOW, count, encode, room};
use crate::huffman::{codes, lengths};
use crate::planes::Planes;
use crate::{bitstream, container::fault};

/// Threads of a block, which is also how many gaps a block has.
const THREADS: usize = 512;
const THREAD_BITS: usize = 64;
const BLOCK_BYTES: usize = THREADS * THREAD_BITS / 8;
/// Five bits a thread.
const GAP_BYTES: usize = THREADS * 5 / 8;
/// From here on an entry of a table points to another one, counted back from 256.
const POINTERS: usize = 240;
/// Elements that are encoded together. Fewer than 2^16, as `count` asks for.
const CHUNK: usize = 1 << 15;
/// Elements whose chunks are in memory beside the buffers.
const TOGETHER: usize = CHUNK << 6;

/// The buffers of a group of weights, named as in the files.
#[derive(Debug, Clone, Copy)]
pub struct Buffers<'a> {
    /// Tables of 256 symbols or pointers, one for each whole byte that codes can begin with, then the lengths.
    pub luts: &'a [u8],
    /// The stream.
    pub encoded_exponent: &'a [u8],
    /// Sign and mantissa of every element.
    pub sign_mantissa: &'a [u8],
    /// For each block the first element whose code begins in it, then the number of elements; u32.
    pub output_positions: &'a [u8],
    /// For each thread where in its bits the first code begins, 5 bits each.
    pub gaps: &'a [u8],
}

/// The buffers of a group of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // as in `Buffers`
pub struct Encoded {
    pub luts: Vec<u8>,
    pub encoded_exponent: Vec<u8>,
    pub sign_mantissa: Vec<u8>,
    pub output_positions: Vec<u8>,
    pub gaps: Vec<u8>,
}

impl Encoded {
    /// Borrows them.
    pub fn buffers(&self) -> Buffers<'_> {
        Buffers {
            luts: &self.luts,
            encoded_exponent: &self.encoded_exponent,
            sign_mantissa: &self.sign_mantissa,
            output_positions: &self.output_positions,
            gaps: &self.gaps,
        }
    }
}

/// How often each exponent occurs in bfloat16 numbers, counted on the threads of rayon's current pool.
pub fn count_exponents(numbers: &[u8]) -> [u64; 256] {
    let set = InstructionSet::current();
    numbers
        .par_chunks(2 * CHUNK)
        .map(|numbers| {
            let (mut symbols, mut counts) = (vec![0; numbers.len() / 2], [0; 256]);
            Planes::Bf16.symbols(set, numbers, &mut symbols);
            count(set, &symbols, &mut counts);
            counts.map(u64::from)
        })
        .reduce(|| [0; 256], |a, b| std::array::from_fn(|s| a[s] + b[s]))
}

/// Encodes a group whose weights come one after the other, on the threads of rayon's current pool.
pub struct Encoder {
    lengths: [u8; 256],
    codes: [(u16, u16); 256],
    sizes: [usize; 5],
    /// How often each exponent is still to come.
    counts: [u64; 256],
    /// First bit of the next code, and of the one before it.
    bits: usize,
    before: Option<usize>,
    luts: Vec<u8>,
    encoded_exponent: Vec<u8>,
    sign_mantissa: Vec<u8>,
    output_positions: Vec<u32>,
    gaps: Vec<u8>,
}

impl Encoder {
    /// For weights that together have the exponents of [`count_exponents`]. `None` where the container cannot hold
    /// them (an exponent of 240 or more: infinities, NaNs, 2^113 and above; 2^32 elements) or is no smaller.
    pub fn new(counts: [u64; 256]) -> Option<Self> {
        let n = u32::try_from(counts.iter().sum::<u64>()).ok().filter(|&n| n > 0)? as usize;
        if counts[POINTERS..].iter().any(|&count| count > 0) {
            return None;
        }
        // Codes within one lookup, unless they need more tables than there are pointers.
        let (lengths, luts) = [WINDOW, 8].into_iter().find_map(|limit| {
            let lengths = lengths(&counts, limit);
            luts(&lengths).map(|luts| (lengths, luts))
        })?;
        let bits: usize = counts.iter().zip(lengths).map(|(&c, l)| c as usize * usize::from(l)).sum();
        let blocks = bits.div_ceil(8).div_ceil(BLOCK_BYTES);
        let sizes = [luts.len(), bits.div_ceil(8), n, 4 * (blocks + 1), GAP_BYTES * blocks];
        if sizes.iter().sum::<usize>() >= 2 * n {
            return None;
        }
        let codes = codes(&lengths);
        Some(Self {
            lengths,
            codes: std::array::from_fn(|s| (codes[s] as u16, u16::from(lengths[s]))),
            sizes,
            counts,
            bits: 0,
            before: None,
            luts,
            encoded_exponent: Vec::with_capacity(sizes[1] + 1), // a carry that `finish` drops
            sign_mantissa: Vec::with_capacity(n),
            output_positions: Vec::with_capacity(blocks + 1),
            gaps: Vec::with_capacity(THREADS * blocks),
        })
    }

    /// Bytes of the buffers, in the order of [`Encoded`].
    pub fn sizes(&self) -> [usize; 5] {
        self.sizes
    }

    /// Takes the next weight: whole bfloat16 numbers.
    pub fn push(&mut self, weight: &[u8]) {
        weight.chunks(2 * TOGETHER).for_each(|numbers| self.push_part(numbers));
    }

    fn push_part(&mut self, numbers: &[u8]) {
        let set = InstructionSet::current();
        let element = self.sign_mantissa.len();
        let mut exponents = vec![0; numbers.len() / 2];
        self.sign_mantissa.resize(element + exponents.len(), 0);
        let counts: Vec<[u16; 256]> = numbers
            .par_chunks(2 * CHUNK)
            .zip(exponents.par_chunks_mut(CHUNK).zip(self.sign_mantissa[element..].par_chunks_mut(CHUNK)))
            .map(|(numbers, (symbols, rest))| {
                let mut counts = [0; 256];
                Planes::Bf16.split(set, numbers, symbols, rest);
                count(set, symbols, &mut counts);
                counts
            })
            .collect();
        let (lengths, codes) = (&self.lengths, &self.codes);
        let length = |symbol: u8| usize::from(lengths[usize::from(symbol)]);
        let mut starts = Vec::with_capacity(counts.len());
        for (counts, symbols) in counts.iter().zip(exponents.chunks(CHUNK)) {
            starts.push((self.bits, self.before));
            for (symbol, &count) in (0..=255).zip(counts) {
                self.bits += usize::from(count) * length(symbol);
                let left = &mut self.counts[usize::from(symbol)];
                *left = left.wrapping_sub(count.into());
            }
            self.before = symbols.last().map(|&symbol| self.bits - length(symbol));
        }
        let chunks: Vec<(Vec<u8>, Vec<u8>, Vec<u32>)> = exponents
            .par_chunks(CHUNK)
            .zip(&starts)
            .enumerate()
            .map(|(i, (symbols, &(start, before)))| {
                let mut stream = vec![0; room(symbols.len())];
                let mut size = 0;
                encode(set, codes, symbols, &mut stream, &mut size);
                stream.truncate(size);
                let (gaps, positions) = begins(symbols, lengths, start, before, element + i * CHUNK);
                (stream, gaps, positions)
            })
            .collect();
        for ((stream, gaps, positions), (start, _)) in chunks.iter().zip(starts) {
            append(&mut self.encoded_exponent, start, stream);
            self.gaps.extend(gaps);
            self.output_positions.extend(positions);
        }
    }

    /// The buffers; an error if the weights were not those that were counted.
    pub fn finish(mut self) -> io::Result<Encoded> {
        if self.counts != [0; 256] {
            return Err(fault("expected the exponents that were counted before, found others".into()));
        }
        let [_, stream, n, positions, gaps] = self.sizes;
        self.encoded_exponent.truncate(stream);
        self.gaps.resize(gaps / GAP_BYTES * THREADS, 0);
        // In the last block no code may begin.
        self.output_positions.resize(positions / 4, n as u32);
        Ok(Encoded {
            luts: self.luts,
            encoded_exponent: self.encoded_exponent,
            sign_mantissa: self.sign_mantissa,
            output_positions: self
                .output_positions
                .iter()
                .flat_map(|position| position.to_le_bytes())
                .collect(),
            gaps: pack(&self.gaps),
        })
    }
}

/// Encodes the weights of a group; `None` as [`Encoder::new`] has it.
pub fn encode_dfloat11(weights: &[&[u8]]) -> Option<Encoded> {
    if weights.iter().any(|weight| !weight.len().is_multiple_of(2)) {
        return None;
    }
    let mut counts = [0; 256];
    for weight in weights {
        counts.iter_mut().zip(count_exponents(weight)).for_each(|(all, own)| *all += own);
    }
    let mut encoder = Encoder::new(counts)?;
    weights.iter().for_each(|weight| encoder.push(weight));
    encoder.finish().ok()
}

/// Gaps of the threads, and elements of the blocks, whose first code is among `symbols`. `start` is the first
/// bit of their codes, `before` that of the code before, `element` the first element.
fn begins(
    symbols: &[u8],
    lengths: &[u8; 256],
    start: usize,
    before: Option<usize>,
    element: usize,
) -> (Vec<u8>, Vec<u32>) {
    let (mut gaps, mut positions) = (Vec::new(), Vec::new());
    let mut next = before.map_or(0, |bit| bit / THREAD_BITS + 1);
    let mut bit = start;
    for (i, &symbol) in symbols.iter().enumerate() {
        if bit / THREAD_BITS == next {
            gaps.push((bit % THREAD_BITS) as u8);
            if next.is_multiple_of(THREADS) {
                positions.push((element + i) as u32);
            }
            next += 1;
        }
        bit += usize::from(lengths[symbol as usize]);
    }
    (gaps, positions)
}

/// Appends a stream whose first bit is bit `start`.
fn append(out: &mut Vec<u8>, start: usize, stream: &[u8]) {
    out.truncate(start.div_ceil(8));
    let shift = start % 8;
    if shift == 0 {
        return out.extend(stream);
    }
    let mut carry = out.pop().unwrap_or(0);
    for &byte in stream {
        out.push(carry | byte >> shift);
        carry = byte << (8 - shift);
    }
    out.push(carry);
}

/// Five bits each, most significant bit first.
fn pack(gaps: &[u8]) -> Vec<u8> {
    gaps.chunks_exact(8)
        .flat_map(|eight| {
            let bits = eight.iter().fold(0u64, |bits, &gap| bits << 5 | u64::from(gap));
            bits.to_be_bytes().into_iter().skip(3)
        })
        .collect()
}

/// The tables of a canonical code and its lengths; `None` if there are more than pointers.
fn luts(lengths: &[u8; 256]) -> Option<Vec<u8>> {
    let codes = codes(lengths);
    let symbols = || (0..POINTERS).filter(|&s| lengths[s] > 0);
    // Whole bytes (as many as the depth says) that longer codes begin with.
    let mut prefixes: Vec<(u32, u32)> = vec![(0, 0)];
    for symbol in symbols() {
        for depth in 1..=(u32::from(lengths[symbol]) - 1) / 8 {
            prefixes.push((depth, codes[symbol] >> (u32::from(lengths[symbol]) - 8 * depth)));
        }
    }
    prefixes.sort_unstable();
    prefixes.dedup();
    if prefixes.len() > 256 - POINTERS + 1 {
        return None;
    }
    let mut luts = Vec::with_capacity(256 * (prefixes.len() + 1));
    for &(depth, prefix) in &prefixes {
        let mut slots = [None; 256];
        for symbol in symbols() {
            let length = u32::from(lengths[symbol]);
            let bits = length.saturating_sub(8 * depth);
            if bits == 0 || (codes[symbol] >> bits) != prefix {
                continue;
            }
            let rest = codes[symbol] & ((1 << bits) - 1);
            if bits <= 8 {
                let first = (rest << (8 - bits)) as usize;
                slots[first..first + (1 << (8 - bits))].fill(Some(symbol as u8));
            } else {
                let longer = (depth + 1, codes[symbol] >> (bits - 8));
                let table = prefixes.binary_search(&longer).ok()?;
                slots[(rest >> (bits - 8)) as usize] = Some((256 - table) as u8);
            }
        }
        // A lone symbol leaves slots free, and each must hold one.
        let mut last = slots.iter().flatten().next().copied()?;
        luts.extend(slots.map(|slot| {
            last = slot.unwrap_or(last);
            last
        }));
    }
    luts.extend(lengths);
    Some(luts)
}

/// Decodes a group into its weights, on the threads of rayon's current pool. Together they have as many elements
/// as the group.
pub fn decode_dfloat11(buffers: Buffers, weights: &mut [&mut [u8]]) -> io::Result<()> {
    let group = Group::open(buffers)?;
    let n = buffers.sign_mantissa.len();
    let wanted: usize = weights.iter().map(|weight| weight.len()).sum();
    if wanted != 2 * n || weights.iter().any(|weight| !weight.len().is_multiple_of(2)) {
        return Err(fault(format!("expected weights of {} bytes, found {wanted}", 2 * n)));
    }
    // For every task, the parts of the weights that its blocks fill.
    let mut rest = weights.iter_mut().map(|weight| &mut **weight).collect::<Vec<_>>().into_iter();
    let mut weight: &mut [u8] = &mut [];
    let mut tasks = Vec::with_capacity(group.positions.len() / STREAMS + 1);
    for first in (0..group.positions.len() - 1).step_by(STREAMS) {
        let end = (first + STREAMS).min(group.positions.len() - 1);
        let mut bytes = 2 * (group.positions[end] - group.positions[first]) as usize;
        let mut parts = Vec::new();
        while bytes > 0 {
            if weight.is_empty() {
                let Some(next) = rest.next() else { break };
                weight = next;
            }
            let size = bytes.min(weight.len());
            let (part, later) = std::mem::take(&mut weight).split_at_mut(size);
            weight = later;
            bytes -= part.len();
            parts.push(part);
        }
        tasks.push((first, end, parts));
    }
    let set = InstructionSet::current();
    tasks.into_par_iter().try_for_each_init(Vec::new, |symbols, (first, end, parts)| {
        group.decode_blocks(set, first, end, parts, symbols)
    })
}

/// A checked group.
struct Group<'a> {
    buffers: Buffers<'a>,
    positions: Vec<u32>,
    luts: Luts<'a>,
    table: Table,
}

impl<'a> Group<'a> {
    fn open(buffers: Buffers<'a>) -> io::Result<Self> {
        let luts = Luts::new(buffers.luts)?;
        let blocks = buffers.encoded_exponent.len().div_ceil(BLOCK_BYTES);
        let sizes = [
            ("output_positions", buffers.output_positions.len(), 4 * (blocks + 1)),
            ("gaps", buffers.gaps.len(), GAP_BYTES * blocks),
        ];
        for (name, found, expected) in sizes {
            if found != expected {
                let message = format!("{name}: expected {expected} bytes for {blocks} blocks, found {found}");
                return Err(fault(message));
            }
        }
        let positions: Vec<u32> = buffers
            .output_positions
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| u32::from_le_bytes(*bytes))
            .collect();
        let n = buffers.sign_mantissa.len();
        let is_right = positions.first() == Some(&0)
            && positions.last().is_some_and(|&last| last as usize == n)
            && positions.windows(2).all(|p| p[0] <= p[1] && (p[1] - p[0]) as usize <= 8 * BLOCK_BYTES);
        if !is_right {
            return Err(fault(format!(
                "output_positions: expected to rise from 0 to {n} by at most {} a block",
                8 * BLOCK_BYTES
            )));
        }
        let table = luts.table();
        Ok(Self { buffers, positions, luts, table })
    }

    /// Where in its 64 bits the first code of a block begins.
    fn gap(&self, block: usize) -> usize {
        usize::from(self.buffers.gaps[block * GAP_BYTES] >> 3)
    }

    fn decode_blocks(
        &self,
        set: InstructionSet,
        first: usize,
        end: usize,
        parts: Vec<&mut [u8]>,
        symbols: &mut Vec<u8>,
    ) -> io::Result<()> {
        let start = self.positions[first] as usize;
        let mut cursors = [Cursor::default(); STREAMS];
        for (i, (cursor, block)) in cursors.iter_mut().zip(first..end).enumerate() {
            let place = |block: usize| self.positions[block] as usize - start + i * SLACK;
            let bit = 8 * BLOCK_BYTES * block + self.gap(block);
            *cursor = Cursor { bit, out: place(block), end: place(block + 1) };
        }
        let n = self.positions[end] as usize - start;
        symbols.resize(symbols.len().max(n + STREAMS * SLACK), 0);
        let stream = self.buffers.encoded_exponent;
        if !bitstream::decode(set, &self.luts, &self.table, stream, symbols, &mut cursors) {
            return Err(fault(format!("blocks {first}..{end}: expected codes of the tables, found others")));
        }
        for (i, block) in (first..end).enumerate().skip(1) {
            let own = self.positions[block] as usize - start..self.positions[block + 1] as usize - start;
            symbols.copy_within(own.start + i * SLACK..own.end + i * SLACK, own.start);
        }
        let mut position = 0;
        for part in parts {
            let range = position..position + part.len() / 2;
            position = range.end;
            let rest = &self.buffers.sign_mantissa[start + range.start..start + range.end];
            Planes::Bf16.join(set, &symbols[range.clone()], rest, 0..range.len(), part);
        }
        Ok(())
    }
}

/// Checked tables: every pointer leads to a table, every symbol has a length of 1 to 32.
struct Luts<'a> {
    tables: &'a [[u8; 256]],
    lengths: &'a [u8; 256],
}

impl<'a> Luts<'a> {
    fn new(luts: &'a [u8]) -> io::Result<Self> {
        let (rows, rest) = luts.as_chunks::<256>();
        let most = 256 - POINTERS + 1;
        let (lengths, tables) = match rows.split_last() {
            Some((lengths, tables)) if rest.is_empty() && (1..=most).contains(&tables.len()) => {
                (lengths, tables)
            }
            _ => {
                let message =
                    format!("luts: expected 2 to {} rows of 256 bytes, found {} bytes", most + 1, luts.len());
                return Err(fault(message));
            }
        };
        for (i, table) in tables.iter().enumerate() {
            for (slot, &entry) in table.iter().enumerate() {
                if usize::from(entry) >= POINTERS && 256 - usize::from(entry) >= tables.len() {
                    return Err(fault(format!(
                        "luts: table {i}, slot {slot}: expected one of {} tables, found {}",
                        tables.len(),
                        256 - usize::from(entry)
                    )));
                }
                if usize::from(entry) < POINTERS && !(1..=32).contains(&lengths[entry as usize]) {
                    return Err(fault(format!(
                        "luts: table {i}, slot {slot}: expected a symbol with 1 to 32 bits, found {entry} with {}",
                        lengths[entry as usize]
                    )));
                }
            }
        }
        Ok(Self { tables, lengths })
    }

    fn pointed(&self, entry: u8) -> Option<&[u8; 256]> {
        (usize::from(entry) >= POINTERS).then(|| &self.tables[256 - usize::from(entry)])
    }

    fn table(&self) -> Table {
        // Per table: the entry that all bytes with a prefix of some bits have; prefixes of k bits start at 2^k.
        let common: Vec<[Option<u8>; 512]> = self
            .tables
            .iter()
            .map(|table| {
                let mut common = [None; 512];
                for (slot, &entry) in common[256..].iter_mut().zip(table) {
                    *slot = Some(entry);
                }
                for i in (1..256).rev() {
                    common[i] = if common[2 * i] == common[2 * i + 1] { common[2 * i] } else { None };
                }
                common
            })
            .collect();
        Table::new(|prefix, known| {
            let mut table = 0;
            let mut rest = known;
            loop {
                let bits = rest.min(8);
                rest -= bits;
                let byte = prefix >> rest & ((1 << bits) - 1);
                let entry = common[table][(1 << bits | byte) as usize]?;
                if usize::from(entry) < POINTERS {
                    let length = u32::from(self.lengths[entry as usize]);
                    return (length <= known).then_some((entry, length));
                }
                if bits < 8 {
                    return None;
                }
                table = 256 - usize::from(entry);
            }
        })
    }
}

impl Code for Luts<'_> {
    fn first(&self, window: u32) -> Option<(u8, u32)> {
        let mut table = &self.tables[0];
        for byte in window.to_be_bytes() {
            let entry = table[byte as usize];
            match self.pointed(entry) {
                Some(next) => table = next,
                None => return Some((entry, u32::from(self.lengths[entry as usize]))),
            }
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn bf16(exponents: impl IntoIterator<Item = u8>) -> Vec<u8> {
        let number =
            |(i, e): (usize, u8)| (u16::from(e) << 7 | i as u16 & 0x7f | (i as u16 & 1) << 15).to_le_bytes();
        exponents.into_iter().enumerate().flat_map(number).collect()
    }

    /// `n` exponents, each half as likely as the one before.
    fn halving(n: usize) -> Vec<u8> {
        let mut state = 9u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 20
        };
        bf16((0..n).map(|_| 100 + random().trailing_zeros().min(30) as u8))
    }

    fn decode(encoded: &Encoded, sizes: &[usize]) -> io::Result<Vec<u8>> {
        let mut out = vec![0; 2 * sizes.iter().sum::<usize>()];
        let mut rest = &mut out[..];
        let mut weights = Vec::new();
        for size in sizes {
            let (weight, later) = rest.split_at_mut(2 * size);
            rest = later;
            weights.push(weight);
        }
        decode_dfloat11(encoded.buffers(), &mut weights)?;
        Ok(out)
    }

    fn round_trip(bytes: &[u8]) -> Encoded {
        let encoded = encode_dfloat11(&[bytes]).unwrap();
        assert!(decode(&encoded, &[bytes.len() / 2]).unwrap() == bytes);
        check_positions(&encoded);
        encoded
    }

    /// Decodes code by code from bit 0; gaps and positions must say where codes begin.
    fn check_positions(encoded: &Encoded) {
        let group = Group::open(encoded.buffers()).unwrap();
        let stream = |bit: usize| {
            (0..32).fold(0u32, |window, i| {
                let byte = encoded.encoded_exponent.get((bit + i) / 8).copied().unwrap_or(0);
                window << 1 | u32::from(byte >> (7 - (bit + i) % 8) & 1)
            })
        };
        let blocks = group.positions.len() - 1;
        let (mut gaps, mut positions) = (vec![None; blocks * THREADS], vec![None; blocks]);
        let mut bit = 0;
        for element in 0..encoded.sign_mantissa.len() {
            gaps[bit / THREAD_BITS].get_or_insert(bit % THREAD_BITS);
            positions[bit / 8 / BLOCK_BYTES].get_or_insert(element as u32);
            bit += group.luts.first(stream(bit)).unwrap().1 as usize;
        }
        assert_eq!(bit.div_ceil(8), encoded.encoded_exponent.len());
        for (block, position) in positions.iter().enumerate() {
            assert_eq!(group.positions[block], position.unwrap_or(encoded.sign_mantissa.len() as u32));
        }
        for (thread, gap) in gaps.iter().enumerate() {
            let bits = (5 * thread..5 * thread + 5).map(|i| encoded.gaps[i / 8] >> (7 - i % 8) & 1);
            assert_eq!(
                bits.fold(0, |value, bit| value << 1 | usize::from(bit)),
                gap.unwrap_or(0),
                "{thread}"
            );
        }
    }

    #[test]
    fn every_pattern_it_can_hold_comes_back() {
        let patterns = |end: u16| (0..end).chain(0x8000..0x8000 + end).flat_map(u16::to_le_bytes);
        let zeros = vec![0; 1 << 19];
        let held: Vec<u8> = patterns((POINTERS as u16) << 7).chain(zeros.clone()).collect();
        round_trip(&held);
        // Infinities, NaNs and what else has an exponent of 240 or more are stored raw.
        for pattern in [0x7800u16, 0xf800, 0x7f80, 0xff80, 0x7fc1, 0xffff] {
            let bytes: Vec<u8> = pattern.to_le_bytes().into_iter().chain(zeros.clone()).collect();
            assert!(encode_dfloat11(&[&bytes]).is_none(), "{pattern:x}");
        }
    }

    #[test]
    fn sizes_around_blocks() {
        assert!(encode_dfloat11(&[]).is_none());
        assert!(encode_dfloat11(&[&[0, 0]]).is_none()); // one element: no smaller
        for n in [5001, 32_767, 32_768, 32_769, 65_536, 200_001, TOGETHER + 1] {
            round_trip(&halving(n));
        }
    }

    #[test]
    fn one_symbol_takes_one_bit() {
        for n in [4001, 32_768, 32_769, 100_000] {
            let encoded = round_trip(&bf16(vec![17; n]));
            assert_eq!(encoded.encoded_exponent.len(), n.div_ceil(8));
            assert_eq!(encoded.luts[..256], [17; 256]); // no slot without a symbol
            assert_eq!(encoded.luts[256 + 17], 1);
        }
    }

    #[test]
    fn a_last_block_in_which_no_code_begins() {
        // 32,768 codes of one bit would fill a block; a longer one at its end reaches into the next.
        for extra in 0..12 {
            let mut exponents = vec![3; 32_766 - extra];
            exponents.extend([4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10]);
            round_trip(&bf16(exponents));
        }
    }

    #[test]
    fn fibonacci_counts_and_many_exponents() {
        let (mut a, mut b) = (1usize, 1usize);
        let mut exponents = Vec::new();
        for symbol in 0..25 {
            exponents.extend(std::iter::repeat_n(symbol as u8, a));
            (a, b) = (b, a + b);
        }
        let encoded = round_trip(&bf16(exponents));
        assert!(encoded.luts.len() > 512);
        // 200 symbols that are rare take more tables of 11 bits than there are pointers.
        let mut exponents: Vec<u8> = (0..200).flat_map(|s| [s; 20]).collect();
        exponents.extend(vec![220; 100_000]);
        let encoded = round_trip(&bf16(exponents));
        assert!(encoded.luts.len() <= 256 * 18);
    }

    #[test]
    fn weights_share_a_stream() {
        let bytes = halving(70_000);
        let sizes = [1, 0, 33_000, 36_999];
        let mut weights = Vec::new();
        let mut rest = &bytes[..];
        for size in sizes {
            let (weight, later) = rest.split_at(2 * size);
            rest = later;
            weights.push(weight);
        }
        let encoded = encode_dfloat11(&weights).unwrap();
        assert_eq!(encoded, encode_dfloat11(&[&bytes]).unwrap());
        assert!(decode(&encoded, &sizes).unwrap() == bytes);
        assert!(decode(&encoded, &[1, 69_998]).is_err());
        // Other weights than those that were counted.
        let mut encoder = Encoder::new(count_exponents(&bytes)).unwrap();
        encoder.push(&bytes[2..]);
        assert!(encoder.finish().is_err());
    }

    /// Codes of up to 32 bits, as other encoders make: 1, 01, 001 ...; tables of tables.
    #[test]
    fn long_codes_of_others() {
        let mut luts = vec![0u8; 5 * 256];
        for depth in 0..4 {
            for byte in 0..256usize {
                let zeros = (byte as u8).leading_zeros() as usize;
                let symbol = 8 * depth + zeros;
                luts[256 * depth + byte] = match zeros {
                    8 if depth == 3 => 31, // unused: 32 zeros
                    8 => (256 - (depth + 1)) as u8,
                    _ => symbol as u8,
                };
            }
        }
        for symbol in 0..32 {
            luts[4 * 256 + symbol] = symbol as u8 + 1;
        }
        let exponents: Vec<u8> =
            (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 27) as u8).collect();
        let mut bits = Vec::new();
        let (mut gaps, mut positions) = (Vec::new(), Vec::new());
        for (element, &symbol) in exponents.iter().enumerate() {
            if bits.len() / THREAD_BITS == gaps.len() {
                if gaps.len().is_multiple_of(THREADS) {
                    positions.push(element as u32);
                }
                gaps.push((bits.len() % THREAD_BITS) as u8);
            }
            bits.extend(std::iter::repeat_n(0, symbol as usize));
            bits.push(1);
        }
        let stream: Vec<u8> =
            bits.chunks(8).map(|b| b.iter().enumerate().map(|(i, bit)| bit << (7 - i)).sum()).collect();
        let blocks = stream.len().div_ceil(BLOCK_BYTES);
        positions.push(exponents.len() as u32);
        assert_eq!(positions.len(), blocks + 1);
        gaps.resize(blocks * THREADS, 0);
        let bytes = bf16(exponents);
        let encoded = Encoded {
            luts,
            encoded_exponent: stream,
            sign_mantissa: bytes.as_chunks::<2>().0.iter().map(|b| b[1] & 0x80 | b[0] & 0x7f).collect(),
            output_positions: positions.iter().flat_map(|p| p.to_le_bytes()).collect(),
            gaps: pack(&gaps),
        };
        check_positions(&encoded);
        assert!(decode(&encoded, &[40_000]).unwrap() == bytes);
    }

    #[test]
    fn broken_buffers_are_refused() {
        let encoded = round_trip(&halving(50_000));
        let refused = |change: &dyn Fn(&mut Encoded), message: &str| {
            let mut broken = encoded.clone();
            change(&mut broken);
            let error = decode(&broken, &[50_000]).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        };
        refused(&|e| e.luts.truncate(256), "luts: expected 2 to 18 rows");
        refused(&|e| e.luts[3] = 200, "expected a symbol with 1 to 32 bits, found 200 with 0");
        refused(&|e| e.luts[3] = 240, "expected one of");
        refused(&|e| *e.luts.last_chunk_mut::<256>().unwrap() = [33; 256], "found 100 with 33");
        refused(&|e| e.gaps.truncate(7), "gaps: expected");
        refused(&|e| e.output_positions.truncate(8), "output_positions: expected");
        refused(&|e| e.output_positions[0] = 1, "expected to rise from 0");
        refused(&|e| e.output_positions[4..8].fill(255), "expected to rise from 0");
        refused(&|e| e.sign_mantissa.truncate(49_999), "expected to rise from 0 to 49999");
        // Pointers in a circle.
        refused(
            &|e| {
                let table: Vec<u8> = vec![255; 256];
                e.luts = [table.clone(), table, vec![1; 256]].concat();
            },
            "expected codes of the tables",
        );
    }
}

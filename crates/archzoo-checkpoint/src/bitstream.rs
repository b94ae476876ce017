//! Streams of prefix codes, most significant bit first.
//!
//! A lookup of [`WINDOW`] bits gives all the symbols whose codes lie within them. [`STREAMS`] streams are
//! decoded side by side: each lookup waits for the last one of its own stream only.

use archzoo_simd::{InstructionSet, multiversion};

/// Bits of a lookup, and the longest code that we write.
pub(crate) const WINDOW: u32 = 11;
/// Streams decoded side by side.
pub(crate) const STREAMS: usize = 4;
/// Most symbols of a lookup.
const MOST: usize = 6;
/// Lookups between two reads of the input: their bits fit into 64, less 7 of the first byte and one marker.
const LOOKUPS: usize = 5;

/// A prefix code as its streams are read.
pub(crate) trait Code {
    /// The symbol and length (1..=32) of the code that `window` begins with.
    fn first(&self, window: u32) -> Option<(u8, u32)>;
}

/// Per window: up to six symbols in the low bytes, their bits in byte 6, their number in byte 7. All zero where
/// the first code is longer than the window.
pub(crate) struct Table {
    entries: Box<[u64; 1 << WINDOW]>,
    is_complete: bool,
}

impl Table {
    /// `within(prefix, known)` gives the first symbol and its length where `known` bits decide both.
    pub(crate) fn new(within: impl Fn(u32, u32) -> Option<(u8, u32)>) -> Self {
        let mut entries = Box::new([0; 1 << WINDOW]);
        for (window, entry) in (0u32..).zip(entries.iter_mut()) {
            let (mut used, mut count) = (0, 0);
            while count < MOST && used < WINDOW {
                let known = WINDOW - used;
                let Some((symbol, length)) = within(window & ((1 << known) - 1), known) else { break };
                *entry |= u64::from(symbol) << (8 * count);
                used += length;
                count += 1;
            }
            *entry |= u64::from(used) << 48 | (count as u64) << 56;
        }
        let is_complete = entries.iter().all(|entry| *entry != 0);
        Self { entries, is_complete }
    }
}

/// Bytes after the symbols of a stream that are written too.
pub(crate) const SLACK: usize = LOOKUPS * MOST + 8;

/// Where a stream is read and where its symbols go.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cursor {
    /// Next bit of the input.
    pub bit: usize,
    /// Next symbol.
    pub out: usize,
    /// End of the symbols; [`SLACK`] bytes follow.
    pub end: usize,
}

/// Decodes every stream to the end of its symbols, or a few symbols past it. Bits past the end of the input are
/// zeros. False if the input holds what is no code.
pub(crate) fn decode<C: Code>(
    set: InstructionSet,
    code: &C,
    table: &Table,
    input: &[u8],
    out: &mut [u8],
    cursors: &mut [Cursor; STREAMS],
) -> bool {
    assert!(cursors.iter().all(|cursor| cursor.out.max(cursor.end) + SLACK <= out.len()));
    let mut is_valid = true;
    decode_most(set, code, table, input, out, cursors, &mut is_valid);
    for cursor in cursors {
        while cursor.out < cursor.end {
            let step = code.first(window(input, cursor.bit));
            is_valid &= step.is_some();
            let (symbol, length) = step.unwrap_or((0, 1));
            out[cursor.out] = symbol;
            cursor.out += 1;
            cursor.bit += length as usize;
        }
    }
    is_valid
}

/// 32 bits from `bit` on.
#[inline(always)]
fn window(input: &[u8], bit: usize) -> u32 {
    let rest = input.get(bit / 8..).unwrap_or_default();
    let bytes = match rest.first_chunk() {
        Some(bytes) => *bytes,
        None => {
            let mut bytes = [0; 8];
            bytes[..rest.len()].copy_from_slice(rest);
            bytes
        }
    };
    ((u64::from_be_bytes(bytes) << (bit % 8)) >> 32) as u32
}

multiversion! {
    /// Decodes all but what lies near the end of the input.
    fn decode_most<C: Code>(
        code: &C,
        table: &Table,
        input: &[u8],
        out: &mut [u8],
        cursors: &mut [Cursor; STREAMS],
        is_valid: &mut bool,
    ) {
        if table.is_complete {
            decode_rounds::<C, false>(code, table, input, out, cursors, is_valid);
        } else {
            decode_rounds::<C, true>(code, table, input, out, cursors, is_valid);
        }
    }
}

/// What a round of one stream can at most write and read: its lookups and one long code.
const WRITES: usize = LOOKUPS * MOST + 1;
const READS: usize = (LOOKUPS * WINDOW as usize + 32).div_ceil(8);

#[inline(always)]
fn decode_rounds<C: Code, const LONG_CODES: bool>(
    code: &C,
    table: &Table,
    input: &[u8],
    out: &mut [u8],
    cursors: &mut [Cursor; STREAMS],
    is_valid: &mut bool,
) {
    // Rounds after which a stream may be at the end of its symbols, and before which it is not.
    let rounds = |cursor: &Cursor| {
        let symbols = cursor.end.saturating_sub(cursor.out).div_ceil(WRITES);
        let bytes = input.len().saturating_sub(cursor.bit / 8 + 8) / READS;
        symbols.min(bytes)
    };
    while let Some(count @ 1..) = cursors.iter().map(rounds).min() {
        for _ in 0..count {
            // SAFETY: `rounds` says so.
            *is_valid &= unsafe { decode_round::<C, LONG_CODES, STREAMS>(code, table, input, out, cursors) };
        }
    }
    for cursor in cursors {
        while rounds(cursor) > 0 {
            let cursor = std::array::from_mut(cursor);
            // SAFETY: `rounds` says so.
            *is_valid &= unsafe { decode_round::<C, LONG_CODES, 1>(code, table, input, out, cursor) };
        }
    }
}

/// # Safety
/// At each cursor, `input` holds 8 bytes, and `out` holds [`SLACK`] bytes.
#[inline(always)]
unsafe fn decode_round<C: Code, const LONG_CODES: bool, const N: usize>(
    code: &C,
    table: &Table,
    input: &[u8],
    out: &mut [u8],
    cursors: &mut [Cursor; N],
) -> bool {
    // The bits used are counted by the zeros that follow the lowest one.
    let mut bits = cursors.map(|cursor| {
        // SAFETY: the caller's promise.
        let bytes = unsafe { input.as_ptr().add(cursor.bit / 8).cast::<[u8; 8]>().read() };
        u64::from_be_bytes(bytes) << (cursor.bit % 8) | 1
    });
    let mut at = cursors.map(|cursor| cursor.out);
    let mut counts = [0; N];
    for _ in 0..LOOKUPS {
        for i in 0..N {
            let entry = table.entries[(bits[i] >> (64 - WINDOW)) as usize];
            // SAFETY: the caller's promise; each lookup before wrote at most `MOST` symbols.
            unsafe { out.as_mut_ptr().add(at[i]).cast::<[u8; 8]>().write(entry.to_le_bytes()) };
            bits[i] <<= (entry >> 48) as u8 & 63;
            counts[i] = (entry >> 56) as usize;
            at[i] += counts[i];
        }
    }
    let mut is_valid = true;
    for i in 0..N {
        cursors[i].bit += bits[i].trailing_zeros() as usize;
        if LONG_CODES && counts[i] == 0 {
            let step = code.first(window(input, cursors[i].bit));
            is_valid &= step.is_some();
            let (symbol, length) = step.unwrap_or((0, 1));
            out[at[i]] = symbol;
            at[i] += 1;
            cursors[i].bit += length as usize;
        }
        cursors[i].out = at[i];
    }
    is_valid
}

/// Bytes that hold as many codes of at most [`WINDOW`] bits, and those that a store of 8 touches.
pub(crate) fn room(symbols: usize) -> usize {
    (symbols * WINDOW as usize).div_ceil(8) + 8
}

multiversion! {
    /// Writes the codes of `symbols`, filled up with zeros to `length` bytes, into `out` of [`room`]. `codes` holds
    /// bits and length (at most [`WINDOW`]) of every symbol.
    pub(crate) fn encode(codes: &[(u16, u16); 256], symbols: &[u8], out: &mut [u8], length: &mut usize) {
        let (mut at, mut bits, mut count) = (0, 0u64, 0u32);
        let mut put = |code: u64, length: u32| {
            bits = bits << length | code;
            count += length;
            // Twice, since count may be 0.
            let top = bits << (63 - count) << 1;
            out[at..at + 8].copy_from_slice(&top.to_be_bytes());
            at += (count / 8) as usize;
            count %= 8;
        };
        let (fours, rest) = symbols.as_chunks::<4>();
        for four in fours {
            let [a, b, c, d] = four.map(|symbol| codes[symbol as usize]);
            // Pairs first, so that only one step a four waits for the last.
            let low = u64::from(c.0) << d.1 | u64::from(d.0);
            let high = u64::from(a.0) << b.1 | u64::from(b.0);
            put(high << (c.1 + d.1) | low, u32::from(a.1 + b.1 + c.1 + d.1));
        }
        for &symbol in rest {
            let (code, length) = codes[symbol as usize];
            put(u64::from(code), u32::from(length));
        }
        *length = at + usize::from(count > 0);
    }
}

multiversion! {
    /// Counts how often each of fewer than 2^16 symbols occurs.
    pub(crate) fn count(symbols: &[u8], counts: &mut [u16; 256]) {
        // Eight, so that a run of one symbol does not wait for itself.
        let mut parts = [[0u16; 256]; 8];
        let (eights, rest) = symbols.as_chunks::<8>();
        for eight in eights {
            let eight = u64::from_le_bytes(*eight);
            for (i, part) in parts.iter_mut().enumerate() {
                part[(eight >> (8 * i)) as usize & 255] += 1;
            }
        }
        for &symbol in rest {
            parts[0][symbol as usize] += 1;
        }
        for (i, count) in counts.iter_mut().enumerate() {
            *count = parts.iter().map(|part| part[i]).sum();
        }
    }
}

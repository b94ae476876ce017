//! The checksum of a tensor: xxh3-64 of its bytes, or, of more than [`BLOCK`], xxh3-64 of the little-endian
//! xxh3-64 of each block, so that many threads can work on one tensor.

use std::collections::BTreeMap;

use twox_hash::XxHash3_64;

/// Bytes that are read, written and hashed as one.
pub(crate) const BLOCK: usize = 4 << 20;
/// Free-form string of a header that holds its tensors' checksums: a JSON object of name and 16 hex digits.
pub(crate) const CHECKSUMS_KEY: &str = "archzoo.xxh3";

/// The checksum of bytes that come in pieces.
#[derive(Default)]
pub(crate) struct Checksum {
    block: XxHash3_64,
    filled: usize,
    blocks: Vec<u64>,
}

impl Checksum {
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        use std::hash::Hasher;
        while !bytes.is_empty() {
            if self.filled == BLOCK {
                self.blocks.push(std::mem::take(&mut self.block).finish());
                self.filled = 0;
            }
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.filled));
            self.block.write(now);
            self.filled += now.len();
            bytes = later;
        }
    }

    pub(crate) fn finish(self) -> u64 {
        use std::hash::Hasher;
        let mut blocks = self.blocks;
        blocks.push(self.block.finish());
        of_blocks(&blocks)
    }
}

/// The checksum of a tensor from those of its blocks, of which there is at least one.
pub(crate) fn of_blocks(blocks: &[u64]) -> u64 {
    match blocks {
        [one] => *one,
        many => {
            let bytes: Vec<u8> = many.iter().flat_map(|block| block.to_le_bytes()).collect();
            XxHash3_64::oneshot(&bytes)
        }
    }
}

/// The checksum of bytes at hand.
pub(crate) fn of(bytes: &[u8]) -> u64 {
    let mut checksum = Checksum::default();
    checksum.update(bytes);
    checksum.finish()
}

/// As it is written.
pub(crate) fn hex(checksum: u64) -> String {
    format!("{checksum:016x}")
}

/// As [`hex`] writes it.
pub(crate) fn parse_hex(text: &str) -> Option<u64> {
    let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    u64::from_str_radix(text, 16).ok().filter(|_| digits)
}

/// Checksums by tensor as a header holds them.
pub(crate) fn parse_all(text: &str) -> Result<BTreeMap<String, u64>, String> {
    let raw: crate::header::UniqueMap = serde_json::from_str(text).map_err(|e| e.to_string())?;
    raw.0
        .into_iter()
        .map(|(name, text)| match parse_hex(&text) {
            Some(checksum) => Ok((name, checksum)),
            None => Err(format!("tensor {name:?}: expected 16 hexadecimal digits, found {text:?}")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_matter() {
        let bytes: Vec<u8> = (0..2 * BLOCK + 5).map(|i| ((i * i) >> 3) as u8).collect();
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, bytes.len()] {
            let bytes = &bytes[..length];
            let mut pieces = Checksum::default();
            bytes.chunks(333_333).for_each(|piece| pieces.update(piece));
            let blocks: Vec<u64> = bytes.chunks(BLOCK).map(XxHash3_64::oneshot).collect();
            let expected = if blocks.is_empty() { XxHash3_64::oneshot(&[]) } else { of_blocks(&blocks) };
            assert_eq!(pieces.finish(), expected);
        }
    }
}

//! A table of replacements of text that SentencePiece has compiled: a double-array trie over UTF-8 and the
//! replacements that its values point to, each ended by a zero byte.
//!
//! SentencePiece replaces the longest key that the text starts with; `tokenizers`, which reads the same table, looks
//! up whole grapheme clusters and characters and takes the shortest key that one starts with.

use unicode_segmentation::UnicodeSegmentation;

use crate::error::{Error, Result};

/// A compiled table of replacements.
#[derive(Debug, Clone)]
pub struct Charsmap {
    units: Vec<u32>,
    replacements: String,
}

const IS_VALUE: u32 = 1 << 31;
const HAS_LEAF: u32 = 1 << 8;
const IS_FAR: u32 = 1 << 9;
/// A longer grapheme cluster is not looked up as a whole.
const MOST_CLUSTER: usize = 5;

impl Charsmap {
    /// Reads a table: the bytes of the trie as a little-endian number, the trie, and the replacements.
    pub fn new(content: &[u8]) -> Result<Self> {
        let damaged = |what: &str| Error::new(format!("the precompiled_charsmap is damaged: {what}"));
        let (size, rest) = content.split_first_chunk().ok_or_else(|| damaged("it has no size"))?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) = rest.split_at_checked(size).ok_or_else(|| damaged("its trie is cut"))?;
        let (units, odd) = trie.as_chunks();
        if !odd.is_empty() || units.is_empty() {
            return Err(damaged("its trie is not a number of units"));
        }
        let replacements = std::str::from_utf8(replacements).map_err(|e| damaged(&e.to_string()))?;
        let units: Vec<u32> = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        let values = units.iter().filter(|&unit| unit & IS_VALUE != 0).map(|unit| unit & !IS_VALUE);
        for value in values {
            let is_start = replacements.get(value as usize..).is_some_and(|text| text.contains('\0'));
            if !is_start {
                return Err(damaged("a value points to no replacement"));
            }
        }
        Ok(Self { units, replacements: replacements.to_owned() })
    }

    /// The keys that `text` starts with, from the shortest on: their lengths and values.
    fn keys(&self, text: &[u8]) -> impl Iterator<Item = (usize, u32)> {
        let mut at = self.units.first().map_or(0, |&root| offset(root));
        let mut bytes = text.iter().enumerate();
        std::iter::from_fn(move || {
            for (i, &byte) in bytes.by_ref() {
                at ^= usize::from(byte);
                let unit = *self.units.get(at)?;
                if unit & (IS_VALUE | 0xff) != u32::from(byte) {
                    bytes = [].iter().enumerate();
                    return None;
                }
                at ^= offset(unit);
                if unit & HAS_LEAF != 0 {
                    let value = *self.units.get(at)?;
                    return Some((i + 1, value & !IS_VALUE));
                }
            }
            None
        })
    }

    fn replacement(&self, value: u32) -> &str {
        let text = self.replacements.get(value as usize..).unwrap_or_default();
        text.split('\0').next().unwrap_or_default()
    }

    /// The longest key that `text` starts with: its length and replacement.
    pub fn longest(&self, text: &[u8]) -> Option<(usize, &str)> {
        self.keys(text).last().map(|(length, value)| (length, self.replacement(value)))
    }

    /// The replacement of a character or grapheme cluster, as `tokenizers` looks it up.
    fn of_whole(&self, text: &str) -> Option<&str> {
        let text = text.split('\0').next().unwrap_or_default();
        self.keys(text.as_bytes()).next().map(|(_, value)| self.replacement(value))
    }

    /// The text with its grapheme clusters, or else their characters, replaced.
    pub fn replace_clusters(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(cluster) = first_cluster(rest) {
            rest = &rest[cluster.len()..];
            let whole = if cluster.len() <= MOST_CLUSTER { self.of_whole(cluster) } else { None };
            if let Some(replacement) = whole {
                out.push_str(replacement);
                continue;
            }
            let mut buffer = [0; 4];
            for c in cluster.chars() {
                let c: &str = c.encode_utf8(&mut buffer);
                out.push_str(self.of_whole(c).unwrap_or(c));
            }
        }
        out
    }
}

/// Where a node's children are.
fn offset(unit: u32) -> usize {
    ((unit >> 10) << if unit & IS_FAR == 0 { 0 } else { 8 }) as usize
}

/// The grapheme cluster that a text starts with.
fn first_cluster(text: &str) -> Option<&str> {
    match text.as_bytes() {
        // Nothing joins two ASCII characters but these two.
        [b'\r', b'\n', ..] => Some(&text[..2]),
        [0..0x80] | [0..0x80, 0..0x80, ..] => Some(&text[..1]),
        _ => text.graphemes(true).next(),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Keys "A" (a), "AB" (x, nothing else), "é" with a combining mark as e.
    fn table() -> Vec<u8> {
        // Nodes are placed by hand: the children of a node are at its base xor the byte.
        let mut units = vec![0u32; 0x200];
        let node = |label: u8, at: usize, base: usize, has_leaf: bool| {
            u32::from(label) | (((at ^ base) as u32) << 10) | if has_leaf { HAS_LEAF } else { 0 }
        };
        units[0] = node(0, 0, 0x100, false);
        units[0x141] = node(b'A', 0x141, 0x80, true);
        units[0x80] = IS_VALUE;
        units[0xc2] = node(b'B', 0xc2, 0x90, true);
        units[0x90] = IS_VALUE | 2;
        let mut content = (4 * units.len() as u32).to_le_bytes().to_vec();
        content.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
        content.extend(b"a\0xyz\0");
        content
    }

    #[test]
    fn longest_and_whole() {
        let map = Charsmap::new(&table()).unwrap();
        assert_eq!(map.longest(b"ABC"), Some((2, "xyz")));
        assert_eq!(map.longest(b"AC"), Some((1, "a")));
        assert_eq!(map.longest(b"B"), None);
        // One cluster whose first byte is a key.
        assert_eq!(
            map.replace_clusters("AB A\u{301}A\u{301}\u{301}\u{301}-\r\n"),
            "aB aa\u{301}\u{301}\u{301}-\r\n"
        );
    }

    #[test]
    fn damaged_tables_are_refused() {
        let whole = table();
        for cut in [0, 3, 4, 100, whole.len() - 7, whole.len() - 1] {
            assert!(Charsmap::new(&whole[..cut]).is_err(), "{cut}");
        }
        let mut far = whole;
        far[4 + 4 * 0x80] = 200;
        assert!(Charsmap::new(&far).unwrap_err().to_string().contains("no replacement"));
    }
}

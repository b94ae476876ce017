use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// `\p{L}`
pub const LETTER: u8 = 1;
/// `\p{N}`
pub const NUMBER: u8 = 2;
/// `\s`
pub const SPACE: u8 = 4;
/// `\r` or `\n`
pub const NEWLINE: u8 = 8;
/// `\p{Lu}` or `\p{Lt}`
pub const UPPER: u8 = 16;
/// `\p{Ll}`
pub const LOWER: u8 = 32;
/// `\p{M}`
pub const MARK: u8 = 64;
/// `\p{P}` or `\p{S}`
pub const SYMBOL: u8 = 128;
/// In DeepSeek's table, which knows no case: a letter or mark of `[一-龥぀-ゟ゠-ヿ]`.
pub const CJK_WORD: u8 = UPPER;
/// In DeepSeek's table: punctuation or a symbol of that range.
pub const CJK_SYMBOL: u8 = LOWER;
/// In DeepSeek's table: any other code point of that range.
pub const CJK_OTHER: u8 = UPPER | LOWER;

/// The classes of every code point, as bits.
pub type Table = [u8];

/// Classes from the Unicode tables of `regex-syntax`, the same that the fallback regexes use.
pub fn unicode() -> &'static Table {
    static TABLE: OnceLock<Box<Table>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![0; 0x11_0000].into_boxed_slice();
        for (bit, class) in [
            (LETTER, r"\p{L}"),
            (NUMBER, r"\p{N}"),
            (SPACE, r"\s"),
            (NEWLINE, r"[\r\n]"),
            (UPPER, r"[\p{Lu}\p{Lt}]"),
            (LOWER, r"\p{Ll}"),
            (MARK, r"\p{M}"),
            (SYMBOL, r"[\p{P}\p{S}]"),
        ] {
            for (first, last) in ranges(class) {
                table[first..=last].iter_mut().for_each(|bits| *bits |= bit);
            }
        }
        table
    })
}

/// [`unicode`] without case, and with the characters of DeepSeek's second split told apart: there is a border
/// between them and all others.
pub fn deepseek() -> &'static Table {
    static TABLE: OnceLock<Box<Table>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table: Box<Table> = unicode().into();
        table.iter_mut().for_each(|class| *class &= !(UPPER | LOWER));
        for (first, last) in [(0x4e00, 0x9fa5), (0x3040, 0x309f), (0x30a0, 0x30ff)] {
            for class in &mut table[first..=last] {
                *class = match *class {
                    c if c & (LETTER | MARK) != 0 => CJK_WORD,
                    c if c & SYMBOL != 0 => CJK_SYMBOL,
                    _ => CJK_OTHER,
                };
            }
        }
        table
    })
}

/// `\w`
pub fn is_word(c: char) -> bool {
    static RANGES: OnceLock<Vec<(usize, usize)>> = OnceLock::new();
    is_in(RANGES.get_or_init(|| ranges(r"\w")), c)
}

fn is_in(ranges: &[(usize, usize)], c: char) -> bool {
    let after = ranges.partition_point(|&(first, _)| first <= c as usize);
    after > 0 && c as usize <= ranges[after - 1].1
}

/// Ranges of code points that a regex class matches.
fn ranges(class: &str) -> Vec<(usize, usize)> {
    match regex_syntax::parse(class).map(|hir| hir.into_kind()) {
        Ok(HirKind::Class(Class::Unicode(class))) => {
            class.iter().map(|r| (r.start() as usize, r.end() as usize)).collect()
        }
        _ => unreachable!("the classes above are valid"),
    }
}

/// The code point at `at`, which is the start of a character, and its length in bytes.
#[inline(always)]
pub fn decode(text: &[u8], at: usize) -> (usize, usize) {
    let tail = |i: usize| usize::from(text.get(at + i).copied().unwrap_or(0) & 0x3f);
    let lead = usize::from(text[at]);
    match lead {
        0..0x80 => (lead, 1),
        0x80..0xe0 => ((lead & 0x1f) << 6 | tail(1), 2),
        0xe0..0xf0 => ((lead & 0xf) << 12 | tail(1) << 6 | tail(2), 3),
        _ => ((lead & 7) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_is_that_of_chars() {
        for c in '\0'..=char::MAX {
            let mut buffer = [0; 4];
            let bytes = c.encode_utf8(&mut buffer).as_bytes();
            assert_eq!(decode(bytes, 0), (c as usize, bytes.len()));
        }
    }

    #[test]
    fn classes_of_some_characters() {
        let class = |c: char| unicode()[c as usize];
        assert_eq!(class('a'), LETTER | LOWER);
        assert_eq!(class('ǅ'), LETTER | UPPER);
        assert_eq!(class('中'), LETTER);
        assert_eq!(class('½'), NUMBER);
        assert_eq!(class('\n'), SPACE | NEWLINE);
        assert_eq!(class('\u{3000}'), SPACE);
        assert_eq!(class('\u{301}'), MARK);
        assert_eq!(class('€'), SYMBOL);
        assert_eq!(class('\0'), 0);
        assert_eq!(deepseek()['中' as usize], CJK_WORD);
        assert_eq!(deepseek()['・' as usize], CJK_SYMBOL);
        assert_eq!(deepseek()['A' as usize], LETTER);
    }
}

//! Where pieces start in the next 64 bytes: a bit for each byte and class, and arithmetic on them in place of branches.
//!
//! A window begins where a piece starts, so that nothing before it matters. What lies behind it may move only starts
//! that are not told: those in white space that reaches its end.

use crate::classes::{LETTER, LOWER, MARK, NEWLINE, NUMBER, SPACE, SYMBOL, Table, UPPER, decode};
use crate::split::families::{Blanks, contraction};

/// Bytes of a window.
pub const WIDTH: usize = 64;

/// The bytes of each class, as bits; all bytes of a character have its class.
struct Window {
    letter: u64,
    number: u64,
    space: u64,
    newline: u64,
    symbol: u64,
    mark: u64,
    upper: u64,
    lower: u64,
    /// `' '`, `'` and `/`.
    blank: u64,
    quote: u64,
    slash: u64,
    /// Bytes of characters of several bytes, those that are not their first, and first ones of [`HAN`].
    wide: u64,
    tail: u64,
    han: u64,
}

/// Characters of three bytes, told by the first, that have one class in each table: most of the Chinese ones.
const HAN: std::ops::RangeInclusive<u8> = 0xe5..=0xe8;
/// One of them.
const ONE_HAN: usize = 0x5000;

/// The window of 64 bytes as if all were ASCII.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ascii(text: &[u8; WIDTH]) -> Option<Window> {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi8, _mm_cmpeq_epi8, _mm_cmplt_epi8, _mm_loadu_si128, _mm_movemask_epi8,
        _mm_or_si128, _mm_set1_epi8,
    };

    /// The bytes that `is_in` makes all ones, or of which it sets the first bit.
    #[inline(always)]
    fn mask(text: &[u8; WIDTH], is_in: impl Fn(__m128i) -> __m128i) -> u64 {
        let (blocks, _) = text.as_chunks::<16>();
        let mask = |i: usize| {
            // SAFETY: SSE2 is part of x86-64 and the load is of 16 bytes that are there.
            unsafe { u64::from(_mm_movemask_epi8(is_in(_mm_loadu_si128(blocks[i].as_ptr().cast()))) as u16) }
        };
        mask(0) | mask(1) << 16 | mask(2) << 32 | mask(3) << 48
    }

    // SAFETY: SSE2 is part of x86-64, here and below.
    let all = |byte: u8| unsafe { _mm_set1_epi8(byte as i8) };
    let is = |byte: u8| mask(text, |b| unsafe { _mm_cmpeq_epi8(b, all(byte)) });
    // The range is moved to the least signed bytes.
    let between = |b, first: u8, last: u8| unsafe {
        _mm_cmplt_epi8(
            _mm_add_epi8(b, all(0x80u8.wrapping_sub(first))),
            all(0x80u8.wrapping_add(last - first + 1)),
        )
    };
    let letter = mask(text, |b| between(unsafe { _mm_or_si128(b, all(0x20)) }, b'a', b'z'));
    let upper = mask(text, |b| between(b, b'A', b'Z'));
    let number = mask(text, |b| between(b, b'0', b'9'));
    let blank = is(b' ');
    let wide = mask(text, |b| b);
    Some(Window {
        letter,
        number,
        space: blank | mask(text, |b| between(b, b'\t', b'\r')),
        newline: is(b'\n') | is(b'\r'),
        symbol: mask(text, |b| between(b, b'!', b'~')) & !letter & !number,
        mark: 0,
        upper,
        lower: letter & !upper,
        blank,
        quote: is(b'\''),
        slash: is(b'/'),
        wide,
        tail: mask(text, |b| unsafe { _mm_cmplt_epi8(b, all(0xc0)) }),
        han: if wide == 0 { 0 } else { mask(text, |b| between(b, *HAN.start(), *HAN.end())) },
    })
}

/// None where it is not written for the processor: pieces are then found one by one.
#[cfg(not(target_arch = "x86_64"))]
fn ascii(_: &[u8; WIDTH]) -> Option<Window> {
    None
}

impl Window {
    /// The window at `at`; none if fewer than [`WIDTH`] bytes are left.
    #[inline(always)]
    fn new(table: &Table, text: &[u8], at: usize) -> Option<Self> {
        let mut window = ascii(text[at..].first_chunk()?)?;
        if window.wide == 0 {
            return Some(window);
        }
        let han = window.han;
        window.add(table[ONE_HAN], han | han << 1 | han << 2);
        let mut leads = window.wide & !window.tail & !han;
        while leads != 0 {
            let i = leads.trailing_zeros() as usize;
            leads &= leads - 1;
            let (c, length) = decode(text, at + i);
            window.add(table[c], ((1 << length) - 1) << i);
        }
        Some(window)
    }

    /// Gives bytes a class.
    #[inline(always)]
    fn add(&mut self, class: u8, bytes: u64) {
        let of = |bit: u8| if class & bit != 0 { bytes } else { 0 };
        self.letter |= of(LETTER);
        self.number |= of(NUMBER);
        self.space |= of(SPACE);
        self.newline |= of(NEWLINE);
        self.symbol |= of(SYMBOL);
        self.mark |= of(MARK);
        self.upper |= of(UPPER);
        self.lower |= of(LOWER);
    }

    /// Neither letter nor number nor white space.
    #[inline(always)]
    fn other(&self) -> u64 {
        !(self.letter | self.number | self.space)
    }

    /// `characters`, which are first bytes, with their other bytes.
    #[inline(always)]
    fn whole(&self, characters: u64) -> u64 {
        let two = characters | characters << 1 & self.tail;
        two | two << 1 & self.tail | two << 2 & self.tail & self.tail << 1
    }

    /// Starts of the pieces of `\p{N}{1,most}`; none for numbers that are not ASCII.
    #[inline(always)]
    fn numbers(&self, most: usize) -> Option<u64> {
        let numbers = self.number;
        if numbers & self.wide != 0 {
            return None;
        }
        if most == 1 {
            return Some(numbers);
        }
        let mut starts = first(numbers);
        let after = numbers & numbers << 1 & numbers << 2 & numbers << 3;
        loop {
            let more = starts << 3 & after & !starts;
            if more == 0 {
                return Some(starts);
            }
            starts |= more;
        }
    }

    /// `starts` without those in contractions, and with those behind: a contraction begins at an apostrophe of
    /// `places` and is a piece, or with `IS_SUFFIX` the end of one.
    #[inline(always)]
    fn contracted<const ANY_CASE: bool, const IS_SUFFIX: bool>(
        &self,
        text: &[u8],
        at: usize,
        mut starts: u64,
        places: u64,
    ) -> u64 {
        let mut quotes = places & self.quote;
        let mut end = 0;
        while quotes != 0 {
            let i = quotes.trailing_zeros() as usize;
            quotes &= quotes - 1;
            let length = contraction::<ANY_CASE>(text, at + i);
            // A word has one suffix.
            if length > 0 && !(IS_SUFFIX && i == end) {
                end = i + length;
                let within = bit(end).wrapping_sub(1) & !0 << (i + usize::from(!IS_SUFFIX));
                starts = starts & !within | bit(end) & self.letter & !self.tail;
            }
        }
        starts
    }

    /// Starts of pieces in white space, of which `space` is left. `bound` bytes count as the end of the text.
    #[inline(always)]
    fn blanks(&self, space: u64, how: Blanks, bound: u64) -> u64 {
        let mut starts = first(space);
        let mut more = space & space << 1;
        while more != 0 {
            let start = more.trailing_zeros() - 1;
            let length = (!(space >> start)).trailing_zeros();
            let end = start + length;
            if end >= WIDTH as u32 {
                break;
            }
            more &= !0 << end;
            let run = ((1 << length) - 1) << start;
            let mut left = run & !self.tail;
            if how != Blanks::Plain {
                let newlines = run & self.newline;
                if newlines != 0 {
                    let after = 64 - newlines.leading_zeros();
                    left &= !0 << after;
                    starts |= 1 << after & run;
                }
            }
            if left != 0 && bound >> end & 1 == 0 {
                starts |= 1 << (63 - left.leading_zeros());
            }
        }
        starts
    }
}

/// None behind the window.
#[inline(always)]
fn bit(i: usize) -> u64 {
    1u64.checked_shl(i as u32).unwrap_or(0)
}

/// The first bit of each run.
#[inline(always)]
fn first(run: u64) -> u64 {
    run & !(run << 1)
}

/// The runs of bits that begin with `starts`.
#[inline(always)]
fn runs_from(starts: u64, runs: u64) -> u64 {
    (starts.wrapping_add(runs) ^ runs) & runs | starts
}

/// A bit for each place in the window where a piece of [`families::gpt2`](crate::split::families::gpt2) starts.
#[inline(always)]
pub fn gpt2<const DIGIT: bool>(table: &Table, text: &[u8], at: usize) -> Option<u64> {
    let w = Window::new(table, text, at)?;
    let after_blank = w.blank << 1;
    let other = w.other();
    let others = first(other) & !after_blank;
    let (numbers, bound) =
        if DIGIT { (w.numbers(1)?, w.number) } else { (first(w.number) & !after_blank, 0) };
    let starts = first(w.letter) & !after_blank | others | numbers | w.blanks(w.space, Blanks::Plain, bound);
    Some(w.contracted::<false, false>(text, at, starts, others & w.letter >> 1))
}

/// The same for [`families::cl100k`](crate::split::families::cl100k), with or without its end.
#[inline(always)]
pub fn cl100k<const DIGITS: usize>(table: &Table, text: &[u8], at: usize) -> Option<u64> {
    let w = Window::new(table, text, at)?;
    let other = w.other();
    let others = first(other) & !(w.blank << 1);
    let ended = runs_from(w.newline & other << 1, w.newline);
    // A character that a word may begin with: white space, and another that stands alone.
    let glued = (w.whole(others) | w.space & !w.newline) << 1;
    let starts =
        first(w.letter) & !glued | others | w.numbers(DIGITS)? | w.blanks(w.space & !ended, Blanks::Lines, 0);
    Some(w.contracted::<true, false>(text, at, starts, others & w.letter >> 1))
}

/// The same for [`families::o200k`](crate::split::families::o200k).
#[inline(always)]
pub fn o200k<const DIGITS: usize, const CONTRACTIONS: bool>(
    table: &Table,
    text: &[u8],
    at: usize,
) -> Option<u64> {
    let w = Window::new(table, text, at)?;
    let caseless = w.letter & !(w.upper | w.lower);
    let other = w.other();
    let others = first(other) & !(w.blank << 1);
    let ended = runs_from(w.newline & other << 1, w.newline);
    // Where a word ends depends on more than neighbours.
    if (w.mark | caseless << 1 & w.upper | ended << 1 & w.slash) != 0 {
        return None;
    }
    let glued = (w.whole(others) | w.space & !w.newline) << 1;
    let starts = first(w.letter) & !glued
        | w.upper & w.lower << 1
        | others
        | w.numbers(DIGITS)?
        | w.blanks(w.space & !ended, Blanks::Lines, 0);
    if !CONTRACTIONS {
        return Some(starts);
    }
    Some(w.contracted::<true, true>(text, at, starts, others & w.letter << 1))
}

/// The same for [`families::deepseek`](crate::split::families::deepseek).
#[inline(always)]
pub fn deepseek(table: &Table, text: &[u8], at: usize) -> Option<u64> {
    let w = Window::new(table, text, at)?;
    // Case is not in this table, and ASCII has none of these.
    let (cjk_word, cjk_symbol) = (w.upper & w.wide, w.lower & w.wide);
    let word = w.letter | w.mark;
    let known = word | w.number | w.space | w.symbol | cjk_word | cjk_symbol;
    if known != !0 || cjk_word & cjk_symbol != 0 {
        return None;
    }
    let symbols = first(w.symbol) & !(w.blank << 1);
    let ended = runs_from(w.newline & w.symbol << 1, w.newline);
    let prefixed = symbols << 1 & w.letter & !w.wide;
    let bound = w.number | cjk_word | cjk_symbol;
    let mut starts = first(word) & !((w.space & !w.newline) << 1) & !prefixed
        | symbols
        | w.numbers(3)?
        | first(cjk_word)
        | first(cjk_symbol)
        | w.blanks(w.space & !ended, Blanks::Lines, bound);
    // What an ASCII symbol is a prefix of is ASCII.
    let mut ends = runs_from(prefixed, word) & w.wide & !w.tail & (word & !w.wide) << 1;
    while ends != 0 {
        let i = ends.trailing_zeros();
        let start = ends & ends.wrapping_neg();
        starts |= start;
        ends &= !runs_from(start, word & !0 << i);
    }
    Some(starts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classes;

    #[test]
    fn most_chinese_characters_have_one_class() {
        for table in [classes::unicode(), classes::deepseek()] {
            assert!(table[0x5000..0x9000].iter().all(|&class| class == table[ONE_HAN]));
        }
        let first = |c: char| c.encode_utf8(&mut [0; 4]).as_bytes()[0];
        assert_eq!([first('\u{5000}'), first('\u{8fff}')], [*HAN.start(), *HAN.end()]);
        assert!(!HAN.contains(&first('\u{4fff}')) && !HAN.contains(&first('\u{9000}')));
    }

    #[test]
    fn classes_are_those_of_the_table() {
        let table = classes::unicode();
        let text: String =
            (1..0x2100).filter_map(char::from_u32).chain("一中国語あ👍½٣\u{3000}".chars()).collect();
        let text = text + &"x".repeat(WIDTH);
        for (at, _) in text.char_indices() {
            let Some(w) = Window::new(table, text.as_bytes(), at) else { break };
            for (i, c) in text[at..].char_indices().take_while(|(i, _)| *i < WIDTH) {
                for (bit, mask) in [
                    (LETTER, w.letter),
                    (NUMBER, w.number),
                    (SPACE, w.space),
                    (NEWLINE, w.newline),
                    (SYMBOL, w.symbol),
                    (MARK, w.mark),
                    (UPPER, w.upper),
                    (LOWER, w.lower),
                ] {
                    for byte in i..(i + c.len_utf8()).min(WIDTH) {
                        assert_eq!(mask >> byte & 1 == 1, table[c as usize] & bit != 0, "{c:?}");
                        assert_eq!(w.tail >> byte & 1 == 1, byte > i);
                        assert_eq!(w.wide >> byte & 1 == 1, !c.is_ascii());
                    }
                }
            }
        }
    }
}

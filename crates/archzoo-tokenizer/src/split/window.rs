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

/// Bytes of a character, at most.
const LONGEST: usize = 4;
/// Characters that have one class in each table: the Chinese ones.
const HAN: std::ops::RangeInclusive<usize> = 0x4e00..=0x9f7f;

/// The bytes of a window, to tell some from the others; each bit is for one.
pub trait Bytes: Copy {
    /// None where it is not written for the processor: pieces are then found one by one.
    ///
    /// # Safety
    ///
    /// The processor has the instructions of the type.
    unsafe fn load(text: &[u8; WIDTH]) -> Option<Self>;
    /// With the bit set that lower case letters have.
    fn lower(self) -> Self;
    /// The bytes from `first` to `last`.
    fn between(self, first: u8, last: u8) -> u64;
    /// Those with this bit set.
    fn with(self, bit: u8) -> u64;

    /// Those that are this one.
    #[inline(always)]
    fn is(self, byte: u8) -> u64 {
        self.between(byte, byte)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{Bytes, WIDTH};
    use std::arch::x86_64::*;

    /// By what every processor has.
    #[derive(Clone, Copy)]
    pub struct Sse2([__m128i; 4]);

    /// For functions compiled for AVX2.
    #[derive(Clone, Copy)]
    pub struct Avx2([__m256i; 2]);

    /// For functions compiled for AVX-512 BW.
    #[derive(Clone, Copy)]
    pub struct Avx512(__m512i);

    // SAFETY, here and below: loads are of bytes that are there, and who has a value has its instructions.
    impl Bytes for Sse2 {
        #[inline(always)]
        fn with(self, bit: u8) -> u64 {
            let mask = |i: usize| unsafe {
                let set =
                    _mm_cmpeq_epi8(_mm_and_si128(self.0[i], _mm_set1_epi8(bit as i8)), _mm_setzero_si128());
                u64::from(_mm_movemask_epi8(set) as u32) << (16 * i)
            };
            !(mask(0) | mask(1) | mask(2) | mask(3))
        }

        #[inline(always)]
        unsafe fn load(text: &[u8; WIDTH]) -> Option<Self> {
            let place = text.as_ptr().cast::<__m128i>();
            Some(Self([0, 1, 2, 3].map(|i| unsafe { _mm_loadu_si128(place.add(i)) })))
        }

        #[inline(always)]
        fn lower(self) -> Self {
            Self(self.0.map(|bytes| unsafe { _mm_or_si128(bytes, _mm_set1_epi8(0x20)) }))
        }

        #[inline(always)]
        fn between(self, first: u8, last: u8) -> u64 {
            // The range is moved to the least signed bytes.
            let mask = |i: usize| unsafe {
                let moved = _mm_add_epi8(self.0[i], _mm_set1_epi8(0x80u8.wrapping_sub(first) as i8));
                let end = _mm_set1_epi8(0x81u8.wrapping_add(last - first) as i8);
                u64::from(_mm_movemask_epi8(_mm_cmplt_epi8(moved, end)) as u32) << (16 * i)
            };
            mask(0) | mask(1) | mask(2) | mask(3)
        }

        #[inline(always)]
        fn is(self, byte: u8) -> u64 {
            let mask = |i: usize| unsafe {
                let same = _mm_cmpeq_epi8(self.0[i], _mm_set1_epi8(byte as i8));
                u64::from(_mm_movemask_epi8(same) as u32) << (16 * i)
            };
            mask(0) | mask(1) | mask(2) | mask(3)
        }
    }

    // No closures, as in `Kinds`.
    impl Avx2 {
        #[inline(always)]
        fn joined([low, high]: [__m256i; 2]) -> u64 {
            let (low, high) = unsafe { (_mm256_movemask_epi8(low), _mm256_movemask_epi8(high)) };
            u64::from(low as u32) | u64::from(high as u32) << 32
        }
    }

    impl Bytes for Avx2 {
        #[inline(always)]
        fn with(self, bit: u8) -> u64 {
            let Self([low, high]) = self;
            unsafe {
                let (bit, none) = (_mm256_set1_epi8(bit as i8), _mm256_setzero_si256());
                let without = [_mm256_and_si256(low, bit), _mm256_and_si256(high, bit)];
                !Self::joined([_mm256_cmpeq_epi8(without[0], none), _mm256_cmpeq_epi8(without[1], none)])
            }
        }

        #[inline(always)]
        unsafe fn load(text: &[u8; WIDTH]) -> Option<Self> {
            let place = text.as_ptr().cast::<__m256i>();
            Some(Self(unsafe { [_mm256_loadu_si256(place), _mm256_loadu_si256(place.add(1))] }))
        }

        #[inline(always)]
        fn lower(self) -> Self {
            let Self([low, high]) = self;
            unsafe {
                let bit = _mm256_set1_epi8(0x20);
                Self([_mm256_or_si256(low, bit), _mm256_or_si256(high, bit)])
            }
        }

        #[inline(always)]
        fn between(self, first: u8, last: u8) -> u64 {
            let Self([low, high]) = self;
            unsafe {
                let shift = _mm256_set1_epi8(0x80u8.wrapping_sub(first) as i8);
                let end = _mm256_set1_epi8(0x81u8.wrapping_add(last - first) as i8);
                let (low, high) = (_mm256_add_epi8(low, shift), _mm256_add_epi8(high, shift));
                Self::joined([_mm256_cmpgt_epi8(end, low), _mm256_cmpgt_epi8(end, high)])
            }
        }

        #[inline(always)]
        fn is(self, byte: u8) -> u64 {
            let Self([low, high]) = self;
            unsafe {
                let byte = _mm256_set1_epi8(byte as i8);
                Self::joined([_mm256_cmpeq_epi8(low, byte), _mm256_cmpeq_epi8(high, byte)])
            }
        }
    }

    impl Bytes for Avx512 {
        #[inline(always)]
        fn with(self, bit: u8) -> u64 {
            unsafe { _mm512_test_epi8_mask(self.0, _mm512_set1_epi8(bit as i8)) }
        }

        #[inline(always)]
        unsafe fn load(text: &[u8; WIDTH]) -> Option<Self> {
            Some(Self(unsafe { _mm512_loadu_si512(text.as_ptr().cast()) }))
        }

        #[inline(always)]
        fn lower(self) -> Self {
            Self(unsafe { _mm512_or_si512(self.0, _mm512_set1_epi8(0x20)) })
        }

        #[inline(always)]
        fn between(self, first: u8, last: u8) -> u64 {
            unsafe {
                let moved = _mm512_sub_epi8(self.0, _mm512_set1_epi8(first as i8));
                _mm512_cmple_epu8_mask(moved, _mm512_set1_epi8((last - first) as i8))
            }
        }

        #[inline(always)]
        fn is(self, byte: u8) -> u64 {
            unsafe { _mm512_cmpeq_epi8_mask(self.0, _mm512_set1_epi8(byte as i8)) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86_64::{Avx2, Avx512, Sse2};

/// Of other processors.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy)]
pub enum Sse2 {}

#[cfg(not(target_arch = "x86_64"))]
impl Bytes for Sse2 {
    unsafe fn load(_: &[u8; WIDTH]) -> Option<Self> {
        None
    }

    fn lower(self) -> Self {
        self
    }

    fn between(self, _: u8, _: u8) -> u64 {
        match self {}
    }

    fn with(self, _: u8) -> u64 {
        match self {}
    }
}

/// The window of 64 bytes as if all were ASCII.
#[inline(always)]
fn ascii<B: Bytes>(text: &[u8; WIDTH]) -> Option<Window> {
    // SAFETY: `split_family` takes a type whose instructions the processor has; tests take the first.
    let bytes = unsafe { B::load(text) }?;
    let letter = bytes.lower().between(b'a', b'z');
    let upper = bytes.between(b'A', b'Z');
    let number = bytes.between(b'0', b'9');
    let blank = bytes.is(b' ');
    let wide = bytes.between(0x80, 0xff);
    let tail = bytes.between(0x80, 0xbf);
    let mut han = 0;
    if wide != 0 {
        let (low, high) = (bytes.between(0xb8, 0xbf) >> 1, bytes.between(0x80, 0xbd) >> 1);
        han = bytes.is(0xe4) & low | bytes.between(0xe5, 0xe8) | bytes.is(0xe9) & high;
    }
    Some(Window {
        letter,
        number,
        space: blank | bytes.between(b'\t', b'\r'),
        newline: bytes.is(b'\n') | bytes.is(b'\r'),
        symbol: bytes.between(b'!', b'~') & !letter & !number,
        mark: 0,
        upper,
        lower: letter & !upper,
        blank,
        quote: bytes.is(b'\''),
        slash: bytes.is(b'/'),
        wide,
        tail,
        han,
    })
}

/// The classes of characters of several bytes.
struct Kinds<B> {
    /// Of those at `others`.
    bytes: B,
    others: u64,
    /// Of those at `han`.
    class: u8,
    han: u64,
}

impl<B: Bytes> Kinds<B> {
    // No closure: that would not be compiled for the instructions of its function.
    #[inline(always)]
    fn with(&self, bit: u8) -> u64 {
        self.bytes.with(bit) & self.others | if self.class & bit != 0 { self.han } else { 0 }
    }
}

impl Window {
    /// The window at `at`; none if fewer than [`WIDTH`] bytes are left.
    #[inline(always)]
    fn new<B: Bytes>(table: &Table, text: &[u8], at: usize) -> Option<Self> {
        let mut window = ascii::<B>(text[at..].first_chunk()?)?;
        if window.wide == 0 {
            return Some(window);
        }
        let han = window.han | window.han << 1 | window.han << 2;
        let others = window.wide & !han;
        let mut classes = [0; WIDTH + LONGEST];
        let mut leads = others & !window.tail;
        while leads != 0 {
            let i = leads.trailing_zeros() as usize;
            leads &= leads - 1;
            // What is behind the character is written again, or left out below.
            classes[i..i + LONGEST].fill(table[decode(text, at + i).0]);
        }
        // SAFETY: As in `ascii`.
        let bytes = unsafe { B::load(classes.first_chunk()?) }?;
        let kinds = Kinds { bytes, others, class: table[*HAN.start()], han };
        window.letter |= kinds.with(LETTER);
        window.number |= kinds.with(NUMBER);
        window.space |= kinds.with(SPACE);
        window.newline |= kinds.with(NEWLINE);
        window.symbol |= kinds.with(SYMBOL);
        window.mark |= kinds.with(MARK);
        window.upper |= kinds.with(UPPER);
        window.lower |= kinds.with(LOWER);
        Some(window)
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
pub fn gpt2<B: Bytes, const DIGIT: bool>(table: &Table, text: &[u8], at: usize) -> Option<u64> {
    let w = Window::new::<B>(table, text, at)?;
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
pub fn cl100k<B: Bytes, const DIGITS: usize>(table: &Table, text: &[u8], at: usize) -> Option<u64> {
    let w = Window::new::<B>(table, text, at)?;
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
pub fn o200k<B: Bytes, const DIGITS: usize, const CONTRACTIONS: bool>(
    table: &Table,
    text: &[u8],
    at: usize,
) -> Option<u64> {
    let w = Window::new::<B>(table, text, at)?;
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
pub fn deepseek<B: Bytes>(table: &Table, text: &[u8], at: usize) -> Option<u64> {
    let w = Window::new::<B>(table, text, at)?;
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
    fn chinese_characters_have_one_class() {
        for table in [classes::unicode(), classes::deepseek()] {
            assert!(table[HAN].iter().all(|&class| class == table[*HAN.start()]));
        }
        for code in (0x800..0x1_0000).filter_map(char::from_u32) {
            let text = format!("{code}{}", "x".repeat(WIDTH));
            let window = text.as_bytes().first_chunk().and_then(ascii::<Sse2>);
            let Some(window) = window else { return };
            assert_eq!(window.han, u64::from(HAN.contains(&(code as usize))), "{code:?}");
        }
    }

    #[test]
    fn classes_are_those_of_the_table() {
        let table = classes::unicode();
        let text: String =
            (1..0x2100).filter_map(char::from_u32).chain("一中国語あ👍½٣\u{3000}".chars()).collect();
        let text = text + &"x".repeat(WIDTH);
        for (at, _) in text.char_indices() {
            let Some(w) = Window::new::<Sse2>(table, text.as_bytes(), at) else { break };
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

//! Runs of characters of one kind.

use crate::classes::{Table, decode};

/// End of the run of letters (and what else `bits` names) from `at`.
#[inline(always)]
pub fn letters(table: &Table, text: &[u8], mut at: usize, bits: u8) -> usize {
    loop {
        at += ascii_letters(text, at);
        match text.get(at) {
            Some(&lead) if lead >= 0x80 => {
                let (c, length) = decode(text, at);
                if table[c] & bits == 0 {
                    return at;
                }
                at += length;
                at = wide_letters(table, text, at, bits);
            }
            _ => return at,
        }
    }
}

/// End of the run of non-ASCII characters with one of `bits`.
#[inline(always)]
fn wide_letters(table: &Table, text: &[u8], mut at: usize, bits: u8) -> usize {
    // Most are of three bytes, and that being known, the next one need not wait for this one.
    while let Some(three @ [0xe0..0xf0, ..]) = text[at..].first_chunk::<3>() {
        if table[decode(three, 0).0] & bits == 0 {
            return at;
        }
        at += 3;
    }
    while text.get(at).is_some_and(|&lead| lead >= 0x80) {
        let (c, length) = decode(text, at);
        if table[c] & bits == 0 {
            break;
        }
        at += length;
    }
    at
}

/// End of the run of characters whose class `is_in`.
#[inline(always)]
pub fn class_run(table: &Table, text: &[u8], mut at: usize, is_in: impl Fn(u8) -> bool) -> usize {
    while let Some(&byte) = text.get(at) {
        let (c, length) = if byte < 0x80 { (usize::from(byte), 1) } else { decode(text, at) };
        if !is_in(table[c]) {
            break;
        }
        at += length;
    }
    at
}

/// Number of ASCII letters from `at`.
#[inline(always)]
fn ascii_letters(text: &[u8], at: usize) -> usize {
    let mut count = 0;
    while let Some(block) = text[at + count..].first_chunk::<16>() {
        let letters = letter_mask(block);
        if letters != u16::MAX {
            return count + letters.trailing_ones() as usize;
        }
        // By a number that is known, so that the next block need not wait for this one.
        count += 16;
    }
    count + text[at + count..].iter().take_while(|b| b.is_ascii_alphabetic()).count()
}

/// A bit for each ASCII letter.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn letter_mask(block: &[u8; 16]) -> u16 {
    use std::arch::x86_64::{
        _mm_add_epi8, _mm_cmplt_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi8,
    };
    // SAFETY: SSE2 is part of x86-64 and the load is of 16 bytes that are there.
    unsafe {
        let bytes = _mm_loadu_si128(block.as_ptr().cast());
        let lower = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
        // 'a'..='z' becomes the 26 least signed bytes.
        let moved = _mm_add_epi8(lower, _mm_set1_epi8(0x80u8.wrapping_sub(b'a') as i8));
        _mm_movemask_epi8(_mm_cmplt_epi8(moved, _mm_set1_epi8(-128 + 26))) as u16
    }
}

/// A bit for each ASCII letter.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn letter_mask(block: &[u8; 16]) -> u16 {
    (0..16).map(|i| u16::from(block[i].is_ascii_alphabetic()) << i).sum()
}

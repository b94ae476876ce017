//! The pre-tokenizers of the model families, by hand. Each returns where the piece that starts at `at` ends;
//! tests prove them equal to the regexes.

use crate::classes::{
    CJK_OTHER, CJK_SYMBOL, CJK_WORD, LETTER, LOWER, MARK, NEWLINE, NUMBER, SPACE, SYMBOL, Table, UPPER,
    decode,
};
use crate::split::scan::{class_run, letters};

/// Class and length of the character at `at`; 0 and 0 at the end.
#[inline(always)]
fn class_at(table: &Table, text: &[u8], at: usize) -> (u8, usize) {
    match text.get(at) {
        None => (0, 0),
        Some(&byte) if byte < 0x80 => (table[usize::from(byte)], 1),
        Some(_) => {
            let (c, length) = decode(text, at);
            (table[c], length)
        }
    }
}

/// Neither letter nor number nor blank: `[^\s\p{L}\p{N}]`.
#[inline(always)]
fn is_other(class: u8) -> bool {
    class & (LETTER | NUMBER | SPACE) == 0
}

/// End of `[^\s\p{L}\p{N}]*`.
#[inline(always)]
fn others(table: &Table, text: &[u8], at: usize) -> usize {
    class_run(table, text, at, is_other)
}

/// End of at most `most` numbers.
#[inline(always)]
fn numbers(table: &Table, text: &[u8], mut at: usize, most: usize) -> usize {
    for _ in 0..most {
        let (class, length) = class_at(table, text, at);
        if class & NUMBER == 0 {
            break;
        }
        at += length;
    }
    at
}

/// Length of `'s 't 'm 'd 're 've 'll` at `at`, the apostrophe included; 0 for none.
#[inline(always)]
pub fn contraction<const ANY_CASE: bool>(text: &[u8], at: usize) -> usize {
    let byte = |i: usize| text.get(at + i).map_or(0, |b| if ANY_CASE { b | 0x20 } else { *b });
    if text.get(at) != Some(&b'\'') {
        return 0;
    }
    match (byte(1), byte(2)) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        (b'r' | b'v', b'e') | (b'l', b'l') => 3,
        // U+017F folds to s.
        _ if ANY_CASE && text[at + 1..].starts_with("ſ".as_bytes()) => 3,
        _ => 0,
    }
}

/// How white space at the end of the text is cut.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Blanks {
    /// `\s+(?!\S)|\s+`
    Plain,
    /// `\s*[\r\n]+|\s+(?!\S)|\s+`
    Lines,
    /// `\s+$|\s*[\r\n]|\s+(?!\S)|\s`
    LinesThenEnd,
}

/// Bytes of the blocks that have but one ASCII blank, over and over, and have it once more behind them.
#[inline(always)]
fn whole_blocks(text: &[u8]) -> usize {
    const BLOCK: usize = 32;

    let Some(&byte @ (b'\t'..=b'\r' | b' ')) = text.first() else { return 0 };
    let is_whole = |block: &&[u8; BLOCK]| **block == [byte; BLOCK];
    let blocks = text[1..].as_chunks().0.iter().take_while(is_whole).count();
    blocks * BLOCK
}

/// End of white space from `at`, where a blank is. `bound` are classes that count as the end of the text.
#[inline(always)]
fn blanks(table: &Table, text: &[u8], at: usize, how: Blanks, bound: u8) -> usize {
    let (mut end, mut last, mut after_newline) = (at, at, 0);
    let class = loop {
        end += whole_blocks(&text[end..]);
        let (class, length) = class_at(table, text, end);
        if class & SPACE == 0 || length == 0 {
            break class;
        }
        last = end;
        end += length;
        if class & NEWLINE != 0 {
            after_newline = end;
        }
    };
    let at_end = end == text.len() || class & bound != 0;
    if how == Blanks::LinesThenEnd && at_end {
        end
    } else if how != Blanks::Plain && after_newline > 0 {
        after_newline
    } else if at_end || last == at {
        end
    } else {
        last
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`, with `DIGIT` after a split
/// that isolates every number.
#[inline(always)]
pub fn gpt2<const DIGIT: bool>(table: &Table, text: &[u8], at: usize) -> usize {
    let blank = usize::from(text[at] == b' ');
    let start = at + blank;
    let (class, length) = class_at(table, text, start);
    if class & LETTER != 0 {
        return letters(table, text, start, LETTER);
    }
    if class & NUMBER != 0 {
        return match (DIGIT, blank) {
            (true, 0) => start + length,
            (true, _) => start,
            (false, _) => class_run(table, text, start, |c| c & NUMBER != 0),
        };
    }
    if class & SPACE == 0 && length > 0 {
        if blank == 0 {
            let contraction = contraction::<false>(text, at);
            if contraction > 0 {
                return at + contraction;
            }
        }
        return others(table, text, start);
    }
    blanks(table, text, at, Blanks::Plain, if DIGIT { NUMBER } else { 0 })
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|` and
/// white space: `\s*[\r\n]+|\s+(?!\S)|\s+`, or with `END` `\s+$|\s*[\r\n]|\s+(?!\S)|\s`.
#[inline(always)]
pub fn cl100k<const DIGITS: usize, const END: bool>(table: &Table, text: &[u8], at: usize) -> usize {
    let (class, length) = class_at(table, text, at);
    if class & LETTER != 0 {
        return letters(table, text, at, LETTER);
    }
    if class & NUMBER != 0 {
        return numbers(table, text, at, DIGITS);
    }
    let contraction = contraction::<true>(text, at);
    if contraction > 0 {
        return at + contraction;
    }
    let (next, _) = class_at(table, text, at + length);
    if next & LETTER != 0 && class & NEWLINE == 0 {
        return letters(table, text, at + length, LETTER);
    }
    let blank = text[at] == b' ' && at + 1 < text.len() && is_other(next);
    if blank || class & SPACE == 0 {
        let end = others(table, text, at + usize::from(blank));
        return newlines(text, end);
    }
    blanks(table, text, at, if END { Blanks::LinesThenEnd } else { Blanks::Lines }, 0)
}

#[inline(always)]
fn newlines(text: &[u8], mut at: usize) -> usize {
    while matches!(text.get(at), Some(b'\r' | b'\n')) {
        at += 1;
    }
    at
}

/// Words that change case only upwards:
/// `[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+C|`
/// `[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*C|`
/// `\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`,
/// where C is `(?i:'s|'t|'re|'ve|'m|'ll|'d)?` with `CONTRACTIONS`, else nothing.
#[inline(always)]
pub fn o200k<const DIGITS: usize, const CONTRACTIONS: bool>(table: &Table, text: &[u8], at: usize) -> usize {
    let (class, length) = class_at(table, text, at);
    if class & NUMBER != 0 {
        return numbers(table, text, at, DIGITS);
    }
    let word = if class & LETTER != 0 {
        cased_word(table, text, at)
    } else if class & NEWLINE == 0 {
        match cased_word(table, text, at + length) {
            // A mark is also a word of its own: the first branch without its optional character.
            (_, false) if class & MARK != 0 => cased_word(table, text, at),
            word => word,
        }
    } else {
        (at, false)
    };
    let (end, first) = word;
    if first || end > at + length || class & LETTER != 0 {
        return end + if CONTRACTIONS { contraction::<true>(text, end) } else { 0 };
    }
    let (next, _) = class_at(table, text, at + length);
    let blank = text[at] == b' ' && at + 1 < text.len() && is_other(next);
    if blank || class & SPACE == 0 {
        let mut end = others(table, text, at + usize::from(blank));
        while matches!(text.get(end), Some(b'\r' | b'\n' | b'/')) {
            end += 1;
        }
        return end;
    }
    blanks(table, text, at, Blanks::Lines, 0)
}

/// End of a word from `at`, and whether the first of the two branches matched. The end is `at` for none.
#[inline(always)]
fn cased_word(table: &Table, text: &[u8], at: usize) -> (usize, bool) {
    // Not upper and not lower: modifier letters, other letters and marks, which both halves of a word take.
    let is_both = |class: u8| class & (UPPER | LOWER) == 0 && class & (LETTER | MARK) != 0;
    let (mut end, mut after_both) = (at, at);
    loop {
        let (class, length) = class_at(table, text, end);
        if class & LOWER != 0 {
            let end = class_run(table, text, end, |c| c & LOWER != 0 || is_both(c));
            return (end, true);
        }
        if is_both(class) {
            after_both = end + length;
        } else if class & UPPER == 0 {
            break;
        }
        end += length;
    }
    if after_both > at { (after_both, true) } else { (end, false) }
}

/// DeepSeek's three splits: `\p{N}{1,3}`, then `[一-龥぀-ゟ゠-ヿ]+`, then
/// `[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
#[inline(always)]
pub fn deepseek(table: &Table, text: &[u8], at: usize) -> usize {
    const WORD: u8 = LETTER | MARK;

    let (class, length) = class_at(table, text, at);
    if class & WORD != 0 {
        return letters(table, text, at, WORD);
    }
    if class == CJK_WORD || class == CJK_SYMBOL {
        return class_run(table, text, at, |c| c == class);
    }
    if class & NUMBER != 0 {
        return numbers(table, text, at, 3);
    }
    let start = at + length;
    let (next, _) = class_at(table, text, start);
    if class & SYMBOL != 0 && length == 1 && text.get(start).is_some_and(u8::is_ascii_alphabetic) {
        return ascii_letters(text, start);
    }
    if next & WORD != 0 && class & (NEWLINE | SYMBOL | CJK_OTHER) == 0 {
        return letters(table, text, start, WORD);
    }
    if class & SYMBOL != 0 || text[at] == b' ' && next & SYMBOL != 0 {
        return newlines(text, class_run(table, text, start, |c| c & SYMBOL != 0));
    }
    if class & SPACE != 0 {
        return blanks(table, text, at, Blanks::Lines, NUMBER | CJK_OTHER);
    }
    // Controls, format characters and unassigned ones match nothing but the optional character before a word: one
    // piece up to where something matches.
    let word = if class == CJK_OTHER { CJK_WORD } else { WORD };
    let is_word = |c: u8| if word == WORD { c & WORD != 0 } else { c == CJK_WORD };
    let mut end = at;
    loop {
        let (here, length) = class_at(table, text, end);
        if here != class || length == 0 {
            return end;
        }
        if is_word(class_at(table, text, end + length).0) {
            return if end == at { class_run(table, text, end + length, is_word) } else { end };
        }
        end += length;
    }
}

#[inline(always)]
fn ascii_letters(text: &[u8], mut at: usize) -> usize {
    while text.get(at).is_some_and(u8::is_ascii_alphabetic) {
        at += 1;
    }
    at
}

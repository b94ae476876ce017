//! The texts of JSON objects, one a line.

use std::borrow::Cow;
use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};

/// Appends the text at `key` of the first of `lines` to `out`; whether there is one, which a blank line has not, and
/// what follows the line. `is_text` says that `lines` are UTF-8.
pub fn add_text<'a>(
    lines: &'a [u8],
    is_text: bool,
    key: &str,
    out: &mut String,
) -> serde_json::Result<(bool, &'a [u8])> {
    let start = out.len();
    if is_text {
        // SAFETY: What is appended are parts of text, cut at ASCII characters, and characters, or it is taken back.
        let content = unsafe { out.as_mut_vec() };
        match add_plain_text(lines, key, content) {
            Some(after) => return Ok((true, after)),
            None => content.truncate(start),
        }
    }
    let (line, after) = lines.split_at(memchr::memchr(b'\n', lines).unwrap_or(lines.len()));
    let is_blank = line.trim_ascii().is_empty();
    if !is_blank {
        let line = simdutf8::compat::from_utf8(line).map_err(serde_json::Error::custom)?;
        let mut json = serde_json::Deserializer::from_str(line);
        Object { key, out }.deserialize(&mut json)?;
        json.end()?;
    }
    Ok((!is_blank, after))
}

/// As `add_text`, but several times as fast; leaves what is rare, and all faults, to serde.
fn add_plain_text<'a>(line: &'a [u8], key: &str, out: &mut Vec<u8>) -> Option<&'a [u8]> {
    let start = out.len();
    let mut is_found = false;
    let mut rest = after_blanks(line).strip_prefix(b"{")?;
    loop {
        let end = out.len();
        let value = add_string(after_blanks(rest), out)?;
        let is_key = out[end..] == *key.as_bytes();
        out.truncate(end);
        let value = after_blanks(after_blanks(value).strip_prefix(b":")?);
        rest = if is_key {
            out.truncate(start);
            is_found = true;
            add_string(value, out)?
        } else {
            let mut values = serde_json::Deserializer::from_slice(value).into_iter::<IgnoredAny>();
            values.next()?.ok()?;
            let (value, after) = value.split_at_checked(values.byte_offset())?;
            // A value may go on in the next line, a line's may not.
            (!value.contains(&b'\n')).then_some(after)?
        };
        rest = after_blanks(rest);
        match rest.strip_prefix(b",") {
            Some(more) => rest = more,
            None => {
                let end = after_blanks(rest.strip_prefix(b"}")?);
                let end = end.strip_prefix(b"\r").unwrap_or(end);
                return (is_found && matches!(end, [] | [b'\n', ..])).then_some(end);
            }
        }
    }
}

fn after_blanks(rest: &[u8]) -> &[u8] {
    &rest[rest.iter().take_while(|&&byte| byte == b' ').count()..]
}

/// Bytes that are looked at together.
const WINDOW: usize = 64;
/// A window, an escape that starts in it, and a window after that.
const REACH: usize = 2 * WINDOW + 1;

/// Appends the characters of the JSON string that `rest` starts with; what follows it.
fn add_string<'a>(rest: &'a [u8], out: &mut Vec<u8>) -> Option<&'a [u8]> {
    let mut rest = rest.strip_prefix(b"\"")?;
    loop {
        rest = &rest[add_windows(rest, out)..];
        match rest.split_first()? {
            (b'"', after) => return Some(after),
            (b'\\', after) => rest = add_escape(after, out)?,
            (0..b' ', _) => return None,
            (&byte, after) => {
                out.push(byte);
                rest = after;
            }
        }
    }
}

/// Appends windows, one or more if there are some, up to the end of the string, an escape of many characters, or a fault;
/// how many bytes that was.
fn add_windows(rest: &[u8], out: &mut Vec<u8>) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        use archzoo_simd::InstructionSet;
        if InstructionSet::current() == InstructionSet::Avx512
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
        {
            // SAFETY: This CPU has these instructions.
            return unsafe { add_windows_avx512(rest, out) };
        }
    }
    rest.first_chunk().map_or(0, |block| add_window(block, out))
}

/// As `add_window` again and again, but the backslashes of a window are taken out all at once.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,bmi1,popcnt")]
fn add_windows_avx512(rest: &[u8], out: &mut Vec<u8>) -> usize {
    use std::arch::x86_64::*;
    const ODD: u64 = 0xaaaa_aaaa_aaaa_aaaa;
    const LAST: u64 = 1 << 63;
    let load = |bytes: &[u8; WINDOW]| {
        // SAFETY: A window of bytes.
        unsafe { _mm512_loadu_epi8(bytes.as_ptr().cast()) }
    };
    let [low, high] = [load(&UNESCAPED[0]), load(&UNESCAPED[1])];
    let mut done = 0;
    while let Some(window) = rest[done..].first_chunk() {
        let bytes = load(window);
        let backslashes = _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(b'\\' as i8));
        // Of a run, the first, the third and so on start an escape. The difference tells them, and what follows a run of
        // odd length, which is escaped too.
        let told = (backslashes << 1 | ODD).wrapping_sub(backslashes) ^ ODD;
        let (starts, escaped) = (told & backslashes, told ^ backslashes);
        let characters = _mm512_permutex2var_epi8(low, bytes, high);
        let known = _mm512_test_epi8_mask(characters, characters) & !_mm512_movepi8_mask(bytes);
        let quotes = _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(b'"' as i8));
        let control = _mm512_cmplt_epu8_mask(bytes, _mm512_set1_epi8(b' ' as i8));
        let stops = quotes & !escaped | control | (escaped & !known) >> 1 | starts & LAST;
        let len = stops.trailing_zeros();
        let kept = !starts & !u64::MAX.checked_shl(len).unwrap_or(0);
        let text = _mm512_maskz_compress_epi8(kept, _mm512_mask_blend_epi8(escaped, bytes, characters));
        out.reserve(WINDOW);
        // SAFETY: There is room for a window, of which the first bytes count.
        unsafe {
            _mm512_storeu_epi8(out.as_mut_ptr().add(out.len()).cast(), text);
            out.set_len(out.len() + kept.count_ones() as usize);
        }
        // Constants, not `done += len`: the CPU predicts a branch, but would have to wait for `len`.
        match stops {
            0 => done += WINDOW,
            LAST => done += WINDOW - 1,
            _ => return done + len as usize,
        }
    }
    done
}

/// Appends a window, or what of it comes before the end of the string or an escape of many characters; how many bytes
/// that was.
fn add_window(block: &[u8; REACH], out: &mut Vec<u8>) -> usize {
    // Windows are appended whole, and cut where something else is found in them.
    let append = |from: usize, out: &mut Vec<u8>| out.extend_from_slice(&block[from..from + WINDOW]);
    let mut ends = ends(block);
    let (mut from, mut len) = (0, out.len());
    append(from, out);
    while ends != 0 {
        let at = ends.trailing_zeros() as usize;
        out.truncate(len + at - from);
        if block[at] != b'\\' {
            return at;
        }
        let Some(byte) = unescaped(block[at + 1]) else { return at };
        out.push(byte);
        (from, len) = (at + 2, out.len());
        append(from, out);
        ends &= u64::MAX.checked_shl(from as u32).unwrap_or(0);
    }
    let end = from.max(WINDOW);
    out.truncate(len + end - from);
    end
}

/// Where in the window a string may end or not be as it is written, as bits: quotes, backslashes, control characters.
fn ends(block: &[u8; REACH]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        let part = |i: usize| {
            // SAFETY: All these processors have SSE2; 16 bytes from `16 * i` on are in the block.
            unsafe {
                let bytes = _mm_loadu_si128(block[16 * i..16 * i + 16].as_ptr().cast());
                let quote = _mm_cmpeq_epi8(bytes, _mm_set1_epi8(b'"' as i8));
                let backslash = _mm_cmpeq_epi8(bytes, _mm_set1_epi8(b'\\' as i8));
                let control = _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(0x1f)), bytes);
                let any = _mm_or_si128(_mm_or_si128(quote, backslash), control);
                u64::from(_mm_movemask_epi8(any) as u32) << (16 * i)
            }
        };
        part(0) | part(1) | part(2) | part(3)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let is_end = |byte: u8| byte < b' ' || byte == b'"' || byte == b'\\';
        (0..WINDOW).fold(0, |ends, i| ends | u64::from(is_end(block[i])) << i)
    }
}

/// Appends the character of an escape whose backslash is left out; what follows it.
fn add_escape<'a>(escape: &'a [u8], out: &mut Vec<u8>) -> Option<&'a [u8]> {
    let (&letter, mut rest) = escape.split_first()?;
    if letter == b'u' {
        let character = character(&mut rest)?;
        out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    } else {
        out.push(unescaped(letter)?);
    }
    Some(rest)
}

/// What a backslash and this letter stand for.
const fn unescaped(letter: u8) -> Option<u8> {
    Some(match letter {
        b'n' => b'\n',
        b't' => b'\t',
        b'r' => b'\r',
        b'b' => 8,
        b'f' => 12,
        b'"' | b'\\' | b'/' => letter,
        _ => return None,
    })
}

/// The same of every ASCII character, 0 for none.
#[cfg(target_arch = "x86_64")]
const UNESCAPED: [[u8; WINDOW]; 2] = {
    let mut table = [[0; WINDOW]; 2];
    let mut letter = 0;
    while letter < 2 * WINDOW {
        if let Some(character) = unescaped(letter as u8) {
            table[letter / WINDOW][letter % WINDOW] = character;
        }
        letter += 1;
    }
    table
};

/// The character of the hexadecimal digits that follow a `\u`, and of a second half if this is the first of two.
fn character(rest: &mut &[u8]) -> Option<char> {
    let first = unit(rest)?;
    char::from_u32(first.into()).or_else(|| {
        *rest = rest.strip_prefix(b"\\u")?;
        char::decode_utf16([first, unit(rest)?]).next()?.ok()
    })
}

/// Four hexadecimal digits.
fn unit(rest: &mut &[u8]) -> Option<u16> {
    let (digits, after) = rest.split_first_chunk::<4>()?;
    *rest = after;
    let digit = |&digit: &u8| char::from(digit).to_digit(16);
    digits.iter().try_fold(0, |number, byte| Some(number << 4 | digit(byte)? as u16))
}

/// An object of which the text at `key` is wanted; the others are passed over.
struct Object<'a> {
    key: &'a str,
    out: &'a mut String,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a JSON object with text at '{}'", self.key)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let start = self.out.len();
        let mut is_found = false;
        while let Some(key) = map.next_key::<Cow<str>>()? {
            if key == self.key {
                self.out.truncate(start);
                map.next_value_seed(Text(self.out))?;
                is_found = true;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if is_found { Ok(()) } else { Err(A::Error::custom(format_args!("no text at '{}'", self.key))) }
    }
}

/// A string that is appended to another.
struct Text<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

//! The characters that GPT-2's files write bytes with.

/// The byte of a character.
#[inline]
pub fn byte_of(c: char) -> Option<u8> {
    let c = c as u32;
    match c {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(c as u8),
        0x100..=0x120 => Some((c - 0x100) as u8),
        0x121..=0x142 => Some((c - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Appends the bytes that a token is written for; false, and nothing is appended, if it is no such token.
pub fn decode(token: &str, out: &mut Vec<u8>) -> bool {
    let before = out.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(before);
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The character of a byte: itself where it is printable, else one from U+0100 on.
    fn char_of(byte: u8) -> char {
        match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            0..=0x20 => offset(u32::from(byte)),
            0x7f..=0xa0 => offset(0x21 + u32::from(byte) - 0x7f),
            0xad => offset(0x43),
        }
    }

    fn offset(n: u32) -> char {
        char::from_u32(0x100 + n).unwrap_or_default()
    }

    #[test]
    fn bytes_round_trip() {
        let mut chars: Vec<char> = (0..=255).map(char_of).collect();
        assert!((0..=255).all(|b| byte_of(char_of(b)) == Some(b)));
        chars.sort_unstable();
        chars.dedup();
        assert_eq!(chars.len(), 256);
        assert_eq!(char_of(b' '), 'Ġ');
        assert_eq!(char_of(b'\n'), 'Ċ');
        assert_eq!(('\0'..=char::MAX).filter(|&c| byte_of(c).is_some()).count(), 256);
    }
}

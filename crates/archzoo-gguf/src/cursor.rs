use crate::{Fault, wrong};

pub(crate) type Parsed<T> = Result<T, Fault>;

/// The first bytes of a file, and a place in them.
pub(crate) struct Cursor<'a> {
    content: &'a [u8],
    /// Bytes of the file.
    size: u64,
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(content: &'a [u8], size: u64) -> Self {
        Self { content, size: size.max(content.len() as u64), at: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Bytes of the file from here on.
    fn left(&self) -> u64 {
        self.size - self.at as u64
    }

    pub(crate) fn take(&mut self, length: usize) -> Parsed<&'a [u8]> {
        if length as u64 > self.left() {
            return wrong(format!("expected {length} more bytes at {}, found {}", self.at, self.left()));
        }
        let bytes = self.content[self.at..].get(..length).ok_or(Fault::Short)?;
        self.at += length;
        Ok(bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// Several of them, that the file can hold.
    pub(crate) fn arrays<const N: usize>(
        &mut self,
        count: usize,
    ) -> Parsed<impl Iterator<Item = [u8; N]> + use<'a, N>> {
        Ok(self.take(count * N)?.as_chunks::<N>().0.iter().copied())
    }

    pub(crate) fn u32(&mut self) -> Parsed<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Parsed<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things of at least `smallest` bytes each that the rest of the file can hold.
    pub(crate) fn fits(&self, count: u64, smallest: u64, what: &str) -> Parsed<usize> {
        match count.checked_mul(smallest) {
            Some(bytes) if bytes <= self.left() => Ok(count as usize),
            _ => wrong(format!(
                "expected at most {} {what} in what follows byte {}, found {count}",
                self.left() / smallest,
                self.at
            )),
        }
    }

    pub(crate) fn boolean(&mut self) -> Parsed<bool> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => wrong(format!("expected 0 or 1 for a boolean, found {other}")),
        }
    }

    pub(crate) fn string(&mut self) -> Parsed<&'a str> {
        let length = self.u64()?;
        let length = self.fits(length, 1, "bytes of a string")?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes)
            .or_else(|error| wrong(format!("expected a string of UTF-8 before byte {}: {error}", self.at)))
    }
}

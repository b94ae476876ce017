use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::io::Errno;

use crate::writer::create;

/// Bytes that the disk is told of as one.
const STEP: u64 = 32 << 20;

/// A new file that is written from its start; the disk takes what has come while more comes.
///
/// On the disks that this was measured on it was faster than writes past the page cache, of any size and number.
pub(crate) struct Stream {
    file: File,
    written: u64,
    /// Bytes that the disk was told of.
    started: u64,
}

impl Stream {
    /// Creates a file that takes the disk space of `most` bytes now, and ends with what was written.
    pub(crate) fn create(path: &Path, most: u64) -> io::Result<Self> {
        let file = create(path)?;
        reserve(&file, most)?;
        Ok(Self { file, written: 0, started: 0 })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        if self.written - self.started >= STEP {
            self.start();
        }
        Ok(())
    }

    /// The file with everything written, not yet through to the disk.
    pub(crate) fn finish(mut self) -> io::Result<File> {
        self.file.set_len(self.written)?;
        self.start();
        Ok(self.file)
    }

    fn start(&mut self) {
        start(&self.file, self.started, self.written - self.started);
        self.started = self.written;
    }
}

/// Takes disk space where the file system can: one that finds it while it writes is slower, and a full disk is
/// found before anything was written.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) | Err(Errno::NOTSUP | Errno::NOSYS | Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn reserve(_: &File, _: u64) -> io::Result<()> {
    Ok(())
}

/// Tells the disk to take bytes of a file. It is advice: what comes of it is seen when the file is synced.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn start(file: &File, from: u64, bytes: u64) {
    let _ = fadvise(file, from, std::num::NonZeroU64::new(bytes), Advice::DontNeed);
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn start(_: &File, _: u64, _: u64) {}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn any_length_in_any_parts() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..2 * STEP + 5).map(|i| ((i * i) >> 3) as u8).collect();
        for (i, length) in [0, 1, STEP as usize - 1, STEP as usize, bytes.len()].into_iter().enumerate() {
            let path = folder.path().join(i.to_string());
            let mut stream = Stream::create(&path, 3 * STEP).unwrap();
            for part in bytes[..length].chunks(1_234_567) {
                stream.write(part).unwrap();
            }
            stream.finish().unwrap();
            assert!(std::fs::read(path).unwrap() == bytes[..length]);
        }
    }
}

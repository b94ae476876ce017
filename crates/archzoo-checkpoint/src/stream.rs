use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::writer::create;

/// Bytes that are written as one.
const BUFFER: usize = 8 << 20;
/// What direct writes must be multiples of, in memory and in the file.
const ALIGNMENT: usize = 4096;

/// A new file that is written from its start, past the page cache where the file system can.
///
/// What goes through the cache has to be written back before a sync returns, which took twice as long on the
/// disk that this was measured on, and it would drive out what training reads.
pub(crate) struct Stream {
    file: File,
    is_direct: bool,
    memory: Vec<u8>,
    /// Where the aligned part of the memory starts.
    start: usize,
    filled: usize,
    written: u64,
}

impl Stream {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = create(path)?;
        let memory = vec![0; BUFFER + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Ok(Self { is_direct: set_direct(&file, true), file, memory, start, filled: 0, written: 0 })
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER - self.filled));
            let at = self.start + self.filled;
            self.memory[at..at + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// The file with everything written; what is written to it from now on need not be aligned.
    pub(crate) fn finish(mut self) -> io::Result<File> {
        self.stop_direct();
        self.flush()?;
        Ok(self.file)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut rest = self.start..self.start + self.filled;
        while !rest.is_empty() {
            match self.file.write_at(&self.memory[rest.clone()], self.written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    rest.start += count;
                    self.written += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // This file system wants another alignment, or the last write ended within a block.
                Err(error) if self.is_direct && error.kind() == io::ErrorKind::InvalidInput => {
                    self.stop_direct();
                }
                Err(error) => return Err(error),
            }
        }
        self.filled = 0;
        Ok(())
    }

    fn stop_direct(&mut self) {
        if self.is_direct {
            set_direct(&self.file, false);
            self.is_direct = false;
        }
    }
}

/// Whether writes go past the page cache from now on.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn set_direct(file: &File, direct: bool) -> bool {
    let set = |flags: OFlags| {
        let flags = if direct { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
        fcntl_setfl(file, flags)
    };
    fcntl_getfl(file).and_then(set).is_ok() && direct
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn set_direct(_: &File, _: bool) -> bool {
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn any_length_in_any_parts() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..2 * BUFFER + 5).map(|i| ((i * i) >> 3) as u8).collect();
        for (i, length) in
            [0, 1, ALIGNMENT, BUFFER - 1, BUFFER, BUFFER + 1, bytes.len()].into_iter().enumerate()
        {
            let path = folder.path().join(i.to_string());
            let mut stream = Stream::create(&path).unwrap();
            for part in bytes[..length].chunks(1_234_567) {
                stream.write(part).unwrap();
            }
            stream.finish().unwrap().write_all_at(&bytes[..length.min(100)], 0).unwrap();
            assert!(std::fs::read(path).unwrap() == bytes[..length]);
        }
    }
}

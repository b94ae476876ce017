use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::split::Scratch;
use crate::{Error, Splitter};

/// Bytes of a file that are split at once; the file's line ends bound them.
const BLOCK: usize = 1 << 20;
/// Blocks in memory at a time, for each thread.
const BLOCKS: usize = 4;

/// How often each distinct word occurs in the texts that were fed.
#[derive(Debug)]
pub struct WordCounts {
    splitter: Splitter,
    idle: Mutex<Vec<Worker>>,
}

/// What one thread has counted, and its automaton, which learns with use.
#[derive(Debug)]
struct Worker {
    counts: FxHashMap<Box<str>, u64>,
    scratch: Scratch,
}

impl WordCounts {
    /// Nothing counted yet.
    pub fn new(splitter: Splitter) -> Self {
        Self { splitter, idle: Mutex::default() }
    }

    /// Adds the words of some texts. No word spans two of them.
    pub fn feed(&self, texts: &[&str]) -> Result<(), Error> {
        texts.par_iter().try_for_each(|text| {
            let mut worker = self
                .workers()
                .pop()
                .unwrap_or_else(|| Worker { counts: FxHashMap::default(), scratch: self.splitter.scratch() });
            let counts = &mut worker.counts;
            let done = self.splitter.split(text, &mut worker.scratch, |word| match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(word.into(), 1);
                }
            });
            self.workers().push(worker);
            done
        })
    }

    fn workers(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the words of a UTF-8 file, read in blocks that end with a line, so of any size.
    pub fn feed_file(&self, path: &Path) -> Result<(), Error> {
        let fault = |message: String| Error::File(path.to_owned(), message);
        let mut file = File::open(path).map_err(|e| fault(format!("cannot open: {e}")))?;
        let room = BLOCK * BLOCKS * rayon::current_num_threads();
        let (mut buffer, mut offset) = (Vec::new(), 0);
        loop {
            let held = buffer.len();
            let read = Read::by_ref(&mut file)
                .take((room - held.min(room / 2)) as u64)
                .read_to_end(&mut buffer)
                .map_err(|e| fault(format!("cannot read: {e}")))?;
            let end = if read == 0 { buffer.len() } else { line_end(&buffer).unwrap_or(char_end(&buffer)) };
            let text = std::str::from_utf8(&buffer[..end])
                .map_err(|e| fault(format!("not UTF-8: byte {}", offset + e.valid_up_to())))?;
            self.feed(&blocks(text))?;
            buffer.drain(..end);
            offset += end;
            if read == 0 {
                return Ok(());
            }
        }
    }

    /// Calls `visit` with every distinct word and its count, in the order of the words' bytes.
    pub(crate) fn for_each_sorted(&self, mut visit: impl FnMut(&str, u64)) {
        let workers = self.workers();
        let mut words: Vec<(&str, u64)> =
            workers.iter().flat_map(|w| &w.counts).map(|(word, count)| (&**word, *count)).collect();
        words.par_sort_unstable();
        for same in words.chunk_by(|a, b| a.0 == b.0) {
            visit(same[0].0, same.iter().map(|(_, count)| count).sum());
        }
    }
}

/// Pieces of about [`BLOCK`] bytes, each up to a line's end where there is one.
fn blocks(mut text: &str) -> Vec<&str> {
    let mut blocks = Vec::new();
    while text.len() > BLOCK {
        let limit = char_end(&text.as_bytes()[..BLOCK]);
        let end = line_end(&text.as_bytes()[..limit]).unwrap_or(limit);
        let (block, rest) = text.split_at(end);
        blocks.push(block);
        text = rest;
    }
    blocks.push(text);
    blocks
}

fn line_end(bytes: &[u8]) -> Option<usize> {
    bytes.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1)
}

/// The end of the last whole character.
fn char_end(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn counter() -> WordCounts {
        WordCounts::new(Splitter::new(r" ?\w+|\s+").unwrap())
    }

    fn words(counts: &WordCounts) -> Vec<(String, u64)> {
        let mut words = Vec::new();
        counts.for_each_sorted(|word, count| words.push((word.to_owned(), count)));
        words
    }

    #[test]
    fn a_large_file_counts_like_its_text() {
        let line = "the quick brown fox 你好 jumps\n";
        let text = line.repeat(3 * BLOCK * BLOCKS / line.len());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, &text).unwrap();
        let (a, b) = (counter(), counter());
        a.feed_file(&path).unwrap();
        b.feed(&[&text]).unwrap();
        assert_eq!(words(&a), words(&b));
        assert_eq!(words(&a).len(), 7);
        std::fs::write(&path, "é".repeat(BLOCK * BLOCKS)).unwrap();
        a.feed_file(&path).unwrap();
        std::fs::write(&path, [b"ab\n".repeat(10), b"\xff".to_vec()].concat()).unwrap();
        let error = a.feed_file(&path).unwrap_err().to_string();
        assert!(error.ends_with("a.txt: not UTF-8: byte 30"), "{error}");
    }
}

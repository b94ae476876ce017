//! A byte-pair tokenizer's tables in a file, so that the next load need not build them.
//!
//! The file is named by the hash of the content it was made from, starts with [`MAGIC`] and that hash, and has a
//! checksum; one that does not fit is made anew.

use std::path::{Path, PathBuf};

use crate::bpe::Bpe;
use crate::error::{Error, Result};

/// The last byte is the version of the layout.
const MAGIC: [u8; 16] = *b"archzoo bpe \0\0\0\x08";
const HASH: usize = blake3::OUT_LEN;

/// A table that is written to a file and read back.
pub trait Table: Sized {
    /// Appends the table.
    fn write(&self, out: &mut Writer);
    /// The table that comes next; none if it is not sound.
    fn read(from: &mut Reader) -> Option<Self>;
}

/// Tables, one after the other, little-endian.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.0.extend_from_slice(bytes);
    }

    /// Appends numbers.
    pub fn words(&mut self, words: &[u32]) {
        self.0.extend_from_slice(&(4 * words.len() as u64).to_le_bytes());
        self.0.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    }

    /// Appends numbers.
    pub fn longs(&mut self, longs: &[u64]) {
        self.0.extend_from_slice(&(8 * longs.len() as u64).to_le_bytes());
        self.0.extend(longs.iter().flat_map(|w| w.to_le_bytes()));
    }
}

/// What is left of a file to read.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// Bytes.
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.0.split_first_chunk()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (bytes, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    /// Numbers.
    pub fn words(&mut self) -> Option<Vec<u32>> {
        let (words, rest) = self.bytes()?.as_chunks();
        rest.is_empty().then(|| words.iter().map(|w| u32::from_le_bytes(*w)).collect())
    }

    /// Numbers.
    pub fn longs(&mut self) -> Option<Vec<u64>> {
        let (longs, rest) = self.bytes()?.as_chunks();
        rest.is_empty().then(|| longs.iter().map(|w| u64::from_le_bytes(*w)).collect())
    }
}

/// The file for content of this hash.
pub fn path(folder: &Path, hash: &blake3::Hash) -> PathBuf {
    folder.join(format!("{}.archzoo", hash.to_hex()))
}

/// What belongs around the model, and the model. None if the file is missing or does not fit.
pub fn read(path: &Path, hash: &blake3::Hash) -> Option<(String, Bpe)> {
    let content = std::fs::read(path).ok()?;
    let rest = content.strip_prefix(&MAGIC)?.strip_prefix(hash.as_bytes())?;
    let (checksum, tables) = rest.split_at_checked(HASH)?;
    if blake3::hash(tables).as_bytes() != checksum {
        return None;
    }
    parse(tables)
}

fn parse(tables: &[u8]) -> Option<(String, Bpe)> {
    let mut reader = Reader(tables);
    let around = String::from_utf8(reader.bytes()?.to_vec()).ok()?;
    let model = Bpe::read(&mut reader)?;
    reader.0.is_empty().then_some((around, model))
}

/// Writes the file: whole or not at all.
pub fn write(path: &Path, hash: &blake3::Hash, around: &str, model: &Bpe) -> Result<()> {
    let mut tables = Writer::default();
    tables.bytes(around.as_bytes());
    model.write(&mut tables);
    let content = [&MAGIC, &hash.as_bytes()[..], blake3::hash(&tables.0).as_bytes(), &tables.0].concat();
    let failed = |e: std::io::Error| Error::new(format!("{}: {e}", path.display()));
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(failed)?;
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = std::fs::write(&temporary, content).and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        failed(e)
    })
}

/// Tables as they are in a file, and the ids that they give: for fuzzing, which finds no checksum.
#[cfg(fuzzing)]
pub fn encode_by(tables: &[u8], pieces: &[&[u8]]) -> Option<Vec<u32>> {
    let (_, model) = parse(tables)?;
    let mut all = Vec::new();
    let mut work = Box::default();
    model.encode_each(pieces.iter().copied(), &mut work, |_, ids| all.extend_from_slice(ids));
    Some(all)
}

/// The tables of the byte-pair model in a tokenizer's file.
#[cfg(fuzzing)]
pub fn tables_of(content: &[u8]) -> Option<Vec<u8>> {
    let parts = crate::json::read(content).ok()?;
    let crate::model::Model::Bpe(model) = &parts.model else { return None };
    let mut tables = Writer::default();
    tables.bytes(b"");
    model.write(&mut tables);
    Some(tables.0)
}

//! Tensors of GGUF files, which are dequantised while they are read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use archzoo_gguf::{Fault, Head, Kind, Metadata, Tensor};
use rayon::prelude::*;

use crate::dequantize::dequantize;
use crate::{Dtype, Error, Result};

/// Blocks that are read at once, and about as many bytes as they become.
const PIECE: usize = 1 << 20;

/// An open GGUF file whose head has been checked.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    /// The file's head.
    content: Vec<u8>,
    size: u64,
    tensors: Vec<Tensor>,
}

/// Of a tensor's elements once they are read: quantised ones are float32.
pub fn gguf_dtype(kind: Kind) -> Dtype {
    Dtype::from_name(kind.name()).unwrap_or(Dtype::F32)
}

impl Gguf {
    /// Opens and checks a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let kind = file.metadata().map_err(Error::io(path, "open"))?;
        if !kind.is_file() {
            return Err(Error::new(path, "expected a regular file"));
        }
        let size = kind.len();
        let end = |content: &[u8]| Head::parse(content, size).map(|head| head.end);
        let content = archzoo_gguf::read_start(&file, end).map_err(|message| Error::new(path, message))?;
        let head = Head::parse(&content, size).map_err(fault(path))?;
        let tensors = head.tensors;
        Ok(Self { path: path.to_owned(), file, content, size, tensors })
    }

    /// The file's metadata.
    pub fn metadata(&self) -> Result<Metadata<'_>> {
        Metadata::parse(&self.content, self.size).map_err(fault(&self.path))
    }

    /// In the order of the file's list.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Reads tensors into the bytes of their elements, on the threads of rayon's current pool: quantised ones as
    /// float32, others as they are.
    pub fn read_into(&self, requests: Vec<(&str, &mut [u8])>) -> Result<()> {
        let mut pieces = Vec::new();
        for (name, destination) in requests {
            let fault = |message: String| Error::tensor(&self.path, name, message);
            let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
            let tensor = tensor.ok_or_else(|| fault("expected in the file, found nowhere".into()))?;
            let element = gguf_dtype(tensor.kind).bits() / 8;
            let (bytes, found) = (tensor.elements * element, destination.len());
            if found as u64 != bytes {
                return Err(fault(format!("destination: expected {bytes} bytes, found {found}")));
            }
            let (elements, size) = tensor.kind.block();
            let width = elements * element as usize;
            let blocks = (PIECE / width).max(1);
            let starts = (tensor.start..).step_by(blocks * size);
            pieces.extend(
                destination.chunks_mut(blocks * width).zip(starts).map(|(out, start)| (tensor, start, out)),
            );
        }
        pieces.into_par_iter().try_for_each_init(Vec::new, |buffer, (tensor, start, out)| {
            self.read_piece(tensor, start, out, buffer).map_err(|error| Error {
                tensor: Some(tensor.name.clone()),
                ..Error::io(&self.path, "read")(error)
            })
        })
    }

    fn read_piece(
        &self,
        tensor: &Tensor,
        start: u64,
        out: &mut [u8],
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        let (elements, size) = tensor.kind.block();
        if !tensor.kind.is_quantized() {
            return self.file.read_exact_at(out, start);
        }
        let (out, _) = out.as_chunks_mut::<4>();
        buffer.resize(out.len() / elements * size, 0);
        self.file.read_exact_at(buffer, start)?;
        dequantize(tensor.kind, buffer, out);
        Ok(())
    }
}

fn fault(path: &Path) -> impl FnOnce(Fault) -> Error {
    move |fault| match fault {
        Fault::Wrong(message) => Error::new(path, message),
        Fault::Short => Error::new(path, "the file ends within its head"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Two rows of Q4_0 and three float32, all bytes 7.
    fn bytes() -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend([2u64, 0].map(u64::to_le_bytes).concat());
        for (name, shape, kind, start) in [("a", &[32u64, 2][..], 2u32, 64u64), ("b", &[3], 0, 0)] {
            out.extend((name.len() as u64).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(start.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + 100, 7);
        out
    }

    #[test]
    fn tensors_are_read_dequantised() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        std::fs::write(&path, bytes()).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        let (mut a, mut b) = (vec![0; 256], vec![0; 12]);
        gguf.read_into(vec![("a", &mut a), ("b", &mut b)]).unwrap();
        assert_eq!(b, [7; 12]);
        // 7 in both nibbles, less 8.
        let scale = archzoo_simd::math::from_f16(0x0707);
        let (low, high) = (-scale, scale * -8.0);
        let expected: Vec<u8> =
            (0..64).flat_map(|i| if i % 32 < 16 { low } else { high }.to_le_bytes()).collect();
        assert_eq!(a, expected);
        let error = gguf.read_into(vec![("a", &mut b)]).unwrap_err().to_string();
        assert!(error.contains("a.gguf: tensor \"a\": destination: expected 256 bytes, found 12"), "{error}");
        assert!(gguf.read_into(vec![("d", &mut b)]).is_err());
    }

    #[test]
    fn numbers_keep_their_dtype() {
        for id in 0..50 {
            let Ok(kind) = Kind::from_id(id) else { continue };
            let (elements, size) = kind.block();
            let (bits, stored) = (gguf_dtype(kind).bits() as usize * elements, 8 * size);
            assert!(if kind.is_quantized() { bits > stored } else { bits == stored }, "{}", kind.name());
            assert!(stored <= 64 * elements);
        }
    }
}

use std::hash::Hasher;
use std::sync::atomic::{AtomicU64, Ordering};

use twox_hash::XxHash3_64;

use crate::cast::{self, Cast};
use crate::checksum::{self, BLOCK};
use crate::reader::Shard;
use crate::spread::spread;
use crate::{Dtype, Error, Reader, Result, TensorInfo};

/// What is cast or hashed goes through this many bytes, which stay in a core's cache.
const CHUNK: usize = 256 << 10;

/// A tensor to read, or a box of it.
#[derive(Debug)]
pub struct Request<'a> {
    /// Its name.
    pub name: &'a str,
    /// Where its elements go: as long as what is read.
    pub destination: &'a mut [u8],
    /// Start and end on the first dimensions; all of the others.
    pub ranges: &'a [(u64, u64)],
    /// Element type of the destination, if not that of the tensor.
    pub dtype: Option<Dtype>,
}

/// A checked request.
struct Plan<'a> {
    name: &'a str,
    tensor: &'a TensorInfo,
    shard: &'a Shard,
    selection: Selection,
    cast: Option<(Cast, Dtype)>,
}

/// Bytes of a tensor that are wanted: equally long runs, numbered in row-major order.
struct Selection {
    /// Length of a run.
    run: u64,
    /// Where the first run starts, from the tensor's start.
    first: u64,
    /// Count and distance of the runs along each outer dimension.
    outer: Vec<(u64, u64)>,
}

impl Selection {
    fn new(tensor: &TensorInfo, ranges: &[(u64, u64)]) -> std::result::Result<Self, String> {
        let shape = &tensor.shape;
        if ranges.len() > shape.len() {
            let found = if shape.is_empty() { "a scalar".to_owned() } else { format!("{shape:?}") };
            return Err(format!("range: expected at least {} dimensions, found {found}", ranges.len()));
        }
        for (dim, (&(start, end), &size)) in ranges.iter().zip(shape).enumerate() {
            if start > end || end > size {
                return Err(format!(
                    "range of dimension {dim}: expected start <= end <= {size}, found {start}..{end}"
                ));
            }
        }
        let parts = |&(dim, &(start, end)): &(usize, &(u64, u64))| (start, end) != (0, shape[dim]);
        let Some((inner, &(start, end))) = ranges.iter().enumerate().rfind(parts) else {
            return Ok(Self { run: tensor.bytes, first: 0, outer: Vec::new() });
        };
        // Only the distance along an outer dimension may be that of a tensor without elements.
        let step = |dim: usize| tensor.dtype.bytes(&shape[dim + 1..]);
        let row = step(inner)
            .ok_or_else(|| format!("range: expected parts of whole bytes, found {}", tensor.dtype))?;
        let mut selection = Self { run: (end - start) * row, first: start * row, outer: Vec::new() };
        for (dim, &(start, end)) in ranges[..inner].iter().enumerate() {
            let step = step(dim).unwrap_or(0);
            selection.first += start * step;
            selection.outer.push((end - start, step));
        }
        Ok(selection)
    }

    fn bytes(&self) -> u64 {
        self.outer.iter().map(|&(count, _)| count).product::<u64>() * self.run
    }

    /// Byte `at` of the selection: where it is in the tensor, and how many bytes follow it in its run.
    fn locate(&self, at: u64) -> (u64, u64) {
        let (mut index, within) = (at / self.run, at % self.run);
        let mut offset = self.first + within;
        for &(count, step) in self.outer.iter().rev() {
            offset += index % count * step;
            index /= count;
        }
        (offset, self.run - within)
    }
}

/// What one thread reads at a time: a block of a selection.
struct Piece<'p, 'a> {
    plan: &'p Plan<'a>,
    /// Its first byte in the selection.
    start: u64,
    destination: &'a mut [u8],
}

impl Reader {
    /// Reads tensors, or boxes of them, straight into their destinations, on the threads of rayon's current
    /// pool. All requests are checked before the first byte is read.
    ///
    /// With `verify` the tensors that are read as a whole and have a checksum are checked against it.
    pub fn read_into(&self, requests: Vec<Request>, verify: bool) -> Result<()> {
        let mut plans = Vec::with_capacity(requests.len());
        let mut destinations = Vec::with_capacity(requests.len());
        for request in requests {
            plans.push(self.plan(&request)?);
            destinations.push(request.destination);
        }
        let mut pieces = Vec::with_capacity(plans.len());
        for (plan, destination) in plans.iter().zip(destinations) {
            let (from, to) = plan.widths();
            let size = BLOCK / from * to;
            let blocks = destination.chunks_mut(size).zip((0..).step_by(BLOCK));
            pieces.extend(blocks.map(|(destination, start)| Piece { plan, start, destination }));
        }
        pieces.sort_unstable_by_key(|piece| {
            (
                std::ptr::from_ref(piece.plan.shard),
                piece.plan.tensor.start + piece.plan.selection.first,
                piece.start,
            )
        });
        // A container has checksums of its own.
        let checked = |plan: &Plan| {
            verify && plan.is_whole() && plan.tensor.checksum.is_some() && !plan.tensor.is_compressed()
        };
        let hashes: Vec<(&Plan, u64)> = spread(
            pieces,
            |piece| piece.destination.len() as u64,
            |piece| {
                let plan = piece.plan;
                piece.read(checked(plan), &self.bytes_read).map(|hash| (plan, hash))
            },
        )?;
        // The blocks of a tensor follow one another.
        for blocks in hashes.chunk_by(|(a, _), (b, _)| std::ptr::eq(*a, *b)) {
            if let Some(&(plan, _)) = blocks.first().filter(|(plan, _)| checked(plan)) {
                let blocks: Vec<u64> = blocks.iter().map(|&(_, hash)| hash).collect();
                plan.shard.compare(plan.tensor, checksum::of_blocks(&blocks))?;
            }
        }
        Ok(())
    }

    fn plan<'a>(&'a self, request: &Request<'a>) -> Result<Plan<'a>> {
        let (tensor, path) = self.tensor(request.name)?;
        let fault = |message: String| Error::tensor(path, request.name, message);
        let shard = self.shard_of(request.name).ok_or_else(|| fault("expected in a shard".into()))?;
        let selection = Selection::new(tensor, request.ranges).map_err(fault)?;
        let mut bytes = selection.bytes();
        let cast = match request.dtype.filter(|&to| to != tensor.dtype) {
            None => None,
            Some(to) => {
                let found = cast::between(tensor.dtype, to).ok_or_else(|| {
                    fault(format!("expected a cast from {} to {to}, found none", tensor.dtype))
                })?;
                bytes = bytes * to.bits() / tensor.dtype.bits();
                Some((found, to))
            }
        };
        if request.destination.len() as u64 != bytes {
            let found = request.destination.len();
            return Err(fault(format!("destination: expected {bytes} bytes, found {found}")));
        }
        Ok(Plan { name: request.name, tensor, shard, selection, cast })
    }

    /// Reads every byte, on the threads of rayon's current pool, and compares files with the manifest and
    /// tensors with their checksums, where there are such. What is wrong, in the order of the files.
    pub fn verify(&self) -> Vec<Error> {
        let mut faults = self.verify_heads();
        let tensors =
            self.shards.iter().flat_map(|shard| shard.header.tensors.iter().map(move |t| (shard, t)));
        let blocks: Vec<(&Shard, &TensorInfo, u64)> = tensors
            .flat_map(|(shard, tensor)| {
                (0..tensor.stored.max(1)).step_by(BLOCK).map(move |start| (shard, tensor, start))
            })
            .collect();
        let length = |tensor: &TensorInfo, start: u64| (tensor.stored - start).min(BLOCK as u64);
        let hash = |(shard, tensor, start): (&Shard, &TensorInfo, u64)| {
            let (mut hash, mut buffer) = (XxHash3_64::new(), vec![0; CHUNK]);
            let end = start + length(tensor, start);
            for at in (start..end).step_by(CHUNK) {
                let chunk = &mut buffer[..(end - at).min(CHUNK as u64) as usize];
                shard.read(chunk, tensor.start + at, &tensor.name, &self.bytes_read)?;
                hash.write(chunk);
            }
            Ok(hash.finish())
        };
        // A block that cannot be read is a fault of its tensor, not the end.
        let hashes = spread(
            blocks.clone(),
            |&(_, tensor, start)| length(tensor, start),
            |block| Ok::<_, std::convert::Infallible>(hash(block)),
        );
        let mut hashes = match hashes {
            Ok(hashes) => hashes.into_iter(),
        };
        for blocks in blocks.chunk_by(|(_, a, _), (_, b, _)| std::ptr::eq(*a, *b)) {
            let Some(&(shard, tensor, _)) = blocks.first() else { continue };
            let found: Result<Vec<u64>> =
                hashes.by_ref().take(blocks.len()).collect::<Vec<_>>().into_iter().collect();
            match found {
                Err(error) => faults.push(error),
                Ok(found) if shard.header.has_checksums => {
                    faults.extend(shard.compare(tensor, checksum::of_blocks(&found)).err());
                }
                Ok(_) => {}
            }
        }
        faults
    }
}

impl Plan<'_> {
    /// Bits of an element in the file and in the destination, if these differ.
    fn widths(&self) -> (usize, usize) {
        self.cast.map_or((1, 1), |(_, to)| (self.tensor.dtype.bits() as usize, to.bits() as usize))
    }

    fn is_whole(&self) -> bool {
        self.selection.bytes() == self.tensor.bytes
    }
}

impl Piece<'_, '_> {
    /// Reads, casts and hashes; the hash is 0 when none is asked for.
    fn read(self, hashed: bool, count: &AtomicU64) -> Result<u64> {
        let Self { plan, start: mut at, destination } = self;
        let mut hash = hashed.then(XxHash3_64::new);
        let mut buffer = Vec::new();
        let container = plan.tensor.is_compressed().then(|| plan.shard.container(plan.tensor)).transpose()?;
        let fill = |bytes: &mut [u8], offset: u64| match &container {
            None => plan.shard.read(bytes, plan.tensor.start + offset, plan.name, count),
            Some(container) => {
                let result = container.read_exact_at(bytes, offset);
                count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                result.map_err(|error| plan.shard.unreadable(plan.name, error))
            }
        };
        let mut rest = destination;
        while !rest.is_empty() {
            let (offset, run) = plan.selection.locate(at);
            let limit = if hashed || plan.cast.is_some() { CHUNK as u64 } else { BLOCK as u64 };
            let read = run.min(limit) as usize;
            let (from, to) = plan.widths();
            let written = (read * to / from).min(rest.len());
            let read = written * from / to;
            let (now, later) = rest.split_at_mut(written);
            let raw: &[u8] = match plan.cast {
                None => {
                    fill(now, offset)?;
                    now
                }
                Some((cast, _)) => {
                    buffer.resize(read, 0);
                    fill(&mut buffer, offset)?;
                    cast(&buffer, now);
                    &buffer
                }
            };
            if let Some(hash) = &mut hash {
                hash.write(raw);
            }
            at += read as u64;
            rest = later;
        }
        Ok(hash.map_or(0, |hash| hash.finish()))
    }
}

impl Shard {
    /// Compares the checksum of what was read with the header's.
    fn compare(&self, tensor: &TensorInfo, found: u64) -> Result<()> {
        let message = match tensor.checksum {
            Some(expected) if expected == found => return Ok(()),
            Some(expected) => {
                let (expected, found) = (checksum::hex(expected), checksum::hex(found));
                format!("damaged: expected checksum {expected}, found {found}")
            }
            None => "expected a checksum in the header, as others have, found none".to_owned(),
        };
        Err(Error::tensor(&self.path, &tensor.name, message))
    }
}

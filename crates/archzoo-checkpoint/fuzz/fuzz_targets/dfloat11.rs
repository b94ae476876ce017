#![no_main]
//! Buffers, also damaged ones, are read or refused; weights come back from theirs.

use std::sync::LazyLock;

use archzoo_checkpoint::{Buffers, Encoded, decode_dfloat11, encode_dfloat11};
use libfuzzer_sys::fuzz_target;

/// bfloat16 whose exponents vary as `seed` says.
fn weights(elements: usize, seed: u32) -> Vec<u8> {
    let mut state = seed + 1;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u8
    };
    (0..elements).flat_map(|_| [random(), 0x3c | (random() & random() & 0x83) >> (seed % 8)]).collect()
}

/// Weights and their buffers: one block, several, short and long codes.
static GROUPS: LazyLock<Vec<(Vec<u8>, [Vec<u8>; 5])>> = LazyLock::new(|| {
    let sizes = [3000, 9000, 20_000, 40_000];
    let groups = (0..).zip(sizes).filter_map(|(seed, elements)| {
        let bytes = weights(elements, seed);
        encode_dfloat11(&[&bytes]).map(|encoded| (bytes, owned(&encoded)))
    });
    groups.collect()
});

fn owned(encoded: &Encoded) -> [Vec<u8>; 5] {
    let b = encoded.buffers();
    [b.luts, b.encoded_exponent, b.sign_mantissa, b.output_positions, b.gaps].map(<[u8]>::to_vec)
}

fn decode(buffers: &[Vec<u8>; 5], elements: usize, split: usize) -> Option<Vec<u8>> {
    let [luts, encoded_exponent, sign_mantissa, output_positions, gaps] =
        buffers.each_ref().map(Vec::as_slice);
    let buffers = Buffers { luts, encoded_exponent, sign_mantissa, output_positions, gaps };
    let mut out = vec![0; 2 * elements];
    let (first, second) = out.split_at_mut(2 * (elements * split / 256));
    decode_dfloat11(buffers, &mut [first, second]).ok()?;
    Some(out)
}

fuzz_target!(
    init: rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().unwrap(),
    |data: &[u8]| {
        let Some((&[kind, choice, split], data)) = data.split_first_chunk::<3>() else { return };
        let split = usize::from(split);
        if kind % 8 > 1 {
            let (bytes, buffers) = &GROUPS[usize::from(choice) % GROUPS.len()];
            let mut buffers = buffers.clone();
            for edit in data.as_chunks::<4>().0 {
                let buffer = &mut buffers[usize::from(edit[2]) % 5];
                let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % buffer.len().max(1);
                match edit[2] / 5 % 8 {
                    0 => buffer.truncate(at),
                    1 => buffer.insert(at, edit[3]),
                    _ if at < buffer.len() => buffer[at] ^= edit[3],
                    _ => {}
                }
            }
            let found = decode(&buffers, bytes.len() / 2, split);
            assert!(data.len() >= 4 || found.as_ref() == Some(bytes));
            return;
        }
        if kind % 8 == 1 {
            // Any tables and blocks of any stream.
            let Some((luts, rest)) = data.split_at_checked(256 * (usize::from(choice) % 18 + 1)) else { return };
            let (stream, rest) = rest.split_at(rest.len() * split / 256);
            let (blocks, n) = (stream.len().div_ceil(4096), rest.len() as u32);
            let positions: Vec<u8> =
                (0..=blocks as u32).flat_map(|i| (n * i / blocks.max(1) as u32).to_le_bytes()).collect();
            let gaps = vec![choice; 320 * blocks];
            decode(&[luts.into(), stream.into(), rest.into(), positions, gaps], rest.len(), split);
            return;
        }
        // Repeated, so that it gets smaller.
        let mut bytes = data.repeat(1 + 8192 / data.len().max(1));
        bytes.truncate(bytes.len() / 2 * 2);
        let Some(encoded) = encode_dfloat11(&[&bytes]) else { return };
        assert!(decode(&owned(&encoded), bytes.len() / 2, split) == Some(bytes));
    }
);

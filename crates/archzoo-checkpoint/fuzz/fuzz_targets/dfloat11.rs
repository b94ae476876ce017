#![no_main]
//! Weights come back from their buffers; buffers are read or refused, also when they are damaged.

use archzoo_checkpoint::{Buffers, decode_dfloat11, encode_dfloat11};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&[tables, split, at, flip], data)) = data.split_first_chunk::<4>() else { return };
    // Any tables and one block of any stream.
    let tables = 256 * (usize::from(tables) % 18 + 1);
    if let Some((luts, rest)) = data.split_at_checked(tables) {
        let (stream, sign_mantissa) = rest.split_at(rest.len() * usize::from(split) / 256);
        let blocks = stream.len().div_ceil(4096);
        let n = sign_mantissa.len() as u32;
        let positions: Vec<u8> =
            (0..=blocks as u32).flat_map(|i| (n * i / blocks.max(1) as u32).to_le_bytes()).collect();
        let gaps = vec![flip; 320 * blocks];
        let buffers = Buffers { luts, encoded_exponent: stream, sign_mantissa, output_positions: &positions, gaps: &gaps };
        let _ = decode_dfloat11(buffers, &mut [&mut vec![0; 2 * sign_mantissa.len()]]);
    }

    // Repeated, so that it gets smaller.
    let mut bytes = data.repeat(1 + 8192 / data.len().max(1));
    bytes.truncate(bytes.len() / 2 * 2);
    let Some(mut encoded) = encode_dfloat11(&[&bytes]) else { return };
    let mut out = vec![0; bytes.len()];
    let (first, second) = out.split_at_mut(bytes.len() / 512 * usize::from(split) * 2);
    decode_dfloat11(encoded.buffers(), &mut [first, second]).unwrap();
    assert!(out == bytes);
    let buffers = [
        &mut encoded.luts,
        &mut encoded.encoded_exponent,
        &mut encoded.output_positions,
        &mut encoded.gaps,
    ];
    let place = usize::from(at) / 4 * 61;
    let buffer = buffers.into_iter().nth(usize::from(at) % 4).unwrap();
    let end = buffer.len();
    buffer[place % end] ^= flip;
    let _ = decode_dfloat11(encoded.buffers(), &mut [&mut out]);
});

#![no_main]
//! A container, also a damaged one, is read or refused; bytes come back from theirs.

use std::sync::LazyLock;

use archzoo_checkpoint::{Dtype, compress, decompress};
use libfuzzer_sys::fuzz_target;

/// Compressible weights: exponents and signs vary as `seed` says, mantissas a lot.
fn weights(width: usize, elements: usize, seed: u32) -> Vec<u8> {
    let mut state = seed + 1;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u8
    };
    (0..elements * width)
        .map(|i| {
            if i % width == width - 1 { 0x3c | (random() & random() & 0x83) >> (seed % 8) } else { random() }
        })
        .collect()
}

/// Containers of every type and of several sizes, with what they hold.
static CONTAINERS: LazyLock<Vec<(Dtype, Vec<u8>, Vec<u8>)>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for (name, width) in [("BF16", 2), ("F32", 4), ("F16", 2), ("F8_E4M3", 1)] {
        let dtype = Dtype::from_name(name).unwrap();
        for (seed, elements) in (0..).zip([1000, 1500, 4097, 65_536 + 700]) {
            let bytes = weights(width, elements, seed);
            if let Some(stored) = compress(dtype, &bytes) {
                all.push((dtype, stored, bytes));
            }
        }
    }
    all
});

fn damaged(container: &[u8], edits: &[u8]) -> Vec<u8> {
    let mut out = container.to_vec();
    for edit in edits.as_chunks::<4>().0 {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % out.len().max(1);
        match edit[2] % 8 {
            0 => out.truncate(at),
            1 => out.insert(at, edit[3]),
            // Near the start, where the tables are.
            2..=4 if at % 512 < out.len() => out[at % 512] = edit[3],
            _ if at < out.len() => out[at] ^= edit[3],
            _ => {}
        }
    }
    out
}

fuzz_target!(
    init: rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().unwrap(),
    |data: &[u8]| {
        let Some((&[choice, kind], data)) = data.split_first_chunk::<2>() else { return };
        if kind % 8 > 0 {
            let (dtype, container, bytes) = &CONTAINERS[usize::from(choice) % CONTAINERS.len()];
            let mut out = vec![0; bytes.len()];
            let container = damaged(container, data);
            if decompress(*dtype, &container, &mut out).is_ok() && data.len() < 4 {
                assert!(out == *bytes);
            }
            return;
        }
        // Repeated, so that it gets smaller.
        let bytes = data.repeat(1 + 4096 / data.len().max(1));
        let dtype = CONTAINERS[usize::from(choice) % CONTAINERS.len()].0;
        let Some(stored) = compress(dtype, &bytes) else { return };
        let mut out = vec![0; bytes.len()];
        decompress(dtype, &stored, &mut out).unwrap();
        assert!(out == bytes);
    }
);

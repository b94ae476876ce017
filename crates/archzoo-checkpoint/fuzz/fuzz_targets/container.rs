#![no_main]
//! Bytes come back from their container; a container is read or refused, also when it is damaged.

use archzoo_checkpoint::{Dtype, compress, decompress};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&[choice, length, at, flip], data)) = data.split_first_chunk::<4>() else { return };
    let name = ["BF16", "F32", "F16", "F8_E4M3"][choice as usize % 4];
    let dtype = Dtype::from_name(name).unwrap();
    let mut out = vec![0; usize::from(length) << 4];
    let _ = decompress(dtype, data, &mut out);

    // Repeated, so that it gets smaller.
    let bytes = data.repeat(1 + 4096 / data.len().max(1));
    let Some(mut stored) = compress(dtype, &bytes) else { return };
    let mut out = vec![0; bytes.len()];
    decompress(dtype, &stored, &mut out).unwrap();
    assert!(out == bytes);
    let end = stored.len();
    stored[usize::from(at) * 131 % end] ^= flip;
    if decompress(dtype, &stored, &mut out).is_ok() {
        assert!(out == bytes);
    }
});

#![no_main]
//! A header is read or refused; what one that is read says holds for a file of that size.

use std::path::Path;

use archzoo_checkpoint::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (size, path) = (data.len() as u64, Path::new("a"));
    let Some((prefix, rest)) = data.split_first_chunk::<8>() else { return };
    let Ok(length) = Header::length(*prefix, size, path) else { return };
    let Some(json) = rest.get(..length as usize) else { panic!("a header longer than the file") };
    if let Ok(header) = Header::parse(json, size, path) {
        let mut end = 8 + length;
        for tensor in &header.tensors {
            assert_eq!(tensor.start, end);
            assert_eq!(tensor.dtype.bytes(&tensor.shape), Some(tensor.bytes));
            end += tensor.bytes;
        }
        assert_eq!(end, size);
    }
});

#![no_main]
//! An index is read or refused; no file name of one that is read leads out of its folder.

use std::path::{Component, Path};

use archzoo_checkpoint::parse_index;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(files) = parse_index(data, Path::new("model.safetensors.index.json")) {
        for file in files.values() {
            let mut parts = Path::new(file).components();
            assert!(matches!(parts.next(), Some(Component::Normal(_))), "{file:?}");
            assert!(parts.next().is_none(), "{file:?}");
        }
    }
});

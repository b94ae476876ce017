#![no_main]
//! The vocabulary of a GGUF file is read or refused; one that is read encodes and decodes without a panic.

use archzoo_tokenizer::{Options, Tokenizer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::from_bytes(&[b"GGUF", data].concat(), None) {
        let mut ids = Vec::new();
        if tokenizer.encode("Hello, world 123 é中\n", Options::default(), &mut ids).is_ok() {
            let _ = tokenizer.decode(&ids, false);
        }
    }
});

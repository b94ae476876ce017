#![no_main]
//! A rank file is read or refused.

use archzoo_tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Tokenizer::from_bytes(data, Some("cl100k"));
});

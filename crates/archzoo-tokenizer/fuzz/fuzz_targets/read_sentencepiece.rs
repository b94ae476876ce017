#![no_main]
//! A SentencePiece file is read or refused; one that is read encodes, decodes and streams without a panic.

use archzoo_tokenizer::{Options, Tokenizer};
use libfuzzer_sys::fuzz_target;

const TEXT: &str = "  Hello,  world 123 é中\n▁▁ aaaa<unk> \0\u{301}";

fuzz_target!(|data: &[u8]| {
    if !data.starts_with(b"\n") {
        return;
    }
    if let Ok(tokenizer) = Tokenizer::from_bytes(data, None) {
        let mut ids = Vec::new();
        tokenizer.encode(TEXT, Options::default(), &mut ids).unwrap();
        assert_eq!(tokenizer.count(TEXT, Options::default()).unwrap(), ids.len());
        ids.extend(0..tokenizer.vocab_size().min(20) as u32);
        let text = tokenizer.decode(&ids, false).unwrap();
        if let Some(mut stream) = tokenizer.stream() {
            let mut parts: String =
                ids.iter().map(|&id| tokenizer.decode_next(id, false, &mut stream).unwrap()).collect();
            parts += &stream.finish();
            assert_eq!(parts, text);
        }
    }
});

#![no_main]
//! Any text comes back from its ids, in every family, with a vocabulary of bytes and some merges.

mod base64;

use std::sync::OnceLock;

use archzoo_tokenizer::{Options, PATTERN_NAMES, Tokenizer};
use base64::base64;
use libfuzzer_sys::fuzz_target;

fn tokenizers() -> &'static [Tokenizer] {
    static ALL: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let words = ["th", "he", "the", " t", " the", "aa", "aaaa", "  ", "    ", "\n\n", "é", "中", "文"];
        tokens.extend(words.map(|word| word.as_bytes().to_vec()));
        let lines: Vec<String> =
            tokens.iter().zip(0..).map(|(t, rank)| format!("{} {rank}\n", base64(t))).collect();
        PATTERN_NAMES.map(|name| Tokenizer::from_bytes(lines.concat().as_bytes(), Some(name)).unwrap()).into()
    })
}

fuzz_target!(|text: &str| {
    for tokenizer in tokenizers() {
        let mut ids = Vec::new();
        tokenizer.encode(text, Options::default(), &mut ids).unwrap();
        assert_eq!(tokenizer.decode_bytes(&ids, false).unwrap(), text.as_bytes());
        assert_eq!(tokenizer.count(text, Options::default()).unwrap(), ids.len());
    }
});

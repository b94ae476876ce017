#![no_main]
//! Any ids become text or are refused, with every kind of decoder; text that comes in parts is the text of all.

use std::sync::OnceLock;

use archzoo_tokenizer::{DecodeStream, Tokenizer};
use libfuzzer_sys::fuzz_target;

const VOCAB: &str = r###""vocab": {"<unk>": 0, "<0xE4>": 1, "<0xB8>": 2, "<0xAD>": 3, "▁": 4, "▁a": 5, "##b": 6, "n't": 7, " ": 8,
    "é": 9, ".": 10, "<0x0": 11, "ab": 12, "[CLS]": 13}"###;
const DECODERS: [&str; 4] = [
    "null",
    r#"{"type": "WordPiece", "prefix": "\u0023\u0023", "cleanup": true}"#,
    r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}"#,
    r#"{"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 1}]}"#,
];

fn tokenizers() -> &'static [Tokenizer] {
    static ALL: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    ALL.get_or_init(|| {
        let model = |decoder| {
            let model = format!(r#""model": {{"type": "BPE", {VOCAB}, "merges": []}}"#);
            format!(r#"{{"decoder": {decoder}, {model}}}"#)
        };
        let mut all: Vec<Tokenizer> =
            DECODERS.iter().map(|d| Tokenizer::from_bytes(model(d).as_bytes(), None).unwrap()).collect();
        let bytes = (0..=255u8).map(|b| format!("{}{}== {b}\n", digit(b >> 2), digit(b << 4 & 0x3f)));
        all.push(Tokenizer::from_bytes(bytes.collect::<String>().as_bytes(), Some("qwen")).unwrap());
        all
    })
}

fn digit(value: u8) -> char {
    char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[usize::from(value)])
}

fuzz_target!(|data: &[u8]| {
    for tokenizer in tokenizers() {
        let size = tokenizer.vocab_size() as u32;
        let ids: Vec<u32> =
            data.chunks(2).map(|c| c.iter().fold(0, |n, &b| n << 8 | u32::from(b)) % (size + 1)).collect();
        let text = tokenizer.decode(&ids, true);
        assert_eq!(text.is_err(), ids.contains(&size) || tokenizer.decode_bytes(&ids, true).is_err());
        let _ = tokenizer.decode(&[u32::MAX], false);
    }
    let mut stream = DecodeStream::default();
    let mut text: String = data.chunks(3).map(|part| stream.push(part)).collect();
    text += &stream.finish();
    assert_eq!(text, String::from_utf8_lossy(data));
});

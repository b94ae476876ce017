#![no_main]
//! A table of replacements is read or refused, and one that is read replaces text, in both forms.

mod base64;

use archzoo_tokenizer::{Options, Tokenizer};
use base64::base64;
use libfuzzer_sys::fuzz_target;

fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = content.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(content);
    out
}

fn encode(file: &[u8], text: &str) -> bool {
    let mut ids = Vec::new();
    Tokenizer::from_bytes(file, None)
        .is_ok_and(|tokenizer| tokenizer.encode(text, Options::default(), &mut ids).is_ok())
}

// A text, a number of units below 256, and the table's units and replacements.
fuzz_target!(|input: (&str, u8, &[u8])| {
    let (text, units, content) = input;
    let size = 4 * u32::from(units);
    let map = [&size.to_le_bytes(), content].concat();
    let json = format!(
        r#"{{"normalizer": {{"type": "Precompiled", "precompiled_charsmap": "{}"}}, "model": {{"type": "Unigram",
            "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}}}"#,
        base64(&map)
    );
    let unknown = [field(1, b"<unk>"), vec![3 << 3, 2]].concat();
    let piece = [field(1, b"a"), vec![3 << 3, 1]].concat();
    let model = [field(1, &unknown), field(1, &piece), field(3, &field(2, &map))].concat();
    assert_eq!(encode(json.as_bytes(), text), encode(&model, text));
});

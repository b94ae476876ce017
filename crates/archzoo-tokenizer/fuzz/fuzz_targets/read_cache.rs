#![no_main]
//! A cache file's tables, whose checksum is not looked at, are read or refused; those that are read encode without a
//! panic. Without an input of its own it starts from the tables of small models.

use std::sync::OnceLock;

use archzoo_tokenizer::{encode_by, tables_of};
use libfuzzer_sys::fuzz_target;

const BYTES: &str = r#"{"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}, "model": {"type":
    "BPE", "vocab": {"a": 0, "b": 1, "aa": 2, "ab": 3, "aab": 4, "Ġ": 5}, "merges": ["a a", "a b", "a ab"]}}"#;
const CHARS: &str = r#"{"model": {"type": "BPE", "unk_token": "b", "byte_fallback": true, "vocab": {"a": 0, "b": 1, "aa": 2, "é":
    3, "aé": 4, "<0xE4>": 5}, "merges": ["a a", "a é"]}}"#;

fn small() -> &'static [Vec<u8>] {
    static ALL: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    ALL.get_or_init(|| [BYTES, CHARS].iter().map(|json| tables_of(json.as_bytes()).unwrap()).collect())
}

/// Tables with some of their bytes changed: places near the start or the end, and values. The filter of merges between,
/// most of the whole, may hold anything.
fn changed(tables: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut tables = tables.to_vec();
    for &[low, high, value] in changes.as_chunks().0 {
        let place = i64::from(i16::from_le_bytes([low, high])) / 16;
        let place = place.rem_euclid(tables.len() as i64) as usize;
        tables[place] ^= value;
    }
    tables
}

fuzz_target!(|data: &[u8]| {
    let (long, run) = ("aabaaé中文中aab".repeat(40), "a".repeat(80));
    // Those that are merged side by side, one by one, and not at all.
    let pieces: Vec<&[u8]> = long.as_bytes().chunks(40).chain([long.as_bytes(), run.as_bytes()]).collect();
    let _ = encode_by(data, &pieces);
    for tables in small() {
        let _ = encode_by(&changed(tables, data), &pieces);
    }
});

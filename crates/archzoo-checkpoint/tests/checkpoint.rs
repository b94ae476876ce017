//! Round trips, and damaged files: an error or the right values, never a panic.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use archzoo_checkpoint::{Dtype, Elements, Header, INDEX_FILE, Reader, Request, SINGLE_FILE, Tensor, save};
use proptest::prelude::*;

fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

fn read(reader: &Reader, name: &str, rows: Option<(u64, u64)>, length: usize) -> Vec<u8> {
    try_read(reader, name, rows, length, true).unwrap()
}

fn try_read(
    reader: &Reader,
    name: &str,
    rows: Option<(u64, u64)>,
    length: usize,
    verify: bool,
) -> archzoo_checkpoint::Result<Vec<u8>> {
    let mut destination = vec![0; length];
    let ranges: Vec<_> = rows.into_iter().collect();
    let request = Request { name, destination: &mut destination, ranges: &ranges, dtype: None };
    reader.read_into(vec![request], verify)?;
    Ok(destination)
}

fn f32_tensor<'a>(name: &'a str, shape: &'a [u64], bytes: &'a [u8]) -> Tensor<'a> {
    Tensor { name, dtype: Dtype::from_name("F32").unwrap(), shape, elements: Elements::Bytes(bytes) }
}

#[test]
fn shards_by_size_in_the_given_order() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..96).collect();
    let tensors = [
        f32_tensor("b", &[4], &bytes[..16]),
        f32_tensor("a", &[2, 4], &bytes[16..48]),
        f32_tensor("large", &[3, 4], &bytes[48..]),
        f32_tensor("empty", &[0, 7], &[]),
        f32_tensor("scalar", &[], &bytes[..4]),
    ];
    save(folder.path(), &tensors, 48, &metadata(), false).unwrap();
    let reader = Reader::open(folder.path()).unwrap();
    let found: Vec<(&str, &str)> = reader
        .tensors()
        .map(|(tensor, file)| (tensor.name.as_str(), file.file_name().unwrap().to_str().unwrap()))
        .collect();
    assert_eq!(
        found,
        [
            ("a", "model-00001-of-00003.safetensors"),
            ("b", "model-00001-of-00003.safetensors"),
            ("empty", "model-00002-of-00003.safetensors"),
            ("large", "model-00002-of-00003.safetensors"),
            ("scalar", "model-00003-of-00003.safetensors"),
        ]
    );
    for tensor in &tensors {
        let Elements::Bytes(expected) = tensor.elements else { panic!("expected memory") };
        assert_eq!(read(&reader, tensor.name, None, expected.len()), expected);
    }
    assert_eq!(read(&reader, "large", Some((1, 3)), 32), bytes[64..]);
    assert!(read(&reader, "empty", Some((0, 0)), 0).is_empty());
    assert_eq!(reader.metadata(), BTreeMap::from([("format", "pt")]));
    let index = fs::read_to_string(folder.path().join(INDEX_FILE)).unwrap();
    assert!(
        index.starts_with(
            "{\n  \"metadata\": {\n    \"total_size\": 100\n  },\n  \"weight_map\": {\n    \"a\""
        )
    );

    let again = save(folder.path(), &tensors, 48, &metadata(), false).unwrap_err();
    assert!(again.to_string().contains("exists"), "{again}");
}

#[test]
fn large_tensors_are_read_in_pieces() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..13 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    save(folder.path(), &[f32_tensor("a", &[13, 1 << 18], &bytes)], u64::MAX, &metadata(), false).unwrap();
    let reader = Reader::open(&folder.path().join(SINGLE_FILE)).unwrap();
    assert!(read(&reader, "a", None, bytes.len()) == bytes);
    assert!(read(&reader, "a", Some((2, 12)), 10 << 20) == bytes[2 << 20..12 << 20]);
}

#[test]
fn bad_requests_are_refused_before_a_byte_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = [1; 16];
    let tensors = [f32_tensor("a", &[2, 2], &bytes), f32_tensor("scalar", &[], &bytes[..4])];
    save(folder.path(), &tensors, u64::MAX, &metadata(), false).unwrap();
    let reader = Reader::open(folder.path()).unwrap();
    for (name, length, rows, message) in [
        ("b", 16, None, "\"b\": expected in the checkpoint"),
        ("a", 15, None, "\"a\": destination: expected 16 bytes, found 15"),
        ("a", 16, Some((1, 2)), "destination: expected 8 bytes, found 16"),
        ("a", 0, Some((2, 1)), "range of dimension 0: expected start <= end <= 2, found 2..1"),
        ("a", 0, Some((0, 3)), "range of dimension 0: expected start <= end <= 2, found 0..3"),
        ("scalar", 4, Some((0, 1)), "found a scalar"),
    ] {
        let (mut good, mut bad) = ([0; 16], vec![0; length]);
        let ranges: Vec<_> = rows.into_iter().collect();
        let requests = vec![
            Request { name: "a", destination: &mut good, ranges: &[], dtype: None },
            Request { name, destination: &mut bad, ranges: &ranges, dtype: None },
        ];
        let error = reader.read_into(requests, false).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(good, [0; 16]);
    }
}

#[test]
fn elements_made_while_they_are_written() {
    let (made, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bytes: Vec<u8> = (0..64).collect();
    let make = || Ok(bytes.clone());
    let with =
        |elements| ["a", "b", "c"].map(|name| Tensor { name, elements, ..f32_tensor(name, &[4, 4], &[]) });
    for compress in [false, true] {
        let folder = |root: &Path| {
            let folder = root.join(compress.to_string());
            fs::create_dir(&folder).unwrap();
            folder
        };
        let (made, plain) = (folder(made.path()), folder(plain.path()));
        save(&made, &with(Elements::Made(&make)), 64, &metadata(), compress).unwrap();
        save(&plain, &with(Elements::Bytes(&bytes)), 64, &metadata(), compress).unwrap();
        for entry in fs::read_dir(&plain).unwrap() {
            let name = entry.unwrap().file_name();
            assert!(fs::read(made.join(&name)).unwrap() == fs::read(plain.join(&name)).unwrap());
        }
    }
    for (make, message) in [
        (&(|| Ok(vec![0u8; 63])) as &(dyn Fn() -> Result<Vec<u8>, String> + Sync), "found 63 bytes"),
        (&|| Err("out of luck".to_owned()), "tensor \"a\": out of luck"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let tensors = with(Elements::Made(make));
        let error = save(folder.path(), &tensors, 1000, &metadata(), false).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn bad_tensors_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = [0; 16];
    for (tensors, limit, message) in [
        (vec![f32_tensor("a", &[3], &bytes)], 1, "expected the bytes of shape [3] of F32, found 16 bytes"),
        (vec![f32_tensor("a", &[1 << 63, 2], &bytes)], 1, "found 16 bytes"),
        (vec![f32_tensor("a", &[4], &bytes), f32_tensor("a", &[4], &bytes)], 1, "found twice"),
        (vec![f32_tensor("__metadata__", &[4], &bytes)], 1, "reserved"),
        (vec![f32_tensor("a", &[4], &bytes)], 0, "max_shard_bytes"),
    ] {
        let error = save(folder.path(), &tensors, limit, &metadata(), false).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

/// A tensor as it was found: name, dtype, shape, bytes.
type Found = (String, String, Vec<u64>, Vec<u8>);

/// Reads all it can of a file, as a caller would.
fn load(path: &Path) -> Option<Vec<Found>> {
    let reader = Reader::open(path).ok()?;
    let all = reader
        .tensors()
        .map(|(tensor, _)| {
            let bytes = try_read(&reader, &tensor.name, None, tensor.bytes as usize, false).unwrap();
            (tensor.name.clone(), tensor.dtype.name().to_owned(), tensor.shape.clone(), bytes)
        })
        .collect();
    Some(all)
}

static VALID: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..40).collect();
    let tensors = [
        f32_tensor("a", &[2, 3], &bytes[..24]),
        Tensor {
            name: "b",
            dtype: Dtype::from_name("BF16").unwrap(),
            shape: &[8],
            elements: Elements::Bytes(&bytes[24..]),
        },
    ];
    save(folder.path(), &tensors, u64::MAX, &metadata(), false).unwrap();
    fs::read(folder.path().join(SINGLE_FILE)).unwrap()
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_damaged_file_is_an_error_or_another_valid_file(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..4),
        in_header in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SINGLE_FILE);
        let mut file = VALID.clone();
        for (at, byte, edit) in edits {
            let at = at.index(if in_header { 24.min(file.len()) } else { file.len() }.max(1));
            match edit {
                0 => file.truncate(at),
                1 => file.insert(at.min(file.len()), byte),
                2 if at < file.len() => { file.remove(at); }
                _ => if at < file.len() { file[at] = byte },
            }
        }
        fs::write(&path, &file).unwrap();
        if let Some(found) = load(&path) {
            let total: usize = found.iter().map(|(.., bytes)| bytes.len()).sum();
            prop_assert!(total <= file.len());
            for (_, dtype, shape, bytes) in found {
                let expected = Dtype::from_name(&dtype).unwrap().bytes(&shape);
                prop_assert_eq!(expected, Some(bytes.len() as u64));
            }
        }
    }

    #[test]
    fn any_text_as_a_header_is_an_error_or_a_header(json in r#"[{}\[\]":,a-z0-9]{0,60}"#, size in 0u64..200) {
        let _ = Header::parse(json.as_bytes(), size, Path::new("x"));
    }

    #[test]
    fn any_text_as_an_index_is_an_error(json in r#"\{"weight_map":[{}\[\]":,a-z./]{0,30}\}"#) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(INDEX_FILE), &json).unwrap();
        if let Ok(reader) = Reader::open(folder.path()) {
            prop_assert_eq!(reader.tensors().count(), 0);
        }
    }
}

/// A tensor [3, 5, 7, 2] of 16-bit elements that are their own index.
fn counted(folder: &Path) -> Vec<u16> {
    let values: Vec<u16> = (0..3 * 5 * 7 * 2).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let dtype = Dtype::from_name("BF16").unwrap();
    let tensor = Tensor { name: "a", dtype, shape: &[3, 5, 7, 2], elements: Elements::Bytes(&bytes) };
    save(folder, &[f32_tensor("before", &[1], &[9; 4]), tensor], u64::MAX, &metadata(), false).unwrap();
    values
}

proptest! {
    #[test]
    fn any_box_of_a_tensor(
        dims in 0usize..=4,
        ends in prop::array::uniform4((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let values = counted(folder.path());
        let shape = [3usize, 5, 7, 2];
        let ranges: Vec<(u64, u64)> = (0..dims)
            .map(|d| {
                let (a, b) = (ends[d].0.index(shape[d] + 1), ends[d].1.index(shape[d] + 1));
                (a.min(b) as u64, a.max(b) as u64)
            })
            .collect();
        let at = |d: usize| ranges.get(d).map_or(0..shape[d], |&(a, b)| a as usize..b as usize);
        let mut expected = Vec::new();
        for i in at(0) {
            for j in at(1) {
                for k in at(2) {
                    expected.extend(at(3).map(|l| values[((i * 5 + j) * 7 + k) * 2 + l]));
                }
            }
        }
        let reader = Reader::open(folder.path()).unwrap();
        let mut found = vec![0; expected.len() * 2];
        let mut wide = vec![0; expected.len() * 4];
        let f32 = Dtype::from_name("F32");
        reader
            .read_into(
                vec![
                    Request { name: "a", destination: &mut found, ranges: &ranges, dtype: None },
                    Request { name: "a", destination: &mut wide, ranges: &ranges, dtype: f32 },
                ],
                true,
            )
            .unwrap();
        prop_assert_eq!(reader.bytes_read(), expected.len() as u64 * 4);
        for ((expected, found), wide) in expected.iter().zip(found.chunks(2)).zip(wide.chunks(4)) {
            prop_assert_eq!(expected.to_le_bytes(), found);
            prop_assert_eq!((u32::from(*expected) << 16).to_le_bytes(), wide);
        }
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..48).collect();
    let tensors = [f32_tensor("a", &[2, 3], &bytes[..24]), f32_tensor("b", &[6], &bytes[24..])];
    save(folder.path(), &tensors, 24, &metadata(), false).unwrap();
    assert!(Reader::open(folder.path()).unwrap().verify().is_empty());
    for file in fs::read_dir(folder.path()).unwrap() {
        let path = file.unwrap().path();
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &bad).unwrap();
            let faults = Reader::open(folder.path()).map_or_else(|error| vec![error], |r| r.verify());
            let in_data = path.extension().is_some_and(|e| e == "safetensors") && bit / 8 >= good.len() - 24;
            if faults.is_empty() {
                // Blanks between the manifest's words, and the like, say nothing.
                assert!(path.ends_with(archzoo_checkpoint::MANIFEST_FILE), "bit {bit} of {}", path.display());
            } else if in_data {
                assert!(faults[0].tensor.is_some());
            }
        }
        fs::write(&path, &good).unwrap();
    }
}

#[test]
fn a_damaged_block_of_a_large_tensor_is_found_by_reading_it() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..9 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    save(folder.path(), &[f32_tensor("a", &[9, 1 << 18], &bytes)], u64::MAX, &metadata(), false).unwrap();
    let path = folder.path().join(SINGLE_FILE);
    let mut file = fs::read(&path).unwrap();
    let middle = file.len() - (5 << 20);
    file[middle] ^= 4;
    fs::write(&path, file).unwrap();
    let reader = Reader::open(&path).unwrap();
    let mut destination = vec![0; bytes.len()];
    for (verify, dtype, length) in
        [(false, None, 9 << 20), (true, None, 9 << 20), (true, Some("BF16"), 9 << 19)]
    {
        let dtype = dtype.and_then(Dtype::from_name);
        let request = Request { name: "a", destination: &mut destination[..length], ranges: &[], dtype };
        let result = reader.read_into(vec![request], verify);
        match result {
            Ok(()) => assert!(!verify),
            Err(error) => assert!(verify && error.to_string().contains("tensor \"a\": damaged"), "{error}"),
        }
    }
    assert_eq!(reader.verify().len(), 1);
}

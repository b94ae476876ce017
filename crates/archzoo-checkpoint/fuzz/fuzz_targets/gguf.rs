#![no_main]
//! A head is read or refused; what one that is read says holds for a file of that size.

use archzoo_checkpoint::GgufHead;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(head) = GgufHead::parse(data, data.len() as u64) {
        for tensor in &head.tensors {
            assert!(tensor.start + tensor.stored <= data.len() as u64);
            assert_eq!(tensor.kind.dtype().bytes(&tensor.shape), Some(tensor.bytes));
            let (elements, size) = tensor.kind.block();
            assert_eq!(tensor.bytes * size as u64, tensor.stored * elements as u64 * if elements == 1 { size as u64 } else { 4 });
        }
    }
});

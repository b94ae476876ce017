#![no_main]
//! A head is read or refused; what one that is read says holds for a file of that size.

use archzoo_gguf::{Fault, Head};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let size = data.len() as u64;
    match Head::parse(data, size) {
        Ok(head) => {
            let again = Head::parse(&data[..head.end], size).map(|again| (again.end, again.tensors));
            assert_eq!(again, Ok((head.end, head.tensors.clone())));
            assert_eq!(Head::parse(&data[..head.end - 1], size), Err(Fault::Short));
            for tensor in &head.tensors {
                assert!(tensor.start + tensor.stored <= size);
                assert_eq!(tensor.shape.iter().product::<u64>(), tensor.elements);
                let (elements, bytes) = tensor.kind.block();
                assert_eq!(tensor.elements / elements as u64 * bytes as u64, tensor.stored);
            }
        }
        Err(fault) => assert_ne!(fault, Fault::Short),
    }
});

//! Compressed tensors in a safetensors file: one dimension of U8 that holds a container. A free-form string of the
//! header tells what they are.

use std::collections::BTreeMap;

use crate::header::UniqueMap;
use crate::planes::Planes;
use crate::{Dtype, Tensor, TensorInfo};

/// A JSON object: name to dtype and shape.
pub(crate) const COMPRESSED_KEY: &str = "archzoo.compressed";

/// Most bytes that one stored byte stands for: eight bits of one symbol each, of a dtype without other bytes.
const MOST: u64 = 8;

/// What a compressed tensor is.
#[derive(serde::Deserialize)]
pub(crate) struct Original(String, Vec<u64>);

/// The header's string for tensors by name.
pub(crate) fn describe<'a>(tensors: impl Iterator<Item = &'a Tensor<'a>>) -> serde_json::Result<String> {
    let all: BTreeMap<&str, (&str, &[u64])> =
        tensors.map(|tensor| (tensor.name, (tensor.dtype.name(), tensor.shape))).collect();
    serde_json::to_string(&all)
}

/// The header's string.
pub(crate) fn parse_all(json: &str) -> serde_json::Result<BTreeMap<String, Original>> {
    serde_json::from_str::<UniqueMap<Original>>(json).map(|all| all.0)
}

impl Original {
    /// Makes the entry of the stored bytes that of the tensor.
    pub(crate) fn describe(self, tensor: &mut TensorInfo) -> Result<(), String> {
        let Self(name, shape) = self;
        if tensor.dtype.name() != "U8" || tensor.shape.len() != 1 {
            return Err(format!(
                "expected one dimension of U8 since it is compressed, found {:?} of {}",
                tensor.shape, tensor.dtype
            ));
        }
        let dtype = Dtype::from_name(&name)
            .filter(|&dtype| Planes::of(dtype).is_some())
            .ok_or_else(|| format!("expected a compressed floating-point dtype, found {name:?}"))?;
        let bytes = dtype
            .bytes(&shape)
            .filter(|&bytes| tensor.stored < bytes && bytes / MOST <= tensor.stored)
            .ok_or_else(|| {
                let stored = tensor.stored;
                format!("shape {shape:?} of {dtype}: expected more than the {stored} bytes stored and less than 8 times as many")
            })?;
        (tensor.dtype, tensor.shape, tensor.bytes) = (dtype, shape, bytes);
        Ok(())
    }
}

use std::fmt;

/// Element type of a tensor. Ordered like the format's own list, in which alignment never decreases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dtype(u8);

/// Name in the header, bits of an element.
const DTYPES: [(&str, u64); 22] = [
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("C64", 64),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
];

impl Dtype {
    pub(crate) const F32: Self = Self(17);

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        DTYPES.iter().position(|(known, _)| *known == name).map(|i| Self(i as u8))
    }

    /// Name in the header.
    pub fn name(self) -> &'static str {
        DTYPES[self.0 as usize].0
    }

    /// All names, for messages.
    pub(crate) fn names() -> String {
        DTYPES.map(|(name, _)| name).join(", ")
    }

    /// Bits of an element.
    pub(crate) fn bits(self) -> u64 {
        DTYPES[self.0 as usize].1
    }

    /// Bytes of a tensor of this type; `None` if they overflow or end within a byte.
    pub fn bytes(self, shape: &[u64]) -> Option<u64> {
        let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size))?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the elements of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind(&'static Format);

#[derive(Debug, PartialEq, Eq)]
struct Format {
    id: u32,
    name: &'static str,
    /// Elements and bytes of a block.
    block: (usize, usize),
}

const fn format(id: u32, name: &'static str, elements: usize, bytes: usize) -> Format {
    Format { id, name, block: (elements, bytes) }
}

static FORMATS: [Format; 20] = [
    format(0, "F32", 1, 4),
    format(1, "F16", 1, 2),
    format(2, "Q4_0", 32, 18),
    format(3, "Q4_1", 32, 20),
    format(6, "Q5_0", 32, 22),
    format(7, "Q5_1", 32, 24),
    format(8, "Q8_0", 32, 34),
    format(9, "Q8_1", 32, 36),
    format(10, "Q2_K", 256, 84),
    format(11, "Q3_K", 256, 110),
    format(12, "Q4_K", 256, 144),
    format(13, "Q5_K", 256, 176),
    format(14, "Q6_K", 256, 210),
    format(15, "Q8_K", 256, 292),
    format(24, "I8", 1, 1),
    format(25, "I16", 1, 2),
    format(26, "I32", 1, 4),
    format(27, "I64", 1, 8),
    format(28, "F64", 1, 8),
    format(30, "BF16", 1, 2),
];

/// Types that are known but not read.
const REFUSED: [(u32, &str); 14] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl Kind {
    /// The type of a number in the file.
    pub fn from_id(id: u32) -> Result<Self, String> {
        if let Some(format) = FORMATS.iter().find(|format| format.id == id) {
            return Ok(Self(format));
        }
        let known = FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ");
        let found = match REFUSED.iter().find(|(refused, _)| *refused == id) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("the unknown number {id}"),
        };
        Err(format!("type: expected one of {known}, found {found}"))
    }

    /// As ggml calls it.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        self.0.block
    }

    /// Whether a block is more than one number.
    pub fn is_quantized(self) -> bool {
        self.0.block.0 > 1
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn types_are_found_or_refused_by_name() {
        assert_eq!(Kind::from_id(14).unwrap().name(), "Q6_K");
        let error = Kind::from_id(20).unwrap_err();
        assert!(error.ends_with("found IQ4_NL"), "{error}");
        let error = Kind::from_id(99).unwrap_err();
        assert!(error.ends_with("found the unknown number 99"), "{error}");
    }
}

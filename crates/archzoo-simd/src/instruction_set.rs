use std::sync::OnceLock;

/// The vector instructions that a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// What every CPU of the target has.
    Baseline,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX-512 (F, BW, DQ, VL).
    Avx512,
}

impl InstructionSet {
    /// All sets, lowest first.
    pub const ALL: [InstructionSet; 3] = [Self::Baseline, Self::Avx2, Self::Avx512];

    /// `baseline`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU can run it.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Baseline => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("bmi2")
                    && is_x86_feature_detected!("popcnt")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best set of this CPU, or the one that `ARCHZOO_INSTRUCTION_SET` names if the CPU has it.
    /// Read once per process.
    pub fn current() -> Self {
        static CURRENT: OnceLock<InstructionSet> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let wanted = std::env::var("ARCHZOO_INSTRUCTION_SET").unwrap_or_default();
            Self::ALL
                .into_iter()
                .filter(|set| set.is_supported())
                .rfind(|set| wanted == set.name())
                .or_else(|| Self::ALL.into_iter().rev().find(|set| set.is_supported()))
                .unwrap_or(Self::Baseline)
        })
    }
}

/// Whether this CPU multiplies bfloat16 itself.
pub fn has_bfloat16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    true // not known; torch's own product is not bad elsewhere
}

use archzoo_simd::math::from_bf16;

/// A stored number that widens to f32: f32 itself, or bf16 as its bits.
pub trait Value: Copy + Send + Sync {
    /// The number in f32.
    fn widen(self) -> f32;
}

impl Value for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Value for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        from_bf16(self)
    }
}

const LANES: usize = 32;

/// Σ a·b in a fixed order of lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += a * b;
    }
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use archzoo_simd::math::from_bf16;

/// A stored number that widens to f32: f32 itself, or bf16 as its bits.
pub trait Value: Copy + Send + Sync {
    /// The number in f32.
    fn widen(self) -> f32;

    /// Eight numbers.
    ///
    /// # Safety
    /// They lie at `p`, and the CPU has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load256(p: *const Self) -> __m256;

    /// Sixteen numbers.
    ///
    /// # Safety
    /// They lie at `p`, and the CPU has AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load512(p: *const Self) -> __m512;
}

// The loads are always inlined, into functions that are compiled for the instructions.
impl Value for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load256(p: *const Self) -> __m256 {
        // SAFETY: promised by the caller.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load512(p: *const Self) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_loadu_ps(p) }
    }
}

impl Value for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        from_bf16(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load256(p: *const Self) -> __m256 {
        // SAFETY: promised by the caller.
        unsafe {
            let raw = _mm_loadu_si128(p.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(raw)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load512(p: *const Self) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe {
            let raw = _mm256_loadu_si256(p.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
        }
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

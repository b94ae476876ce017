//! Scalar functions without branches, so that loops over them vectorise.

/// Values handled side by side; also the number of partial sums, whatever the CPU's vector width.
pub const LANES: usize = 16;

/// Widens the bits of a bfloat16.
#[inline(always)]
pub fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Widens the bits of an IEEE half float.
#[inline(always)]
pub fn from_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // Moves the exponent bias from 15 to 127; exact for subnormals too.
    let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let infinite_or_nan = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(finite.to_bits() | infinite_or_nan | u32::from(bits & 0x8000) << 16)
}

/// Larger of two numbers; the first on a tie.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Smaller of two numbers; the first on a tie.
#[inline(always)]
pub fn smaller(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

/// e^x within 2 units in the last place, for every x from -inf to inf.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 355.0 / 512.0; // few bits: its product with an integer is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = smaller(larger(x, -104.0), 89.0); // beyond these the result is 0 and inf
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // The Taylor polynomial of degree 7, in pairs: the terms of a pair do not wait for another.
    let r2 = r * r;
    let low = (1.0 + r) + r2 * (1.0 / 2.0 + r * (1.0 / 6.0));
    let high = (1.0 / 24.0 + r * (1.0 / 120.0)) + r2 * (1.0 / 720.0 + r * (1.0 / 5040.0));
    let p = low + r2 * r2 * high;
    // 2^n in two steps, since n may lie outside the exponents of normal numbers.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    p * power(half) * power(n - half)
}

/// x·sigmoid(x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Sum over lanes in a fixed order. The length of `x` is a multiple of [`LANES`].
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    fold(x, 0.0, |a, b| a + b)
}

/// Largest element. The length of `x` is a multiple of [`LANES`].
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    fold(x, f32::NEG_INFINITY, larger)
}

#[inline(always)]
fn fold(x: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    for row in x.as_chunks::<LANES>().0 {
        for (lane, &value) in lanes.iter_mut().zip(row) {
            *lane = f(*lane, value);
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_everywhere() {
        let mut worst = 0.0f64;
        for i in -870_000..=887_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(-95.0), (-95.0f64).exp() as f32); // subnormal
        assert_eq!(exp(-104.0), 0.0);
    }

    #[test]
    fn half_floats_widen() {
        assert_eq!(from_f16(0x3c00), 1.0);
        assert_eq!(from_f16(0xc000), -2.0);
        assert_eq!(from_f16(0x0001), 2.0f32.powi(-24));
        assert_eq!(from_f16(0x7bff), 65504.0);
        assert_eq!(from_f16(0xfc00), f32::NEG_INFINITY);
        assert!(from_f16(0x7c01).is_nan());
        assert_eq!(from_bf16(0x3f80), 1.0);
        assert!(from_bf16(0x7fc0).is_nan());
    }
}

//! Elements of one floating-point type as another, rounded to nearest even.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::Dtype;

/// Turns the elements of the first slice into those of the second.
pub(crate) type Cast = fn(&[u8], &mut [u8]);

/// Elements that are turned at once.
const LANES: usize = 16;

/// The cast between two types, of those that have one.
pub(crate) fn between(from: Dtype, to: Dtype) -> Option<Cast> {
    Some(match (from.name(), to.name()) {
        ("BF16", "F32") => |from, to| cast(from, to, from_bf16, to_f32),
        ("BF16", "F16") => |from, to| cast(from, to, from_bf16, to_f16),
        ("F16", "F32") => |from, to| cast(from, to, from_f16, to_f32),
        ("F16", "BF16") => |from, to| cast(from, to, from_f16, to_bf16),
        ("F32", "F16") => |from, to| cast(from, to, from_f32, to_f16),
        ("F32", "BF16") => |from, to| cast(from, to, from_f32, to_bf16),
        _ => return None,
    })
}

#[inline(always)]
fn cast<const FROM: usize, const TO: usize>(
    from: &[u8],
    to: &mut [u8],
    read: impl Fn(&[[u8; FROM]; LANES]) -> [f32; LANES],
    write: impl Fn(&[f32; LANES], &mut [[u8; TO]; LANES]),
) {
    let (from, to) = (from.as_chunks::<FROM>().0, to.as_chunks_mut::<TO>().0);
    let (groups, rest) = from.as_chunks::<LANES>();
    let (outputs, last) = to.as_chunks_mut::<LANES>();
    for (group, output) in groups.iter().zip(outputs) {
        write(&read(group), output);
    }
    let (mut group, mut output) = ([[0; FROM]; LANES], [[0; TO]; LANES]);
    group[..rest.len()].copy_from_slice(rest);
    write(&read(&group), &mut output);
    last.copy_from_slice(&output[..last.len()]);
}

#[inline(always)]
fn from_bf16(bytes: &[[u8; 2]; LANES]) -> [f32; LANES] {
    bytes.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
}

#[inline(always)]
fn from_f16(bytes: &[[u8; 2]; LANES]) -> [f32; LANES] {
    let (halves, mut out) = (bytes.map(f16::from_le_bytes), [0.0; LANES]);
    halves.convert_to_f32_slice(&mut out);
    out
}

#[inline(always)]
fn from_f32(bytes: &[[u8; 4]; LANES]) -> [f32; LANES] {
    bytes.map(f32::from_le_bytes)
}

#[inline(always)]
fn to_f32(values: &[f32; LANES], out: &mut [[u8; 4]; LANES]) {
    *out = values.map(f32::to_le_bytes);
}

#[inline(always)]
fn to_f16(values: &[f32; LANES], out: &mut [[u8; 2]; LANES]) {
    let mut halves = [f16::ZERO; LANES];
    halves.convert_from_f32_slice(values);
    *out = halves.map(f16::to_le_bytes);
}

#[inline(always)]
fn to_bf16(values: &[f32; LANES], out: &mut [[u8; 2]; LANES]) {
    *out = values.map(|value| {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // Rounding could turn a NaN into an infinity.
        (if value.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16).to_le_bytes()
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use half::bf16;

    use super::*;

    fn run(from: &str, to: &str, bytes: &[u8], size: usize) -> Vec<u8> {
        let mut out = vec![0; size];
        between(Dtype::from_name(from).unwrap(), Dtype::from_name(to).unwrap()).unwrap()(bytes, &mut out);
        out
    }

    #[test]
    fn every_16_bit_pattern() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for (name, value) in [
            ("BF16", (|bits| bf16::from_bits(bits).to_f32()) as fn(u16) -> f32),
            ("F16", |bits| f16::from_bits(bits).to_f32()),
        ] {
            let wide = run(name, "F32", &bytes, 4 << 16);
            for (bits, found) in (0..=u16::MAX).zip(wide.as_chunks::<4>().0) {
                let (found, expected) = (f32::from_le_bytes(*found), value(bits));
                assert!(found == expected || (found.is_nan() && expected.is_nan()), "{name} {bits:#x}");
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        let values: Vec<f32> = (0..200_003u32)
            .map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)))
            .chain([1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX, 65_504.0, 65_520.0, 1e-8, 6e-8])
            .collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (b, h) =
            (run("F32", "BF16", &bytes, values.len() * 2), run("F32", "F16", &bytes, values.len() * 2));
        for ((value, b), h) in values.iter().zip(b.as_chunks::<2>().0).zip(h.as_chunks::<2>().0) {
            let (b, h) = (bf16::from_le_bytes(*b), f16::from_le_bytes(*h));
            if value.is_nan() {
                assert!(b.is_nan() && h.is_nan());
            } else {
                assert_eq!((b, h), (bf16::from_f32(*value), f16::from_f32(*value)));
            }
        }
    }
}

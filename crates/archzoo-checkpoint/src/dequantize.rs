//! ggml's quantised blocks as float32.

use archzoo_gguf::Kind;
use archzoo_simd::InstructionSet;
use archzoo_simd::math::from_f16;
use archzoo_simd::multiversion;

/// Dequantises whole blocks into as many elements. Types that are not quantised are left alone.
pub(crate) fn dequantize(kind: Kind, blocks: &[u8], out: &mut [[u8; 4]]) {
    let set = InstructionSet::current();
    match kind.name() {
        "Q4_0" => q4_0(set, blocks, out),
        "Q4_1" => q4_1(set, blocks, out),
        "Q5_0" => q5_0(set, blocks, out),
        "Q5_1" => q5_1(set, blocks, out),
        "Q8_0" => q8_0(set, blocks, out),
        "Q8_1" => q8_1(set, blocks, out),
        "Q2_K" => q2_k(set, blocks, out),
        "Q3_K" => q3_k(set, blocks, out),
        "Q4_K" => q4_k(set, blocks, out),
        "Q5_K" => q5_k(set, blocks, out),
        "Q6_K" => q6_k(set, blocks, out),
        "Q8_K" => q8_k(set, blocks, out),
        _ => {}
    }
}

#[inline(always)]
fn half(bytes: &[u8]) -> f32 {
    from_f16(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// Calls `block` on each block of `BYTES` bytes and its `ELEMENTS` elements.
#[inline(always)]
fn each<const BYTES: usize, const ELEMENTS: usize>(
    blocks: &[u8],
    out: &mut [[u8; 4]],
    block: impl Fn(&[u8; BYTES], &mut [[u8; 4]; ELEMENTS]),
) {
    let (blocks, _) = blocks.as_chunks::<BYTES>();
    let (outs, _) = out.as_chunks_mut::<ELEMENTS>();
    for (bytes, out) in blocks.iter().zip(outs) {
        block(bytes, out);
    }
}

/// Fills elements from their indices.
#[inline(always)]
fn fill(out: &mut [[u8; 4]], value: impl Fn(usize) -> f32) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = value(i).to_le_bytes();
    }
}

/// 32 values of 4 bits: the low halves of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

/// 32 values of 5 bits: nibbles, and the fifth bit of each in a u32.
#[inline(always)]
fn five_bits(high: &[u8], low: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let low = nibbles(low);
    std::array::from_fn(|i| low[i] | ((high >> i & 1) as u8) << 4)
}

multiversion! {
    fn q4_0(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<18, 32>(blocks, out, |block, out| {
            let (d, q) = (half(block), nibbles(&block[2..]));
            fill(out, |i| d * f32::from(q[i] as i8 - 8));
        });
    }
}

multiversion! {
    fn q4_1(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<20, 32>(blocks, out, |block, out| {
            let (d, m, q) = (half(block), half(&block[2..]), nibbles(&block[4..]));
            fill(out, |i| d * f32::from(q[i]) + m);
        });
    }
}

multiversion! {
    fn q5_0(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<22, 32>(blocks, out, |block, out| {
            let (d, q) = (half(block), five_bits(&block[2..6], &block[6..]));
            fill(out, |i| d * f32::from(q[i] as i8 - 16));
        });
    }
}

multiversion! {
    fn q5_1(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<24, 32>(blocks, out, |block, out| {
            let (d, m, q) = (half(block), half(&block[2..]), five_bits(&block[4..8], &block[8..]));
            fill(out, |i| d * f32::from(q[i]) + m);
        });
    }
}

multiversion! {
    fn q8_0(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<34, 32>(blocks, out, |block, out| {
            let d = half(block);
            fill(out, |i| f32::from(block[2 + i] as i8) * d);
        });
    }
}

multiversion! {
    fn q8_1(blocks: &[u8], out: &mut [[u8; 4]]) {
        // Scale, then the sum of the block, which is not needed.
        each::<36, 32>(blocks, out, |block, out| {
            let d = half(block);
            fill(out, |i| f32::from(block[4 + i] as i8) * d);
        });
    }
}

multiversion! {
    fn q2_k(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<84, 256>(blocks, out, |block, out| {
            let (scales, q) = (&block[..16], &block[16..80]);
            let (d, m) = (half(&block[80..]), half(&block[82..]));
            for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let (d, m) = (d * f32::from(scales[group] & 15), m * f32::from(scales[group] >> 4));
                let (first, shift) = (group / 8 * 32 + group % 2 * 16, group % 8 / 2 * 2);
                fill(out, |i| d * f32::from(q[first + i] >> shift & 3) - m);
            }
        });
    }
}

multiversion! {
    fn q3_k(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<110, 256>(blocks, out, |block, out| {
            let (high, q, scales, d) = (&block[..32], &block[32..96], &block[96..108], half(&block[108..]));
            for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let low = scales[group % 8] >> (group / 8 * 4) & 15;
                let scale = low | (scales[8 + group % 4] >> (group / 4 * 2) & 3) << 4;
                let d = d * f32::from(scale as i8 - 32);
                let (half, side) = (group / 8, group % 2 * 16);
                let (first, shift) = (half * 32 + side, group % 8 / 2 * 2);
                let bit = group / 2;
                fill(out, |i| {
                    let low = (q[first + i] >> shift & 3) as i8;
                    let absent = (high[side + i] >> bit & 1 ^ 1) as i8;
                    d * f32::from(low - absent * 4)
                });
            }
        });
    }
}

/// Scale and minimum, 6 bits each, of group 0 to 7.
#[inline(always)]
fn scale_and_min(scales: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = if group < 4 {
        (scales[group] & 63, scales[4 + group] & 63)
    } else {
        let (scale, min, both) = (scales[group - 4], scales[group], scales[4 + group]);
        (both & 15 | scale >> 2 & 48, both >> 4 | min >> 2 & 48)
    };
    (f32::from(scale), f32::from(min))
}

multiversion! {
    fn q4_k(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<144, 256>(blocks, out, |block, out| {
            let (d, m, scales, q) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
            for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (scale, min) = scale_and_min(scales, group);
                let (d, m) = (d * scale, m * min);
                let (first, shift) = (group / 2 * 32, group % 2 * 4);
                fill(out, |i| d * f32::from(q[first + i] >> shift & 15) - m);
            }
        });
    }
}

multiversion! {
    fn q5_k(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<176, 256>(blocks, out, |block, out| {
            let (d, m, scales) = (half(block), half(&block[2..]), &block[4..16]);
            let (high, q) = (&block[16..48], &block[48..]);
            for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (scale, min) = scale_and_min(scales, group);
                let (d, m) = (d * scale, m * min);
                let (first, shift) = (group / 2 * 32, group % 2 * 4);
                fill(out, |i| d * f32::from(q[first + i] >> shift & 15 | (high[i] >> group & 1) << 4) - m);
            }
        });
    }
}

multiversion! {
    fn q6_k(blocks: &[u8], out: &mut [[u8; 4]]) {
        each::<210, 256>(blocks, out, |block, out| {
            let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(&block[208..]));
            for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let d = d * f32::from(scales[group] as i8);
                // 128 elements a half: four rows of 32, the first two in low nibbles.
                let (half, row, side) = (group / 8, group % 8 / 2, group % 2 * 16);
                let first = half * 64 + row % 2 * 32 + side;
                fill(out, |i| {
                    let low = low[first + i] >> (row / 2 * 4) & 15;
                    let high = high[half * 32 + side + i] >> (2 * row) & 3;
                    d * f32::from((low | high << 4) as i8 - 32)
                });
            }
        });
    }
}

multiversion! {
    fn q8_k(blocks: &[u8], out: &mut [[u8; 4]]) {
        // Scale, elements, then sums of 16 each, which are not needed.
        each::<292, 256>(blocks, out, |block, out| {
            let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
            fill(out, |i| d * f32::from(block[4 + i] as i8));
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Types that are only made while multiplying; no file and no other reader has them.
    #[test]
    fn inner_types() {
        let mut block = vec![0x00, 0x40, 1, 2]; // 2.0 and a sum
        block.extend((0..32).map(|i| (i as i8 - 16) as u8));
        let mut out = [[0; 4]; 32];
        dequantize(Kind::from_id(9).unwrap(), &block, &mut out);
        assert!(out.iter().enumerate().all(|(i, x)| f32::from_le_bytes(*x) == 2.0 * (i as f32 - 16.0)));

        let mut block = 0.5f32.to_le_bytes().to_vec();
        block.extend(0..=255u8);
        block.extend([9; 32]);
        let mut out = [[0; 4]; 256];
        dequantize(Kind::from_id(15).unwrap(), &block, &mut out);
        assert!(
            out.iter().enumerate().all(|(i, x)| f32::from_le_bytes(*x) == 0.5 * f32::from(i as u8 as i8))
        );
    }

    #[test]
    fn instruction_sets_agree() {
        let mut state = 3u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        type Kernel = fn(InstructionSet, &[u8], &mut [[u8; 4]]);
        let kernels: [(u32, Kernel); 12] = [
            (2, q4_0),
            (3, q4_1),
            (6, q5_0),
            (7, q5_1),
            (8, q8_0),
            (9, q8_1),
            (10, q2_k),
            (11, q3_k),
            (12, q4_k),
            (13, q5_k),
            (14, q6_k),
            (15, q8_k),
        ];
        for (id, kernel) in kernels {
            let (elements, size) = Kind::from_id(id).unwrap().block();
            let blocks: Vec<u8> = (0..7 * size).map(|_| random()).collect();
            let run = |set| {
                let mut out = vec![[0; 4]; 7 * elements];
                kernel(set, &blocks, &mut out);
                // One NaN is as good as another.
                out.into_iter()
                    .map(f32::from_le_bytes)
                    .map(|x| if x.is_nan() { 0 } else { x.to_bits() })
                    .collect::<Vec<_>>()
            };
            for set in InstructionSet::ALL.into_iter().filter(|set| set.is_supported()) {
                assert_eq!(run(set), run(InstructionSet::Baseline), "{id} {set:?}");
            }
        }
    }
}

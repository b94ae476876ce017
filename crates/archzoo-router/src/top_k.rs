//! The `k` largest of a row, in descending order, the lowest index first among equals.

use std::hint::black_box;

use archzoo_simd::math::{self, LANES, larger};

/// Most candidates that are ranked by counting; more are sorted.
const CANDIDATES: usize = 32;
/// Candidates taken at once: a fixed number, since a branch on each would often be predicted wrong.
const STEP: usize = 4;
/// Rows searched together, one step at a time for all: the steps of one row wait for each other.
pub const TOGETHER: usize = 8;

/// Writes the indices of the `k` largest of each of at most [`TOGETHER`] rows to `found`.
///
/// A row of `values` is padded with `-inf` to a multiple of `W`, the number of columns; the pads come last and
/// so are never chosen while `k` is at most the real length. Not `NaN`.
///
/// The `k`-th largest column maximum bounds the `k`-th largest value from below, and few values reach that
/// bound. A candidate's place is the number of candidates before it, so no step depends on the one before.
#[inline(always)]
pub fn top_k<const W: usize>(
    values: &[f32],
    length: usize,
    k: usize,
    candidates: &mut [Candidates; TOGETHER],
    found: &mut [u32],
) {
    let rows = values.chunks_exact(length);
    if k > W {
        return rows.zip(found.chunks_exact_mut(k)).for_each(|(row, found)| sort(row, found));
    }
    let mut bounds = [0.0; TOGETHER];
    for (bound, row) in bounds.iter_mut().zip(rows.clone()) {
        *bound = kth_maximum::<W>(row, k);
    }
    for ((candidates, &bound), row) in candidates.iter_mut().zip(&bounds).zip(rows.clone()) {
        candidates.fill(row, bound);
    }
    for ((candidates, row), found) in candidates.iter().zip(rows).zip(found.chunks_exact_mut(k)) {
        match candidates.count {
            0..=16 => candidates.order::<16>(found),
            17..=CANDIDATES => candidates.order::<CANDIDATES>(found),
            _ => sort(row, found),
        }
    }
}

/// The `k`-th largest column maximum.
#[inline(always)]
fn kth_maximum<const W: usize>(values: &[f32], k: usize) -> f32 {
    let mut maxima = [f32::NEG_INFINITY; W];
    for row in values.as_chunks::<W>().0 {
        for i in 0..W {
            maxima[i] = larger(maxima[i], row[i]);
        }
    }
    let mut above = [0u32; W];
    for other in maxima {
        let other = black_box(other); // else LLVM makes each count a sum across lanes
        for i in 0..W {
            above[i] += u32::from(other > maxima[i]);
        }
    }
    let mut inside = [0.0; W];
    for i in 0..W {
        inside[i] = if above[i] < k as u32 { maxima[i] } else { f32::INFINITY };
    }
    -math::max(&black_box(inside).map(|x| -x)) // opaque: else LLVM shapes all of the above after this fold
}

/// The values of a row that reach its bound, in the order of their indices.
pub struct Candidates {
    values: [f32; CANDIDATES + STEP],
    indices: [u32; CANDIDATES + STEP],
    count: usize,
}

impl Candidates {
    pub const fn new() -> Self {
        Self { values: [f32::NEG_INFINITY; CANDIDATES + STEP], indices: [0; CANDIDATES + STEP], count: 0 }
    }

    /// With a count above `CANDIDATES` they are too many to be kept.
    #[inline(always)]
    fn fill(&mut self, row: &[f32], bound: f32) {
        self.values.fill(f32::NEG_INFINITY);
        let mut n = 0;
        for (word, part) in row.chunks(64).enumerate() {
            let mut mask = 0u64;
            for (i, lanes) in part.as_chunks::<LANES>().0.iter().enumerate() {
                mask |= u64::from(reaching(lanes, bound)) << (i * LANES);
            }
            let end = n + mask.count_ones() as usize;
            if end > CANDIDATES {
                self.count = end;
                return;
            }
            while n < end {
                for i in 0..STEP {
                    // Past the last candidate comes anything: it will be overwritten.
                    let index = (mask.trailing_zeros() as usize).min(part.len() - 1);
                    self.values[n + i] = part[index];
                    self.indices[n + i] = (word * 64 + index) as u32;
                    mask &= mask.wrapping_sub(1);
                }
                n += STEP;
            }
            n = end;
        }
        self.values[n..n + STEP].fill(f32::NEG_INFINITY);
        self.count = n;
    }

    /// Writes the indices of the largest to `found`; there are at most `N`.
    #[inline(always)]
    fn order<const N: usize>(&self, found: &mut [u32]) {
        let mut values = [0.0; N];
        values.copy_from_slice(&self.values[..N]);
        let mut ordered = [0u32; N];
        for (&place, &index) in places(&values, self.count).iter().zip(&self.indices).take(self.count) {
            ordered[place as usize % N] = index;
        }
        found.copy_from_slice(&ordered[..found.len()]);
    }
}

/// Bit `i` says whether lane `i` is at least `bound`.
#[inline(always)]
fn reaching(lanes: &[f32; LANES], bound: f32) -> u16 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{
            _mm_castps_si128, _mm_cmpge_ps, _mm_loadu_ps, _mm_movemask_epi8, _mm_packs_epi16,
            _mm_packs_epi32, _mm_set1_ps,
        };
        // SAFETY: SSE2 is part of x86-64, and the four loads are inside the lanes.
        #[allow(unused_unsafe)]
        return unsafe {
            let bound = _mm_set1_ps(bound);
            let four = |i: usize| _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(lanes.as_ptr().add(i)), bound));
            let eight = |i: usize| _mm_packs_epi32(four(i), four(i + 4));
            _mm_movemask_epi8(_mm_packs_epi16(eight(0), eight(8))) as u16
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    lanes.iter().enumerate().fold(0, |mask, (i, &value)| mask | u16::from(value >= bound) << i)
}

/// For each value, how many of the first `n` come before it: the larger, and equal ones with a lower index.
#[inline(always)]
pub fn places<const N: usize>(values: &[f32; N], n: usize) -> [u64; N] {
    // Keys in the order of (value, lowest index first): one comparison of integers settles ties too.
    let mut keys = [0i64; N];
    for i in 0..N {
        let bits = (values[i] + 0.0).to_bits() as i32; // -0 becomes 0
        let ordered = bits ^ ((bits >> 31) as u32 >> 1) as i32;
        keys[i] = (i64::from(ordered) << 32) | (N - i) as i64;
    }
    let mut places = [0u64; N];
    for &key in &keys[..n] {
        let key = black_box(key); // as in `kth_maximum`
        for i in 0..N {
            places[i] += u64::from(key > keys[i]);
        }
    }
    places
}

/// The same by sorting: for many columns or many ties.
#[cold]
#[inline(never)]
pub fn sort(values: &[f32], found: &mut [u32]) {
    let before = |&a: &u32, &b: &u32| {
        let (x, y) = (values[a as usize], values[b as usize]);
        y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
    };
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    let k = found.len();
    if k < order.len() {
        order.select_nth_unstable_by(k, before);
    }
    order[..k].sort_unstable_by(before);
    found.copy_from_slice(&order[..k]);
}

#[cfg(test)]
mod tests {
    use super::{Candidates, TOGETHER, top_k};
    use proptest::prelude::*;

    fn expected(values: &[f32], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..values.len() as u32).collect();
        order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
        order.truncate(k);
        order
    }

    proptest! {
        #[test]
        fn equals_a_stable_sort(
            values in prop::collection::vec(prop_oneof![
                (-4i32..4).prop_map(|x| x as f32 + 0.5), any::<i16>().prop_map(|x| f32::from(x) + 0.5),
                Just(f32::NEG_INFINITY),
            ], 1..300),
            k in 1usize..80,
        ) {
            let k = k.min(values.len());
            let expected = expected(&values, k);
            let mut padded = values;
            padded.resize(padded.len().next_multiple_of(64), f32::NEG_INFINITY);
            let mut found = vec![0; k];
            let mut candidates = [const { Candidates::new() }; TOGETHER];
            top_k::<16>(&padded, padded.len(), k, &mut candidates, &mut found);
            prop_assert_eq!(&found, &expected);
            top_k::<64>(&padded, padded.len(), k, &mut candidates, &mut found);
            prop_assert_eq!(&found, &expected);
        }
    }
}

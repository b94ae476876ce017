//! The `k` largest of a row, in descending order, the lowest index first among equals.

use std::hint::black_box;

use archzoo_simd::math::{LANES, larger, smaller};

/// Most candidates that are ranked by counting; more are sorted.
const CANDIDATES: usize = 32;

/// Writes the indices of the `found.len()` largest of `values` to `found`.
///
/// `values` is padded with `-inf` to a multiple of `W`, the number of columns; the pads come last and so are
/// never chosen while `found` asks for at most the real length. Not `NaN`.
///
/// The `k`-th largest column maximum bounds the `k`-th largest value from below, and few values reach that
/// bound. A candidate's place is the number of candidates before it, so no step depends on the one before.
#[inline(always)]
pub fn top_k<const W: usize>(values: &[f32], found: &mut [u32]) {
    let k = found.len();
    let rows = values.as_chunks::<W>().0;
    if k > W {
        return sort(values, found);
    }
    let mut column_max = [f32::NEG_INFINITY; W];
    for row in rows {
        for (best, &value) in column_max.iter_mut().zip(row) {
            *best = larger(*best, value);
        }
    }
    let mut above = [0u32; W];
    // The opaque length keeps the counts in lanes: unrolled, each would become a sum across lanes.
    for &other in &column_max[..black_box(W)] {
        for (count, &own) in above.iter_mut().zip(&column_max) {
            *count += u32::from(other > own);
        }
    }
    let mut bound = f32::INFINITY;
    for (&count, &own) in above.iter().zip(&column_max) {
        bound = smaller(bound, if (count as usize) < k { own } else { f32::INFINITY });
    }

    let mut candidates = [f32::NEG_INFINITY; CANDIDATES];
    let mut indices = [0u32; CANDIDATES];
    let mut n = 0;
    for (word, part) in values.chunks(64).enumerate() {
        let mut mask = 0u64;
        for (i, lanes) in part.as_chunks::<LANES>().0.iter().enumerate() {
            mask |= u64::from(reaching(lanes, bound)) << (i * LANES);
        }
        if n + mask.count_ones() as usize > CANDIDATES {
            return sort(values, found);
        }
        while mask != 0 {
            let index = mask.trailing_zeros() as usize;
            candidates[n] = part[index];
            indices[n] = (word * 64 + index) as u32;
            n += 1;
            mask &= mask - 1;
        }
    }
    let places = if n <= 16 { places::<16>(&candidates, n) } else { places::<CANDIDATES>(&candidates, n) };
    let mut ordered = [0u32; CANDIDATES];
    for (&place, &index) in places.iter().zip(&indices).take(n) {
        ordered[place as usize % CANDIDATES] = index;
    }
    found.copy_from_slice(&ordered[..k]);
}

/// Bit `i` says whether lane `i` is at least `bound`.
#[inline(always)]
fn reaching(lanes: &[f32; LANES], bound: f32) -> u16 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_cmpge_ps, _mm_movemask_ps, _mm_set1_ps, _mm_setr_ps};
        // SAFETY: SSE2 is part of x86-64.
        #[allow(unused_unsafe)]
        return unsafe {
            let bound = _mm_set1_ps(bound);
            let four = |i: usize| {
                let four = _mm_setr_ps(lanes[i], lanes[i + 1], lanes[i + 2], lanes[i + 3]);
                _mm_movemask_ps(_mm_cmpge_ps(four, bound)) << i
            };
            (four(0) | four(4) | four(8) | four(12)) as u16
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    lanes.iter().enumerate().fold(0, |mask, (i, &value)| mask | u16::from(value >= bound) << i)
}

/// For each of the first `n` candidates, how many come before it.
#[inline(always)]
fn places<const N: usize>(candidates: &[f32; CANDIDATES], n: usize) -> [u32; CANDIDATES] {
    let mut places = [0u32; CANDIDATES];
    for (j, &other) in candidates.iter().enumerate().take(n) {
        for i in 0..N {
            let own = candidates[i];
            places[i] += u32::from((other > own) | ((other == own) & (j < i)));
        }
    }
    places
}

/// The same by sorting: for many columns or many ties.
#[cold]
#[inline(never)]
fn sort(values: &[f32], found: &mut [u32]) {
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
    use super::top_k;
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
            top_k::<16>(&padded, &mut found);
            prop_assert_eq!(&found, &expected);
            top_k::<64>(&padded, &mut found);
            prop_assert_eq!(&found, &expected);
        }
    }
}

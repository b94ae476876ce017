//! Prefix codes over bytes.

/// Bits of every symbol's code in an optimal prefix code without codes longer than `limit`; 0 where the count
/// is 0. A lone symbol gets one bit.
///
/// Package-merge (Larmore and Hirschberg 1990). `2^limit` must be at least the number of symbols in use.
pub(crate) fn lengths(counts: &[u64; 256], limit: u32) -> [u8; 256] {
    let mut leaves: Vec<(u64, usize)> =
        counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(s, &count)| (count, s)).collect();
    leaves.sort_unstable();
    let mut lengths = [0; 256];
    if let [(_, lone)] = leaves[..] {
        lengths[lone] = 1;
    }
    if leaves.len() < 2 {
        return lengths;
    }
    // One list a code bit: the leaves and the pairs of the list before, by weight. Only what each item is
    // need be kept: leaves come in order, and so do pairs.
    let mut lists: Vec<Vec<bool>> = Vec::new();
    let mut weights: Vec<u64> = Vec::new();
    for _ in 0..limit {
        let mut pairs = weights.chunks_exact(2).map(|pair| pair[0] + pair[1]).peekable();
        let mut own = leaves.iter().map(|&(count, _)| count).peekable();
        let mut merged = Vec::new();
        let mut is_pair = Vec::new();
        loop {
            let pair = match (own.peek(), pairs.peek()) {
                (None, None) => break,
                (Some(leaf), Some(pair)) => pair < leaf,
                (leaf, _) => leaf.is_none(),
            };
            merged.extend(if pair { pairs.next() } else { own.next() });
            is_pair.push(pair);
        }
        weights = merged;
        lists.push(is_pair);
    }
    let mut take = 2 * leaves.len() - 2;
    for list in lists.iter().rev() {
        let pairs = list[..take].iter().filter(|&&pair| pair).count();
        for &(_, symbol) in &leaves[..take - pairs] {
            lengths[symbol] += 1;
        }
        take = 2 * pairs;
    }
    lengths
}

/// The canonical code of every symbol, in the low bits: shorter codes first, then by symbol. Lengths at most 32.
pub(crate) fn codes(lengths: &[u8; 256]) -> [u32; 256] {
    let mut order: Vec<usize> = (0..256).filter(|&s| lengths[s] > 0).collect();
    order.sort_by_key(|&s| (lengths[s], s));
    let mut codes = [0; 256];
    let (mut next, mut length) = (0u64, 0);
    for symbol in order {
        next <<= lengths[symbol] - length;
        length = lengths[symbol];
        codes[symbol] = next as u32;
        next += 1;
    }
    codes
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kraft(lengths: &[u8; 256]) -> u64 {
        lengths.iter().filter(|l| **l > 0).map(|&l| 1 << (32 - l)).sum()
    }

    fn bits(counts: &[u64; 256], lengths: &[u8; 256]) -> u64 {
        counts.iter().zip(lengths).map(|(count, &l)| count * u64::from(l)).sum()
    }

    /// Huffman's own algorithm: the sum of all merged weights.
    fn unlimited(counts: &[u64; 256]) -> u64 {
        let mut heap: Vec<u64> = counts.iter().copied().filter(|c| *c > 0).collect();
        let mut total = 0;
        while heap.len() > 1 {
            heap.sort_unstable_by(|a, b| b.cmp(a));
            let merged = heap.pop().unwrap() + heap.pop().unwrap();
            total += merged;
            heap.push(merged);
        }
        total
    }

    #[test]
    fn fibonacci_counts_meet_the_limit() {
        let mut counts = [0; 256];
        let (mut a, mut b) = (1, 1);
        for count in counts.iter_mut().take(60) {
            *count = a;
            (a, b) = (b, a + b);
        }
        for limit in [6, 8, 11, 32] {
            let lengths = lengths(&counts, limit);
            assert_eq!(u32::from(*lengths.iter().max().unwrap()), limit);
            assert_eq!(kraft(&lengths), 1 << 32);
        }
        assert_eq!(bits(&counts, &lengths(&counts, 59)), unlimited(&counts));
    }

    #[test]
    fn few_symbols() {
        assert_eq!(lengths(&[0; 256], 11), [0; 256]);
        let mut counts = [0; 256];
        counts[7] = 5;
        assert_eq!(lengths(&counts, 11)[7], 1);
        counts[255] = 1;
        let both = lengths(&counts, 11);
        assert_eq!((both[7], both[255], both.iter().map(|l| u32::from(*l)).sum::<u32>()), (1, 1, 2));
        assert_eq!(lengths(&[1; 256], 8), [8; 256]);
    }

    proptest! {
        #[test]
        fn optimal_complete_and_prefix_free(seeds in prop::collection::vec(0u64..1 << 20, 2..=256)) {
            let mut counts = [0; 256];
            for (count, seed) in counts.iter_mut().zip(&seeds) {
                *count = seed >> (seed % 19);
            }
            let used = counts.iter().filter(|c| **c > 0).count();
            prop_assume!(used >= 2);
            let wide = lengths(&counts, 48);
            prop_assert_eq!(bits(&counts, &wide), unlimited(&counts));
            let mut best = bits(&counts, &wide);
            for limit in [16, 11, 9, 8] {
                let limited = lengths(&counts, limit);
                prop_assert!(limited.iter().all(|l| u32::from(*l) <= limit));
                prop_assert_eq!(limited.iter().filter(|l| **l > 0).count(), used);
                prop_assert_eq!(kraft(&limited), 1 << 32);
                prop_assert!(bits(&counts, &limited) >= best);
                best = bits(&counts, &limited);
                let codes = codes(&limited);
                let mut ranges: Vec<(u64, u64)> = (0..256)
                    .filter(|&s| limited[s] > 0)
                    .map(|s| (u64::from(codes[s]) << (32 - limited[s]), 1u64 << (32 - limited[s])))
                    .collect();
                ranges.sort_unstable();
                prop_assert!(ranges.windows(2).all(|w| w[0].0 + w[0].1 == w[1].0));
            }
        }
    }
}

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::alphabet::alphabet;
use crate::{Error, WordCounts};

/// Tokens by id, and the merges by rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// Byte-level text of each token: special tokens, bytes, then what was learnt.
    pub tokens: Vec<String>,
    /// Ids of the two halves, most important first.
    pub merges: Vec<(u32, u32)>,
}

type Pair = (u32, u32);

/// A pair to merge: when it was queued, how often it occurred and in which words it had appeared.
struct Candidate {
    count: i64,
    pair: Pair,
    words: Vec<u32>,
}

impl Candidate {
    /// Most frequent first, then by the lower ids.
    fn key(&self) -> (i64, Reverse<Pair>) {
        (self.count, Reverse(self.pair))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Candidate {}

/// Counts of all pairs, and since the last [`queue`](Pairs::queue) the words in which a pair has appeared.
#[derive(Default)]
struct Pairs {
    known: FxHashMap<Pair, Count>,
    fresh: Vec<(Pair, Vec<u32>)>,
}

#[derive(Default)]
struct Count {
    count: i64,
    /// Place in `fresh`, from 1; 0 is none.
    fresh: u32,
}

impl Pairs {
    fn change(&mut self, pair: Pair, change: i64, word: u32) {
        let known = self.known.entry(pair).or_default();
        known.count += change;
        if change < 0 {
            return;
        }
        if known.fresh == 0 {
            self.fresh.push((pair, vec![word]));
            known.fresh = self.fresh.len() as u32;
            return;
        }
        let words = &mut self.fresh[known.fresh as usize - 1].1;
        if words.last() != Some(&word) {
            words.push(word);
        }
    }

    fn count(&self, pair: Pair) -> i64 {
        self.known.get(&pair).map_or(0, |known| known.count)
    }

    fn queue(&mut self, queue: &mut BinaryHeap<Candidate>) {
        for (pair, words) in self.fresh.drain(..) {
            if let Some(known) = self.known.get_mut(&pair) {
                known.fresh = 0;
                if known.count > 0 {
                    queue.push(Candidate { count: known.count, pair, words });
                }
            }
        }
    }
}

/// The distinct words as token ids, one after the other in one array.
struct Words {
    symbols: Vec<u32>,
    /// Start and length in `symbols`, and count.
    places: Vec<(usize, u32, i64)>,
}

/// Learns merges until the vocabulary has `vocab_size` tokens or no pair occurs `min_frequency` times.
///
/// The order is that of Hugging Face's trainer, ties included: the lower pair of ids first. As there, the count
/// of a pair that has been merged stays, and a token that can be made in several ways has one id.
pub fn learn(
    counts: &WordCounts,
    vocab_size: usize,
    min_frequency: u64,
    special_tokens: &[&str],
) -> Result<Vocabulary, Error> {
    let mut tokens: Vec<String> = Vec::with_capacity(vocab_size);
    let mut ids: FxHashMap<String, u32> = FxHashMap::default();
    let alphabet = alphabet();
    let mut characters = alphabet;
    characters.sort_unstable();
    let special_tokens = special_tokens.iter().map(|token| (*token).to_owned());
    for token in special_tokens.chain(characters.iter().map(char::to_string)) {
        id_of(token, &mut tokens, &mut ids);
    }
    if tokens.len() > vocab_size {
        return Err(Error::TooSmall { vocab_size, needed: tokens.len() });
    }
    let bytes = alphabet.map(|c| ids[&c.to_string()]);

    let mut words = tokenized(counts, &bytes);
    let mut pairs = Pairs::default();
    for (i, &(start, len, count)) in words.places.iter().enumerate() {
        for pair in words.symbols[start..start + len as usize].windows(2) {
            pairs.change((pair[0], pair[1]), count, i as u32);
        }
    }
    let mut queue = BinaryHeap::new();
    pairs.queue(&mut queue);

    let mut merges = Vec::new();
    while tokens.len() < vocab_size
        && let Some(mut top) = queue.pop()
    {
        let count = pairs.count(top.pair);
        if top.count != count {
            top.count = count;
            queue.push(top);
            continue;
        }
        if count < 1 || (count as u64) < min_frequency {
            break;
        }
        let (a, b) = top.pair;
        let merged = format!("{}{}", tokens[a as usize], tokens[b as usize]);
        let new = id_of(merged, &mut tokens, &mut ids);
        merges.push(top.pair);
        for &word in &top.words {
            let (start, len, count) = &mut words.places[word as usize];
            let symbols = &mut words.symbols[*start..*start + *len as usize];
            *len = merge(symbols, top.pair, new, |pair, sign| pairs.change(pair, sign * *count, word)) as u32;
        }
        pairs.queue(&mut queue);
    }
    Ok(Vocabulary { tokens, merges: last_of_each(merges) })
}

fn id_of(token: String, tokens: &mut Vec<String>, ids: &mut FxHashMap<String, u32>) -> u32 {
    *ids.entry(token).or_insert_with_key(|token| {
        tokens.push(token.clone());
        tokens.len() as u32 - 1
    })
}

fn tokenized(counts: &WordCounts, bytes: &[u32; 256]) -> Words {
    let mut words = Words { symbols: Vec::new(), places: Vec::new() };
    counts.for_each_sorted(|word, count| {
        words.places.push((words.symbols.len(), word.len() as u32, count as i64));
        words.symbols.extend(word.bytes().map(|byte| bytes[byte as usize]));
    });
    words
}

/// Merges a pair in one word, left to right, and reports the neighbouring pairs that go (-1) and come (1).
/// Returns the new length.
fn merge(word: &mut [u32], (a, b): Pair, new: u32, mut change: impl FnMut(Pair, i64)) -> usize {
    let (mut read, mut write) = (0, 0);
    while read < word.len() {
        if word[read] == a && word.get(read + 1) == Some(&b) {
            if write > 0 {
                let left = word[write - 1];
                change((left, a), -1);
                change((left, new), 1);
            }
            if let Some(&right) = word.get(read + 2) {
                change((b, right), -1);
                change((new, right), 1);
            }
            word[write] = new;
            read += 2;
        } else {
            word[write] = word[read];
            read += 1;
        }
        write += 1;
    }
    write
}

/// A pair that was merged again later has its later rank.
fn last_of_each(merges: Vec<Pair>) -> Vec<Pair> {
    let last: FxHashMap<Pair, usize> = merges.iter().enumerate().map(|(i, pair)| (*pair, i)).collect();
    merges.iter().enumerate().filter(|(i, pair)| last[pair] == *i).map(|(_, pair)| *pair).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Splitter;

    fn learnt(text: &str, learnt: usize) -> Vec<String> {
        let counts = WordCounts::new(Splitter::new(r"\S+|\s+").unwrap());
        counts.feed(&[text]).unwrap();
        let vocabulary = learn(&counts, 257 + learnt, 0, &["<s>"]).unwrap();
        assert_eq!(vocabulary.tokens[..2], ["<s>", "!"]);
        vocabulary.tokens[257..].to_vec()
    }

    #[test]
    fn frequent_pairs_first_and_ties_by_id() {
        assert_eq!(learnt("low low low lower newest newest widest", 4), ["lo", "low", "es", "est"]);
        assert_eq!(learnt("ba ab", 2), ["ab", "ba"]);
    }

    #[test]
    fn runs_merge_left_to_right() {
        assert_eq!(learnt("aaaaa", 3), ["aa", "aaa", "aaaaa"]);
        let mut word = [1, 1, 1];
        let mut changes = Vec::new();
        assert_eq!(merge(&mut word, (1, 1), 9, |pair, sign| changes.push((pair, sign))), 2);
        assert_eq!(word[..2], [9, 1]);
        assert_eq!(changes, [((1, 1), -1), ((9, 1), 1)]);
    }

    #[test]
    fn too_small_a_vocabulary_is_refused() {
        let counts = WordCounts::new(Splitter::new(".").unwrap());
        assert!(matches!(learn(&counts, 256, 0, &["<s>"]), Err(Error::TooSmall { needed: 257, .. })));
        assert_eq!(learn(&counts, 300, 0, &[]).unwrap().tokens.len(), 256);
    }
}

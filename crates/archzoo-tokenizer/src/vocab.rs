use crate::cache::prefetch;
use crate::cache_file::{Reader, Table, Writer};
use crate::error::{Error, Result};

/// Largest number of ids: some of a hash shares a word with one.
pub const MOST_IDS: usize = (1 << ID_BITS) - 1;
/// Bits of an id.
pub const ID_BITS: u32 = 21;
/// What no token has.
pub const NO_ID: u32 = MOST_IDS as u32;

/// Tokens by id, and ids by token.
#[derive(Debug, Clone)]
pub struct Vocab {
    bytes: Vec<u8>,
    /// Where each id's bytes end; they start where those of the id before end.
    ends: Vec<u32>,
    /// Ids by the hash of their bytes, and above each its [`tag`]: a power of two of slots, at most half full.
    slots: Vec<u32>,
    found: usize,
    longest: usize,
}

/// A free slot: no token has such an id.
const FREE: u32 = u32::MAX;

/// What a slot has of a hash that its place does not say: most tokens that are not there need no comparing of bytes.
#[inline(always)]
fn tag(hash: u64) -> u32 {
    (hash >> (32 + ID_BITS)) as u32
}

impl Vocab {
    /// A vocabulary of `tokens`, each with its id. An id without a token stands for no bytes.
    ///
    /// `is_found(i)` says whether `get` knows the i-th token; the others are for decoding only.
    pub fn new<T: AsRef<[u8]>>(tokens: &[(T, u32)], is_found: impl Fn(usize) -> bool) -> Result<Self> {
        let size = tokens.iter().map(|&(_, id)| id as usize + 1).max().unwrap_or(0);
        if size > MOST_IDS {
            return Err(Error::unsupported(format!("token ids above {}", MOST_IDS - 1)));
        }
        let mut by_id = vec![usize::MAX; size];
        for (i, (_, id)) in tokens.iter().enumerate() {
            let slot = &mut by_id[*id as usize];
            if *slot != usize::MAX {
                return Err(Error::new(format!("two tokens have the id {id}")));
            }
            *slot = i;
        }
        let total: usize = tokens.iter().map(|(t, _)| t.as_ref().len()).sum();
        if u32::try_from(total).is_err() {
            return Err(Error::unsupported("more than 4 GiB of tokens"));
        }
        let mut vocab = Self {
            bytes: Vec::with_capacity(total),
            ends: Vec::with_capacity(size),
            slots: vec![FREE; (2 * tokens.len() + 1).next_power_of_two()],
            found: 0,
            longest: 0,
        };
        for (id, &i) in by_id.iter().enumerate() {
            if let Some((token, _)) = tokens.get(i) {
                vocab.bytes.extend_from_slice(token.as_ref());
            }
            vocab.ends.push(vocab.bytes.len() as u32);
            if tokens.get(i).is_some() && is_found(i) {
                vocab.insert(id as u32)?;
            }
        }
        Ok(vocab)
    }

    fn insert(&mut self, id: u32) -> Result<()> {
        let token = self.bytes_of(id);
        if token.is_empty() {
            return Ok(());
        }
        let hash = hash(token);
        match self.find(token, hash) {
            Ok(_) => {
                Err(Error::new(format!("the token {:?} is there twice", String::from_utf8_lossy(token))))
            }
            Err(slot) => {
                self.longest = self.longest.max(token.len());
                self.slots[slot] = id | tag(hash) << ID_BITS;
                self.found += 1;
                Ok(())
            }
        }
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.slots.len() - 1)
    }

    /// The id of a token, or the free slot for it.
    #[inline]
    fn find(&self, token: &[u8], hash: u64) -> std::result::Result<u32, usize> {
        let mut at = self.home(hash);
        loop {
            match self.slots[at] {
                FREE => return Err(at),
                slot if slot >> ID_BITS == tag(hash) && self.bytes_of(slot & NO_ID) == token => {
                    return Ok(slot & NO_ID);
                }
                _ => at = (at + 1) & (self.slots.len() - 1),
            }
        }
    }

    #[inline(always)]
    fn bytes_of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] as usize };
        &self.bytes[start..self.ends[id] as usize]
    }

    /// Number of ids: one more than the largest.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Number of tokens that `get` knows.
    pub fn found(&self) -> usize {
        self.found
    }

    /// Number of bytes of a token that is there.
    #[inline(always)]
    pub fn length(&self, id: u32) -> usize {
        self.bytes_of(id).len()
    }

    /// Bytes of a token; none for an id that is not there.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        ((id as usize) < self.ends.len()).then(|| self.bytes_of(id))
    }

    /// Hands the tokens that have such a byte to `take`.
    pub fn each_with(&self, is_it: impl Fn(u8) -> bool, mut take: impl FnMut(&[u8])) {
        const BLOCK: usize = 64;
        let mut id = 0;
        let mut at = 0;
        while at < self.bytes.len() {
            let block = &self.bytes[at..self.bytes.len().min(at + BLOCK)];
            // Most blocks have none, which takes a few instructions to tell.
            if !block.iter().fold(false, |any, &byte| any | is_it(byte)) {
                at += BLOCK;
                continue;
            }
            let Some(first) = block.iter().position(|&byte| is_it(byte)) else { break };
            while self.ends[id] as usize <= at + first {
                id += 1;
            }
            take(self.bytes_of(id as u32));
            at = self.ends[id] as usize;
        }
    }

    /// Id of a token.
    #[inline]
    pub fn get(&self, token: &[u8]) -> Option<u32> {
        if token.len() > self.longest || token.is_empty() {
            return None;
        }
        self.find(token, hash(token)).ok()
    }

    /// Hands the id of each of many tokens to `take`. What they need is loaded side by side, one step after the other.
    pub fn get_each<'t>(&self, tokens: impl Iterator<Item = &'t [u8]>, mut take: impl FnMut(Option<u32>)) {
        const BESIDE: usize = 32;
        let mut tokens = tokens.fuse();
        let mut some = [(&[][..], 0, 0); BESIDE];
        loop {
            let mut count = 0;
            for (place, token) in some.iter_mut().zip(&mut tokens) {
                let hash = if token.len() <= self.longest { hash(token) } else { 0 };
                prefetch(&self.slots[self.home(hash)]);
                *place = (token, hash, NO_ID);
                count += 1;
            }
            let some = &mut some[..count];
            for (token, hash, likely) in some.iter_mut().filter(|(token, ..)| token.len() <= self.longest) {
                let mut at = self.home(*hash);
                while self.slots[at] != FREE && self.slots[at] >> ID_BITS != tag(*hash) {
                    at = (at + 1) & (self.slots.len() - 1);
                }
                if self.slots[at] != FREE && !token.is_empty() {
                    *likely = self.slots[at] & NO_ID;
                    prefetch(&self.ends[*likely as usize]);
                }
            }
            for (.., likely) in some.iter().filter(|(.., likely)| *likely != NO_ID) {
                self.bytes_of(*likely).first().into_iter().for_each(|first| prefetch(first));
            }
            for &(token, hash, likely) in some.iter() {
                take(match likely {
                    NO_ID => None,
                    id if self.bytes_of(id) == token => Some(id),
                    _ => self.find(token, hash).ok(),
                });
            }
            if count < BESIDE {
                return;
            }
        }
    }
}

impl Table for Vocab {
    fn write(&self, out: &mut Writer) {
        out.bytes(&self.bytes);
        out.words(&self.ends);
        out.words(&self.slots);
        out.words(&[self.found as u32, self.longest as u32]);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let (bytes, ends, slots) = (from.bytes()?.to_vec(), from.words()?, from.words()?);
        let [found, longest] = from.words()?[..] else { return None };
        let is_rising = ends.is_sorted() && ends.last().map_or(0, |&end| end as usize) == bytes.len();
        let is_table = slots.len().is_power_of_two() && slots.contains(&FREE);
        let all_there = slots.iter().all(|&slot| slot == FREE || ((slot & NO_ID) as usize) < ends.len());
        (is_rising && is_table && all_there && ends.len() <= MOST_IDS).then_some(Self {
            bytes,
            ends,
            slots,
            found: found as usize,
            longest: longest as usize,
        })
    }
}

/// Bits without a pattern, for hashes.
pub const MIX: [u64; 3] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9];

/// The two halves of the full product, folded together.
#[inline(always)]
pub fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// A hash of bytes that is fast on short ones.
#[inline]
pub fn hash(bytes: &[u8]) -> u64 {
    let mut state = bytes.len() as u64 ^ MIX[2];
    // The last word begins before the others end, or with fewer bytes is all that there is.
    let last = if let Some(&last) = bytes.last_chunk::<8>() {
        let mut rest = bytes;
        while let Some((&block, tail)) = rest.split_first_chunk::<8>()
            && !tail.is_empty()
        {
            state = fold(state ^ u64::from_le_bytes(block) ^ MIX[0], MIX[1]);
            rest = tail;
        }
        u64::from_le_bytes(last)
    } else if let (Some(&first), Some(&last)) = (bytes.first_chunk::<4>(), bytes.last_chunk::<4>()) {
        u64::from(u32::from_le_bytes(first)) | u64::from(u32::from_le_bytes(last)) << 32
    } else {
        let at = |i: usize| u64::from(bytes.get(i).copied().unwrap_or(0));
        at(0) | at(1) << 8 | at(2) << 16
    };
    fold(state ^ last, MIX[0])
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// Of so many short tokens several have one tag and neighbouring slots.
        #[test]
        fn tokens_beside_each_other_are_those_alone(
            known in prop::collection::vec(any::<u16>(), 0..5000),
            sought in prop::collection::vec((any::<u16>(), 0..4usize), 0..100),
        ) {
            let mut tokens: Vec<_> = known.iter().map(|token| token.to_le_bytes().to_vec()).collect();
            tokens.sort();
            tokens.dedup();
            let numbered: Vec<_> = tokens.iter().zip(0..).collect();
            let vocab = Vocab::new(&numbered, |_| true).unwrap();
            // None, of two bytes, and one too long among them, and all that are there.
            let others = sought.iter().map(|&(token, length)| [&token.to_le_bytes()[..], b"a"].concat()[..length].to_vec());
            let all: Vec<Vec<u8>> = tokens.iter().cloned().chain(others).collect();
            let mut found = Vec::new();
            vocab.get_each(all.iter().map(Vec::as_slice), |id| found.push(id));
            let expected: Vec<_> = all.iter().map(|token| tokens.binary_search(token).ok().map(|id| id as u32)).collect();
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(all.iter().map(|token| vocab.get(token)).collect::<Vec<_>>(), expected);
            // Every token that has such a byte, once.
            let mut with = Vec::new();
            vocab.each_with(|byte| byte >= 0xe0, |token| with.push(token.to_vec()));
            tokens.retain(|token| token.iter().any(|&byte| byte >= 0xe0));
            prop_assert_eq!(with, tokens);
        }
    }
}

use crate::bpe::MISSING;
use crate::error::Result;
use crate::trie::Trie;
use crate::vocab::Vocab;

/// Unigram: the tokens whose scores have the largest sum; of equal sums the one whose last token is longest.
#[derive(Debug, Clone)]
pub struct Unigram {
    /// The tokens.
    pub vocab: Vocab,
    trie: Trie,
    /// The log probability of each id.
    scores: Vec<f64>,
    /// Of a character without a token.
    unknown_score: f64,
    /// Stands for characters without a token.
    unknown: Option<u32>,
    /// Ids of the byte tokens, if a character without a token becomes its bytes.
    fallback: Option<Box<[u32; 256]>>,
    precision: Score,
}

/// How sums of scores are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// As `tokenizers` does.
    Double,
    /// As SentencePiece 0.2.3 does: to single precision after each token, from 0 again beyond [`MOST_SUM`].
    Single,
}

/// How much less likely than the least likely token an unknown character is.
const UNKNOWN_PENALTY: f64 = 10.0;
const MOST_SUM: f64 = 100_000.0;
/// Nothing ends here.
const NOWHERE: u32 = u32::MAX;

/// The best tokens up to a position: their score, where the last starts, and its id.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    start: u32,
    /// [`MISSING`] for an unknown character.
    id: u32,
}

impl Unigram {
    /// A model of tokens and their scores, of which `least` counts as the least.
    pub fn new(
        vocab: Vocab,
        scores: Vec<f64>,
        least: f64,
        unknown: Option<u32>,
        fallback: Option<Box<[u32; 256]>>,
        precision: Score,
    ) -> Result<Self> {
        let ids = 0..vocab.len() as u32;
        let tokens: Vec<(&[u8], u32)> = ids
            .filter_map(|id| Some((vocab.bytes(id)?, id)))
            .filter(|(t, id)| vocab.get(t) == Some(*id))
            .collect();
        let trie = Trie::new(&tokens)?;
        let unknown_score = rounded(least - UNKNOWN_PENALTY, precision);
        Ok(Self { vocab, trie, scores, unknown_score, unknown, fallback, precision })
    }

    /// Appends the ids of a piece to `out`.
    pub fn encode(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut best = vec![Best { score: 0.0, start: NOWHERE, id: MISSING }; piece.len() + 1];
        // Where the last token so far ends.
        let mut frontier = 0;
        let mut start = 0;
        while start < piece.len() {
            if self.precision == Score::Single && best[start].score.abs() > MOST_SUM {
                rebase(&mut best[start..=frontier]);
            }
            let here = best[start].score;
            let length = crate::classes::decode(piece, start).1.min(piece.len() - start);
            let mut has_single = false;
            self.trie.prefixes(&piece[start..], |id, token| {
                has_single |= token == length;
                frontier = frontier.max(start + token);
                self.offer(&mut best[start + token], start, id, here + self.scores[id as usize]);
            });
            if !has_single {
                frontier = frontier.max(start + length);
                self.offer(&mut best[start + length], start, MISSING, here + self.unknown_score);
            }
            start += length;
        }
        let first = out.len();
        let mut unknown_end = None;
        let mut end = piece.len();
        while end > 0 {
            let Best { start, id, .. } = best[end];
            if start == NOWHERE {
                break;
            }
            if id == MISSING || Some(id) == self.unknown {
                unknown_end.get_or_insert(end);
            } else {
                if let Some(unknown_end) = unknown_end.take() {
                    self.unknown(&piece[end..unknown_end], out);
                }
                out.push(id);
            }
            end = start as usize;
        }
        if let Some(unknown_end) = unknown_end {
            self.unknown(&piece[..unknown_end], out);
        }
        out[first..].reverse();
    }

    #[inline(always)]
    fn offer(&self, best: &mut Best, start: usize, id: u32, score: f64) {
        let score = rounded(score, self.precision);
        if best.start == NOWHERE || score > best.score {
            *best = Best { score, start: start as u32, id };
        }
    }

    /// Appends the ids of neighbouring unknown characters, which are one, from the last on.
    fn unknown(&self, text: &[u8], out: &mut Vec<u32>) {
        if let Some(id) = self.vocab.get(text) {
            out.push(id);
            return;
        }
        match &self.fallback {
            Some(ids) if text.iter().all(|&b| ids[usize::from(b)] != MISSING) => {
                out.extend(text.iter().rev().map(|&b| ids[usize::from(b)]));
            }
            _ => out.extend(self.unknown),
        }
    }
}

/// Takes the first sum off all.
fn rebase(best: &mut [Best]) {
    let offset = best.first().map_or(0.0, |first| first.score);
    for best in best.iter_mut().filter(|best| best.start != NOWHERE) {
        best.score = rounded(best.score - offset, Score::Single);
    }
}

fn rounded(score: f64, precision: Score) -> f64 {
    match precision {
        Score::Double => score,
        Score::Single => f64::from(score as f32),
    }
}

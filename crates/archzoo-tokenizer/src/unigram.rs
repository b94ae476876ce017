use crate::vocab::Vocab;

/// Unigram: the tokens whose scores have the largest sum.
#[derive(Debug, Clone)]
pub struct Unigram {
    /// The tokens.
    pub vocab: Vocab,
    /// The log probability of each id.
    pub scores: Vec<f64>,
    /// Stands for characters without a token.
    pub unknown: Option<u32>,
    /// Ids of the byte tokens, if a character without a token becomes its bytes.
    pub fallback: Option<Box<[u32; 256]>>,
}

/// How much less likely than the least likely token an unknown character is.
const UNKNOWN_PENALTY: f64 = 10.0;

/// The best tokens up to a position: their score, where the last starts, and its id.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    start: usize,
    id: Option<u32>,
}

impl Unigram {
    /// Appends the ids of a piece to `out`.
    pub fn encode(&self, piece: &[u8], out: &mut Vec<u32>) {
        let unknown_score = self.scores.iter().copied().fold(f64::INFINITY, f64::min) - UNKNOWN_PENALTY;
        let mut best: Vec<Option<Best>> = vec![None; piece.len() + 1];
        best[0] = Some(Best { score: 0.0, start: 0, id: None });
        let mut start = 0;
        while start < piece.len() {
            let here = best[start].map_or(f64::NEG_INFINITY, |b| b.score);
            let length = crate::classes::decode(piece, start).1.min(piece.len() - start);
            let mut has_single = false;
            let longest = self.vocab.longest().min(piece.len() - start);
            for end in start + 1..=start + longest {
                let Some(id) = self.vocab.get(&piece[start..end]) else { continue };
                has_single |= end == start + length;
                offer(&mut best[end], Best { score: here + self.scores[id as usize], start, id: Some(id) });
            }
            if !has_single {
                offer(&mut best[start + length], Best { score: here + unknown_score, start, id: None });
            }
            start += length;
        }
        let mut tokens: Vec<(Option<u32>, (usize, usize))> = Vec::new();
        let mut end = piece.len();
        while end > 0 {
            let Some(token) = best[end] else { break };
            // Neighbouring unknown characters are one.
            match (token.id, tokens.last_mut()) {
                (None, Some((None, range))) => *range = (token.start, range.1),
                (id, _) => tokens.push((id, (token.start, end))),
            }
            end = token.start;
        }
        for &(id, (start, end)) in tokens.iter().rev() {
            let bytes = &piece[start..end];
            match (id, &self.fallback) {
                (Some(id), _) => out.push(id),
                (None, Some(ids)) if bytes.iter().all(|&b| ids[usize::from(b)] != crate::bpe::MISSING) => {
                    out.extend(bytes.iter().map(|&b| ids[usize::from(b)]));
                }
                (None, _) => out.extend(self.unknown),
            }
        }
    }
}

fn offer(best: &mut Option<Best>, candidate: Best) {
    if best.is_none_or(|b| candidate.score > b.score) {
        *best = Some(candidate);
    }
}

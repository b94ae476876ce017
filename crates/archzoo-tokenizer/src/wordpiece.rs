use crate::vocab::Vocab;

/// WordPiece: the longest token that a word starts with, then the longest that goes on.
#[derive(Debug, Clone)]
pub struct WordPiece {
    /// The tokens; those that continue a word are written with the prefix.
    pub vocab: Vocab,
    /// What marks a token that continues a word.
    pub prefix: String,
    /// Stands for a word that no tokens make.
    pub unknown: u32,
    /// A word of more characters is unknown.
    pub longest: usize,
}

impl WordPiece {
    /// Appends the ids of a word to `out`.
    pub fn encode(&self, word: &[u8], out: &mut Vec<u32>) {
        let is_start = |byte: u8| byte & 0xc0 != 0x80;
        if word.iter().filter(|&&b| is_start(b)).count() > self.longest {
            out.push(self.unknown);
            return;
        }
        let before = out.len();
        let mut buffer = Vec::with_capacity(self.prefix.len() + word.len());
        let mut start = 0;
        while start < word.len() {
            buffer.clear();
            if start > 0 {
                buffer.extend_from_slice(self.prefix.as_bytes());
            }
            let prefix = buffer.len();
            buffer.extend_from_slice(&word[start..]);
            let found = (start + 1..=word.len())
                .rev()
                .filter(|&end| word.get(end).is_none_or(|&b| is_start(b)))
                .find_map(|end| Some((self.vocab.get(&buffer[..prefix + end - start])?, end)));
            let Some((id, end)) = found else {
                out.truncate(before);
                out.push(self.unknown);
                return;
            };
            out.push(id);
            start = end;
        }
    }
}

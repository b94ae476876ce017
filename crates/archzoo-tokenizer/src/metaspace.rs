use crate::error::Result;
use crate::model::Encoder;
use crate::sentencepiece::MARK;
use crate::split::{BATCH, Sink, Splitter};

/// Blanks written as a mark, and the mark put before a text.
#[derive(Debug, Clone)]
pub struct Metaspace {
    /// The mark, `▁`.
    pub mark: char,
    /// When the mark is put before a text that does not start with it.
    pub prepend: Prepend,
    /// Where text is cut.
    pub cut: Cut,
}

/// Where text is cut into pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nowhere.
    Nowhere,
    /// Before each mark.
    Marks,
    /// Before each run of SentencePiece's mark, where that changes nothing.
    Words,
}

/// When the mark is put before a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prepend {
    /// Never.
    Never,
    /// Before the start of the input.
    First,
    /// Before every stretch between added tokens.
    Always,
}

impl Metaspace {
    /// Encodes the pieces of a text that `splitter` has cut first.
    pub fn split(
        &self,
        text: &str,
        is_first: bool,
        splitter: &Splitter,
        encoder: &mut Encoder,
    ) -> Result<()> {
        let mut marked = Marked { metaspace: self, is_first, encoder };
        splitter.split(text, &mut marked)
    }
}

struct Marked<'a, 'b> {
    metaspace: &'a Metaspace,
    is_first: bool,
    encoder: &'a mut Encoder<'b>,
}

impl Sink for Marked<'_, '_> {
    fn take(&mut self, text: &[u8], pieces: &[(usize, usize)]) -> Result<()> {
        for &(start, end) in pieces {
            self.piece(&String::from_utf8_lossy(&text[start..end]), self.is_first && start == 0)?;
        }
        Ok(())
    }
}

impl Marked<'_, '_> {
    fn piece(&mut self, piece: &str, is_first: bool) -> Result<()> {
        let Metaspace { mark, prepend, cut } = *self.metaspace;
        let mut buffer = [0; 4];
        let mark: &str = mark.encode_utf8(&mut buffer);
        let mut text = piece.replace(' ', mark);
        let wanted = prepend == Prepend::Always || prepend == Prepend::First && is_first;
        if wanted && !text.starts_with(mark) {
            text.insert_str(0, mark);
        }
        match cut {
            Cut::Nowhere => return Splitter::Whole.split(&text, self.encoder),
            Cut::Words => return Splitter::Words(MARK).split(&text, self.encoder),
            Cut::Marks => {}
        }
        let starts = text.match_indices(mark).map(|(at, _)| at).filter(|&at| at > 0);
        let mut pieces = Vec::with_capacity(BATCH);
        let mut start = 0;
        for end in starts.chain([text.len()]) {
            pieces.push((start, end));
            start = end;
            if pieces.len() == BATCH {
                self.encoder.take(text.as_bytes(), &pieces)?;
                pieces.clear();
            }
        }
        self.encoder.take(text.as_bytes(), &pieces)
    }
}

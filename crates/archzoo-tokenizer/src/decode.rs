use crate::error::Error;
use crate::sentencepiece::PieceDecoder;

/// How the texts of tokens become text.
#[derive(Debug, Clone)]
pub enum Decoder {
    /// The tokens' bytes, one after the other.
    Bytes,
    /// Those of SentencePiece's pieces.
    Pieces(PieceDecoder),
    /// Tokens' texts, changed step by step, then joined.
    Steps(Vec<DecodeStep>),
}

/// A change of the texts of tokens.
#[derive(Debug, Clone)]
pub enum DecodeStep {
    /// In every text.
    Replace(String, String),
    /// Runs of `<0x..>` become the bytes' text.
    ByteFallback,
    /// One text from here on.
    Fuse,
    /// Up to so many of a character removed at each text's start and end.
    Strip(char, usize, usize),
    /// A blank between words: WordPiece's continuations lose this prefix.
    WordPiece {
        /// What continues a word.
        prefix: String,
        /// Whether blanks before punctuation and in contractions go.
        cleanup: bool,
    },
    /// The mark becomes a blank; the first one goes if a blank was put there.
    Metaspace(char, bool),
    /// A blank between all.
    Join,
}

impl DecodeStep {
    fn apply(&self, tokens: Vec<String>) -> Vec<String> {
        match self {
            Self::Replace(from, to) => tokens.into_iter().map(|t| t.replace(from, to)).collect(),
            Self::ByteFallback => byte_fallback(tokens),
            Self::Fuse => vec![tokens.concat()],
            Self::Strip(c, start, end) => tokens.iter().map(|t| strip(t, *c, *start, *end)).collect(),
            Self::WordPiece { prefix, cleanup } => tokens
                .into_iter()
                .enumerate()
                .map(|(i, token)| {
                    let text = match token.strip_prefix(prefix.as_str()) {
                        _ if i == 0 => token,
                        Some(rest) => rest.to_owned(),
                        None => format!(" {token}"),
                    };
                    if *cleanup { clean_up(&text) } else { text }
                })
                .collect(),
            Self::Metaspace(mark, prepended) => tokens
                .into_iter()
                .enumerate()
                .map(|(i, token)| match token.strip_prefix(*mark) {
                    Some(rest) if i == 0 && *prepended => rest.replace(*mark, " "),
                    _ => token.replace(*mark, " "),
                })
                .collect(),
            Self::Join => vec![tokens.join(" ")],
        }
    }
}

/// The text of tokens' texts.
pub fn run(steps: &[DecodeStep], tokens: Vec<String>) -> String {
    steps.iter().fold(tokens, |tokens, step| step.apply(tokens)).concat()
}

/// The byte of a `<0x..>` token.
pub fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

fn byte_fallback(tokens: Vec<String>) -> Vec<String> {
    let mut out = Vec::with_capacity(tokens.len());
    let mut bytes = Vec::new();
    for token in tokens.into_iter().map(Some).chain([None]) {
        match token.as_deref().and_then(fallback_byte) {
            Some(byte) => bytes.push(byte),
            None => {
                if !bytes.is_empty() {
                    match std::str::from_utf8(&bytes) {
                        Ok(text) => out.push(text.to_owned()),
                        Err(_) => out.extend(bytes.iter().map(|_| "\u{fffd}".to_owned())),
                    }
                    bytes.clear();
                }
                out.extend(token);
            }
        }
    }
    out
}

fn strip(token: &str, c: char, start: usize, end: usize) -> String {
    let leading = token.chars().take(start).take_while(|&x| x == c).count();
    let rest: Vec<char> = token.chars().skip(leading).collect();
    let trailing = rest.iter().rev().take(end).take_while(|&&x| x == c).count();
    rest[..rest.len() - trailing].iter().collect()
}

fn clean_up(text: &str) -> String {
    [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" do not", " don't"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Text of ids that come one by one: what may still become a character is held back.
#[derive(Debug)]
pub struct DecodeStream {
    held: Vec<u8>,
    /// Whether every byte that is not UTF-8 becomes a replacement character, or each stretch of a cut character.
    each_byte: bool,
    /// Whether no text has come before.
    pub(crate) is_start: bool,
}

impl Default for DecodeStream {
    fn default() -> Self {
        Self::new(false)
    }
}

impl DecodeStream {
    pub(crate) fn new(each_byte: bool) -> Self {
        Self { held: Vec::new(), each_byte, is_start: true }
    }

    /// The text that the bytes of one more token complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut done = 0;
        loop {
            match std::str::from_utf8(&self.held[done..]) {
                Ok(rest) => {
                    text.push_str(rest);
                    done = self.held.len();
                    break;
                }
                Err(e) => {
                    let valid = done + e.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.held[done..valid]));
                    done = valid;
                    // No length: the bytes may be the start of a character.
                    let Some(bad) = e.error_len() else { break };
                    self.replace(bad, &mut text);
                    done += bad;
                }
            }
        }
        self.held.drain(..done);
        text
    }

    /// What is left: a replacement character for a character that never ended.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        let mut text = String::new();
        for chunk in held.utf8_chunks() {
            text.push_str(chunk.valid());
            self.replace(chunk.invalid().len(), &mut text);
        }
        text
    }

    fn replace(&self, bytes: usize, text: &mut String) {
        let marks = if self.each_byte { bytes } else { bytes.min(1) };
        text.extend(std::iter::repeat_n('\u{fffd}', marks));
    }
}

/// The id `id` has no token.
pub fn unknown_id(id: u32, size: usize) -> Error {
    Error::new(format!("no token has the id {id}: the vocabulary has {size} ids"))
}

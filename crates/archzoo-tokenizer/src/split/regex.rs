use std::ops::Range;

use fancy_regex::Regex;
use unicode_categories::UnicodeCategories;

use crate::classes::{self, NUMBER};
use crate::error::{Error, Result};
use crate::split::Piece;

/// What becomes of the matches of a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behavior {
    /// Dropped.
    Removed,
    /// A piece each.
    Isolated,
    /// The end of the piece before.
    MergedWithPrevious,
    /// The start of the piece after.
    MergedWithNext,
    /// One piece with the matches that touch it.
    Contiguous,
}

/// One step of a pre-tokenizer that no hand-written one covers.
#[derive(Debug, Clone)]
pub enum Step {
    /// `Split` by a regex.
    Regex {
        /// The pattern.
        regex: Box<Regex>,
        /// What becomes of its matches.
        behavior: Behavior,
        /// Whether what lies between counts as the matches.
        invert: bool,
    },
    /// `Digits`.
    Digits {
        /// Whether each number is a piece.
        individual: bool,
    },
    /// `WhitespaceSplit`.
    Blanks,
    /// `Punctuation`.
    Punctuation(Behavior),
}

impl Step {
    /// A `Split` step.
    pub fn regex(pattern: &str, behavior: Behavior, invert: bool) -> Result<Self> {
        let regex = Regex::new(pattern)
            .map_err(|e| Error::unsupported(format!("the regular expression {pattern:?}: {e}")))?;
        Ok(Self::Regex { regex: Box::new(regex), behavior, invert })
    }

    /// Whether some text is dropped.
    pub fn removes(&self) -> bool {
        match self {
            Self::Regex { behavior, .. } | Self::Punctuation(behavior) => *behavior == Behavior::Removed,
            Self::Blanks => true,
            Self::Digits { .. } => false,
        }
    }

    /// Cuts each of `pieces` of `text`.
    pub fn apply(&self, text: &str, pieces: &[Piece]) -> Result<Vec<Piece>> {
        let mut out = Vec::new();
        let mut matches = Vec::new();
        for &(start, end) in pieces {
            matches.clear();
            let behavior = self.matches(&text[start..end], &mut matches)?;
            cut(start, &matches, behavior, &mut out);
        }
        Ok(out)
    }

    /// Ranges within `piece` that cover it, and whether each is a match.
    fn matches(&self, piece: &str, out: &mut Vec<(Range<usize>, bool)>) -> Result<Behavior> {
        match self {
            Self::Regex { regex, behavior, invert } => {
                let mut end = 0;
                for found in regex.find_iter(piece) {
                    let found = found.map_err(|e| {
                        Error::new(format!("the regular expression {:?} gave up: {e}", regex.as_str()))
                    })?;
                    if found.start() > end {
                        out.push((end..found.start(), *invert));
                    }
                    if found.end() > found.start() {
                        out.push((found.range(), !invert));
                    }
                    end = found.end();
                }
                if end < piece.len() {
                    out.push((end..piece.len(), *invert));
                }
                Ok(*behavior)
            }
            Self::Digits { individual } => {
                let table = classes::unicode();
                each_char(piece, out, |c| table[c as usize] & NUMBER != 0);
                Ok(if *individual { Behavior::Isolated } else { Behavior::Contiguous })
            }
            Self::Blanks => {
                each_char(piece, out, char::is_whitespace);
                Ok(Behavior::Removed)
            }
            Self::Punctuation(behavior) => {
                each_char(piece, out, is_punctuation);
                Ok(*behavior)
            }
        }
    }
}

/// ASCII punctuation and `\p{P}`, by the tables that `tokenizers` uses: Unicode of 2015.
pub fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || c.is_punctuation()
}

/// Each matching character by itself, and the stretches between.
fn each_char(piece: &str, out: &mut Vec<(Range<usize>, bool)>, is_match: impl Fn(char) -> bool) {
    let mut start = 0;
    for (at, c) in piece.char_indices() {
        if is_match(c) {
            if at > start {
                out.push((start..at, false));
            }
            start = at + c.len_utf8();
            out.push((at..start, true));
        }
    }
    if start < piece.len() {
        out.push((start..piece.len(), false));
    }
}

/// Appends the pieces that `matches` of a piece from `offset` make.
fn cut(offset: usize, matches: &[(Range<usize>, bool)], behavior: Behavior, out: &mut Vec<Piece>) {
    let mut previous = None;
    for (range, is_match) in matches {
        let joins = match behavior {
            Behavior::Isolated | Behavior::Removed => false,
            Behavior::MergedWithPrevious => *is_match && previous == Some(false),
            Behavior::MergedWithNext => !is_match && previous == Some(true),
            Behavior::Contiguous => previous == Some(*is_match),
        };
        previous = Some(*is_match);
        let end = offset + range.end;
        match out.last_mut() {
            Some(last) if joins => last.1 = end,
            _ if *is_match && behavior == Behavior::Removed => {}
            _ => out.push((offset + range.start, end)),
        }
    }
}

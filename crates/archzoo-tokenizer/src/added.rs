use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use aho_corasick::{AhoCorasick, Anchored, Input, Match, MatchKind, Span, StartKind, packed};

use crate::classes::is_word;
use crate::error::{Error, Result};

/// A token that is found in the text before anything else is done to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Not found inside a word.
    pub single_word: bool,
    /// Takes white space before it.
    pub lstrip: bool,
    /// Takes white space after it.
    pub rstrip: bool,
    /// Found in the normalised text rather than in the text as given.
    pub normalized: bool,
    /// A control token rather than text.
    pub special: bool,
}

/// Which special tokens are found in text; the others are text like any other.
#[derive(Debug, Clone, Copy)]
pub enum AllowedSpecial<'a> {
    /// All.
    All,
    /// Those of a set.
    Only(&'a BTreeSet<String>),
}

/// A stretch of text.
pub enum Section {
    /// An added token, and the text that it takes.
    Token(u32, Range<usize>),
    /// Text between added tokens.
    Text(Range<usize>),
}

/// Added tokens that are searched for together.
#[derive(Debug, Clone, Default)]
pub struct Added {
    tokens: Vec<AddedToken>,
    by_id: HashMap<u32, usize>,
    finder: Option<Finder>,
}

/// Finds patterns: the leftmost, of those the longest, and again behind it.
#[derive(Debug, Clone)]
struct Finder {
    /// Of what the patterns start with; none if one is empty, or where the processor has no fast search for it.
    starts: Option<packed::Searcher>,
    patterns: AhoCorasick,
}

impl Finder {
    /// Bytes of a pattern that are searched for first.
    const START: usize = 3;

    fn new(patterns: &[String]) -> Result<Self> {
        let shortest = patterns.iter().map(String::len).min().unwrap_or(0);
        let starts: BTreeSet<&[u8]> =
            patterns.iter().map(|p| &p.as_bytes()[..shortest.min(Self::START)]).collect();
        let patterns = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .start_kind(StartKind::Both)
            .build(patterns)
            .map_err(|e| Error::new(format!("added tokens: {e}")))?;
        Ok(Self { starts: packed::Searcher::new(starts), patterns })
    }

    fn find_all<'a>(&'a self, text: &'a str) -> Box<dyn Iterator<Item = Match> + 'a> {
        let Some(starts) = &self.starts else { return Box::new(self.patterns.find_iter(text)) };
        let mut from = 0;
        Box::new(std::iter::from_fn(move || {
            loop {
                let start = starts.find_in(text, Span::from(from..text.len()))?.start();
                let whole = Input::new(text).range(start..).anchored(Anchored::Yes);
                if let Some(found) = self.patterns.find(whole) {
                    from = found.end();
                    return Some(found);
                }
                from = start + 1;
            }
        }))
    }
}

impl Added {
    /// Searches the contents of `tokens`.
    pub fn new(tokens: Vec<AddedToken>) -> Result<Self> {
        let patterns: Vec<String> = tokens.iter().map(|t| t.content.clone()).collect();
        Self::searched(tokens, &patterns)
    }

    /// Searches a pattern for each of `tokens`.
    pub fn searched(tokens: Vec<AddedToken>, patterns: &[String]) -> Result<Self> {
        let finder = if tokens.is_empty() { None } else { Some(Finder::new(patterns)?) };
        let by_id = tokens.iter().zip(0..).map(|(token, i)| (token.id, i)).collect();
        Ok(Self { tokens, by_id, finder })
    }

    /// Searches nothing: the tokens only have their ids.
    pub fn silent(tokens: Vec<AddedToken>) -> Self {
        let by_id = tokens.iter().zip(0..).map(|(token, i)| (token.id, i)).collect();
        Self { tokens, by_id, finder: None }
    }

    /// The token of an id.
    pub fn by_id(&self, id: u32) -> Option<&AddedToken> {
        self.by_id.get(&id).map(|&i| &self.tokens[i])
    }

    /// The tokens.
    pub fn tokens(&self) -> &[AddedToken] {
        &self.tokens
    }

    /// Hands the sections of `text` to `take`, in order.
    pub fn split(
        &self,
        text: &str,
        allowed: AllowedSpecial,
        mut take: impl FnMut(Section) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        if let Some(finder) = &self.finder {
            for found in finder.find_all(text) {
                let token = &self.tokens[found.pattern().as_usize()];
                let (mut start, mut end) = (found.start(), found.end());
                if token.special
                    && matches!(allowed, AllowedSpecial::Only(set) if !set.contains(&token.content))
                {
                    continue;
                }
                if token.single_word
                    && (text[..start].chars().next_back().is_some_and(is_word)
                        || text[end..].chars().next().is_some_and(is_word))
                {
                    continue;
                }
                if token.lstrip {
                    start = text[..start].trim_end().len().max(done);
                }
                if token.rstrip {
                    end = text.len() - text[end..].trim_start().len();
                }
                if done < start {
                    take(Section::Text(done..start))?;
                }
                take(Section::Token(token.id, start..end))?;
                done = end;
            }
        }
        if done < text.len() { take(Section::Text(done..text.len())) } else { Ok(()) }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Empty patterns, and more of them than a fast search takes, included.
        #[test]
        fn finds_what_a_search_for_all_at_once_finds(
            patterns in prop::collection::vec("[<|｜x]{0,5}", 1..80),
            text in "[<|｜x]{0,60}",
        ) {
            let whole = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&patterns).unwrap();
            let found: Vec<Match> = Finder::new(&patterns).unwrap().find_all(&text).collect();
            prop_assert_eq!(found, whole.find_iter(&text).collect::<Vec<_>>());
        }
    }
}

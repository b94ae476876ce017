use std::ops::Range;

use regex_automata::meta::{Cache, Regex};
use regex_automata::util::syntax;
use regex_automata::{Anchored, Input};

use crate::Error;

/// How the patterns of the GPT families end: white space without its last character when a word follows.
const WHITE_SPACE_TAIL: &str = r"|\s+(?!\S)|\s+";

/// Bytes of states that the automaton of one thread may keep; many scripts in one text need some MB.
const CACHE: usize = 16 << 20;

/// Splits text into words: the matches of a pattern, and what lies between them.
#[derive(Debug)]
pub struct Splitter(Engine);

#[derive(Debug)]
enum Engine {
    /// Linear time. With `tail` the second pattern is the white space of [`WHITE_SPACE_TAIL`].
    Automaton { regex: Regex, tail: bool },
    /// Patterns that look around.
    Backtracking(fancy_regex::Regex),
}

/// What a thread needs to split.
#[derive(Debug)]
pub enum Scratch {
    Automaton(Box<Cache>),
    Nothing,
}

impl Splitter {
    /// A splitter by this pattern.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let head = pattern.strip_suffix(WHITE_SPACE_TAIL);
        let patterns = match head {
            Some(head) => vec![head, r"\s+"],
            None => vec![pattern],
        };
        let automaton = Regex::builder()
            .configure(Regex::config().hybrid_cache_capacity(CACHE))
            .syntax(syntax::Config::new().utf8(true))
            .build_many(&patterns);
        if let Ok(regex) = automaton {
            return Ok(Self(Engine::Automaton { regex, tail: head.is_some() }));
        }
        let regex = fancy_regex::Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?;
        Ok(Self(Engine::Backtracking(regex)))
    }

    pub(crate) fn scratch(&self) -> Scratch {
        match &self.0 {
            Engine::Automaton { regex, .. } => Scratch::Automaton(Box::new(regex.create_cache())),
            Engine::Backtracking(_) => Scratch::Nothing,
        }
    }

    /// Calls `word` on every word of `text` in order.
    pub(crate) fn split<'t>(
        &self,
        text: &'t str,
        scratch: &mut Scratch,
        mut word: impl FnMut(&'t str),
    ) -> Result<(), Error> {
        let mut at = 0;
        while at < text.len() {
            let found = self.next(text, at, scratch)?.unwrap_or(text.len()..text.len());
            if at < found.start {
                word(&text[at..found.start]);
            }
            if !found.is_empty() {
                word(&text[found.clone()]);
            }
            at = found.end;
        }
        Ok(())
    }

    /// The first match at or after `at` that is not empty.
    fn next(&self, text: &str, at: usize, scratch: &mut Scratch) -> Result<Option<Range<usize>>, Error> {
        match (&self.0, scratch) {
            (Engine::Automaton { regex, tail }, Scratch::Automaton(cache)) => {
                let input = Input::new(text).range(at..);
                // Words usually touch, and an anchored search needs no second pass for the start.
                let half = regex.search_half_with(cache, &input.clone().anchored(Anchored::Yes));
                let (start, end, pattern) = match half {
                    Some(half) if half.offset() > at => (at, half.offset(), half.pattern()),
                    _ => match first(regex, cache, input) {
                        Some(found) => (found.start(), found.end(), found.pattern()),
                        None => return Ok(None),
                    },
                };
                let mut end = end;
                if *tail && pattern.as_usize() == 1 && end < text.len() {
                    let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
                    if last < end - start {
                        end -= last;
                    }
                }
                Ok(Some(start..end))
            }
            (Engine::Backtracking(regex), _) => {
                let mut from = at;
                loop {
                    let found = regex.find_from_pos(text, from).map_err(|e| Error::Pattern(e.to_string()))?;
                    match found {
                        Some(found) if found.range().is_empty() => match next_char(text, found.end()) {
                            Some(next) => from = next,
                            None => return Ok(None),
                        },
                        found => return Ok(found.map(|m| m.range())),
                    }
                }
            }
            (Engine::Automaton { .. }, Scratch::Nothing) => unreachable!("the scratch of another splitter"),
        }
    }
}

fn first(regex: &Regex, cache: &mut Cache, mut input: Input) -> Option<regex_automata::Match> {
    loop {
        let found = regex.search_with(cache, &input)?;
        if !found.is_empty() {
            return Some(found);
        }
        let text = std::str::from_utf8(input.haystack()).ok()?;
        input.set_start(next_char(text, found.end())?);
    }
}

fn next_char(text: &str, at: usize) -> Option<usize> {
    text[at..].chars().next().map(|c| at + c.len_utf8())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    fn words<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut found = Vec::new();
        splitter.split(text, &mut splitter.scratch(), |word| found.push(word)).unwrap();
        found
    }

    #[test]
    fn known_splits() {
        let text = "It's  naïve\n\n  x = 12345 ";
        let gpt2 = Splitter::new(GPT2).unwrap();
        assert_eq!(words(&gpt2, text), ["It", "'s", " ", " naïve", "\n\n ", " x", " =", " 12345", " "]);
        let llama = Splitter::new(LLAMA3).unwrap();
        assert_eq!(
            words(&llama, text),
            ["It", "'s", " ", " naïve", "\n\n", " ", " x", " =", " ", "123", "45", " "]
        );
    }

    #[test]
    fn gaps_and_empty_matches() {
        assert_eq!(words(&Splitter::new(r"\d*").unwrap(), "ab12é3"), ["ab", "12", "é", "3"]);
        assert_eq!(words(&Splitter::new(r"\d*(?=x|\z)").unwrap(), "ab12xé3"), ["ab", "12", "xé", "3"]);
        assert!(matches!(Splitter::new("("), Err(Error::Pattern(_))));
    }

    proptest! {
        #[test]
        fn the_automaton_is_the_pattern(text in "([ \n\r\ta-cZ'é你1-9!\u{a0}\u{300}]|'s|\\PC){0,40}") {
            for pattern in [GPT2, LLAMA3] {
                let regex = fancy_regex::Regex::new(pattern).unwrap();
                let wanted: Vec<&str> = regex.find_iter(&text).map(|m| m.unwrap().as_str()).collect();
                let splitter = Splitter::new(pattern).unwrap();
                let is_automaton = matches!(splitter.0, Engine::Automaton { .. });
                prop_assert!(is_automaton);
                prop_assert_eq!(words(&splitter, &text), wanted);
            }
        }
    }
}

//! Cutting text into the pieces that a model encodes one by one.

mod families;
pub mod regex;
mod scan;
mod window;

use archzoo_simd::InstructionSet;

use crate::classes::{self, Table};
use crate::error::Result;
use regex::Step;
use window::Bytes;

/// The regex of GPT-2.
pub const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The regex of Llama 3; cl100k in tiktoken's own spelling keeps white space at the end of a text in one piece.
pub const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The regex of Qwen 2 and 3.
pub const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The regex of cl100k as tiktoken writes it.
pub const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
/// The regex of o200k and Llama 4.
pub const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The regex of Mistral's Tekken.
pub const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The three splits of DeepSeek V3, in this order.
pub const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];

/// The regexes that one `Split` of a `tokenizer.json` may have, by the name of a family of models.
pub const SPLIT_PATTERNS: [(&str, &str); 5] =
    [("gpt2", GPT2), ("llama3", LLAMA3), ("qwen2", QWEN), ("o200k", O200K), ("tekken", TEKKEN)];

/// How text is cut into pieces.
#[derive(Debug, Clone)]
pub enum Splitter {
    /// Not at all.
    Whole,
    /// Before every run of a mark.
    Words(&'static str),
    /// A hand-written pre-tokenizer.
    Family(Family),
    /// Any other: step after step.
    Steps(Vec<Step>),
}

/// The hand-written pre-tokenizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// [`GPT2`]
    Gpt2,
    /// Every number isolated, then [`GPT2`]: SmolLM2 and others.
    Gpt2Digit,
    /// [`LLAMA3`]
    Llama3,
    /// [`QWEN`]
    Qwen,
    /// [`CL100K`]
    Cl100k,
    /// [`O200K`]
    O200k,
    /// [`TEKKEN`]
    Tekken,
    /// [`DEEPSEEK`]
    DeepSeek,
}

impl Family {
    /// The family that one `Split` by this regex is, each match a piece.
    pub fn of_regex(pattern: &str) -> Option<Self> {
        match pattern {
            GPT2 => Some(Self::Gpt2),
            LLAMA3 => Some(Self::Llama3),
            QWEN => Some(Self::Qwen),
            CL100K => Some(Self::Cl100k),
            O200K => Some(Self::O200k),
            TEKKEN => Some(Self::Tekken),
            _ => None,
        }
    }

    #[inline(always)]
    fn table(self) -> &'static Table {
        match self {
            Self::DeepSeek => classes::deepseek(),
            _ => classes::unicode(),
        }
    }

    /// A bit for each place in the window at `at` where a piece starts, if they can be told.
    #[inline(always)]
    fn starts<B: Bytes>(self, table: &Table, text: &[u8], at: usize) -> Option<u64> {
        match self {
            Self::Gpt2 => window::gpt2::<B, false>(table, text, at),
            Self::Gpt2Digit => window::gpt2::<B, true>(table, text, at),
            Self::Llama3 | Self::Cl100k => window::cl100k::<B, 3>(table, text, at),
            Self::Qwen => window::cl100k::<B, 1>(table, text, at),
            Self::O200k => window::o200k::<B, 3, true>(table, text, at),
            Self::Tekken => window::o200k::<B, 1, false>(table, text, at),
            Self::DeepSeek => window::deepseek::<B>(table, text, at),
        }
    }

    /// The end of the piece that starts at `at`.
    #[inline(always)]
    fn next(self, table: &Table, text: &[u8], at: usize) -> usize {
        match self {
            Self::Gpt2 => families::gpt2::<false>(table, text, at),
            Self::Gpt2Digit => families::gpt2::<true>(table, text, at),
            Self::Llama3 => families::cl100k::<3, false>(table, text, at),
            Self::Cl100k => families::cl100k::<3, true>(table, text, at),
            Self::Qwen => families::cl100k::<1, false>(table, text, at),
            Self::O200k => families::o200k::<3, true>(table, text, at),
            Self::Tekken => families::o200k::<1, false>(table, text, at),
            Self::DeepSeek => families::deepseek(table, text, at),
        }
    }
}

/// Start and end of a piece in its text.
pub type Piece = (usize, usize);

/// Pieces handed over together, so that work on one hides waiting for another.
pub const BATCH: usize = 128;

/// Consumer of the pieces of a text.
pub trait Sink {
    /// Takes the next pieces of `text`, in order, at most [`BATCH`].
    fn take(&mut self, text: &[u8], pieces: &[Piece]) -> Result<()>;
}

impl Splitter {
    /// Whether all text is in some piece.
    pub fn keeps_all(&self) -> bool {
        match self {
            Self::Whole | Self::Words(_) | Self::Family(_) => true,
            Self::Steps(steps) => !steps.iter().any(Step::removes),
        }
    }

    /// Parts of a text, each but the last of `size` bytes or more, whose pieces are those of the whole; one part where
    /// nothing is known of what goes over a border.
    pub fn parts<'t>(&self, text: &'t str, size: usize) -> Vec<&'t str> {
        let next = |from: usize| match self {
            Self::Words(mark) => next_word(mark, text, from),
            Self::Family(_) => next_blank(text, from),
            Self::Whole | Self::Steps(_) => None,
        };
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(end) = next(start + size.max(1)) {
            parts.push(&text[start..end]);
            start = end;
        }
        parts.push(&text[start..]);
        parts
    }

    /// Hands every piece of `text` to `sink`, in order.
    pub fn split(&self, text: &str, sink: &mut impl Sink) -> Result<()> {
        match self {
            Self::Whole if text.is_empty() => Ok(()),
            Self::Whole => sink.take(text.as_bytes(), &[(0, text.len())]),
            Self::Words(mark) => split_words(mark, text, sink),
            Self::Family(family) => split_family(InstructionSet::current(), *family, text.as_bytes(), sink),
            Self::Steps(steps) => {
                let mut pieces = vec![(0, text.len())];
                for step in steps {
                    pieces = step.apply(text, &pieces)?;
                }
                pieces.retain(|(start, end)| end > start);
                pieces.chunks(BATCH).try_for_each(|batch| sink.take(text.as_bytes(), batch))
            }
        }
    }
}

/// Blanks that are looked at for one cut: in a long run of them nothing is lost by one part.
const MOST_TRIED: usize = 1 << 12;

/// The first blank or line feed from `from` on that follows a letter: no family has a piece with both, and none looks
/// behind a piece's start, or past its end but at white space. None, too, where many in a row follow no letter.
fn next_blank(text: &str, from: usize) -> Option<usize> {
    let after = text.as_bytes().get(from..)?;
    let follows_letter = |&at: &usize| {
        let before = text[..at].chars().next_back();
        before.is_some_and(|c| classes::unicode()[c as usize] & classes::LETTER != 0)
    };
    memchr::memchr2_iter(b' ', b'\n', after).take(MOST_TRIED).map(|at| from + at).find(follows_letter)
}

/// The first mark from `from` on that follows something else.
fn next_word(mark: &str, text: &str, from: usize) -> Option<usize> {
    let from = (from..text.len()).find(|&at| text.is_char_boundary(at))?;
    let mut marks = text[from..].match_indices(mark).map(|(at, _)| from + at);
    marks.find(|&at| !text[..at].ends_with(mark))
}

fn split_words(mark: &str, text: &str, sink: &mut impl Sink) -> Result<()> {
    let mut batch = [(0, 0); BATCH];
    // Where the piece starts, where its marks end, and the number of pieces in the batch.
    let (mut start, mut marks_end, mut count) = (0, 0, 0);
    for (at, _) in text.match_indices(mark) {
        if at > marks_end {
            batch[count] = (start, at);
            count += 1;
            start = at;
            if count == BATCH {
                sink.take(text.as_bytes(), &batch)?;
                count = 0;
            }
        }
        marks_end = at + mark.len();
    }
    if start < text.len() {
        batch[count] = (start, text.len());
        count += 1;
    }
    sink.take(text.as_bytes(), &batch[..count])
}

fn split_family(set: InstructionSet, family: Family, text: &[u8], sink: &mut impl Sink) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
        fn avx2(family: Family, text: &[u8], sink: &mut impl Sink) -> Result<()> {
            split_family_by::<window::Avx2>(family, text, sink)
        }

        #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512(family: Family, text: &[u8], sink: &mut impl Sink) -> Result<()> {
            split_family_by::<window::Avx512>(family, text, sink)
        }

        match set {
            // SAFETY: The processor has these instructions.
            InstructionSet::Avx512 if set.is_supported() => return unsafe { avx512(family, text, sink) },
            // SAFETY: As above.
            InstructionSet::Avx2 if set.is_supported() => return unsafe { avx2(family, text, sink) },
            _ => {}
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = set;
    split_family_by::<window::Sse2>(family, text, sink)
}

/// A loop for each family.
#[inline(always)]
fn split_family_by<B: Bytes>(family: Family, text: &[u8], sink: &mut impl Sink) -> Result<()> {
    match family {
        Family::Gpt2 => split_windows::<B>(Family::Gpt2, text, sink),
        Family::Gpt2Digit => split_windows::<B>(Family::Gpt2Digit, text, sink),
        Family::Llama3 => split_windows::<B>(Family::Llama3, text, sink),
        Family::Qwen => split_windows::<B>(Family::Qwen, text, sink),
        Family::Cl100k => split_windows::<B>(Family::Cl100k, text, sink),
        Family::O200k => split_windows::<B>(Family::O200k, text, sink),
        Family::Tekken => split_windows::<B>(Family::Tekken, text, sink),
        Family::DeepSeek => split_windows::<B>(Family::DeepSeek, text, sink),
    }
}

/// Hands over all pieces of a window at once, and where there is none, or no start in it, some of them one by one.
#[inline(always)]
fn split_windows<B: Bytes>(family: Family, text: &[u8], sink: &mut impl Sink) -> Result<()> {
    /// Pieces found one by one before a window is tried again.
    const SOME: usize = 8;

    let table = family.table();
    let mut at = 0;
    let mut batch = [(0, 0); BATCH];
    while at < text.len() {
        let mut count = 0;
        while count + window::WIDTH <= BATCH && at < text.len() {
            let base = at;
            let mut ends = family.starts::<B>(table, text, base).unwrap_or(0) & !1;
            if ends == 0 {
                for place in &mut batch[count..count + SOME] {
                    if at == text.len() {
                        break;
                    }
                    let end = family.next(table, text, at);
                    *place = (at, end);
                    count += 1;
                    at = end;
                }
            }
            while ends != 0 {
                let end = base + ends.trailing_zeros() as usize;
                batch[count] = (at, end);
                count += 1;
                at = end;
                ends &= ends - 1;
            }
        }
        sink.take(text, &batch[..count])?;
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used)]
mod tests {
    use super::regex::Behavior;
    use super::*;
    use proptest::prelude::*;
    use std::sync::OnceLock;

    impl Family {
        /// All of them.
        pub const ALL: [Family; 8] = [
            Self::Gpt2,
            Self::Gpt2Digit,
            Self::Llama3,
            Self::Qwen,
            Self::Cl100k,
            Self::O200k,
            Self::Tekken,
            Self::DeepSeek,
        ];

        /// The same as regexes.
        pub fn steps(self) -> Result<Vec<Step>> {
            let isolate = |pattern: &str| Step::regex(pattern, Behavior::Isolated, false);
            match self {
                Self::Gpt2 => Ok(vec![isolate(GPT2)?]),
                Self::Gpt2Digit => Ok(vec![Step::Digits { individual: true }, isolate(GPT2)?]),
                Self::Llama3 => Ok(vec![isolate(LLAMA3)?]),
                Self::Qwen => Ok(vec![isolate(QWEN)?]),
                Self::Cl100k => Ok(vec![isolate(CL100K)?]),
                Self::O200k => Ok(vec![isolate(O200K)?]),
                Self::Tekken => Ok(vec![isolate(TEKKEN)?]),
                Self::DeepSeek => DEEPSEEK.iter().map(|p| isolate(p)).collect(),
            }
        }
    }

    struct Ends(Vec<usize>);

    impl Sink for Ends {
        fn take(&mut self, _: &[u8], pieces: &[Piece]) -> Result<()> {
            for &(start, end) in pieces {
                assert_eq!(start, self.0.last().copied().unwrap_or(0));
                assert!(end > start);
                self.0.push(end);
            }
            Ok(())
        }
    }

    fn ends(splitter: &Splitter, text: &str) -> Vec<usize> {
        let mut ends = Ends(Vec::new());
        splitter.split(text, &mut ends).unwrap();
        ends.0
    }

    /// The same by hand, with whatever instructions.
    fn ends_by_hand(family: Family, text: &str) -> Vec<usize> {
        let mut found = InstructionSet::ALL.iter().filter(|set| set.is_supported()).map(|&set| {
            let mut ends = Ends(Vec::new());
            split_family(set, family, text.as_bytes(), &mut ends).unwrap();
            ends.0
        });
        let first = found.next().unwrap();
        found.for_each(|ends| assert_eq!(ends, first, "{family:?} {text:?}"));
        first
    }

    fn regexes() -> &'static [(Family, Splitter)] {
        static ALL: OnceLock<Vec<(Family, Splitter)>> = OnceLock::new();
        ALL.get_or_init(|| Family::ALL.map(|f| (f, Splitter::Steps(f.steps().unwrap()))).into())
    }

    fn compare(text: &str) {
        for (family, regex) in regexes() {
            let by_hand = Splitter::Family(*family);
            let found = ends_by_hand(*family, text);
            assert_eq!(found, ends(regex, text), "{family:?} {text:?}");
            assert_eq!(ends_of_parts(&by_hand, text), found, "parts: {family:?} {text:?}");
        }
    }

    /// The same by every cut that parts may have.
    fn ends_of_parts(splitter: &Splitter, text: &str) -> Vec<usize> {
        let mut start = 0;
        let mut found = Vec::new();
        for part in splitter.parts(text, 1) {
            found.extend(ends(splitter, part).iter().map(|end| start + end));
            start += part.len();
        }
        assert_eq!(start, text.len());
        found
    }

    #[test]
    fn parts_are_cut_between_words() {
        let family = Splitter::Family(Family::Qwen);
        assert_eq!(family.parts("ab cd  e, f\n12 日\nx", 1), ["ab", " cd", "  e, f", "\n12 日", "\nx"]);
        assert_eq!(family.parts("ab cd  ef gh", 3), ["ab cd", "  ef", " gh"]);
        assert_eq!(Splitter::Words("_").parts("_ab__c_", 1), ["_ab", "__c", "_"]);
        assert_eq!(Splitter::Whole.parts("a b", 1), ["a b"]);
        assert_eq!(family.parts("", 1), [""]);
    }

    /// The first and the last code point of every run of one class, in contexts.
    #[test]
    fn every_class_boundary_in_context() {
        let table = classes::unicode();
        let class = |c: u32| table.get(c as usize).copied().unwrap_or(0);
        let cjk = [0x3040, 0x309f, 0x30a0, 0x30ff, 0x4e00, 0x9fa5];
        let decides = |&c: &char| {
            let c = c as u32;
            c == 0
                || class(c) != class(c - 1)
                || class(c) != class(c + 1)
                || cjk.iter().any(|x| c.abs_diff(*x) < 2)
        };
        let chars: Vec<char> = ('\0'..=char::MAX).filter(decides).collect();
        assert!(chars.len() > 3000);
        for (family, regex) in regexes() {
            for some in chars.chunks(16) {
                let mut text = String::new();
                for c in some {
                    for context in ["a{}a", " {}", "{}\n", ".{} ", "'{}", "A{}'s", "{}1", "{}{}中"] {
                        text.push_str(&context.replace("{}", c.encode_utf8(&mut [0; 4])));
                    }
                }
                let (found, expected) = (ends_by_hand(*family, &text), ends(regex, &text));
                if let Some(at) = found.iter().zip(&expected).position(|(a, b)| a != b) {
                    let start = if at == 0 { 0 } else { found[at - 1] };
                    let pieces = (&text[start..found[at]], &text[start..expected[at]]);
                    panic!("{family:?}: found {:?}, expected {:?} in {text:?}", pieces.0, pieces.1);
                }
                assert_eq!(found.len(), expected.len());
            }
        }
    }

    /// A word's contraction has letters of any case.
    #[test]
    fn contractions_in_a_window() {
        for word in ["a'lLb", "a'Ss's", "'sA", "A'ſa", "don'T'reX", "x'"] {
            compare(&format!("{word}{}", "a".repeat(window::WIDTH)));
            compare(&format!("{} {word}", "b ".repeat(window::WIDTH / 2 - 2)).repeat(2));
        }
    }

    /// Mostly characters that decide something, some of them several times.
    fn hostile() -> impl Strategy<Value = String> {
        let few = prop::sample::select(
            "aAbzZsStTmdrRevElLſK019½٣\u{4dff}一龥\u{9f7f}\u{9f80}あア・゛\u{3040}ㄱ日éÉßǅʰ\u{301}\u{fe0f}\u{200d}👍🏽🇩.,'’\"/-_<|>$€©! \t\r\n\u{a0}\u{2028}\u{3000}\0\u{7f}\u{85}\u{ad}\u{e000}\u{378}\u{10ffff}"
                .chars()
                .collect::<Vec<_>>(),
        );
        let count = prop_oneof![6 => Just(1), 2 => 2..5usize, 1 => 5..70usize];
        let run = (prop_oneof![12 => few, 1 => any::<char>()], count);
        // Within one window, and over several.
        let vec = prop::collection::vec;
        prop_oneof![vec(run.clone(), 0..24), vec(run, 40..150)]
            .prop_map(|runs| runs.into_iter().flat_map(|(c, count)| std::iter::repeat_n(c, count)).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn families_are_their_regexes(text in hostile()) {
            compare(&text);
            let words = Splitter::Words("aA");
            assert_eq!(ends_of_parts(&words, &text), ends(&words, &text));
        }
    }
}

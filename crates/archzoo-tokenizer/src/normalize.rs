use std::borrow::Cow;

use fancy_regex::Regex;
use unicode_categories::UnicodeCategories;
use unicode_normalization::char::is_combining_mark;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::charsmap::Charsmap;
use crate::sentencepiece::Spec;

/// A change of the text before it is cut into pieces.
#[derive(Debug, Clone)]
pub enum Normalizer {
    /// Canonical composition.
    Nfc,
    /// Canonical decomposition.
    Nfd,
    /// Compatible composition.
    Nfkc,
    /// Compatible decomposition.
    Nfkd,
    /// Every character's lower case.
    Lowercase,
    /// Marks removed.
    StripAccents,
    /// White space removed at the ends.
    Strip {
        /// At the start.
        left: bool,
        /// At the end.
        right: bool,
    },
    /// Text put before text that is not empty.
    Prepend(String),
    /// Text replaced.
    ReplaceText(String, String),
    /// Matches replaced.
    ReplaceRegex(Box<Regex>, String),
    /// What a table that SentencePiece has compiled says.
    Precompiled(Box<Charsmap>),
    /// What a SentencePiece file says.
    SentencePiece(Box<Spec>),
    /// What BERT does.
    Bert {
        /// Controls removed, white space made blanks.
        clean_text: bool,
        /// Blanks around Chinese characters.
        chinese: bool,
        /// Non-spacing marks removed after decomposition.
        strip_accents: bool,
        /// Every character's lower case.
        lowercase: bool,
    },
}

impl Normalizer {
    /// The normalised text.
    pub fn apply<'a>(&self, text: Cow<'a, str>) -> Cow<'a, str> {
        match self {
            Self::Nfc if text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes => text,
            Self::Nfc => text.nfc().collect(),
            Self::Nfd | Self::Nfkc | Self::Nfkd if text.is_ascii() => text,
            Self::Nfd => text.nfd().collect(),
            Self::Nfkc => text.nfkc().collect(),
            Self::Nfkd => text.nfkd().collect(),
            Self::Lowercase => lowercase(&text).into(),
            Self::StripAccents => text.chars().filter(|&c| !is_combining_mark(c)).collect(),
            Self::Strip { left, right } => {
                let mut kept = text.as_ref();
                if *left {
                    kept = kept.trim_start();
                }
                if *right {
                    kept = kept.trim_end();
                }
                if kept.len() == text.len() { text } else { kept.to_owned().into() }
            }
            Self::Prepend(prefix) if !text.is_empty() => format!("{prefix}{text}").into(),
            Self::Prepend(_) => text,
            Self::ReplaceText(from, to) if text.contains(from.as_str()) => text.replace(from, to).into(),
            Self::ReplaceText(..) => text,
            Self::ReplaceRegex(regex, to) => {
                // The content is text, never a template with groups.
                regex.replace_all(&text, fancy_regex::NoExpand(to)).into_owned().into()
            }
            Self::Precompiled(charsmap) => charsmap.replace_clusters(&text).into(),
            Self::SentencePiece(spec) => spec.apply(&text).into(),
            Self::Bert { clean_text, chinese, strip_accents, lowercase } => {
                let mut text: String = text.into_owned();
                if *clean_text {
                    text = text
                        .chars()
                        .filter(|&c| {
                            !matches!(c, '\0' | '\u{fffd}')
                                && (matches!(c, '\t' | '\n' | '\r') || !c.is_other())
                        })
                        .map(|c| if c.is_whitespace() { ' ' } else { c })
                        .collect();
                }
                if *chinese {
                    let mut padded = String::with_capacity(text.len());
                    for c in text.chars() {
                        if is_chinese(c) {
                            padded.extend([' ', c, ' ']);
                        } else {
                            padded.push(c);
                        }
                    }
                    text = padded;
                }
                if *strip_accents && !text.is_ascii() {
                    text = text.nfd().filter(|&c| !c.is_mark_nonspacing()).collect();
                }
                if *lowercase { self::lowercase(&text).into() } else { text.into() }
            }
        }
    }
}

/// Character by character: a final sigma is a sigma.
fn lowercase(text: &str) -> String {
    if text.is_ascii() {
        text.to_ascii_lowercase()
    } else {
        text.chars().flat_map(char::to_lowercase).collect()
    }
}

fn is_chinese(c: char) -> bool {
    matches!(c as u32,
        0x4E00..=0x9FFF | 0x3400..=0x4DBF | 0x20000..=0x2A6DF | 0x2A700..=0x2B73F | 0x2B740..=0x2B81F
        | 0x2B920..=0x2CEAF | 0xF900..=0xFAFF | 0x2F800..=0x2FA1F)
}

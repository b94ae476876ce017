//! SentencePiece `.model` files: a protocol buffer of pieces and of how text is normalised.
//!
//! A field that changes ids or text and is not understood is refused by its name; those that only say how the model was
//! trained are passed over.

use std::collections::HashMap;

use crate::added::{Added, AddedToken};
use crate::bpe::{Bpe, MISSING, Symbols};
use crate::charsmap::Charsmap;
use crate::decode::{Decoder, fallback_byte};
use crate::error::{Error, Result};
use crate::merges::Merge;
use crate::model::Model;
use crate::normalize::Normalizer;
use crate::split::Splitter;
use crate::tokenizer::Parts;
use crate::trie::Trie;
use crate::unigram::{Score, Unigram};
use crate::vocab::Vocab;

/// What SentencePiece writes a blank as.
pub const MARK: &str = "\u{2581}";

/// A value of a field.
enum Value<'a> {
    Number(u64),
    Fixed([u8; 4]),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a message.
struct Message<'a> {
    /// For errors.
    name: &'static str,
    rest: &'a [u8],
}

impl<'a> Message<'a> {
    fn damaged(&self) -> Error {
        Error::new(format!("the SentencePiece file is damaged: {} ends within a field", self.name))
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or_else(|| self.damaged())?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.damaged())
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let length = usize::try_from(length).map_err(|_| self.damaged())?;
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or_else(|| self.damaged())?;
        self.rest = rest;
        Ok(bytes)
    }

    /// The next field's number and value.
    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.take(8).map(|_| Value::Other)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed(self.take(4)?.try_into().map_err(|_| self.damaged())?),
            kind => {
                let message =
                    format!("the SentencePiece file is damaged: {} has a value of type {kind}", self.name);
                return Err(Error::new(message));
            }
        };
        Ok(Some((tag >> 3, value)))
    }

    fn unknown<T>(&self, field: u64) -> Result<T> {
        Err(Error::unsupported(format!("the SentencePiece field {} of {}", field, self.name)))
    }
}

fn text(bytes: &[u8], what: &str) -> Result<String> {
    let text = std::str::from_utf8(bytes).map_err(|e| Error::new(format!("{what}: not UTF-8: {e}")))?;
    Ok(text.to_owned())
}

/// What a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Normal,
    /// Stands for characters without a piece.
    Unknown,
    /// Has no text, and is not found in any.
    Control,
    /// Text that is always one piece.
    UserDefined,
    /// Text that is no longer a piece.
    Unused,
    /// A byte of a character without a piece.
    Byte,
}

impl Kind {
    fn of(number: u64) -> Result<Self> {
        Ok(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return Err(Error::unsupported(format!("a SentencePiece piece of type {number}"))),
        })
    }
}

struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

impl Piece {
    fn read(content: &[u8]) -> Result<Self> {
        let mut message = Message { name: "a piece", rest: content };
        let mut piece = Self { text: String::new(), score: 0.0, kind: Kind::Normal };
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (1, Value::Bytes(bytes)) => piece.text = text(bytes, "a piece")?,
                (2, Value::Fixed(bytes)) => piece.score = f32::from_le_bytes(bytes),
                (3, Value::Number(kind)) => piece.kind = Kind::of(kind)?,
                _ => return message.unknown(field),
            }
        }
        piece.checked()
    }

    fn checked(self) -> Result<Self> {
        match self.score.is_finite() {
            true => Ok(self),
            false => Err(Error::new(format!("the piece {:?} has the score {}", self.text, self.score))),
        }
    }
}

/// What a SentencePiece file says.
pub(crate) struct File {
    pieces: Vec<Piece>,
    is_bpe: bool,
    byte_fallback: bool,
    unknown_surface: String,
    normalizer: Spec,
    /// Whether control pieces are found in text.
    finds_controls: bool,
}

/// How text is normalised.
#[derive(Debug, Clone)]
pub struct Spec {
    charsmap: Option<Charsmap>,
    /// Pieces that are not changed.
    user_defined: Option<Trie>,
    /// Whether a mark is put before a text, or after it.
    add_dummy_prefix: bool,
    whitespace_as_suffix: bool,
    /// Blanks at the ends go, and all but one elsewhere.
    remove_extra_whitespaces: bool,
    /// Blanks are written as marks.
    escape_whitespaces: bool,
}

impl Spec {
    fn read(&mut self, content: &[u8]) -> Result<()> {
        let mut message = Message { name: "the normalizer_spec", rest: content };
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (1 | 6, Value::Bytes(_)) => {}
                (2, Value::Bytes([])) => self.charsmap = None,
                (2, Value::Bytes(bytes)) => self.charsmap = Some(Charsmap::new(bytes)?),
                (3, Value::Number(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Value::Number(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Value::Number(flag)) => self.escape_whitespaces = flag != 0,
                _ => return message.unknown(field),
            }
        }
        Ok(())
    }

    /// The start of a text that is replaced together: its length and what replaces it.
    fn first<'a>(&'a self, text: &'a str) -> (usize, &'a str) {
        let bytes = text.as_bytes();
        if let Some(trie) = &self.user_defined {
            let (_, length) = trie.longest(bytes);
            if length > 0 {
                return (length, &text[..length]);
            }
        }
        if let Some((length, replacement)) = self.charsmap.as_ref().and_then(|map| map.longest(bytes))
            && text.is_char_boundary(length)
        {
            return (length, replacement);
        }
        let length = text.chars().next().map_or(0, char::len_utf8);
        (length, &text[..length])
    }

    /// The normalised text.
    pub fn apply(&self, text: &str) -> String {
        let mark = if self.escape_whitespaces { MARK } else { " " };
        let mut out = String::with_capacity(text.len() + text.len() / 4 + mark.len());
        let mut rest = text;
        if self.remove_extra_whitespaces {
            while let (length @ 1.., " ") = self.first(rest) {
                rest = &rest[length..];
            }
        }
        if rest.is_empty() {
            return out;
        }
        if self.add_dummy_prefix && !self.whitespace_as_suffix {
            out.push_str(mark);
        }
        let mut after_blank = self.remove_extra_whitespaces;
        while !rest.is_empty() {
            let (length, mut replacement) = self.first(rest);
            rest = &rest[length..];
            if after_blank {
                replacement = replacement.trim_start_matches(' ');
            }
            if !replacement.is_empty() {
                let mut parts = replacement.split(' ');
                out.extend(parts.next());
                parts.for_each(|part| out.extend([mark, part]));
                after_blank = self.remove_extra_whitespaces && replacement.ends_with(' ');
            }
        }
        if self.remove_extra_whitespaces {
            let kept = out.trim_end_matches(mark).len();
            out.truncate(kept);
        }
        if self.add_dummy_prefix && self.whitespace_as_suffix {
            out.push_str(mark);
        }
        out
    }
}

impl Default for File {
    fn default() -> Self {
        Self {
            pieces: Vec::new(),
            is_bpe: false,
            byte_fallback: false,
            unknown_surface: " \u{2047} ".to_owned(),
            normalizer: Spec {
                charsmap: None,
                user_defined: None,
                add_dummy_prefix: true,
                whitespace_as_suffix: false,
                remove_extra_whitespaces: true,
                escape_whitespaces: true,
            },
            finds_controls: false,
        }
    }
}

impl File {
    /// A byte-pair model out of another kind of file: pieces (text, score, type), and whether a mark is put before a
    /// text and extra blanks go. Control pieces are found in text.
    pub(crate) fn of_pieces<'a>(
        pieces: impl Iterator<Item = (&'a str, f32, u64)>,
        add_dummy_prefix: bool,
        remove_extra_whitespaces: bool,
    ) -> Result<Self> {
        let mut file = Self { is_bpe: true, finds_controls: true, ..Self::default() };
        for (text, score, kind) in pieces {
            let piece = Piece { text: text.to_owned(), score, kind: Kind::of(kind)? };
            file.byte_fallback |= piece.kind == Kind::Byte;
            file.pieces.push(piece.checked()?);
        }
        file.normalizer.add_dummy_prefix = add_dummy_prefix;
        file.normalizer.remove_extra_whitespaces = remove_extra_whitespaces;
        Ok(file)
    }

    fn read(content: &[u8]) -> Result<Self> {
        let mut file = Self::default();
        let mut message = Message { name: "the model", rest: content };
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (1, Value::Bytes(bytes)) => file.pieces.push(Piece::read(bytes)?),
                (2, Value::Bytes(bytes)) => file.trainer(bytes)?,
                (3, Value::Bytes(bytes)) => file.normalizer.read(bytes)?,
                // Examples for a self-test.
                (4, Value::Bytes(_)) => {}
                (5, Value::Bytes(bytes)) => {
                    let mut spec = file.normalizer.clone();
                    spec.charsmap = None;
                    spec.read(bytes)?;
                    if spec.charsmap.is_some() {
                        return Err(Error::unsupported("a SentencePiece denormalizer_spec"));
                    }
                }
                _ => return message.unknown(field),
            }
        }
        Ok(file)
    }

    fn trainer(&mut self, content: &[u8]) -> Result<()> {
        let mut message = Message { name: "the trainer_spec", rest: content };
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (3, Value::Number(1)) => self.is_bpe = false,
                (3, Value::Number(2)) => self.is_bpe = true,
                (3, Value::Number(kind)) => {
                    let kinds = [(3, "WORD"), (4, "CHAR")];
                    let name = kinds.iter().find(|&&(k, _)| k == kind).map_or("?", |&(_, name)| name);
                    return Err(Error::unsupported(format!("the SentencePiece model_type {name} ({kind})")));
                }
                (24, Value::Number(flag)) => self.normalizer.whitespace_as_suffix = flag != 0,
                (35, Value::Number(flag)) => self.byte_fallback = flag != 0,
                (44, Value::Bytes(bytes)) => self.unknown_surface = text(bytes, "unk_surface")?,
                // How it was trained, and names of pieces that their types tell.
                (1..=60, _) => {}
                _ => return message.unknown(field),
            }
        }
        Ok(())
    }

    fn tokens(&self, is_found: impl Fn(Kind) -> bool) -> Result<Vocab> {
        let tokens: Vec<(&[u8], u32)> = self.pieces.iter().map(|p| p.text.as_bytes()).zip(0..).collect();
        Vocab::new(&tokens, |i| is_found(self.pieces[i].kind))
    }

    /// The id of the unknown piece, and those of the byte pieces if there is a fallback to them.
    fn reserved(&self) -> Result<(u32, Option<Box<[u32; 256]>>)> {
        let mut unknown = None;
        let mut bytes = Box::new([MISSING; 256]);
        let mut seen = HashMap::new();
        for (piece, id) in self.pieces.iter().zip(0..) {
            if piece.text.is_empty() {
                return Err(Error::new(format!("the piece {id} is empty")));
            }
            if let Some(first) = seen.insert(piece.text.as_str(), id) {
                return Err(Error::new(format!("the pieces {first} and {id} are both {:?}", piece.text)));
            }
            match piece.kind {
                Kind::Unknown if unknown.is_some() => {
                    return Err(Error::new("two pieces are of type UNKNOWN"));
                }
                Kind::Unknown => unknown = Some(id),
                Kind::Byte if !self.byte_fallback => {
                    return Err(Error::new(format!(
                        "the piece {:?} is a byte, without byte_fallback",
                        piece.text
                    )));
                }
                Kind::Byte => match fallback_byte(&piece.text) {
                    Some(byte) => bytes[usize::from(byte)] = id,
                    None => return Err(Error::new(format!("the piece {:?} is of type BYTE", piece.text))),
                },
                _ => {}
            }
        }
        let unknown = unknown.ok_or_else(|| Error::new("no piece is of type UNKNOWN"))?;
        if !self.byte_fallback {
            return Ok((unknown, None));
        }
        match bytes.iter().position(|&id| id == MISSING) {
            None => Ok((unknown, Some(bytes))),
            Some(byte) => Err(Error::new(format!("byte_fallback without a piece for the byte {byte:#04x}"))),
        }
    }

    /// Two neighbours merge if their texts together are a piece, that of the best score first.
    fn bpe(&self, unknown: u32, fallback: Option<Box<[u32; 256]>>) -> Result<Bpe> {
        let vocab = self.tokens(|kind| kind == Kind::Normal)?;
        let mut buffer = [0; 4];
        for piece in &self.pieces {
            match piece.kind {
                Kind::Unused => {
                    return Err(Error::unsupported(format!(
                        "the unused piece {:?} of a BPE model",
                        piece.text
                    )));
                }
                Kind::Normal => {
                    let missing = piece
                        .text
                        .chars()
                        .find(|c| vocab.get(c.encode_utf8(&mut buffer).as_bytes()).is_none());
                    if let Some(c) = missing {
                        let message =
                            format!("the piece {:?} with the character {c:?}, which is no piece", piece.text);
                        return Err(Error::unsupported(message));
                    }
                }
                _ => {}
            }
        }
        let score = |id: u32| self.pieces[id as usize].score;
        let is_merged = |&id: &u32| {
            let piece = &self.pieces[id as usize];
            piece.kind == Kind::Normal && piece.text.chars().nth(1).is_some()
        };
        let mut order: Vec<u32> = (0..self.pieces.len() as u32).filter(is_merged).collect();
        order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        let mut merges = Vec::new();
        // Equal scores are one rank, so that the leftmost of such pairs is first.
        for (same, rank) in order.chunk_by(|&a, &b| score(a) == score(b)).zip(0..) {
            for &id in same {
                let text = self.pieces[id as usize].text.as_str();
                for (cut, _) in text.char_indices().skip(1) {
                    let (left, right) = text.as_bytes().split_at(cut);
                    if let (Some(left), Some(right)) = (vocab.get(left), vocab.get(right)) {
                        merges.push(Merge { left, right, rank, product: id });
                    }
                }
            }
        }
        let mut bpe = Bpe::new(vocab, Symbols::Chars { fallback }, &merges, Some(unknown))?;
        bpe.fuse_unknown = true;
        Ok(bpe)
    }

    fn unigram(&self, unknown: u32, fallback: Option<Box<[u32; 256]>>) -> Result<Unigram> {
        let is_found = |kind| matches!(kind, Kind::Normal | Kind::UserDefined);
        let vocab = self.tokens(is_found)?;
        let normal = || self.pieces.iter().filter(|p| p.kind == Kind::Normal).map(|p| p.score);
        let least = normal().fold(f32::MAX, f32::min);
        let score = |piece: &Piece| match piece.kind {
            // Better than any sum of others.
            Kind::UserDefined => f64::from((0.1 * (piece.text.len() - 1) as f64) as f32),
            _ => f64::from(piece.score),
        };
        let scores = self.pieces.iter().map(score).collect();
        Unigram::new(vocab, scores, f64::from(least), Some(unknown), fallback, Score::Single)
    }

    /// The parts of the file, with the model made of it or that given.
    pub(crate) fn parts(mut self, made: Option<Bpe>) -> Result<Parts> {
        let (unknown, fallback) = self.reserved()?;
        let model = match made {
            Some(bpe) => Model::Bpe(bpe),
            None if self.is_bpe => Model::Bpe(self.bpe(unknown, fallback)?),
            None => Model::Unigram(self.unigram(unknown, fallback)?),
        };
        let splitter = match &model {
            Model::Bpe(bpe) if bpe.starts_words_with(MARK) => Splitter::Words(MARK),
            _ => Splitter::Whole,
        };
        let token = |(piece, id): (&Piece, u32)| AddedToken {
            id,
            content: piece.text.clone(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: piece.kind == Kind::UserDefined,
            special: piece.kind == Kind::Control,
        };
        let of_kind = |kind: Kind| self.pieces.iter().zip(0..).filter(move |(piece, _)| piece.kind == kind);
        let controls: Vec<AddedToken> = of_kind(Kind::Control).map(token).collect();
        let controls = if self.finds_controls { Added::new(controls)? } else { Added::silent(controls) };
        let user_defined: Vec<AddedToken> = of_kind(Kind::UserDefined).map(token).collect();
        if !user_defined.is_empty() {
            let tokens: Vec<(&[u8], u32)> =
                user_defined.iter().map(|t| (t.content.as_bytes(), t.id)).collect();
            self.normalizer.user_defined = Some(Trie::new(&tokens)?);
        }
        // Unigram's scores see to it that these are found.
        let normalized = if self.is_bpe { Added::new(user_defined)? } else { Added::silent(user_defined) };
        let kinds = self.pieces.iter().map(|piece| piece.kind).collect();
        let starts_blank = self.normalizer.add_dummy_prefix || self.normalizer.remove_extra_whitespaces;
        let strips = match (starts_blank, self.normalizer.remove_extra_whitespaces) {
            (false, _) => Strip::Nothing,
            (true, false) => Strip::First,
            (true, true) => Strip::All,
        };
        Ok(Parts {
            raw: controls,
            normalized,
            normalizers: vec![Normalizer::SentencePiece(Box::new(self.normalizer))],
            prefix_blank: false,
            metaspace: None,
            splitter,
            model,
            before: Vec::new(),
            after: Vec::new(),
            decoder: Decoder::Pieces(PieceDecoder { kinds, unknown_surface: self.unknown_surface, strips }),
        })
    }
}

/// Whether content is that of a SentencePiece file: it starts with a piece that starts with its text.
pub fn is_model(content: &[u8]) -> bool {
    let mut message = Message { name: "the model", rest: content };
    let Ok(Some((1, Value::Bytes(piece)))) = message.next() else { return false };
    let mut piece = Message { name: "a piece", rest: piece };
    matches!(piece.next(), Ok(Some((1, Value::Bytes(_)))))
}

/// The parts of a SentencePiece file, with the model made of it or that given.
pub(crate) fn parts(content: &[u8], made: Option<Bpe>) -> Result<Parts> {
    File::read(content)?.parts(made)
}

/// Which marks at the start of a text are no blanks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strip {
    Nothing,
    /// The first, before any other text.
    First,
    /// The first of every piece before any other text.
    All,
}

/// The text of pieces.
#[derive(Debug, Clone)]
pub struct PieceDecoder {
    kinds: Vec<Kind>,
    unknown_surface: String,
    strips: Strip,
}

impl PieceDecoder {
    /// Appends the bytes of a piece to `out`; `is_start` says, and learns, whether no text has come before.
    pub fn decode(&self, id: u32, token: &[u8], is_start: &mut bool, out: &mut Vec<u8>) {
        let token = String::from_utf8_lossy(token);
        match self.kinds.get(id as usize) {
            Some(Kind::Control) => {}
            Some(Kind::Byte) => {
                out.extend(fallback_byte(&token));
                *is_start = false;
            }
            Some(Kind::Unknown) => {
                out.extend_from_slice(self.unknown_surface.as_bytes());
                *is_start &= self.unknown_surface.is_empty();
            }
            _ => {
                let mut text = token.as_ref();
                let mut stripped = false;
                if *is_start
                    && self.strips != Strip::Nothing
                    && let Some(rest) = text.strip_prefix(MARK)
                {
                    (text, stripped) = (rest, true);
                }
                out.extend_from_slice(text.replace(MARK, " ").as_bytes());
                *is_start &= text.is_empty() && !(stripped && self.strips == Strip::First);
            }
        }
    }
}

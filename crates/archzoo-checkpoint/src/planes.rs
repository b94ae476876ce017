//! The parts of floating-point numbers: the byte with their exponent, which is coded, and the rest.

use std::ops::Range;

use archzoo_simd::{InstructionSet, multiversion};

use crate::Dtype;

/// How the numbers of a dtype are taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Planes {
    /// bfloat16: exponent; sign and mantissa in a byte.
    Bf16,
    /// float32: exponent; sign and upper mantissa in a byte; then the lower mantissa, 2 bytes.
    F32,
    /// float16: sign, exponent and two bits of mantissa, since the rest is a byte; the rest.
    F16,
    /// The whole byte.
    F8,
}

impl Planes {
    pub(crate) const ALL: [Self; 4] = [Self::Bf16, Self::F32, Self::F16, Self::F8];

    /// `None` where nothing is to be won.
    pub(crate) fn of(dtype: Dtype) -> Option<Self> {
        match dtype.name() {
            "BF16" => Some(Self::Bf16),
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "F8_E4M3" | "F8_E5M2" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => Some(Self::F8),
            _ => None,
        }
    }

    /// Bytes of a number.
    pub(crate) fn width(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F8 => 1,
        }
    }

    /// Takes numbers apart; `rest` has a byte less for each than `numbers`.
    pub(crate) fn split(self, set: InstructionSet, numbers: &[u8], symbols: &mut [u8], rest: &mut [u8]) {
        match self {
            Self::Bf16 => split_bf16(set, numbers, symbols, rest),
            Self::F32 => {
                let (upper, lower) = rest.split_at_mut(symbols.len());
                split_f32(set, numbers, symbols, upper, lower);
            }
            Self::F16 => split_f16(set, numbers, symbols, rest),
            Self::F8 => symbols.copy_from_slice(numbers),
        }
    }

    /// The coded byte of each number.
    pub(crate) fn symbols(self, set: InstructionSet, numbers: &[u8], symbols: &mut [u8]) {
        match self {
            Self::Bf16 => exponents_bf16(set, numbers, symbols),
            Self::F32 => exponents_f32(set, numbers, symbols),
            Self::F16 => upper_f16(set, numbers, symbols),
            Self::F8 => symbols.copy_from_slice(numbers),
        }
    }

    /// Puts the numbers of a range together again. `rest` is that of all `numbers`; one byte for each float32
    /// lacks the lower mantissas: all zero.
    pub(crate) fn join(
        self,
        set: InstructionSet,
        symbols: &[u8],
        rest: &[u8],
        range: Range<usize>,
        numbers: &mut [u8],
    ) {
        let elements = numbers.len() / self.width();
        let numbers = &mut numbers[range.start * self.width()..range.end * self.width()];
        match self {
            Self::Bf16 => join_bf16(set, symbols, &rest[range], numbers),
            Self::F32 if rest.len() == elements => join_short_f32(set, symbols, &rest[range], numbers),
            Self::F32 => {
                let (upper, lower) = rest.split_at(elements);
                let lower = &lower[2 * range.start..2 * range.end];
                join_f32(set, symbols, &upper[range], lower, numbers);
            }
            Self::F16 => join_f16(set, symbols, &rest[range], numbers),
            Self::F8 => numbers.copy_from_slice(symbols),
        }
    }
}

#[inline(always)]
fn exponent(upper: u16) -> u8 {
    (upper >> 7) as u8
}

#[inline(always)]
fn sign_and_mantissa(upper: u16) -> u8 {
    (upper >> 8) as u8 & 0x80 | upper as u8 & 0x7f
}

#[inline(always)]
fn upper_half(exponent: u8, rest: u8) -> u16 {
    u16::from(rest & 0x80) << 8 | u16::from(exponent) << 7 | u16::from(rest & 0x7f)
}

multiversion! {
    fn split_bf16(numbers: &[u8], symbols: &mut [u8], rest: &mut [u8]) {
        for ((number, symbol), rest) in numbers.as_chunks::<2>().0.iter().zip(symbols).zip(rest) {
            let number = u16::from_le_bytes(*number);
            *symbol = exponent(number);
            *rest = sign_and_mantissa(number);
        }
    }
}

multiversion! {
    fn exponents_bf16(numbers: &[u8], symbols: &mut [u8]) {
        for (number, symbol) in numbers.as_chunks::<2>().0.iter().zip(symbols) {
            *symbol = exponent(u16::from_le_bytes(*number));
        }
    }
}

multiversion! {
    fn join_bf16(symbols: &[u8], rest: &[u8], numbers: &mut [u8]) {
        for ((number, &symbol), &rest) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(symbols).zip(rest) {
            *number = upper_half(symbol, rest).to_le_bytes();
        }
    }
}

multiversion! {
    fn split_f32(numbers: &[u8], symbols: &mut [u8], upper: &mut [u8], lower: &mut [u8]) {
        let parts = symbols.iter_mut().zip(upper).zip(lower.as_chunks_mut::<2>().0);
        for (number, ((symbol, upper), lower)) in numbers.as_chunks::<4>().0.iter().zip(parts) {
            let number = u32::from_le_bytes(*number);
            *symbol = exponent((number >> 16) as u16);
            *upper = sign_and_mantissa((number >> 16) as u16);
            *lower = (number as u16).to_le_bytes();
        }
    }
}

multiversion! {
    fn exponents_f32(numbers: &[u8], symbols: &mut [u8]) {
        for (number, symbol) in numbers.as_chunks::<4>().0.iter().zip(symbols) {
            *symbol = exponent((u32::from_le_bytes(*number) >> 16) as u16);
        }
    }
}

multiversion! {
    fn join_f32(symbols: &[u8], upper: &[u8], lower: &[u8], numbers: &mut [u8]) {
        let parts = symbols.iter().zip(upper).zip(lower.as_chunks::<2>().0);
        for (number, ((&symbol, &upper), lower)) in numbers.as_chunks_mut::<4>().0.iter_mut().zip(parts) {
            let upper = u32::from(upper_half(symbol, upper)) << 16;
            *number = (upper | u32::from(u16::from_le_bytes(*lower))).to_le_bytes();
        }
    }
}

multiversion! {
    fn join_short_f32(symbols: &[u8], upper: &[u8], numbers: &mut [u8]) {
        for ((number, &symbol), &upper) in numbers.as_chunks_mut::<4>().0.iter_mut().zip(symbols).zip(upper) {
            *number = (u32::from(upper_half(symbol, upper)) << 16).to_le_bytes();
        }
    }
}

multiversion! {
    fn split_f16(numbers: &[u8], symbols: &mut [u8], rest: &mut [u8]) {
        for ((number, symbol), rest) in numbers.as_chunks::<2>().0.iter().zip(symbols).zip(rest) {
            [*rest, *symbol] = *number;
        }
    }
}

multiversion! {
    fn upper_f16(numbers: &[u8], symbols: &mut [u8]) {
        for (number, symbol) in numbers.as_chunks::<2>().0.iter().zip(symbols) {
            *symbol = number[1];
        }
    }
}

multiversion! {
    fn join_f16(symbols: &[u8], rest: &[u8], numbers: &mut [u8]) {
        for ((number, &symbol), &rest) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(symbols).zip(rest) {
            *number = [rest, symbol];
        }
    }
}

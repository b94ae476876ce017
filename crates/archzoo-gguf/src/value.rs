//! Values of the metadata.

use crate::cursor::{Cursor, Parsed};
use crate::wrong;

/// Arrays within arrays.
const DEPTH: u32 = 4;

macro_rules! values {
    (integers: $($int:ident: $int_type:ty = $int_id:literal),*; floats: $($float:ident: $float_type:ty = $float_id:literal),*) => {
        /// A value of the metadata.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum Value<'a> {
            $($int($int_type),)*
            $($float($float_type),)*
            Bool(bool),
            String(&'a str),
            Array(Array<'a>),
        }

        /// An array of the metadata, of one type.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum Array<'a> {
            $($int(Vec<$int_type>),)*
            $($float(Vec<$float_type>),)*
            Bool(Vec<bool>),
            String(Vec<&'a str>),
            Array(Vec<Array<'a>>),
        }

        impl<'a> Value<'a> {
            pub(crate) fn parse(cursor: &mut Cursor<'a>, id: u32) -> Parsed<Self> {
                Ok(match id {
                    $($int_id => Self::$int(<$int_type>::from_le_bytes(cursor.array()?)),)*
                    $($float_id => Self::$float(<$float_type>::from_le_bytes(cursor.array()?)),)*
                    7 => Self::Bool(cursor.boolean()?),
                    8 => Self::String(cursor.string()?),
                    9 => Self::Array(Array::parse(cursor, DEPTH)?),
                    _ => return wrong(format!("expected a value type of 0 to 12, found {id}")),
                })
            }

            /// An integer of any width, or a boolean as 0 or 1.
            pub fn integer(&self) -> Option<i64> {
                match self {
                    $(Self::$int(value) => i64::try_from(*value).ok(),)*
                    Self::Bool(value) => Some(i64::from(*value)),
                    _ => None,
                }
            }
        }

        impl<'a> Array<'a> {
            fn parse(cursor: &mut Cursor<'a>, depth: u32) -> Parsed<Self> {
                let id = cursor.u32()?;
                let count = cursor.u64()?;
                let smallest = match id {
                    $($int_id => size_of::<$int_type>() as u64,)*
                    $($float_id => size_of::<$float_type>() as u64,)*
                    7 => 1,
                    8 => 8,
                    9 if depth > 0 => 12,
                    9 => return wrong(format!("expected at most {DEPTH} arrays in arrays, found more")),
                    _ => return wrong(format!("expected an array of type 0 to 12, found {id}")),
                };
                let count = cursor.fits(count, smallest, "array elements")?;
                Ok(match id {
                    $($int_id => Self::$int(cursor.arrays(count)?.map(<$int_type>::from_le_bytes).collect()),)*
                    $($float_id => Self::$float(cursor.arrays(count)?.map(<$float_type>::from_le_bytes).collect()),)*
                    7 => Self::Bool((0..count).map(|_| cursor.boolean()).collect::<Parsed<_>>()?),
                    8 => Self::String((0..count).map(|_| cursor.string()).collect::<Parsed<_>>()?),
                    _ => Self::Array((0..count).map(|_| Self::parse(cursor, depth - 1)).collect::<Parsed<_>>()?),
                })
            }

            /// Integers of any width.
            pub fn integers(&self) -> Option<Vec<i64>> {
                match self {
                    $(Self::$int(values) => values.iter().map(|&value| i64::try_from(value).ok()).collect(),)*
                    _ => None,
                }
            }
        }
    };
}

values! {
    integers: U8: u8 = 0, I8: i8 = 1, U16: u16 = 2, I16: i16 = 3, U32: u32 = 4, I32: i32 = 5, U64: u64 = 10, I64: i64 = 11;
    floats: F32: f32 = 6, F64: f64 = 12
}

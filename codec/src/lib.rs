//! How images are written: MessagePack in which every struct's field names stand once rather than in each instance.
//!
//! An image of ten thousand connections is ten thousand times the same hundred and fifty field names. With the names in
//! every instance it takes four times the bytes, and the time to write and compare them is spent while a job stands
//! still. Without names at all it could not be read by a release that knows a field more or less. So names are kept, in a
//! table: *shapes* (lists of field names) and names of enum variants.
//!
//! ```text
//! | c1 'M' 'I' | format (1) | length of the body, u64 big-endian | body | tables |
//! ```
//!
//! Body and tables are MessagePack. The tables are `[[[field, ..], ..], [variant, ..]]`. In the body
//!
//! * a struct is an array: the number of its shape, then its fields in the order of that shape;
//! * an enum variant without content is its number in the table of variants; with content it is an array of that number
//!   and the content;
//! * all else is as MessagePack has it.
//!
//! The first byte, `c1`, begins no MessagePack value: [`is_packed`] tells such an image from one that was written in plain
//! MessagePack.
//!
//! A reader whose struct has exactly the fields of the shape takes them by position, without looking at a name; otherwise
//! they are matched by name: fields it doesn't know are skipped, fields that are missing take their `#[serde(default)]`.
//!
//! Left out, since no image holds them: 128-bit integers, and types that must be told apart by what the input looks like
//! (`untagged` and internally tagged enums).

mod decode;
mod encode;
mod marker;

use serde::{Deserialize, Serialize};

/// First bytes of a packed image, the last being the number of the format.
const MAGIC: [u8; 4] = [marker::NEVER, b'M', b'I', 1];
/// Bytes before the body.
const HEADER_LEN: usize = MAGIC.len() + 8;

/// Why bytes are no image, or a value can't be made one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The bytes don't begin as an image does, or have a format this release doesn't know.
    #[error("not a packed image of a format this release reads")]
    Magic,
    /// The bytes end too early.
    #[error("the image ends in the middle of a value")]
    Truncated,
    /// There is more than the image.
    #[error("{0} bytes too many after the image")]
    Trailing(usize),
    /// A value of another kind was expected.
    #[error("expected {expected}, found a value that begins with {found:#04x}")]
    Kind {
        /// What the reader wanted.
        expected: &'static str,
        /// First byte of what is there.
        found: u8,
    },
    /// A number that stands for a shape or a variant has no entry in its table, or the lengths don't fit.
    #[error("the image refers to {0} that it doesn't hold")]
    Table(&'static str),
    /// Values within values within values.
    #[error("values are nested too deeply")]
    Depth,
    /// Text that is not UTF-8.
    #[error("text is not UTF-8")]
    Utf8,
    /// What the type itself has to say.
    #[error("{0}")]
    Custom(String),
    /// A type that images can't hold.
    #[error("{0} can't be written")]
    Unsupported(&'static str),
}

impl serde::ser::Error for Error {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Error::Custom(message.to_string())
    }
}

impl serde::de::Error for Error {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Error::Custom(message.to_string())
    }
}

/// Whether `bytes` begin as a packed image of any format does.
#[must_use]
pub fn is_packed(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC[..3])
}

/// Writes `value` as an image.
///
/// # Errors
/// When the type can't be held by an image, or refuses to be serialized.
pub fn to_vec<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, Error> {
    let mut encoder = encode::Encoder::new();
    value.serialize(&mut encoder)?;
    Ok(encoder.finish())
}

/// Reads a value from an image. What the value borrows, it borrows from `bytes`.
///
/// # Errors
/// When `bytes` are not one whole image, or not one of this type.
pub fn from_slice<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, Error> {
    let tables = decode::Tables::read(bytes)?;
    let mut decoder = decode::Decoder::new(&tables);
    let value = T::deserialize(&mut decoder)?;
    decoder.finish()?;
    Ok(value)
}

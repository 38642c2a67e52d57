//! Reading.

use std::cell::Cell;

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{self, DeserializeSeed, Visitor};

use crate::{Error, HEADER_LEN, MAGIC, marker};

/// Values within values.
const DEPTH_MAX: usize = 96;

/// A list of fields, and what was found out about a type that was read from it.
struct Shape<'de> {
    fields: Vec<&'de str>,
    /// Address of the field list of the last type that was compared, and whether it has exactly these fields.
    compared: Cell<(usize, bool)>,
}

impl Shape<'_> {
    fn is_exactly(&self, wanted: &'static [&'static str]) -> bool {
        let address = wanted.as_ptr().addr();
        let (last, same) = self.compared.get();
        // An empty list has no address of its own.
        if last == address && !wanted.is_empty() {
            return same;
        }
        let same = *self.fields == *wanted;
        self.compared.set((address, same));
        same
    }
}

/// What an image holds once.
pub(crate) struct Tables<'de> {
    body: &'de [u8],
    shapes: Vec<Shape<'de>>,
    variants: Vec<&'de str>,
}

impl<'de> Tables<'de> {
    pub(crate) fn read(bytes: &'de [u8]) -> Result<Self, Error> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(Error::Magic)?;
        let (len, rest) = rest.split_first_chunk::<8>().ok_or(Error::Truncated)?;
        let len = usize::try_from(u64::from_be_bytes(*len)).map_err(|_| Error::Truncated)?;
        debug_assert_eq!(bytes.len() - rest.len(), HEADER_LEN);
        let (body, tables) = rest.split_at_checked(len).ok_or(Error::Truncated)?;
        let mut input = Input { bytes: tables };
        if input.array()? != 2 {
            return Err(Error::Table("tables"));
        }
        let texts = |input: &mut Input<'de>| (0..input.array()?).map(|_| input.text()).collect::<Result<Vec<_>, _>>();
        let mut shapes = Vec::new();
        for _ in 0..input.array()? {
            shapes.push(Shape { fields: texts(&mut input)?, compared: Cell::new((0, false)) });
        }
        let variants = texts(&mut input)?;
        match input.bytes.len() {
            0 => Ok(Tables { body, shapes, variants }),
            more => Err(Error::Trailing(more)),
        }
    }
}

/// The bytes still to be read.
#[derive(Clone, Copy)]
struct Input<'de> {
    bytes: &'de [u8],
}

impl<'de> Input<'de> {
    fn peek(&self) -> Result<u8, Error> {
        self.bytes.first().copied().ok_or(Error::Truncated)
    }

    fn take(&mut self, len: usize) -> Result<&'de [u8], Error> {
        let (head, rest) = self.bytes.split_at_checked(len).ok_or(Error::Truncated)?;
        self.bytes = rest;
        Ok(head)
    }

    fn fixed<const LEN: usize>(&mut self) -> Result<[u8; LEN], Error> {
        let (head, rest) = self.bytes.split_first_chunk::<LEN>().ok_or(Error::Truncated)?;
        self.bytes = rest;
        Ok(*head)
    }

    fn byte(&mut self) -> Result<u8, Error> {
        let [byte] = self.fixed()?;
        Ok(byte)
    }

    fn len8(&mut self) -> Result<usize, Error> {
        self.byte().map(usize::from)
    }

    fn len16(&mut self) -> Result<usize, Error> {
        self.fixed().map(|bytes| usize::from(u16::from_be_bytes(bytes)))
    }

    fn len32(&mut self) -> Result<usize, Error> {
        usize::try_from(u32::from_be_bytes(self.fixed()?)).map_err(|_| Error::Truncated)
    }

    fn array(&mut self) -> Result<usize, Error> {
        let len = match self.byte()? {
            fixed @ 0x90..=0x9f => usize::from(fixed - marker::FIXARRAY),
            marker::ARRAY16 => self.len16()?,
            marker::ARRAY32 => self.len32()?,
            found => return Err(Error::Kind { expected: "a sequence", found }),
        };
        // Each entry takes a byte at least.
        if len > self.bytes.len() { Err(Error::Truncated) } else { Ok(len) }
    }

    fn map(&mut self) -> Result<usize, Error> {
        let len = match self.byte()? {
            fixed @ 0x80..=0x8f => usize::from(fixed - marker::FIXMAP),
            marker::MAP16 => self.len16()?,
            marker::MAP32 => self.len32()?,
            found => return Err(Error::Kind { expected: "a map", found }),
        };
        if len > self.bytes.len() { Err(Error::Truncated) } else { Ok(len) }
    }

    fn text(&mut self) -> Result<&'de str, Error> {
        let len = match self.byte()? {
            fixed @ 0xa0..=0xbf => usize::from(fixed - marker::FIXSTR),
            marker::STR8 => self.len8()?,
            marker::STR16 => self.len16()?,
            marker::STR32 => self.len32()?,
            found => return Err(Error::Kind { expected: "a text", found }),
        };
        std::str::from_utf8(self.take(len)?).map_err(|_| Error::Utf8)
    }

    fn binary(&mut self) -> Result<&'de [u8], Error> {
        let len = match self.byte()? {
            marker::BIN8 => self.len8()?,
            marker::BIN16 => self.len16()?,
            marker::BIN32 => self.len32()?,
            found => return Err(Error::Kind { expected: "bytes", found }),
        };
        self.take(len)
    }

    fn number(&mut self) -> Result<Number, Error> {
        let unsigned = Number::Unsigned;
        Ok(match self.byte()? {
            small @ 0..=marker::FIXINT_MAX => unsigned(small.into()),
            small @ marker::NEGATIVE_FIXINT.. => Number::Signed(small.cast_signed().into()),
            marker::U8 => unsigned(self.byte()?.into()),
            marker::U16 => unsigned(u16::from_be_bytes(self.fixed()?).into()),
            marker::U32 => unsigned(u32::from_be_bytes(self.fixed()?).into()),
            marker::U64 => unsigned(u64::from_be_bytes(self.fixed()?)),
            marker::I8 => Number::Signed(i8::from_be_bytes(self.fixed()?).into()),
            marker::I16 => Number::Signed(i16::from_be_bytes(self.fixed()?).into()),
            marker::I32 => Number::Signed(i32::from_be_bytes(self.fixed()?).into()),
            marker::I64 => Number::Signed(i64::from_be_bytes(self.fixed()?)),
            marker::F32 => Number::Float(f32::from_be_bytes(self.fixed()?).into()),
            marker::F64 => Number::Float(f64::from_be_bytes(self.fixed()?)),
            found => return Err(Error::Kind { expected: "a number", found }),
        })
    }

    /// A number that refers to a table.
    fn reference(&mut self) -> Result<usize, Error> {
        match self.number()? {
            Number::Unsigned(number) => usize::try_from(number).map_err(|_| Error::Table("a number")),
            _ => Err(Error::Table("a number")),
        }
    }

    /// Passes over one value, however deep, in constant stack.
    fn skip(&mut self) -> Result<(), Error> {
        let mut left: usize = 1;
        while left > 0 {
            left -= 1;
            let more = match self.peek()? {
                0x90..=0x9f | marker::ARRAY16 | marker::ARRAY32 => self.array()?,
                0x80..=0x8f | marker::MAP16 | marker::MAP32 => 2 * self.map()?,
                0xa0..=0xbf | marker::STR8 | marker::STR16 | marker::STR32 => {
                    self.text()?;
                    0
                }
                marker::BIN8 | marker::BIN16 | marker::BIN32 => {
                    self.binary()?;
                    0
                }
                marker::NIL | marker::TRUE | marker::FALSE => {
                    self.byte()?;
                    0
                }
                _ => {
                    self.number()?;
                    0
                }
            };
            left = left.saturating_add(more);
        }
        Ok(())
    }
}

enum Number {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
}

/// Reads values.
pub(crate) struct Decoder<'t, 'de> {
    tables: &'t Tables<'de>,
    input: Input<'de>,
    depth: usize,
}

impl<'t, 'de> Decoder<'t, 'de> {
    pub(crate) fn new(tables: &'t Tables<'de>) -> Self {
        Decoder { tables, input: Input { bytes: tables.body }, depth: 0 }
    }

    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.input.bytes.len() {
            0 => Ok(()),
            more => Err(Error::Trailing(more)),
        }
    }

    fn nested<R>(&mut self, read: impl FnOnce(&mut Self) -> Result<R, Error>) -> Result<R, Error> {
        if self.depth >= DEPTH_MAX {
            return Err(Error::Depth);
        }
        self.depth += 1;
        let result = read(self);
        self.depth -= 1;
        result
    }

    fn number<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value, Error> {
        match self.input.number()? {
            Number::Unsigned(value) => visitor.visit_u64(value),
            Number::Signed(value) => visitor.visit_i64(value),
            Number::Float(value) => visitor.visit_f64(value),
        }
    }

    fn sequence<V: Visitor<'de>>(&mut self, left: usize, visitor: V) -> Result<V::Value, Error> {
        self.nested(|decoder| {
            let mut sequence = Sequence { decoder, left };
            let value = visitor.visit_seq(&mut sequence)?;
            match sequence.left {
                0 => Ok(value),
                _ => Err(Error::Table("a sequence longer than what reads it")),
            }
        })
    }

    fn map<V: Visitor<'de>>(&mut self, visitor: V) -> Result<V::Value, Error> {
        let left = self.input.map()?;
        self.nested(|decoder| {
            let mut map = Map { decoder, left };
            let value = visitor.visit_map(&mut map)?;
            match map.left {
                0 => Ok(value),
                _ => Err(Error::Table("a map longer than what reads it")),
            }
        })
    }

    fn structure<V: Visitor<'de>>(&mut self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        if matches!(self.input.peek()?, 0x80..=0x8f | marker::MAP16 | marker::MAP32) {
            return self.map(visitor);
        }
        let len = self.input.array()?;
        let tables = self.tables;
        let shape = tables.shapes.get(self.input.reference()?).ok_or(Error::Table("a shape"))?;
        if len != shape.fields.len() + 1 {
            return Err(Error::Table("a shape of another length"));
        }
        if shape.is_exactly(fields) {
            return self.sequence(shape.fields.len(), visitor);
        }
        self.nested(|decoder| {
            let mut fields = Fields { decoder, names: shape.fields.iter() };
            let value = visitor.visit_map(&mut fields)?;
            match fields.names.len() {
                0 => Ok(value),
                _ => Err(Error::Table("a struct longer than what reads it")),
            }
        })
    }

    fn variant(&mut self) -> Result<&'de str, Error> {
        let number = self.input.reference()?;
        self.tables.variants.get(number).copied().ok_or(Error::Table("a variant"))
    }
}

struct Sequence<'a, 't, 'de> {
    decoder: &'a mut Decoder<'t, 'de>,
    left: usize,
}

impl<'de> de::SeqAccess<'de> for &mut Sequence<'_, '_, 'de> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(&mut *self.decoder).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left)
    }
}

struct Map<'a, 't, 'de> {
    decoder: &'a mut Decoder<'t, 'de>,
    left: usize,
}

impl<'de> de::MapAccess<'de> for &mut Map<'_, '_, 'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(&mut *self.decoder).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        seed.deserialize(&mut *self.decoder)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left)
    }
}

/// A struct whose fields are matched by name.
struct Fields<'a, 't, 'de> {
    decoder: &'a mut Decoder<'t, 'de>,
    names: std::slice::Iter<'t, &'de str>,
}

impl<'de> de::MapAccess<'de> for &mut Fields<'_, '_, 'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.names.next().map(|name| seed.deserialize(BorrowedStrDeserializer::new(name))).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        seed.deserialize(&mut *self.decoder)
    }
}

/// A variant and what belongs to it.
struct Enum<'a, 't, 'de> {
    decoder: &'a mut Decoder<'t, 'de>,
    /// Values after the variant's number; none of a variant that is a number only.
    content: Option<usize>,
}

impl<'de> de::EnumAccess<'de> for Enum<'_, '_, 'de> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let name = self.decoder.variant()?;
        let deserializer: BorrowedStrDeserializer<'de, Error> = BorrowedStrDeserializer::new(name);
        Ok((seed.deserialize(deserializer)?, self))
    }
}

impl<'de> Enum<'_, '_, 'de> {
    fn one(self) -> Result<(), Error> {
        if self.content == Some(1) { Ok(()) } else { Err(Error::Table("a variant with other content")) }
    }
}

impl<'de> de::VariantAccess<'de> for Enum<'_, '_, 'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.content {
            None => Ok(()),
            Some(_) => Err(Error::Table("a variant with content where none belongs")),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        let Enum { decoder, content } = self;
        Enum { decoder: &mut *decoder, content }.one()?;
        decoder.nested(|decoder| seed.deserialize(decoder))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        if self.content != Some(len) {
            return Err(Error::Table("a variant with other content"));
        }
        self.decoder.sequence(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        let Enum { decoder, content } = self;
        Enum { decoder: &mut *decoder, content }.one()?;
        decoder.structure(fields, visitor)
    }
}

impl<'de> de::Deserializer<'de> for &mut Decoder<'_, 'de> {
    type Error = Error;

    fn is_human_readable(&self) -> bool {
        false
    }

    /// For types that take what there is, such as `serde_bytes`. Structs and enums need `deserialize_struct` and
    /// `deserialize_enum`, since nothing marks them.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.input.peek()? {
            marker::NIL => self.deserialize_unit(visitor),
            marker::TRUE | marker::FALSE => self.deserialize_bool(visitor),
            marker::BIN8 | marker::BIN16 | marker::BIN32 => self.deserialize_bytes(visitor),
            0xa0..=0xbf | marker::STR8 | marker::STR16 | marker::STR32 => self.deserialize_str(visitor),
            0x90..=0x9f | marker::ARRAY16 | marker::ARRAY32 => self.deserialize_seq(visitor),
            0x80..=0x8f | marker::MAP16 | marker::MAP32 => self.map(visitor),
            _ => self.number(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.input.byte()? {
            marker::TRUE => visitor.visit_bool(true),
            marker::FALSE => visitor.visit_bool(false),
            found => Err(Error::Kind { expected: "true or false", found }),
        }
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_str(self.input.text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_bytes(self.input.binary()?)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.input.peek()? == marker::NIL {
            self.input.byte()?;
            return visitor.visit_none();
        }
        self.nested(|decoder| visitor.visit_some(decoder))
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.input.byte()? {
            marker::NIL => visitor.visit_unit(),
            found => Err(Error::Kind { expected: "nothing", found }),
        }
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        self.nested(|decoder| visitor.visit_newtype_struct(decoder))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let len = self.input.array()?;
        self.sequence(len, visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.map(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.structure(fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let content = match self.input.peek()? {
            0x90..=0x9f | marker::ARRAY16 | marker::ARRAY32 => {
                Some(self.input.array()?.checked_sub(1).ok_or(Error::Table("a variant"))?)
            }
            _ => None,
        };
        visitor.visit_enum(Enum { decoder: self, content })
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_any(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.input.skip()?;
        visitor.visit_unit()
    }
}

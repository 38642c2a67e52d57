//! Values of any type that can be deserialized, made up from bytes: where a type wants a number, a length or a variant, the
//! next bytes decide. It makes seeds for decoders, and values that go through an encoder and back.

use serde::de::value::{BytesDeserializer, StrDeserializer, U32Deserializer};
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor};

use crate::script::Script;

/// Values within values.
const DEPTH_MAX: usize = 48;

/// A value made up from `bytes`; `None` when the type refuses it (a number out of range, say).
pub(crate) fn make<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    T::deserialize(&mut Maker { script: Script::new(bytes), depth: 0 }).ok()
}

struct Maker<'a> {
    script: Script<'a>,
    depth: usize,
}

type Error = de::value::Error;

impl Maker<'_> {
    fn count(&mut self) -> usize {
        if self.depth > DEPTH_MAX / 2 || self.script.is_empty() { 0 } else { usize::from(self.script.byte() % 5) }
    }

    fn number(&mut self) -> u64 {
        match self.script.byte() {
            small @ 0..200 => u64::from(small % 8),
            200..220 => u64::from(self.script.byte()),
            220..235 => u64::from(self.script.half()),
            235..245 => u64::from(self.script.word()),
            _ => u64::from(self.script.word()) << 32 | u64::from(self.script.word()),
        }
    }

    fn deeper<R>(&mut self, act: impl FnOnce(&mut Self) -> Result<R, Error>) -> Result<R, Error> {
        if self.depth >= DEPTH_MAX {
            return Err(de::Error::custom("too deep"));
        }
        self.depth += 1;
        let result = act(self);
        self.depth -= 1;
        result
    }
}

/// What belongs to a sequence, a map, a struct or a variant.
struct Parts<'m, 'a> {
    maker: &'m mut Maker<'a>,
    left: usize,
    fields: Option<&'static [&'static str]>,
}

impl<'de> de::SeqAccess<'de> for Parts<'_, '_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let Some(left) = self.left.checked_sub(1) else { return Ok(None) };
        self.left = left;
        self.maker.deeper(|maker| seed.deserialize(maker)).map(Some)
    }
}

impl<'de> de::MapAccess<'de> for Parts<'_, '_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some(left) = self.left.checked_sub(1) else { return Ok(None) };
        self.left = left;
        match self.fields.and_then(|fields| fields.get(fields.len() - 1 - left)) {
            Some(&name) => seed.deserialize(StrDeserializer::<Error>::new(name)).map(Some),
            None => self.maker.deeper(|maker| seed.deserialize(maker)).map(Some),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        self.maker.deeper(|maker| seed.deserialize(maker))
    }
}

impl<'de> de::EnumAccess<'de> for Parts<'_, '_> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        let number = u32::from(self.maker.script.byte()) % u32::try_from(self.left.max(1)).unwrap_or(1);
        let deserializer: U32Deserializer<Error> = number.into_deserializer();
        Ok((seed.deserialize(deserializer)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Parts<'_, '_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        self.maker.deeper(|maker| seed.deserialize(maker))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Parts { maker: self.maker, left: len, fields: None })
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Parts { maker: self.maker, left: fields.len(), fields: Some(fields) })
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty),*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit(self.number() as $type)
        })*
    };
}

impl<'de> de::Deserializer<'de> for &mut Maker<'_> {
    type Error = Error;

    fn is_human_readable(&self) -> bool {
        false
    }

    numbers!(
        deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16, deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64, deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64, deserialize_f32 visit_f32 f32,
        deserialize_f64 visit_f64 f64, deserialize_any visit_u64 u64
    );

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.script.byte() & 1 != 0)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_char(char::from(self.script.byte()))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let len = self.count();
        let text: String = self.script.take(len).iter().map(|&byte| char::from(byte)).collect();
        visitor.visit_string(text)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let len = self.count() * 7;
        de::Deserializer::deserialize_bytes(BytesDeserializer::<Error>::new(self.script.take(len)), visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.script.is_empty() || self.depth > DEPTH_MAX / 2 || self.script.byte() & 1 == 0 {
            return visitor.visit_none();
        }
        self.deeper(|maker| visitor.visit_some(maker))
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        self.deeper(|maker| visitor.visit_newtype_struct(maker))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let left = self.count();
        visitor.visit_seq(Parts { maker: self, left, fields: None })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Parts { maker: self, left: len, fields: None })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let left = self.count();
        visitor.visit_map(Parts { maker: self, left, fields: None })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Parts { maker: self, left: fields.len(), fields: Some(fields) })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(Parts { maker: self, left: variants.len(), fields: None })
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }
}

//! Writing.

use serde::ser::{self, Serialize};

use crate::{Error, HEADER_LEN, MAGIC, marker};

/// Places where a shape is looked for first, by its first field's name and number of fields.
const GUESSES: usize = 256;

/// Collects an image.
pub(crate) struct Encoder {
    out: Vec<u8>,
    shapes: Vec<Vec<&'static str>>,
    variants: Vec<&'static str>,
    /// Where a struct of a name is likely to find its shape; only a guess, every field is compared.
    guesses: Box<[u16; GUESSES]>,
}

impl Encoder {
    pub(crate) fn new() -> Self {
        let mut out = Vec::with_capacity(4096);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 8]);
        Encoder { out, shapes: Vec::new(), variants: Vec::new(), guesses: Box::new([0; GUESSES]) }
    }

    /// The image: header, body, tables.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let body = (self.out.len() - HEADER_LEN) as u64;
        self.out[MAGIC.len()..HEADER_LEN].copy_from_slice(&body.to_be_bytes());
        let (shapes, variants) = (std::mem::take(&mut self.shapes), std::mem::take(&mut self.variants));
        self.array(2);
        self.array(shapes.len());
        for shape in &shapes {
            self.array(shape.len());
            shape.iter().for_each(|field| self.text(field));
        }
        self.array(variants.len());
        variants.iter().for_each(|variant| self.text(variant));
        self.out
    }

    fn unsigned(&mut self, value: u64) {
        match value {
            0..=0x7f => self.out.push(value as u8),
            0x80..=0xff => self.out.extend_from_slice(&[marker::U8, value as u8]),
            0x100..=0xffff => self.put(marker::U16, &(value as u16).to_be_bytes()),
            0x1_0000..=0xffff_ffff => self.put(marker::U32, &(value as u32).to_be_bytes()),
            _ => self.put(marker::U64, &value.to_be_bytes()),
        }
    }

    fn signed(&mut self, value: i64) {
        match value {
            0.. => self.unsigned(value.cast_unsigned()),
            -32..=-1 => self.out.push(value as u8),
            -0x80..=-33 => self.out.extend_from_slice(&[marker::I8, value as u8]),
            -0x8000..=-0x81 => self.put(marker::I16, &(value as i16).to_be_bytes()),
            -0x8000_0000..=-0x8001 => self.put(marker::I32, &(value as i32).to_be_bytes()),
            _ => self.put(marker::I64, &value.to_be_bytes()),
        }
    }

    fn put(&mut self, marker: u8, bytes: &[u8]) {
        self.out.push(marker);
        self.out.extend_from_slice(bytes);
    }

    fn sized(&mut self, fixed: Option<(u8, usize)>, markers: [Option<u8>; 3], len: usize) {
        let [one, two, four] = markers;
        match (fixed, one, two, four) {
            (Some((fix, most)), ..) if len <= most => self.out.push(fix | len as u8),
            (_, Some(one), ..) if len <= 0xff => self.out.extend_from_slice(&[one, len as u8]),
            (.., Some(two), _) if len <= 0xffff => self.put(two, &(len as u16).to_be_bytes()),
            (.., four) => self.put(four.unwrap_or(marker::NIL), &(len as u32).to_be_bytes()),
        }
    }

    fn array(&mut self, len: usize) {
        self.sized(Some((marker::FIXARRAY, 15)), [None, Some(marker::ARRAY16), Some(marker::ARRAY32)], len);
    }

    fn map(&mut self, len: usize) {
        self.sized(Some((marker::FIXMAP, 15)), [None, Some(marker::MAP16), Some(marker::MAP32)], len);
    }

    fn text(&mut self, text: &str) {
        let markers = [Some(marker::STR8), Some(marker::STR16), Some(marker::STR32)];
        self.sized(Some((marker::FIXSTR, 31)), markers, text.len());
        self.out.extend_from_slice(text.as_bytes());
    }

    fn variant(&mut self, name: &'static str) {
        // Few, and nearly always the same pointers.
        let known = self.variants.iter().position(|&known| std::ptr::eq(known, name) || known == name);
        let number = known.unwrap_or_else(|| {
            self.variants.push(name);
            self.variants.len() - 1
        });
        self.unsigned(number as u64);
    }

    fn counted(&mut self, len: Option<usize>, kind: Kind) -> Result<Counted<'_>, Error> {
        if len.is_some_and(|len| u32::try_from(len).is_err()) {
            return Err(Error::Unsupported("a collection of more than 2^32 entries"));
        }
        let at = self.out.len();
        match (len, kind) {
            (Some(len), Kind::Array) => self.array(len),
            (Some(len), Kind::Map) => self.map(len),
            (None, Kind::Array) => self.put(marker::ARRAY32, &[0; 4]),
            (None, Kind::Map) => self.put(marker::MAP32, &[0; 4]),
        }
        Ok(Counted { encoder: self, told: len, count: 0, at })
    }

    fn structure(&mut self, name: &'static str, len: usize) -> Structure<'_> {
        self.array(len + 1);
        let at = self.out.len();
        // The number of the shape, known when all fields are.
        self.out.push(0);
        let slot = (name.as_ptr().addr() >> 2 ^ len) % GUESSES;
        let guess = usize::from(self.guesses[slot]);
        Structure { encoder: self, at, slot, candidate: guess, index: 0, fields: Vec::new(), told: len }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Array,
    Map,
}

/// A sequence or map being written.
pub(crate) struct Counted<'a> {
    encoder: &'a mut Encoder,
    told: Option<usize>,
    count: usize,
    at: usize,
}

impl Counted<'_> {
    fn finish(self) -> Result<(), Error> {
        match self.told {
            Some(told) if told == self.count => Ok(()),
            Some(_) => Err(Error::Custom("a collection that has another length than it told".into())),
            None => {
                let count = u32::try_from(self.count)
                    .map_err(|_| Error::Unsupported("a collection of more than 2^32 entries"))?;
                self.encoder.out[self.at + 1..self.at + 5].copy_from_slice(&count.to_be_bytes());
                Ok(())
            }
        }
    }

    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.count += 1;
        value.serialize(&mut *self.encoder)
    }
}

/// A struct being written.
pub(crate) struct Structure<'a> {
    encoder: &'a mut Encoder,
    at: usize,
    slot: usize,
    /// The shape it seems to have.
    candidate: usize,
    index: usize,
    /// Its fields, once it is seen not to have the shape it seemed to have.
    fields: Vec<&'static str>,
    told: usize,
}

impl Structure<'_> {
    fn field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Error> {
        if self.fields.is_empty() {
            let shape = self.encoder.shapes.get(self.candidate).map_or(&[][..], Vec::as_slice);
            let same = shape.get(self.index).is_some_and(|&known| std::ptr::eq(known, name) || known == name);
            if !same {
                let before = shape.get(..self.index).unwrap_or_default();
                self.fields = before.iter().copied().chain([name]).collect();
            }
        } else {
            self.fields.push(name);
        }
        self.index += 1;
        value.serialize(&mut *self.encoder)
    }

    fn finish(self) -> Result<(), Error> {
        let Structure { encoder, at, slot, candidate, index, mut fields, told } = self;
        if index != told {
            return Err(Error::Custom("a struct that has another number of fields than it told".into()));
        }
        let known = encoder.shapes.get(candidate);
        let number = if fields.is_empty() && known.is_some_and(|shape| shape.len() == index) {
            candidate
        } else {
            if fields.is_empty() {
                fields = known.and_then(|shape| shape.get(..index)).unwrap_or_default().to_vec();
            }
            let found = encoder.shapes.iter().position(|shape| *shape == fields);
            found.unwrap_or_else(|| {
                encoder.shapes.push(fields);
                encoder.shapes.len() - 1
            })
        };
        let number = u16::try_from(number).map_err(|_| Error::Unsupported("more than 65,536 kinds of structs"))?;
        encoder.guesses[slot] = number;
        if let [0, low @ 0..=marker::FIXINT_MAX] = number.to_be_bytes() {
            encoder.out[at] = low;
        } else {
            // Seldom: an image rarely has so many kinds of structs.
            let [high, low] = number.to_be_bytes();
            encoder.out.splice(at..=at, [marker::U16, high, low]);
        }
        Ok(())
    }
}

impl<'a> ser::Serializer for &'a mut Encoder {
    type Ok = ();
    type Error = Error;
    type SerializeSeq = Counted<'a>;
    type SerializeTuple = Counted<'a>;
    type SerializeTupleStruct = Counted<'a>;
    type SerializeTupleVariant = Counted<'a>;
    type SerializeMap = Counted<'a>;
    type SerializeStruct = Structure<'a>;
    type SerializeStructVariant = Structure<'a>;

    fn is_human_readable(&self) -> bool {
        false
    }

    fn serialize_bool(self, value: bool) -> Result<(), Error> {
        self.out.push(if value { marker::TRUE } else { marker::FALSE });
        Ok(())
    }

    fn serialize_i8(self, value: i8) -> Result<(), Error> {
        self.serialize_i64(value.into())
    }

    fn serialize_i16(self, value: i16) -> Result<(), Error> {
        self.serialize_i64(value.into())
    }

    fn serialize_i32(self, value: i32) -> Result<(), Error> {
        self.serialize_i64(value.into())
    }

    fn serialize_i64(self, value: i64) -> Result<(), Error> {
        self.signed(value);
        Ok(())
    }

    fn serialize_u8(self, value: u8) -> Result<(), Error> {
        self.serialize_u64(value.into())
    }

    fn serialize_u16(self, value: u16) -> Result<(), Error> {
        self.serialize_u64(value.into())
    }

    fn serialize_u32(self, value: u32) -> Result<(), Error> {
        self.serialize_u64(value.into())
    }

    fn serialize_u64(self, value: u64) -> Result<(), Error> {
        self.unsigned(value);
        Ok(())
    }

    fn serialize_f32(self, value: f32) -> Result<(), Error> {
        self.put(marker::F32, &value.to_be_bytes());
        Ok(())
    }

    fn serialize_f64(self, value: f64) -> Result<(), Error> {
        self.put(marker::F64, &value.to_be_bytes());
        Ok(())
    }

    fn serialize_char(self, value: char) -> Result<(), Error> {
        self.text(value.encode_utf8(&mut [0; 4]));
        Ok(())
    }

    fn serialize_str(self, value: &str) -> Result<(), Error> {
        if u32::try_from(value.len()).is_err() {
            return Err(Error::Unsupported("a text of more than 2^32 bytes"));
        }
        self.text(value);
        Ok(())
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<(), Error> {
        if u32::try_from(value.len()).is_err() {
            return Err(Error::Unsupported("a string of more than 2^32 bytes"));
        }
        self.sized(None, [Some(marker::BIN8), Some(marker::BIN16), Some(marker::BIN32)], value.len());
        self.out.extend_from_slice(value);
        Ok(())
    }

    fn serialize_none(self) -> Result<(), Error> {
        self.serialize_unit()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), Error> {
        self.out.push(marker::NIL);
        Ok(())
    }

    fn serialize_unit_struct(self, _name: &'static str) -> Result<(), Error> {
        self.serialize_unit()
    }

    fn serialize_unit_variant(self, _name: &'static str, _index: u32, variant: &'static str) -> Result<(), Error> {
        self.variant(variant);
        Ok(())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _name: &'static str, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        self.array(2);
        self.variant(variant);
        value.serialize(self)
    }

    fn serialize_seq(self, len: Option<usize>) -> Result<Counted<'a>, Error> {
        self.counted(len, Kind::Array)
    }

    fn serialize_tuple(self, len: usize) -> Result<Counted<'a>, Error> {
        self.counted(Some(len), Kind::Array)
    }

    fn serialize_tuple_struct(self, _name: &'static str, len: usize) -> Result<Counted<'a>, Error> {
        self.counted(Some(len), Kind::Array)
    }

    fn serialize_tuple_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        len: usize,
    ) -> Result<Counted<'a>, Error> {
        let at = self.out.len();
        self.array(len + 1);
        self.variant(variant);
        Ok(Counted { encoder: self, told: Some(len), count: 0, at })
    }

    fn serialize_map(self, len: Option<usize>) -> Result<Counted<'a>, Error> {
        self.counted(len, Kind::Map)
    }

    fn serialize_struct(self, name: &'static str, len: usize) -> Result<Structure<'a>, Error> {
        Ok(self.structure(name, len))
    }

    fn serialize_struct_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        len: usize,
    ) -> Result<Structure<'a>, Error> {
        self.array(2);
        self.variant(variant);
        Ok(self.structure(variant, len))
    }
}

impl ser::SerializeSeq for Counted<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.finish()
    }
}

impl ser::SerializeTuple for Counted<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.finish()
    }
}

impl ser::SerializeTupleStruct for Counted<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.finish()
    }
}

impl ser::SerializeTupleVariant for Counted<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.finish()
    }
}

impl ser::SerializeMap for Counted<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        self.element(key)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        value.serialize(&mut *self.encoder)
    }

    fn end(self) -> Result<(), Error> {
        self.finish()
    }
}

impl ser::SerializeStruct for Structure<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Error> {
        self.field(name, value)
    }

    fn end(self) -> Result<(), Error> {
        self.finish()
    }
}

impl ser::SerializeStructVariant for Structure<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Error> {
        self.field(name, value)
    }

    fn end(self) -> Result<(), Error> {
        self.finish()
    }
}

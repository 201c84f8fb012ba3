//! The wire format of protocol buffers: enough to find fields, and to replace one without touching the others.

use crate::error::{Error, Result};

/// A field as it lies in its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field<'a> {
    pub(super) number: u32,
    pub(super) value: Value<'a>,
    /// Key and value, as they are encoded.
    pub(super) raw: &'a [u8],
    /// The key alone.
    pub(super) key: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

/// The fields of a message, in their order; ends behind the first error.
pub(super) fn fields(message: &[u8]) -> impl Iterator<Item = Result<Field<'_>>> {
    let mut rest = message;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let field = field(&mut rest).ok_or_else(|| Error::damaged("a message is malformed"));
        if field.is_err() {
            rest = &[];
        }
        Some(field)
    })
}

fn field<'a>(rest: &mut &'a [u8]) -> Option<Field<'a>> {
    let start = *rest;
    let key = varint(rest)?;
    let key_length = start.len() - rest.len();
    let number = u32::try_from(key >> 3).ok().filter(|number| (1..1 << 29).contains(number))?;
    let value = match key & 7 {
        0 => Value::Varint(varint(rest)?),
        1 => Value::Fixed64(array(rest)?),
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            let (value, after) = rest.split_at_checked(length)?;
            *rest = after;
            Value::Bytes(value)
        }
        5 => Value::Fixed32(array(rest)?),
        // Groups went out of use long before CRIU began.
        _ => return None,
    };
    Some(Field { number, value, raw: &start[..start.len() - rest.len()], key: &start[..key_length] })
}

fn array<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*head)
}

/// Splits a number off `rest`: seven bits a byte, the lowest first.
pub(super) fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for i in 0..10 {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        let bits = u64::from(byte & 0x7f);
        if i == 9 && bits > 1 {
            return None;
        }
        number |= bits << (7 * i);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Appends a number.
pub(super) fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends `field` with `value` in place of its own bytes.
pub(super) fn put_bytes(out: &mut Vec<u8>, field: &Field<'_>, value: &[u8]) {
    out.extend_from_slice(field.key);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

impl<'a> Field<'a> {
    fn wrong(&self) -> Error {
        Error::damaged(format!("field {} has another type", self.number))
    }

    pub(super) fn u64(&self) -> Result<u64> {
        match self.value {
            Value::Varint(number) => Ok(number),
            _ => Err(self.wrong()),
        }
    }

    pub(super) fn u32(&self) -> Result<u32> {
        self.u64()?.try_into().map_err(|_| Error::damaged(format!("field {} is too large", self.number)))
    }

    pub(super) fn flag(&self) -> Result<bool> {
        Ok(self.u64()? != 0)
    }

    pub(super) fn bytes(&self) -> Result<&'a [u8]> {
        match self.value {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(self.wrong()),
        }
    }

    /// The numbers of a repeated field: one, or several packed into one value.
    pub(super) fn u32s(&self, numbers: &mut Vec<u32>) -> Result<()> {
        match self.value {
            Value::Varint(_) => numbers.push(self.u32()?),
            Value::Bytes(mut packed) => {
                while !packed.is_empty() {
                    let number = varint(&mut packed).and_then(|number| u32::try_from(number).ok());
                    numbers.push(number.ok_or_else(|| self.wrong())?);
                }
            }
            _ => return Err(self.wrong()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_both_ways() {
        for number in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, number);
            assert_eq!(varint(&mut &bytes[..]), Some(number));
        }
        assert_eq!(varint(&mut &[0xff; 10][..]), None);
        assert_eq!(varint(&mut &[0x80][..]), None);
    }

    #[test]
    fn every_byte_of_a_message_belongs_to_a_field() {
        let message = [0x08, 0x96, 0x01, 0x12, 2, b'h', b'i', 0x1d, 1, 2, 3, 4, 0x21, 1, 2, 3, 4, 5, 6, 7, 8];
        let fields: Vec<_> = fields(&message).map(Result::unwrap).collect();
        assert_eq!(fields.iter().map(|field| field.number).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(fields[0].u32().unwrap(), 150);
        assert_eq!(fields.iter().flat_map(|field| field.raw).copied().collect::<Vec<_>>(), message);
    }

    #[test]
    fn malformed_messages_are_errors() {
        for message in [&[0x08][..], &[0x12, 5, 1], &[0x0b], &[0x00, 1], &[0x0d, 1, 2], &[0x80]] {
            assert!(fields(message).any(|field| field.is_err()), "{message:?}");
        }
    }
}

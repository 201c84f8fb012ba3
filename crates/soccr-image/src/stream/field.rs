//! Fields: the tagged values that the payload of a record consists of.

use crate::error::{Error, Result};

/// A reader that doesn't know the tag must not go on without it.
pub(super) const CRITICAL: u16 = 0x8000;

/// Bytes of a field before its value: tag and length.
pub(super) const HEADER: usize = 6;

/// The largest value but a queue: 1 MiB. A lying length cannot take more memory.
pub(super) const LIMIT: u32 = 1 << 20;

/// Tags: one number means the same in every record, and is never given away again.
pub(super) mod tag {
    use super::CRITICAL;

    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const REASON: u16 = 2;
    pub(in super::super) const COUNT: u16 = 3 | CRITICAL;
    pub(in super::super) const ANSWERS: u16 = 4 | CRITICAL;
    pub(in super::super) const PACKET: u16 = 5 | CRITICAL;
    pub(in super::super) const STATE: u16 = 6 | CRITICAL;
    pub(in super::super) const PLACE: u16 = 7;
    pub(in super::super) const STEERED: u16 = 8;
    pub(in super::super) const SOURCE: u16 = 9;
    pub(in super::super) const TUNNEL: u16 = 10 | CRITICAL;
    pub(in super::super) const ANSWER_BACK: u16 = 11 | CRITICAL;
    pub(in super::super) const NOTES: u16 = 12;
    pub(in super::super) const NOTE: u16 = 13;
    pub(in super::super) const FAILED: u16 = 14;

    pub(in super::super) const LOCAL: u16 = 16 | CRITICAL;
    pub(in super::super) const REMOTE: u16 = 17 | CRITICAL;
    pub(in super::super) const CONTROL: u16 = 18 | CRITICAL;
    pub(in super::super) const OPTIONS: u16 = 19 | CRITICAL;
    pub(in super::super) const WINDOW_SCALE: u16 = 20 | CRITICAL;
    pub(in super::super) const TIMESTAMPS: u16 = 21 | CRITICAL;
    pub(in super::super) const WINDOW: u16 = 22 | CRITICAL;
    pub(in super::super) const URGENT: u16 = 23 | CRITICAL;
    pub(in super::super) const BUFFERS: u16 = 24;
    pub(in super::super) const PATH: u16 = 25;
    pub(in super::super) const SETTING: u16 = 26;
    pub(in super::super) const RECEIVE_QUEUE: u16 = 27 | CRITICAL;
    pub(in super::super) const SEND_QUEUE: u16 = 28 | CRITICAL;
    pub(in super::super) const TRACKED: u16 = 40 | CRITICAL;
    pub(in super::super) const OWNER: u16 = 41;
    pub(in super::super) const TLS: u16 = 42 | CRITICAL;
}

/// Appends a field whose value `body` writes.
pub(super) fn put(out: &mut Vec<u8>, tag: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    put_header(out, tag, 0);
    body(out);
    let length = (out.len() - start - HEADER) as u32;
    out[start + 2..start + HEADER].copy_from_slice(&length.to_le_bytes());
}

/// Appends tag and length of a field whose value is written elsewhere.
pub(super) fn put_header(out: &mut Vec<u8>, tag: u16, length: u32) {
    out.extend_from_slice(&tag.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
}

/// The value of a field, taken apart from its beginning.
pub(super) struct Value<'a>(pub(super) &'a [u8]);

impl<'a> Value<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) =
            self.0.split_first_chunk().ok_or_else(|| Error::damaged("a field is too short"))?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Error::damaged("a flag is neither 0 nor 1")),
        }
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let (head, rest) =
            self.0.split_at_checked(length).ok_or_else(|| Error::damaged("a field is too short"))?;
        self.0 = rest;
        Ok(head)
    }

    /// Everything that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(super) fn end(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::damaged("a field is too long")) }
    }
}

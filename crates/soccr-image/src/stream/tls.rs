//! The TLS part of a connection as a field. The records that are decrypted and not read are in the field of the receive
//! queue: so one limit and one way of reading hold for all bytes.

use std::borrow::Cow;

use soccr::Connection;
use soccr::connection::Tls;
use soccr::tls::{Cipher, Record, Secrets, Version};

use super::field::Value;
use crate::error::{Error, Result};

/// Bits of the field.
mod bit {
    pub(super) const TRANSMIT: u8 = 1;
    pub(super) const RECEIVE: u8 = 2;
    pub(super) const ZEROCOPY_SENDFILE: u8 = 4;
    pub(super) const NO_PADDING: u8 = 8;
    pub(super) const ALL: u8 = 15;
}

/// What a field says, but for the bytes of the records: their types and lengths.
pub(super) struct Layer {
    tls: Tls,
    records: Vec<(u8, u32)>,
}

pub(super) fn write(out: &mut Vec<u8>, tls: &Tls) {
    let bits = [
        (tls.transmit.is_some(), bit::TRANSMIT),
        (tls.receive.is_some(), bit::RECEIVE),
        (tls.zerocopy_sendfile, bit::ZEROCOPY_SENDFILE),
        (tls.expect_no_padding, bit::NO_PADDING),
    ];
    out.extend_from_slice(&(tls.version as u16).to_le_bytes());
    out.extend_from_slice(&(tls.cipher as u16).to_le_bytes());
    out.push(bits.into_iter().map(|(set, bit)| u8::from(set) * bit).sum());
    [&tls.transmit, &tls.receive]
        .into_iter()
        .flatten()
        .for_each(|keys| out.extend_from_slice(keys.as_bytes()));
    for record in &tls.unread {
        out.push(record.content_type);
        out.extend_from_slice(&(record.bytes.len() as u32).to_le_bytes());
    }
}

pub(super) fn read(value: &mut Value<'_>) -> Result<Layer> {
    let (version, cipher, bits) = (value.u16()?, value.u16()?, value.u8()?);
    let newer = || Error::newer(format_args!("TLS of version {version:#06x} with cipher {cipher}"));
    let version = Version::from_wire(version).ok_or_else(newer)?;
    let cipher = Cipher::from_kernel(cipher).ok_or_else(newer)?;
    if bits & !bit::ALL != 0 {
        return Err(Error::newer(format_args!("TLS bits {bits:#04x}")));
    }
    let mut keys = |direction| {
        let secrets = |bytes| Secrets::new(cipher, bytes).map_err(|error| Error::damaged(error.to_string()));
        (bits & direction != 0).then(|| value.bytes(cipher.secrets_len()).and_then(secrets)).transpose()
    };
    let mut tls = Tls::new(version, cipher);
    (tls.transmit, tls.receive) = (keys(bit::TRANSMIT)?, keys(bit::RECEIVE)?);
    tls.zerocopy_sendfile = bits & bit::ZEROCOPY_SENDFILE != 0;
    tls.expect_no_padding = bits & bit::NO_PADDING != 0;
    let mut records = Vec::new();
    while !value.0.is_empty() {
        records.push((value.u8()?, value.u32()?));
    }
    Ok(Layer { tls, records })
}

impl Layer {
    /// Takes the bytes of the records from the beginning of the receive queue.
    pub(super) fn with_records(self, queue: &mut Vec<u8>) -> Result<Tls> {
        let Self { mut tls, records } = self;
        let mut start = 0;
        for (content_type, length) in records {
            let end = start + length as usize;
            let bytes = queue.get(start..end);
            let bytes =
                bytes.ok_or_else(|| Error::damaged("the receive queue is shorter than its TLS records"))?;
            tls.unread.push(Record { content_type, bytes: bytes.to_vec() });
            start = end;
        }
        queue.drain(..start);
        Ok(tls)
    }
}

/// The receive queue as its field has it: the decrypted records come first.
pub(super) fn whole_queue(connection: &Connection) -> Cow<'_, [u8]> {
    let rest = &connection.receive_queue[..];
    match &connection.tls {
        Some(tls) if !tls.unread.is_empty() => {
            let records = tls.unread.iter().map(|record| &record.bytes[..]);
            records.chain([rest]).collect::<Vec<_>>().concat().into()
        }
        _ => rest.into(),
    }
}

//! Other addresses in a `files.img`; everything else stays as it is, byte for byte.

use std::net::{IpAddr, SocketAddr};

use super::container;
use super::protobuf::{Field, Value, fields, put_bytes, put_varint};
use super::socket::{FILE_INETSK, address, number};
use crate::AddressMap;
use crate::error::{Error, Result};

/// Gives every address of a `files.img` that one of `maps` concerns its new value: the new file, and how many sockets changed.
///
/// # Errors
/// [`Foreign`](crate::ErrorKind::Foreign) where it is another file; a message that is malformed.
pub fn rewrite(files: &[u8], maps: &[AddressMap]) -> Result<(Vec<u8>, usize)> {
    let mut rest = container::open(files, &[container::COMMON, container::FILES], "files.img")?;
    let mut out = Vec::with_capacity(files.len() + 64);
    out.extend_from_slice(&files[..files.len() - rest.len()]);
    let mut changed = 0;
    while !rest.is_empty() {
        let start = rest;
        let entry = container::entry(&mut rest)?;
        match rewrite_entry(entry, maps)? {
            Some(entry) => {
                let length = u32::try_from(entry.len()).map_err(|_| Error::damaged("an entry over 4 GiB"))?;
                out.extend_from_slice(&length.to_le_bytes());
                out.extend_from_slice(&entry);
                changed += 1;
            }
            None => out.extend_from_slice(&start[..start.len() - rest.len()]),
        }
    }
    Ok((out, changed))
}

/// The `file_entry` with other addresses, where one of `maps` concerns it.
fn rewrite_entry(entry: &[u8], maps: &[AddressMap]) -> Result<Option<Vec<u8>>> {
    let mut out = Vec::new();
    let mut changed = false;
    for field in fields(entry) {
        let field = field?;
        match field.number {
            FILE_INETSK => match rewrite_socket(field.bytes()?, maps)? {
                Some(socket) => {
                    put_bytes(&mut out, &field, &socket);
                    changed = true;
                }
                None => out.extend_from_slice(field.raw),
            },
            _ => out.extend_from_slice(field.raw),
        }
    }
    Ok(changed.then_some(out))
}

/// The `inet_sk_entry` with other addresses.
fn rewrite_socket(socket: &[u8], maps: &[AddressMap]) -> Result<Option<Vec<u8>>> {
    let (mut ends, mut ports) = ([Vec::new(), Vec::new()], [0; 2]);
    for field in fields(socket) {
        let field = field?;
        match field.number {
            number::LOCAL_PORT => ports[0] = field.u32()?,
            number::REMOTE_PORT => ports[1] = field.u32()?,
            number::LOCAL => field.u32s(&mut ends[0])?,
            number::REMOTE => field.u32s(&mut ends[1])?,
            _ => {}
        }
    }
    let old = [address(&ends[0], ports[0])?, address(&ends[1], ports[1])?];
    let mut new = old.map(|end| AddressMap::apply_first(maps, end));
    if old[1].port() == 0 && old[1].ip().is_unspecified() {
        // A listener has no peer, and its peer address of zeros must not match a rule for 0.0.0.0.
        new[1] = old[1];
    }
    if old == new {
        return Ok(None);
    }
    let mut words = new.map(|end| words(end).into_iter());
    let mut out = Vec::with_capacity(socket.len() + 16);
    for field in fields(socket) {
        let field = field?;
        match field.number {
            number::LOCAL_PORT => put_number(&mut out, &field, new[0].port().into()),
            number::REMOTE_PORT => put_number(&mut out, &field, new[1].port().into()),
            number::LOCAL => put_words(&mut out, &field, &mut words[0])?,
            number::REMOTE => put_words(&mut out, &field, &mut words[1])?,
            _ => out.extend_from_slice(field.raw),
        }
    }
    Ok(Some(out))
}

/// An address as it lies in memory, word by word.
fn words(end: SocketAddr) -> Vec<u32> {
    let bytes = match end.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// Appends `field` with another number; as it was where the number is the same.
fn put_number(out: &mut Vec<u8>, field: &Field<'_>, number: u32) {
    if field.value == Value::Varint(number.into()) {
        return out.extend_from_slice(field.raw);
    }
    out.extend_from_slice(field.key);
    put_varint(out, number.into());
}

/// Appends `field` with as many of `words` as it had numbers.
fn put_words(out: &mut Vec<u8>, field: &Field<'_>, words: &mut impl Iterator<Item = u32>) -> Result<()> {
    let mut old = Vec::new();
    field.u32s(&mut old)?;
    let new: Vec<u32> = words.take(old.len()).collect();
    match field.value {
        _ if new == old => out.extend_from_slice(field.raw),
        Value::Bytes(_) => {
            let mut packed = Vec::new();
            new.iter().for_each(|word| put_varint(&mut packed, (*word).into()));
            put_bytes(out, field, &packed);
        }
        _ => new.iter().for_each(|word| put_number(out, field, *word)),
    }
    Ok(())
}

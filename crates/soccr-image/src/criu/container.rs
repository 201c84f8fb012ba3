//! The container: magic numbers, then entries, each with its length before it.

use crate::error::{Error, ErrorKind, Result};

/// Begins every image but the inventory.
pub(super) const COMMON: u32 = 0x5456_4319;
pub(super) const INVENTORY: u32 = 0x5831_3116;
pub(super) const FILES: u32 = 0x5630_3138;
pub(super) const TCP_STREAM: u32 = 0x5146_5506;

/// Checks the magic numbers and gives what follows them.
pub(super) fn open<'a>(bytes: &'a [u8], magics: &[u32], what: &str) -> Result<&'a [u8]> {
    let mut rest = bytes;
    for magic in magics {
        match rest.split_first_chunk() {
            Some((word, after)) if u32::from_le_bytes(*word) == *magic => rest = after,
            _ => return Err(Error::new(ErrorKind::Foreign, format!("no {what} of CRIU"))),
        }
    }
    Ok(rest)
}

/// Splits the next entry off `bytes`.
pub(super) fn entry<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8]> {
    let truncated = || Error::new(ErrorKind::Truncated, "ends in the middle of an entry");
    let (length, rest) = bytes.split_first_chunk().ok_or_else(truncated)?;
    let (entry, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(truncated)?;
    *bytes = rest;
    Ok(entry)
}

//! Reading a stream whose bytes come in pieces, without waiting for them.

use std::collections::VecDeque;
use std::io::{self, Read};

use super::record::{CHECKSUM, HEADER, Header, PREAMBLE};
use super::{Message, Reader};
use crate::error::{Error, Result};

/// Takes a stream apart as its bytes come, for callers that must not block in a read.
///
/// It holds the bytes of the record that has begun; what [`Reader`] says of memory and errors goes for it, too.
///
/// ```
/// use soccr_image::stream::{Decoded, Decoder, Message, Writer};
///
/// let mut writer = Writer::new(Vec::new())?;
/// writer.send(&Message::Ready { connection: 1 })?;
/// let bytes = writer.finish()?;
///
/// let mut decoder = Decoder::new();
/// decoder.feed(&bytes[..20]);
/// assert!(matches!(decoder.decode()?, Decoded::Begin));
/// assert!(matches!(decoder.decode()?, Decoded::Incomplete));
/// decoder.feed(&bytes[20..]);
/// assert!(matches!(decoder.decode()?, Decoded::Message(Message::Ready { connection: 1 })));
/// assert!(matches!(decoder.decode()?, Decoded::End));
/// # Ok::<(), soccr_image::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Bytes,
    reader: Option<Reader<Bytes>>,
    limit: Option<u32>,
    ended: bool,
}

/// What the bytes that have come are.
#[derive(Debug)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "short-lived")]
pub enum Decoded {
    /// The stream begins, and this version can read it.
    Begin,
    /// A record.
    Message(Message),
    /// The stream has ended. What comes behind it is not read.
    End,
    /// More bytes are needed.
    Incomplete,
}

/// Bytes that have come and are not read yet.
#[derive(Debug, Default)]
struct Bytes(VecDeque<u8>);

impl Read for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Decoder {
    /// For a stream of which nothing has come yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// For a stream of short words: a record of more bytes is damage.
    pub fn with_limit(bytes: u32) -> Self {
        Self { limit: Some(bytes), ..Self::default() }
    }

    /// Takes in bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.inbox().extend(bytes);
    }

    /// The next thing that is complete.
    ///
    /// # Errors
    /// The errors of [`Reader::new`] and [`Reader::receive`]. Where [`Error::connection`] is `Some`, go on.
    pub fn decode(&mut self) -> Result<Decoded> {
        if self.ended {
            return Ok(Decoded::End);
        }
        let Some(reader) = &mut self.reader else {
            if self.bytes.0.len() < PREAMBLE {
                return Ok(Decoded::Incomplete);
            }
            self.reader = Some(Reader::new(std::mem::take(&mut self.bytes))?);
            return Ok(Decoded::Begin);
        };
        while is_complete(&reader.get_mut().0, self.limit)? {
            match reader.receive_one()? {
                Decoded::Incomplete => {}
                Decoded::End => {
                    self.ended = true;
                    return Ok(Decoded::End);
                }
                decoded => return Ok(decoded),
            }
        }
        Ok(Decoded::Incomplete)
    }

    /// How many bytes have come and are not taken apart yet.
    pub fn pending(&self) -> usize {
        self.reader.as_ref().map_or(&self.bytes, Reader::get_ref).0.len()
    }

    /// The bytes that have come and are not read. Behind the end of the stream they belong to somebody else.
    pub fn into_rest(mut self) -> Vec<u8> {
        std::mem::take(self.inbox()).into()
    }

    fn inbox(&mut self) -> &mut VecDeque<u8> {
        &mut self.reader.as_mut().map_or(&mut self.bytes, Reader::get_mut).0
    }
}

/// Whether the whole next record is there. A damaged header counts as a whole record.
fn is_complete(bytes: &VecDeque<u8>, limit: Option<u32>) -> Result<bool> {
    if bytes.len() < HEADER {
        return Ok(false);
    }
    let mut start = [0; HEADER];
    start.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    // Reading it reports the damage.
    let Ok(header) = Header::parse(&start) else { return Ok(true) };
    if limit.is_some_and(|limit| header.length > limit) {
        return Err(Error::damaged("a record is longer than any word"));
    }
    Ok(bytes.len() >= HEADER + header.length as usize + CHECKSUM)
}

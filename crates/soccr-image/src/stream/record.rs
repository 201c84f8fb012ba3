//! Records: what a stream is made of, and how their checksums are kept.

use std::io::{IoSlice, Read, Write};

use crc32fast::Hasher;
use soccr::connection::QUEUE_LIMIT;

use super::field;
use crate::error::{Error, ErrorKind, Result};

/// High bit set: not UTF-8, not text. The rest shows when something translated line ends on the way.
const MAGIC: [u8; 8] = *b"\x89SOCCR\r\n";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;

pub(super) const HEADER: usize = 16;
pub(super) const CHECKSUM: usize = 4;
pub(super) const PREAMBLE: usize = 16;

/// The largest payload: two full queues, and as much as one field for everything else.
const PAYLOAD_LIMIT: u32 = 2 * QUEUE_LIMIT + field::LIMIT;

/// A record of held packets is closed when it is larger than this; then it is at most one packet larger.
pub(super) const HELD_SIZE: u32 = field::LIMIT;

/// The flag of a record that a reader must not skip when its type is unknown.
pub(super) const CRITICAL: u16 = 1;

/// How many bytes are read ahead within a payload.
const CHUNK: usize = 8 << 10;

/// How much memory a queue gets before any of its bytes have come.
const FIRST: usize = 256 << 10;

/// Types of records.
pub(super) mod kind {
    pub(in super::super) const CONNECTION: u16 = 1;
    pub(in super::super) const HELD: u16 = 2;
    pub(in super::super) const BEGIN: u16 = 3;
    pub(in super::super) const COMMIT: u16 = 4;
    pub(in super::super) const ABORT: u16 = 5;
    pub(in super::super) const READY: u16 = 6;
    pub(in super::super) const REFUSED: u16 = 7;
    pub(in super::super) const TAKEN: u16 = 8;
    pub(in super::super) const END: u16 = 9;
    pub(in super::super) const STATE: u16 = 10;
    pub(in super::super) const HERE: u16 = 11;
    pub(in super::super) const NOTE: u16 = 12;
    pub(in super::super) const TRIAL: u16 = 13;
}

/// What precedes a payload.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) kind: u16,
    pub(super) critical: bool,
    pub(super) connection: u32,
    pub(super) length: u32,
}

impl Header {
    /// Takes a header apart, and believes it only where its checksum is right.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Result<Self> {
        let mut value = field::Value(bytes);
        let header = Self {
            kind: value.u16()?,
            critical: value.u16()? & CRITICAL != 0,
            connection: value.u32()?,
            length: value.u32()?,
        };
        if value.u32()? != crc32fast::hash(&bytes[..12]) {
            return Err(Error::damaged("the checksum of a record's header is wrong"));
        }
        if header.length > PAYLOAD_LIMIT {
            return Err(Error::damaged("a record is larger than any can be"));
        }
        Ok(header)
    }
}

/// The bytes that a stream begins with.
pub(super) fn preamble() -> [u8; PREAMBLE] {
    let mut bytes = [0; PREAMBLE];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
    bytes[10..12].copy_from_slice(&MINOR.to_le_bytes());
    let check = crc32fast::hash(&bytes[..12]);
    bytes[12..].copy_from_slice(&check.to_le_bytes());
    bytes
}

/// Reads a preamble and checks that this version can read what follows.
pub(super) fn read_preamble(reader: &mut impl Read) -> Result<()> {
    let mut bytes = [0; PREAMBLE];
    // The magic first: a foreign file may be shorter than a preamble.
    reader.read_exact(&mut bytes[..8]).map_err(Error::reading)?;
    if bytes[..8] != MAGIC {
        return Err(Error::new(ErrorKind::Foreign, "no soccr image: it begins with other bytes"));
    }
    reader.read_exact(&mut bytes[8..]).map_err(Error::reading)?;
    let mut rest = field::Value(&bytes[8..]);
    let (major, _minor, check) = (rest.u16()?, rest.u16()?, rest.u32()?);
    if check != crc32fast::hash(&bytes[..12]) {
        return Err(Error::damaged("the checksum of the preamble is wrong"));
    }
    if major != MAJOR {
        return Err(Error::newer(format_args!("format version {major}, known here: {MAJOR}")));
    }
    Ok(())
}

/// Begins a record in `out`: its fields follow, then [`seal`].
pub(super) fn open(out: &mut Vec<u8>, kind: u16, connection: u32) {
    open_flagged(out, kind, CRITICAL, connection);
}

/// Begins a record that readers may skip, unless its flags say [`CRITICAL`].
pub(super) fn open_flagged(out: &mut Vec<u8>, kind: u16, flags: u16, connection: u32) {
    out.clear();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    out.extend_from_slice(&connection.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
}

/// Fills in the length and the checksums of the record in `parts`, and writes it.
///
/// The parts are `small[..cuts[0]]`, `first`, `small[cuts[0]..cuts[1]]`, `second`, then the rest of `small`: queues go
/// out from where they lie.
pub(super) fn seal(
    writer: &mut impl Write,
    small: &mut Vec<u8>,
    cuts: [usize; 2],
    queues: [&[u8]; 2],
) -> Result<()> {
    let length = (small.len() - HEADER + queues[0].len() + queues[1].len()) as u32;
    small[8..12].copy_from_slice(&length.to_le_bytes());
    let check = crc32fast::hash(&small[..12]);
    small[12..HEADER].copy_from_slice(&check.to_le_bytes());

    let mut hasher = Hasher::new();
    for part in [&small[..cuts[0]], queues[0], &small[cuts[0]..cuts[1]], queues[1], &small[cuts[1]..]] {
        hasher.update(part);
    }
    small.extend_from_slice(&hasher.finalize().to_le_bytes());

    let parts = [&small[..cuts[0]], queues[0], &small[cuts[0]..cuts[1]], queues[1], &small[cuts[1]..]];
    write_all(writer, &parts).map_err(|error| Error::io("write", error))
}

/// Writes a record that has no queues.
pub(super) fn seal_small(writer: &mut impl Write, small: &mut Vec<u8>) -> Result<()> {
    let length = small.len();
    seal(writer, small, [length; 2], [&[]; 2])
}

/// Writes all parts, in one system call where the writer can.
fn write_all(writer: &mut impl Write, parts: &[&[u8]; 5]) -> std::io::Result<()> {
    let mut slices = parts.map(IoSlice::new);
    let mut slices = &mut slices[..];
    IoSlice::advance_slices(&mut slices, 0); // drops the empty ones at the front
    while !slices.is_empty() {
        match writer.write_vectored(slices) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The payload of a record while it is read. Nothing beyond the record is ever read.
pub(super) struct Payload<'a, R> {
    reader: &'a mut R,
    buffer: &'a mut Vec<u8>,
    /// What of `buffer` has been handed out.
    at: usize,
    /// Payload bytes not handed out yet.
    left: usize,
    /// Payload bytes not yet read from `reader`.
    unread: usize,
    hasher: Hasher,
}

impl<'a, R: Read> Payload<'a, R> {
    /// Reads the header of the next record.
    pub(super) fn open(reader: &'a mut R, buffer: &'a mut Vec<u8>) -> Result<(Header, Self)> {
        let mut bytes = [0; HEADER];
        reader.read_exact(&mut bytes).map_err(Error::reading)?;
        let header = Header::parse(&bytes)?;
        let mut hasher = Hasher::new();
        hasher.update(&bytes);
        buffer.clear();
        let length = header.length as usize;
        Ok((header, Self { reader, buffer, at: 0, left: length, unread: length, hasher }))
    }

    /// Tag and length of the next field; `None` behind the last one.
    pub(super) fn field(&mut self) -> Result<Option<(u16, u32)>> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut header = self.value(field::HEADER as u32)?;
        let (tag, length) = (header.u16()?, header.u32()?);
        if length as usize > self.left {
            return Err(Error::damaged("a field is larger than its record"));
        }
        Ok(Some((tag, length)))
    }

    /// The value of a field that is no queue.
    pub(super) fn value(&mut self, length: u32) -> Result<field::Value<'_>> {
        let length = length as usize;
        if length > self.left || length > field::LIMIT as usize {
            return Err(Error::damaged("a field exceeds its limit"));
        }
        while self.buffer.len() - self.at < length {
            self.fill()?;
        }
        let start = self.at;
        self.at += length;
        self.left -= length;
        Ok(field::Value(&self.buffer[start..self.at]))
    }

    /// The value of a field that is a queue, into `queue`.
    pub(super) fn queue(&mut self, length: u32, queue: &mut Vec<u8>) -> Result<()> {
        if length > QUEUE_LIMIT {
            return Err(Error::damaged("a queue is over 64 MiB"));
        }
        self.long(length, queue)
    }

    /// The value of a long field, into `queue`: memory grows as bytes come, to exactly what is needed.
    pub(super) fn long(&mut self, length: u32, queue: &mut Vec<u8>) -> Result<()> {
        let length = length as usize;
        queue.clear();
        let ready = &self.buffer[self.at..];
        let ready = &ready[..ready.len().min(length)];
        queue.extend_from_slice(ready);
        self.at += ready.len();
        while queue.len() < length {
            let (start, step) = (queue.len(), (length - queue.len()).min(queue.len().max(FIRST)));
            queue.reserve_exact(step);
            let read = self.reader.by_ref().take(step as u64).read_to_end(queue).map_err(Error::reading)?;
            self.unread -= read;
            self.hasher.update(&queue[start..]);
            if read < step {
                return Err(Error::reading(std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
        self.left -= length;
        Ok(())
    }

    /// Steps over a value.
    pub(super) fn skip(&mut self, length: u32) -> Result<()> {
        let mut length = length as usize;
        while length > 0 {
            if self.at == self.buffer.len() {
                self.fill()?;
            }
            let step = length.min(self.buffer.len() - self.at);
            (self.at, self.left, length) = (self.at + step, self.left - step, length - step);
        }
        Ok(())
    }

    /// Reads to the end of the record, whatever of it is still unread, and compares the checksum.
    ///
    /// The error is of the record where its checksum is wrong, else of the reader.
    pub(super) fn finish(mut self) -> Result<bool> {
        self.skip(self.left as u32)?;
        let mut check = [0; CHECKSUM];
        self.reader.read_exact(&mut check).map_err(Error::reading)?;
        Ok(self.hasher.finalize() == u32::from_le_bytes(check))
    }

    fn fill(&mut self) -> Result<()> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let start = self.buffer.len();
        let step = self.unread.min(CHUNK);
        self.buffer.resize(start + step, 0);
        self.reader.read_exact(&mut self.buffer[start..]).map_err(Error::reading)?;
        self.unread -= step;
        self.hasher.update(&self.buffer[start..]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The header of a record that promises `length` bytes, of which only `bytes` come.
    fn lying(length: u32, bytes: &[u8]) -> Vec<u8> {
        let mut all = Vec::new();
        open(&mut all, kind::CONNECTION, 1);
        all[8..12].copy_from_slice(&length.to_le_bytes());
        let check = crc32fast::hash(&all[..12]);
        all[12..].copy_from_slice(&check.to_le_bytes());
        all.extend_from_slice(bytes);
        all
    }

    #[test]
    fn a_lying_length_takes_no_memory() {
        let mut field = Vec::new();
        field::put_header(&mut field, field::tag::RECEIVE_QUEUE, QUEUE_LIMIT);
        // The first bytes of the queue come, the promised 64 MiB never do.
        field.resize(field.len() + 40_000, 7);
        let (bytes, mut buffer, mut queue) = (lying(PAYLOAD_LIMIT, &field), Vec::new(), Vec::new());
        let mut reader = &bytes[..];
        let (_, mut payload) = Payload::open(&mut reader, &mut buffer).unwrap();
        let (tag, length) = payload.field().unwrap().unwrap();
        assert_eq!((tag, length), (field::tag::RECEIVE_QUEUE, QUEUE_LIMIT));
        assert_eq!(payload.queue(length, &mut queue).unwrap_err().kind(), ErrorKind::Truncated);
        assert!(queue.capacity() <= 2 * FIRST, "{}", queue.capacity());
        assert!(buffer.capacity() <= 4 * CHUNK, "{}", buffer.capacity());
    }

    #[test]
    fn what_is_over_a_limit_is_refused_before_it_is_read() {
        let bytes = lying(PAYLOAD_LIMIT + 1, &[]);
        assert_eq!(
            Payload::open(&mut &bytes[..], &mut Vec::new()).err().map(|error| error.kind()),
            Some(ErrorKind::Damaged)
        );
        let bytes = lying(PAYLOAD_LIMIT, &[]);
        let (mut reader, mut buffer, mut queue) = (&bytes[..], Vec::new(), Vec::new());
        let (_, mut payload) = Payload::open(&mut reader, &mut buffer).unwrap();
        assert_eq!(payload.queue(QUEUE_LIMIT + 1, &mut queue).unwrap_err().kind(), ErrorKind::Damaged);
        assert!(payload.value(field::LIMIT + 1).is_err_and(|error| error.kind() == ErrorKind::Damaged));
        assert_eq!(queue.capacity(), 0);
    }

    #[test]
    fn a_queue_takes_what_it_needs() {
        let mut bytes = Vec::new();
        open(&mut bytes, kind::CONNECTION, 1);
        let (queue, mut out) = (vec![3; 3_000_000], Vec::new());
        field::put_header(&mut bytes, field::tag::RECEIVE_QUEUE, queue.len() as u32);
        let cut = bytes.len();
        seal(&mut out, &mut bytes, [cut; 2], [&queue, &[]]).unwrap();
        let (mut reader, mut buffer, mut read) = (&out[..], Vec::new(), Vec::new());
        let (_, mut payload) = Payload::open(&mut reader, &mut buffer).unwrap();
        let (_, length) = payload.field().unwrap().unwrap();
        payload.queue(length, &mut read).unwrap();
        assert!(payload.finish().unwrap());
        assert!(read == queue);
        assert_eq!(read.capacity(), queue.len());
    }
}

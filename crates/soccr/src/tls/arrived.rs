//! What has arrived at a socket on which the kernel decrypts: nothing shows it but reading it.

use std::os::fd::BorrowedFd;

use super::{APPLICATION_DATA, Record, Tls, layer};
use crate::buffers;
use crate::connection::{Buffers, QUEUE_LIMIT};
use crate::error::{Error, Result};
use crate::queue::changed;
use crate::sys::tcp::{self, Queue, Repair};
use crate::sys::tls;

/// Four records of the largest size.
const CHUNK: usize = 64 << 10;

/// What has been read from a socket.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrived {
    /// Whole records, decrypted.
    pub(crate) records: Vec<Record>,
    /// What follows, as it came: less than a record.
    pub(crate) rest: Vec<u8>,
    /// They are only looked at: the socket still has them.
    in_place: bool,
    /// Where that has been done, the number of the record behind them.
    seen: Option<u64>,
}

impl Arrived {
    /// For what is only looked at.
    pub(crate) fn in_place() -> Self {
        Self { in_place: true, ..Self::default() }
    }

    /// Something has been read or looked at.
    pub(crate) fn is_read(&self) -> bool {
        self.seen.is_some() || !(self.records.is_empty() && self.rest.is_empty())
    }

    /// It is nowhere else.
    pub(crate) fn is_taken(&self) -> bool {
        !self.in_place && self.is_read()
    }

    /// Reads everything.
    ///
    /// Whole records first: what is taken past the TLS layer must not be one that it has begun to look at (CVE-2025-38616).
    pub(crate) fn take_in(&mut self, fd: BorrowedFd<'_>, tls: &Tls) -> Result<()> {
        if self.in_place {
            return self.look_at(fd, tls);
        }
        widen(fd)?;
        out_of_repair(fd, || self.take_records(fd).and_then(|()| self.take_rest(fd)))
    }

    /// Looks at everything, and leaves it in the socket, which can go on with it: the kernel has decrypted it then, and keeps it.
    ///
    /// # Errors
    /// Refused: what nobody can look at. A half record is one; and of several records the kernel shows those of one type, so
    /// the bytes must be as many as the records that it has decrypted for us.
    fn look_at(&mut self, fd: BorrowedFd<'_>, tls: &Tls) -> Result<()> {
        let (length, number) = (tcp::unread(fd)?, layer::records_read(fd)?);
        match self.seen {
            Some(seen) if (length, number) == (0, seen) => return Ok(()),
            Some(_) => return Err(changed()),
            None => {}
        }
        let before = widen(fd)?;
        let looked = out_of_repair(fd, || peek(fd));
        if let Some(before) = before {
            buffers::write(fd, buffers::read(fd)?.buffers, before)?;
        }
        let record = looked?;
        let (rest, seen) = (tcp::unread(fd)?, layer::records_read(fd)?);
        let remedy = "its process has to read on, so try again; or let the program hand it over itself";
        if rest > 0 {
            return Err(Error::refused("half a TLS record, at which nobody can look", remedy));
        }
        let sealed = record.bytes.len() as u64 + (seen - number) * tls.expansion();
        if sealed != u64::from(length) {
            let what = "a TLS record that is read in part or padded, or one behind records of another type";
            return Err(Error::refused(what, remedy));
        }
        self.records = if record.bytes.is_empty() { Vec::new() } else { vec![record] };
        self.seen = Some(seen);
        Ok(())
    }

    fn take_records(&mut self, fd: BorrowedFd<'_>) -> Result<()> {
        if !self.rest.is_empty() {
            // The layer has lost its place in the stream.
            return Ok(());
        }
        let mut bytes = vec![0; CHUNK];
        loop {
            match tls::receive(fd, &mut bytes) {
                // The end of the stream: the FIN has a state of its own.
                Ok((_, 0)) => return Ok(()),
                Ok((content_type, length)) => self.add(content_type, &bytes[..length])?,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(unreadable(error)),
            }
        }
    }

    fn add(&mut self, content_type: u8, bytes: &[u8]) -> Result<()> {
        match self.records.last_mut() {
            Some(last) if (last.content_type, content_type) == (APPLICATION_DATA, APPLICATION_DATA) => {
                last.bytes.extend_from_slice(bytes);
            }
            _ => self.records.push(Record { content_type, bytes: bytes.to_vec() }),
        }
        // TCP's queue was shorter than that, so something goes on arriving.
        let length: usize = self.records.iter().map(|record| record.bytes.len()).sum();
        if length > QUEUE_LIMIT as usize { Err(changed()) } else { Ok(()) }
    }

    fn take_rest(&mut self, fd: BorrowedFd<'_>) -> Result<()> {
        let length = tcp::unread(fd)? as usize;
        if length == 0 {
            return Ok(());
        }
        let start = self.rest.len();
        self.rest.resize(start + length, 0);
        let taken = tls::receive_raw(fd, &mut self.rest[start..]);
        self.rest.truncate(start + *taken.as_ref().unwrap_or(&0));
        match (taken?, tcp::unread(fd)?) {
            (taken, 0) if taken == length => Ok(()),
            _ => Err(changed()),
        }
    }
}

/// In repair mode nothing can be read, so the socket leaves it meanwhile; the receive queue is selected afterwards.
fn out_of_repair<T>(fd: BorrowedFd<'_>, read: impl FnOnce() -> Result<T>) -> Result<T> {
    tcp::set_repair(fd, Repair::OffNoProbe)?;
    let read = read();
    // Out of repair mode the socket would reset the peer when it is closed, so one failure is not the last word.
    tcp::set_repair(fd, Repair::On).or_else(|_| tcp::set_repair(fd, Repair::On))?;
    tcp::select_queue(fd, Queue::Receive)?;
    read
}

/// The records of one type at the beginning.
fn peek(fd: BorrowedFd<'_>) -> Result<Record> {
    let mut bytes = vec![0; CHUNK];
    loop {
        match tls::peek(fd, &mut bytes) {
            Ok((_, length)) if length == bytes.len() => bytes.resize(2 * length, 0),
            Ok((content_type, length)) => {
                bytes.truncate(length);
                return Ok(Record { content_type, bytes });
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Ok(Record { content_type: APPLICATION_DATA, bytes: Vec::new() });
            }
            Err(error) => return Err(unreadable(error)),
        }
    }
}

fn unreadable(error: std::io::Error) -> Error {
    if error.raw_os_error() == Some(libc::EBADMSG) {
        let remedy = "its peer uses other keys, or the bytes are damaged: the application sees EBADMSG";
        return Error::refused("a TLS record that cannot be decrypted", remedy);
    }
    Error::system("recvmsg", error)
}

/// A nearly full receive buffer makes the kernel take the beginning of a record out of TCP to where nothing shows it: it gets a
/// larger one while it is read. Returns what it had; what was saved of it stays.
fn widen(fd: BorrowedFd<'_>) -> Result<Option<Buffers>> {
    let memory = buffers::read(fd)?;
    if memory.receive_queue <= memory.buffers.receive / 2 {
        return Ok(None);
    }
    let larger = memory.buffers.receive.saturating_mul(2).min(i32::MAX as u32 / 2) as i32;
    tcp::set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, "SO_RCVBUFFORCE", larger).map_err(|error| {
        error.advise("TLS records hide in a full receive buffer: let the application read, or run as root")
    })?;
    Ok(Some(memory.buffers))
}

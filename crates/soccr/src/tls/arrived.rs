//! What has arrived at a socket on which the kernel decrypts: nothing shows it but reading it.

use std::os::fd::BorrowedFd;

use super::{APPLICATION_DATA, Record};
use crate::buffers;
use crate::connection::QUEUE_LIMIT;
use crate::error::{Error, Result};
use crate::queue::changed;
use crate::sys::tcp::{self, Queue, Repair};
use crate::sys::tls;

/// Four records of the largest size.
const CHUNK: usize = 64 << 10;

/// What has been read from a socket: it is nowhere else.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrived {
    /// Whole records, decrypted.
    pub(crate) records: Vec<Record>,
    /// What follows, as it came: less than a record.
    pub(crate) rest: Vec<u8>,
}

impl Arrived {
    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty() && self.rest.is_empty()
    }

    /// Reads everything. In repair mode nothing can be read, so the socket leaves it meanwhile; the receive queue is selected
    /// afterwards.
    ///
    /// Whole records first: what is taken past the TLS layer must not be one that it has begun to look at (CVE-2025-38616).
    pub(crate) fn take_in(&mut self, fd: BorrowedFd<'_>) -> Result<()> {
        widen(fd)?;
        tcp::set_repair(fd, Repair::OffNoProbe)?;
        let read = self.take_records(fd).and_then(|()| self.take_rest(fd));
        // Out of repair mode the socket would reset the peer when it is closed, so one failure is not the last word.
        tcp::set_repair(fd, Repair::On).or_else(|_| tcp::set_repair(fd, Repair::On))?;
        tcp::select_queue(fd, Queue::Receive)?;
        read
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
                Err(error) if error.raw_os_error() == Some(libc::EBADMSG) => {
                    let remedy =
                        "its peer uses other keys, or the bytes are damaged: the application sees EBADMSG";
                    return Err(Error::refused("a TLS record that cannot be decrypted", remedy));
                }
                Err(error) => return Err(Error::system("recvmsg", error)),
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

/// A nearly full receive buffer makes the kernel take the beginning of a record out of TCP to where nothing shows it: it gets a
/// larger one while it is read. What was saved of it stays.
fn widen(fd: BorrowedFd<'_>) -> Result<()> {
    let memory = buffers::read(fd)?;
    if memory.receive_queue <= memory.buffers.receive / 2 {
        return Ok(());
    }
    let larger = memory.buffers.receive.saturating_mul(2).min(i32::MAX as u32 / 2) as i32;
    tcp::set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, "SO_RCVBUFFORCE", larger).map_err(|error| {
        error.advise("TLS records hide in a full receive buffer: let the application read, or run as root")
    })
}

//! Records that were decrypted become records again, for the receive queue of a restored socket.
//!
//! The kernel encrypts them: on a connection to ourselves, whose one end writes with the keys of the peer, and whose other end reads
//! what that has made. No cryptography of our own, and no other reader.

use std::borrow::Cow;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use super::Tls;
use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::sys::tls::{self, Direction};

/// A record's content type, version and length.
const HEADER: usize = 5;

/// Far longer than a record takes through `lo`.
const LIMIT: Duration = Duration::from_secs(10);

impl Tls {
    /// The receive queue as it was when nothing had been decrypted yet: the unread records, then the `rest`.
    pub(crate) fn seal<'a>(&self, rest: &'a [u8]) -> Result<Cow<'a, [u8]>> {
        let Some(receive) = self.receive.as_ref().filter(|_| !self.unread.is_empty()) else {
            return Ok(rest.into());
        };
        let (writer, mut reader) = pair().map_err(|error| {
            Error::system("a connection over 127.0.0.1", error)
                .advise("the kernel encrypts unread TLS records on one: bring `lo` up")
        })?;
        let fd = writer.as_fd();
        tls::set_upper_layer(fd)?;
        let keys = receive.before(self.fragments().count() as u64);
        let kind = (self.version as u16, self.cipher as u16);
        tls::set_secrets(fd, Direction::Transmit, kind, keys.as_bytes())?;
        let mut sealed = Vec::new();
        for (content_type, fragment) in self.fragments() {
            let record = |error| Error::system("a TLS record over 127.0.0.1", error);
            // Nothing is on its way but this one, so there is room for all of it.
            let sent = tls::send(fd, content_type, fragment).map_err(record)?;
            if sent != fragment.len() {
                return Err(Error::refused(
                    "a TLS record that was encrypted in part",
                    "out of socket memory",
                ));
            }
            read_record(&mut reader, &mut sealed).map_err(record)?;
        }
        sealed.extend_from_slice(rest);
        Ok(sealed.into())
    }
}

impl Connection {
    /// The receive queue as TCP had it: with the records that have been decrypted since, if there are any.
    pub(crate) fn raw_receive_queue(&self) -> Result<Cow<'_, [u8]>> {
        match &self.tls {
            Some(tls) => tls.seal(&self.receive_queue),
            None => Ok(self.receive_queue[..].into()),
        }
    }
}

fn pair() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let writer = TcpStream::connect(listener.local_addr()?)?;
    // Others may connect as well.
    loop {
        let (reader, from) = listener.accept()?;
        if from == writer.local_addr()? {
            reader.set_read_timeout(Some(LIMIT))?;
            return Ok((writer, reader));
        }
    }
}

fn read_record(reader: &mut TcpStream, sealed: &mut Vec<u8>) -> std::io::Result<()> {
    let start = sealed.len();
    sealed.resize(start + HEADER, 0);
    reader.read_exact(&mut sealed[start..])?;
    let length = u16::from_be_bytes([sealed[start + 3], sealed[start + 4]]);
    sealed.resize(start + HEADER + usize::from(length), 0);
    reader.read_exact(&mut sealed[start + HEADER..])
}

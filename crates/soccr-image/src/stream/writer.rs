//! Writing a stream.

use std::borrow::Cow;
use std::io::Write;
use std::net::SocketAddr;

use soccr::Connection;

use super::connection::{put_address, write_address};
use super::field::{self, tag};
use super::record::{self, kind};
use super::{Message, NOTE_LIMIT, Place, STATE_LIMIT, Steered, TEXT_LIMIT, connection};
use crate::error::{Error, Result};

/// Writes a stream, one record after the other.
///
/// Queues are written from where they lie; the memory for everything else is kept from one record to the next. Small
/// records are one write each: for many of them put a [`BufWriter`](std::io::BufWriter) around the file, and
/// [`flush`](Self::flush) before waiting for an answer.
///
/// Dropped without [`finish`](Self::finish), it leaves a stream that its readers see as cut off. After an
/// [`Io`](crate::ErrorKind::Io) error nothing more can be written; every other error concerns what was to be written only.
#[derive(Clone, Debug)]
pub struct Writer<W> {
    writer: W,
    small: Vec<u8>,
    records: u32,
}

impl<W: Write> Writer<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// The errors of `writer`.
    pub fn new(mut writer: W) -> Result<Self> {
        writer.write_all(&record::preamble()).map_err(|error| Error::io("write", error))?;
        Ok(Self { writer, small: Vec::new(), records: 0 })
    }

    /// Begins a stream with its only connection, if that does not contradict itself.
    pub(super) fn of_one(mut writer: W, connection: &Connection) -> Result<Self> {
        let mut small = Vec::new();
        connection::write(&mut writer, &mut small, &record::preamble(), 1, "", connection)?;
        Ok(Self { writer, small, records: 1 })
    }

    /// Writes a connection under a number, not 0, and a name for people, which may be empty.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) and nothing written where the connection contradicts itself.
    pub fn connection(&mut self, id: u32, name: &str, connection: &Connection) -> Result<()> {
        if id == 0 {
            return Err(Error::invalid("0 is no number of a connection"));
        }
        connection::write(&mut self.writer, &mut self.small, &[], id, &clean(name, TEXT_LIMIT), connection)?;
        self.records += 1;
        Ok(())
    }

    /// Writes the state that an application keeps about a connection. The connection must come next.
    ///
    /// A reader that does not know such records skips it, or refuses the connection where the state is `critical`.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) and nothing written for more than [`STATE_LIMIT`].
    pub fn state(&mut self, connection: u32, bytes: &[u8], critical: bool) -> Result<()> {
        if connection == 0 || bytes.len() > STATE_LIMIT {
            return Err(
                Error::invalid("a state belongs to no connection, or is over 16 MiB").of(connection, "")
            );
        }
        let flags = if critical { record::CRITICAL } else { 0 };
        record::open_flagged(&mut self.small, kind::STATE, flags, connection);
        field::put_header(&mut self.small, tag::STATE, bytes.len() as u32);
        let cut = self.small.len();
        record::seal(&mut self.writer, &mut self.small, [cut; 2], [bytes, &[]])?;
        self.records = self.records.wrapping_add(1);
        Ok(())
    }

    /// Writes held packets of a connection.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) for a packet that is empty or over 1 MiB.
    pub fn held<P: AsRef<[u8]>>(
        &mut self,
        connection: u32,
        packets: impl IntoIterator<Item = P>,
    ) -> Result<()> {
        record::open(&mut self.small, kind::HELD, connection);
        for packet in packets {
            let packet = packet.as_ref();
            if packet.is_empty() || packet.len() > field::LIMIT as usize {
                return Err(Error::invalid("a packet is empty or over 1 MiB").of(connection, ""));
            }
            field::put(&mut self.small, tag::PACKET, |out| out.extend_from_slice(packet));
            if self.small.len() > record::HELD_SIZE as usize {
                self.seal()?;
                record::open(&mut self.small, kind::HELD, connection);
            }
        }
        if self.small.len() > record::HEADER { self.seal() } else { Ok(()) }
    }

    /// Writes any message.
    ///
    /// # Errors
    /// The errors of [`connection`](Self::connection), [`state`](Self::state), [`held`](Self::held) and of the writer.
    pub fn send(&mut self, message: &Message) -> Result<()> {
        let (kind, id, reason) = match message {
            Message::Connection { id, name, connection } => return self.connection(*id, name, connection),
            Message::State { connection, critical, bytes } => {
                return self.state(*connection, bytes, *critical);
            }
            Message::Held { connection, packets } => return self.held(*connection, packets),
            Message::Begin { connections, answers, notes, place, steered } => {
                record::open(&mut self.small, kind::BEGIN, 0);
                field::put(&mut self.small, tag::COUNT, |out| {
                    out.extend_from_slice(&connections.to_le_bytes());
                });
                field::put(&mut self.small, tag::ANSWERS, |out| out.push((*answers).into()));
                field::put(&mut self.small, tag::NOTES, |out| out.push((*notes).into()));
                if let Some(place) = place {
                    self.place(place);
                }
                if let Some(steered) = steered {
                    self.steered(steered);
                }
                return self.seal();
            }
            Message::Here { place } => {
                record::open_flagged(&mut self.small, kind::HERE, 0, 0);
                self.place(place);
                return self.seal();
            }
            Message::Note { text, failed } => {
                record::open_flagged(&mut self.small, kind::NOTE, 0, 0);
                let text = clean(text, NOTE_LIMIT);
                field::put(&mut self.small, tag::NOTE, |out| out.extend_from_slice(text.as_bytes()));
                field::put(&mut self.small, tag::FAILED, |out| out.push((*failed).into()));
                return self.seal();
            }
            Message::Trial { connection: id, name, flow } => {
                record::open_flagged(&mut self.small, kind::TRIAL, 0, *id);
                let name = clean(name, TEXT_LIMIT);
                field::put(&mut self.small, tag::NAME, |out| out.extend_from_slice(name.as_bytes()));
                put_address(&mut self.small, tag::LOCAL, &flow.local);
                put_address(&mut self.small, tag::REMOTE, &flow.remote);
                return self.seal();
            }
            Message::Commit { connection } => (kind::COMMIT, connection, None),
            Message::Abort { connection, reason } => (kind::ABORT, connection, Some(reason)),
            Message::Ready { connection } => (kind::READY, connection, None),
            Message::Refused { connection, reason } => (kind::REFUSED, connection, Some(reason)),
            Message::Taken { connection } => (kind::TAKEN, connection, None),
        };
        record::open(&mut self.small, kind, *id);
        if let Some(reason) = reason {
            field::put(&mut self.small, tag::REASON, |out| {
                out.extend_from_slice(clean(reason, TEXT_LIMIT).as_bytes())
            });
        }
        self.seal()
    }

    fn place(&mut self, place: &Place) {
        field::put(&mut self.small, tag::PLACE, |out| {
            out.extend_from_slice(&place.host);
            place.namespace.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
        });
    }

    fn steered(&mut self, steered: &Steered) {
        field::put(&mut self.small, tag::STEERED, |out| out.push(1));
        for address in &steered.from {
            put_address(&mut self.small, tag::SOURCE, &SocketAddr::new(*address, 0));
        }
        if let Some(tunnel) = &steered.tunnel {
            field::put(&mut self.small, tag::TUNNEL, |out| {
                out.extend_from_slice(&tunnel.id.to_le_bytes());
                for end in [tunnel.local, tunnel.remote] {
                    write_address(out, &SocketAddr::new(end, tunnel.port));
                }
            });
        }
        if steered.answers {
            field::put(&mut self.small, tag::ANSWER_BACK, |out| out.push(1));
        }
    }

    /// Passes on what a buffer around the file still holds.
    ///
    /// # Errors
    /// The errors of the writer.
    pub fn flush(&mut self) -> Result<()> {
        self.writer.flush().map_err(|error| Error::io("write", error))
    }

    /// What is written to: bytes written beside the writer damage the stream.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.writer
    }

    /// Gives the writer back, whether the stream has an end or not.
    pub fn into_inner(self) -> W {
        self.writer
    }

    /// Writes the end of the stream, flushes, and gives the writer back.
    ///
    /// # Errors
    /// The errors of the writer.
    pub fn finish(mut self) -> Result<W> {
        self.end()?;
        Ok(self.writer)
    }

    /// The same, and keeps the writer. Nothing may be written behind it.
    ///
    /// # Errors
    /// The errors of the writer.
    pub fn end(&mut self) -> Result<()> {
        record::open(&mut self.small, kind::END, 0);
        let records = self.records;
        field::put(&mut self.small, tag::COUNT, |out| out.extend_from_slice(&records.to_le_bytes()));
        self.seal()?;
        self.flush()
    }

    fn seal(&mut self) -> Result<()> {
        record::seal_small(&mut self.writer, &mut self.small)?;
        self.records = self.records.wrapping_add(1);
        Ok(())
    }
}

/// Cut to the limit and without control characters: error messages may hold anything.
fn clean(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit && !text.chars().any(char::is_control) {
        return text.into();
    }
    let mut length = 0;
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take_while(|c| {
            length += c.len_utf8();
            length <= limit
        })
        .collect()
}

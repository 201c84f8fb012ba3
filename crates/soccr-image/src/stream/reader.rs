//! Reading a stream.

use std::io::Read;

use soccr::steer::Tunnel;
use soccr::{Connection, Flow};

use super::connection::{Fields, address, skip_unknown, text};
use super::field::{self, tag};
use super::record::{self, Header, Payload, kind};
use super::{Decoded, Message, NOTE_LIMIT, Place, STATE_LIMIT, Steered, TEXT_LIMIT};
use crate::error::{Error, ErrorKind, Result};

/// The largest record of held packets: closed behind the packet that made it large.
const HELD_LIMIT: u32 = record::HELD_SIZE + field::LIMIT + 2 * field::HEADER as u32;

/// Reads a stream, one record after the other.
///
/// Memory is bounded by the largest connection. Nothing is read beyond the record that is asked for, so that a hand-over
/// can be answered; put a [`BufReader`](std::io::BufReader) around a file or pipe that many records come from.
///
/// An error of which [`connection`](Error::connection) is `Some` concerns only that connection: go on with [`receive`](Self::receive).
#[derive(Debug)]
pub struct Reader<R> {
    reader: R,
    buffer: Vec<u8>,
    queues: [Vec<u8>; 2],
    records: u32,
    ended: bool,
    validate: bool,
}

impl<R: Read> Reader<R> {
    /// Begins to read a stream.
    ///
    /// # Errors
    /// [`Foreign`](ErrorKind::Foreign) where it is of another format, [`Newer`](ErrorKind::Newer) where it is of a newer
    /// major version.
    pub fn new(mut reader: R) -> Result<Self> {
        record::read_preamble(&mut reader)?;
        let (buffer, queues) = Default::default();
        Ok(Self { reader, buffer, queues, records: 0, ended: false, validate: true })
    }

    /// Gives connections even if they contradict themselves: to look at, not to restore.
    pub fn without_validation(self) -> Self {
        Self { validate: false, ..self }
    }

    /// The next message; `None` behind the end of the stream.
    ///
    /// # Errors
    /// [`Truncated`](ErrorKind::Truncated) where the bytes end before the stream does: its writer is gone. Otherwise see
    /// [`ErrorKind`] and [`Error::connection`].
    pub fn receive(&mut self) -> Result<Option<Message>> {
        while !self.ended {
            match self.record()? {
                Parsed::Message(message) => return Ok(Some(message)),
                Parsed::End => self.ended = true,
                Parsed::Nothing => {}
            }
        }
        Ok(None)
    }

    /// Reads one record and no further.
    pub(super) fn receive_one(&mut self) -> Result<Decoded> {
        Ok(match self.record()? {
            Parsed::Message(message) => Decoded::Message(message),
            Parsed::End => Decoded::End,
            Parsed::Nothing => Decoded::Incomplete,
        })
    }

    /// What is read from.
    pub(super) fn get_ref(&self) -> &R {
        &self.reader
    }

    /// What is read from: to put more bytes into it.
    pub(super) fn get_mut(&mut self) -> &mut R {
        &mut self.reader
    }

    fn record(&mut self) -> Result<Parsed> {
        let (header, mut payload) = Payload::open(&mut self.reader, &mut self.buffer)?;
        let mut fields = Fields::new(std::mem::take(&mut self.queues));
        let before = self.records;
        self.records = before.wrapping_add(1);
        let parsed = match parse(&header, before, &mut fields, &mut payload) {
            Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Truncated) => return Err(error),
            parsed => parsed,
        };
        // Read to the end of the record in any case: the next one begins there.
        let intact = payload.finish()?;
        let name = fields.name.clone();
        let result = match parsed {
            _ if !intact => Err(Error::damaged("the checksum of a record is wrong")),
            Ok(Parsed::Nothing) if header.kind == kind::CONNECTION => {
                self.connection(fields).map(|connection| {
                    let (id, name) = (header.connection, name.clone());
                    Parsed::Message(Message::Connection { id, name, connection })
                })
            }
            parsed => parsed,
        };
        result.map_err(|error| match header.connection {
            0 => error,
            id => error.of(id, &name),
        })
    }

    fn connection(&self, fields: Fields) -> Result<Connection> {
        let connection = fields.connection()?;
        if self.validate {
            connection.validate().map_err(|error| Error::invalid(error.to_string()))?;
        }
        Ok(connection)
    }

    /// Takes the memory of a connection that is no longer needed, for the next one.
    pub fn recycle(&mut self, connection: Connection) {
        self.queues = [connection.receive_queue, connection.send_queue];
    }

    /// Gives the reader back.
    pub fn into_inner(self) -> R {
        self.reader
    }
}

#[allow(clippy::large_enum_variant, reason = "short-lived, and most are connections")]
enum Parsed {
    Message(Message),
    End,
    /// No message as yet: it is of a newer version, or a connection whose checksum has to be compared first.
    Nothing,
}

/// Reads the fields of a record that comes after `before` others. Those of a connection are left in `fields`.
fn parse<R: Read>(
    header: &Header,
    before: u32,
    fields: &mut Fields,
    payload: &mut Payload<'_, R>,
) -> Result<Parsed> {
    let id = header.connection;
    match header.kind {
        kind::CONNECTION
        | kind::HELD
        | kind::COMMIT
        | kind::READY
        | kind::TAKEN
        | kind::STATE
        | kind::TRIAL
            if id == 0 =>
        {
            return Err(Error::damaged("a record belongs to no connection"));
        }
        kind::CONNECTION => {
            fields.read(payload)?;
            return Ok(Parsed::Nothing);
        }
        kind::BEGIN..=kind::TRIAL | kind::HELD => {}
        _ if header.critical => return Err(Error::newer(format_args!("a record of type {}", header.kind))),
        _ => return Ok(Parsed::Nothing),
    }
    let (mut reason, mut count, mut answers, mut packets) = (String::new(), 0, false, Vec::new());
    let (mut notes, mut note, mut failed) = (false, String::new(), false);
    let (mut place, mut is_steered, mut steered) = (None, false, Steered::default());
    let (mut name, mut local, mut remote) = (String::new(), None, None);
    let mut state = Vec::new();
    while let Some((tag, length)) = payload.field()? {
        match tag {
            tag::REASON => reason = text(payload.value(length)?.rest(), TEXT_LIMIT)?,
            tag::COUNT => count = payload.value(length)?.u32()?,
            tag::ANSWERS => answers = payload.value(length)?.flag()?,
            tag::NOTES => notes = payload.value(length)?.flag()?,
            tag::NOTE => note = text(payload.value(length)?.rest(), NOTE_LIMIT)?,
            tag::FAILED => failed = payload.value(length)?.flag()?,
            tag::PLACE => {
                let mut value = payload.value(length)?;
                place = Some(Place { host: value.array()?, namespace: [value.u64()?, value.u64()?] });
            }
            tag::STEERED => is_steered = payload.value(length)?.flag()?,
            tag::SOURCE => steered.from.push(address(&mut payload.value(length)?)?.ip()),
            tag::TUNNEL => {
                let mut value = payload.value(length)?;
                let (id, local, remote) = (value.u32()?, address(&mut value)?, address(&mut value)?);
                steered.tunnel = Some(Tunnel::known(local.ip(), remote.ip(), id, local.port()));
            }
            tag::ANSWER_BACK => steered.answers = payload.value(length)?.flag()?,
            tag::PACKET if header.kind == kind::HELD => {
                if length == 0 || header.length > HELD_LIMIT {
                    return Err(Error::damaged("a held packet is empty, or they are too many"));
                }
                packets.push(payload.value(length)?.rest().to_vec());
            }
            tag::NAME if header.kind == kind::TRIAL => {
                name = text(payload.value(length)?.rest(), TEXT_LIMIT)?
            }
            tag::LOCAL if header.kind == kind::TRIAL => local = Some(address(&mut payload.value(length)?)?),
            tag::REMOTE if header.kind == kind::TRIAL => remote = Some(address(&mut payload.value(length)?)?),
            tag::STATE if header.kind == kind::STATE => {
                if length as usize > STATE_LIMIT {
                    return Err(Error::damaged("a state is over 16 MiB"));
                }
                payload.long(length, &mut state)?;
            }
            _ => skip_unknown(payload, tag, length)?,
        }
    }
    Ok(Parsed::Message(match header.kind {
        kind::BEGIN => {
            let steered = is_steered.then_some(steered);
            Message::Begin { connections: count, answers, notes, place, steered }
        }
        kind::STATE => Message::State { connection: id, critical: header.critical, bytes: state },
        kind::HELD => Message::Held { connection: id, packets },
        kind::COMMIT => Message::Commit { connection: id },
        kind::ABORT => Message::Abort { connection: id, reason },
        kind::READY => Message::Ready { connection: id },
        kind::REFUSED => Message::Refused { connection: id, reason },
        kind::TAKEN => Message::Taken { connection: id },
        kind::HERE => match place {
            Some(place) => Message::Here { place },
            None => return Ok(Parsed::Nothing),
        },
        kind::NOTE => Message::Note { text: note, failed },
        kind::TRIAL => match (local, remote) {
            (Some(local), Some(remote)) => {
                Message::Trial { connection: id, name, flow: Flow { local, remote } }
            }
            _ => return Err(Error::damaged("a trial has no addresses")),
        },
        _ if count == before => return Ok(Parsed::End),
        _ => return Err(Error::damaged("records are missing before the end")),
    }))
}

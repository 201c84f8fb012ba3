//! The messages of a stream: how they are written, read, and taken as they come.

use std::io::{self, IoSlice, Read, Write};

use soccr::connection::{Owner, Tls, Tracked};
use soccr::steer::Tunnel;
use soccr::tls::{Cipher, Secrets, Version};
use soccr::{Connection, Flow};
use soccr_image::stream::{Decoded, Decoder, Message, Place, Reader, STATE_LIMIT, Steered, Writer};
use soccr_image::{ErrorKind, read, write};

use super::connections::{SetQueues, idle};
use super::{bytes_of, end, field, kind, payload, preamble, record, sample};

impl Read for Dribble<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let length = buffer.len().min(1);
        self.0.read(&mut buffer[..length])
    }
}

/// A writer that takes a few bytes at a time; counts the calls.
struct Narrow(Vec<u8>, usize, usize);

impl Write for Narrow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.2 += 1;
        let before = self.0.len();
        self.0.extend(parts.iter().flat_map(|part| part.iter()).take(self.1));
        let length = self.0.len() - before;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A writer that takes all, and is interrupted each time before.
struct Interrupted(Vec<u8>, bool);

impl Write for Interrupted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 { Err(io::ErrorKind::Interrupted.into()) } else { self.0.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_interrupted_write_is_made_again() {
    let mut writer = Interrupted(Vec::new(), false);
    write(&mut writer, &sample()).unwrap();
    assert!(writer.0 == bytes_of(&sample()));
}

const PREAMBLE_AND_HEADER: usize = 32;

/// A reader that gives one byte at a time, and is interrupted in between.
struct Dribble<'a>(&'a [u8], bool);

fn flow(ends: &str) -> Flow {
    let (local, remote) = ends.split_once(' ').unwrap();
    Flow { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
}

/// Not alone in its socket: NAT, a user and kernel TLS know of it.
fn known_to_others() -> Connection {
    let mut tls = Tls::new(Version::Tls13, Cipher::ALL[0]);
    tls.transmit = Secrets::new(tls.cipher, &vec![0xA5; tls.cipher.secrets_len()]).ok();
    let wire = flow("[2001:db8::1]:443 [2001:db8::2]:5000");
    Connection {
        tracked: Some(Tracked { wire, initiator: true, mark: 0x1234_5678 }),
        owner: Some(Owner { user: 1000, group: 100 }),
        tls: Some(tls),
        ..sample()
    }
}

fn messages() -> Vec<Message> {
    vec![
        Message::Begin {
            connections: 2,
            answers: true,
            notes: true,
            place: Some(Place { host: *b"0123456789abcdef", namespace: [4, 4_026_531_840] }),
            steered: Some(Steered::default()),
        },
        Message::Begin {
            connections: 3,
            answers: true,
            notes: false,
            place: None,
            steered: Some(Steered {
                from: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
                tunnel: Some(Tunnel::known(
                    "192.0.2.1".parse().unwrap(),
                    "203.0.113.2".parse().unwrap(),
                    0x04_711b,
                    4789,
                )),
                answers: true,
            }),
        },
        Message::Begin { connections: 1, answers: false, notes: false, place: None, steered: None },
        Message::State { connection: 1, critical: true, bytes: vec![7; 1000] },
        Message::Connection { id: 1, name: "pid 7 fd 3".into(), connection: sample() },
        Message::State { connection: 2, critical: false, bytes: Vec::new() },
        Message::Connection { id: 2, name: String::new(), connection: idle() },
        Message::Connection { id: 3, name: String::new(), connection: known_to_others() },
        Message::Held { connection: 1, packets: vec![vec![0x45; 20], vec![0x60; 1500]] },
        Message::Here { place: Place { host: [9; 16], namespace: [4, 1 << 40] } },
        Message::Note { text: "ein längerer Text: ".repeat(10), failed: false },
        Message::Note { text: String::new(), failed: true },
        Message::Trial { connection: 2, name: "one".into(), flow: flow("192.0.2.1:80 192.0.2.2:1") },
        Message::Trial {
            connection: 3,
            name: String::new(),
            flow: flow("[fe80::1%3]:80 [2001:db8::2]:65535"),
        },
        Message::Commit { connection: 1 },
        Message::Abort { connection: 2, reason: "changed my mind".into() },
        Message::Ready { connection: 1 },
        Message::Refused { connection: 2, reason: "Größe".into() },
        Message::Taken { connection: 1 },
    ]
}

fn written(messages: &[Message]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).unwrap();
    messages.iter().for_each(|message| writer.send(message).unwrap());
    writer.finish().unwrap()
}

/// Another version of soccr may be at the other end.
#[test]
fn messages_are_written_as_ever() {
    assert!(written(&messages()) == include_bytes!("messages.v1"));
}

#[test]
fn every_message_comes_through() {
    let messages = messages();
    let bytes = written(&messages);
    let mut dribble = Reader::new(Dribble(&bytes, false)).unwrap();
    let mut reader = Reader::new(&bytes[..]).unwrap();
    for message in messages {
        assert_eq!(dribble.receive().unwrap().as_ref(), Some(&message));
        assert_eq!(reader.receive().unwrap(), Some(message));
    }
    assert_eq!((reader.receive().unwrap(), dribble.receive().unwrap()), (None, None));
    assert!(reader.into_inner().is_empty());
    assert_eq!(kind(read(&bytes[..])), ErrorKind::Invalid);
}

#[test]
fn a_state_is_skipped_by_who_does_not_know_it_unless_it_is_critical() {
    let with_state = |critical| {
        let mut writer = Writer::new(Vec::new()).unwrap();
        writer.state(1, b"nickname", critical).unwrap();
        writer.connection(1, "", &sample()).unwrap();
        writer.finish().unwrap()
    };
    // An image has nobody to give it to.
    assert_eq!(read(&with_state(false)[..]).unwrap(), sample());
    assert_eq!(kind(read(&with_state(true)[..])), ErrorKind::Invalid);
    // As older readers see it: of a type that they do not know.
    for (flags, skipped) in [(0, true), (1, false)] {
        let known = payload(&bytes_of(&sample()));
        let of_the_future = record(99, flags, 1, &field(0x8000 | 6, b"nickname"));
        let bytes = [preamble(1, 0), of_the_future, record(1, 1, 1, &known), end(2)].concat();
        assert_eq!(read(&bytes[..]).is_ok(), skipped);
        assert_eq!(with_state(flags == 1)[18], flags as u8, "of the first record");
    }
}

#[test]
fn a_state_has_its_limit() {
    let longest = vec![3; STATE_LIMIT];
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.state(1, &longest, false).unwrap();
    let refused = writer.state(2, &vec![3; STATE_LIMIT + 1], false).unwrap_err();
    assert_eq!((refused.kind(), refused.connection()), (ErrorKind::Invalid, Some(2)));
    assert_eq!(kind(writer.state(0, b"", false)), ErrorKind::Invalid);
    let bytes = writer.finish().unwrap();
    let mut reader = Reader::new(&bytes[..]).unwrap();
    let expected = Message::State { connection: 1, critical: false, bytes: longest };
    assert!(reader.receive().unwrap() == Some(expected));
    assert_eq!(reader.receive().unwrap(), None);
    // One that comes nevertheless concerns its connection only, and takes no memory.
    let over = record(10, 0, 1, &field(0x8000 | 6, &vec![3; STATE_LIMIT + 1]));
    let bytes = [preamble(1, 0), over, record(4, 1, 2, b""), end(2)].concat();
    let mut reader = Reader::new(&bytes[..]).unwrap();
    let error = reader.receive().unwrap_err();
    assert_eq!((error.kind(), error.connection()), (ErrorKind::Damaged, Some(1)));
    assert_eq!(reader.receive().unwrap(), Some(Message::Commit { connection: 2 }));
}

#[test]
fn a_decoder_takes_bytes_as_they_come() {
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.connection(1, "", &sample()).unwrap();
    writer.send(&Message::Commit { connection: 1 }).unwrap();
    let mut bytes = writer.finish().unwrap();
    // Of the future, and to be skipped: nothing comes of it.
    let end = bytes.split_off(bytes.len() - end(2).len());
    assert_eq!(end, self::end(2));
    bytes.extend([record(99, 0, 1, b"?"), self::end(3), b"behind".to_vec()].concat());
    for size in [1, 7, 1000, bytes.len()] {
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        for piece in bytes.chunks(size) {
            decoder.feed(piece);
            loop {
                match decoder.decode().unwrap() {
                    Decoded::Incomplete => break,
                    Decoded::End => {
                        found.push("end".to_owned());
                        break;
                    }
                    Decoded::Begin => found.push("begin".into()),
                    Decoded::Message(Message::Connection { connection, .. }) => {
                        assert_eq!(connection, sample());
                        found.push("connection".into());
                    }
                    Decoded::Message(message) => found.push(format!("{message:?}")),
                    _ => unreachable!(),
                }
            }
        }
        found.dedup();
        assert_eq!(found, ["begin", "connection", "Commit { connection: 1 }", "end"], "pieces of {size}");
        assert_eq!(decoder.into_rest(), b"behind");
    }
}

#[test]
fn a_decoder_begins_with_the_preamble_and_knows_what_waits() {
    let bytes = bytes_of(&sample());
    let (preamble, rest) = bytes.split_at(PREAMBLE_AND_HEADER / 2);
    let mut decoder = Decoder::new();
    decoder.feed(preamble);
    assert_eq!(decoder.pending(), preamble.len());
    assert!(matches!(decoder.decode(), Ok(Decoded::Begin)));
    decoder.feed(&rest[..20]);
    assert!(matches!(decoder.decode(), Ok(Decoded::Incomplete)));
    assert_eq!(decoder.pending(), 20);
}

#[test]
fn a_packet_has_its_limit() {
    for (length, is_written) in [(0, false), (1 << 20, true), ((1 << 20) + 1, false)] {
        let mut writer = Writer::new(Vec::new()).unwrap();
        let packets = vec![vec![0x45; length]];
        assert_eq!(writer.held(1, &packets).is_ok(), is_written, "{length}");
        if is_written {
            let bytes = writer.finish().unwrap();
            let held = Reader::new(&bytes[..]).unwrap().receive().unwrap();
            assert!(held == Some(Message::Held { connection: 1, packets }));
        }
    }
}

#[test]
fn what_a_buffer_holds_is_passed_on_when_asked() {
    let mut writer = Writer::new(io::BufWriter::new(Vec::new())).unwrap();
    assert!(writer.get_mut().get_ref().is_empty());
    writer.flush().unwrap();
    assert_eq!(writer.get_mut().get_ref()[..], preamble(1, 0));
}

#[test]
fn a_decoder_of_words_takes_no_more_than_its_limit() {
    let bytes = bytes_of(&sample());
    let mut decoder = Decoder::with_limit(100);
    decoder.feed(&bytes[..PREAMBLE_AND_HEADER]);
    assert!(matches!(decoder.decode(), Ok(Decoded::Begin)));
    assert_eq!(kind(decoder.decode()), ErrorKind::Damaged);
}

#[test]
fn texts_reach_no_terminal_with_control_characters() {
    let reason = format!("\x1b[2J{}é", "x".repeat(250));
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.send(&Message::Refused { connection: 1, reason }).unwrap();
    let bytes = writer.finish().unwrap();
    match Reader::new(&bytes[..]).unwrap().receive().unwrap() {
        Some(Message::Refused { reason, .. }) => assert_eq!(reason, format!(" [2J{}", "x".repeat(250))),
        other => panic!("{other:?}"),
    }
    let bytes = [preamble(1, 0), record(7, 1, 1, &field(2, b"\x1b[2J"))].concat();
    assert_eq!(kind(Reader::new(&bytes[..]).unwrap().receive()), ErrorKind::Damaged);
}

#[test]
fn held_packets_of_any_number_go_in_pieces() {
    let packets: Vec<Vec<u8>> = (0..300u32).map(|i| vec![i as u8; 20 + 65_000 * (i as usize % 2)]).collect();
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.held(3, &packets).unwrap();
    writer.held(3, [&[0u8; 1 << 20][..]]).unwrap();
    assert!(writer.held(3, [&[0u8; (1 << 20) + 1][..]]).is_err());
    assert!(writer.held(3, [&[][..]]).is_err());
    writer.held(3, std::iter::empty::<&[u8]>()).unwrap();
    let bytes = writer.finish().unwrap();
    let mut reader = Reader::new(&bytes[..]).unwrap();
    let (mut read, mut records) = (Vec::new(), 0);
    while let Some(message) = reader.receive().unwrap() {
        let Message::Held { connection: 3, packets } = message else { panic!("{message:?}") };
        records += 1;
        read.extend(packets);
    }
    assert_eq!(read.pop().unwrap().len(), 1 << 20);
    assert_eq!(read, packets);
    assert!(records > 5);
}

#[test]
fn a_record_is_one_write_and_short_writes_lose_nothing() {
    let mut connection = sample();
    connection.urgent = None;
    connection.set_queues(vec![1; 10_000], vec![2; 30_000]);
    let mut whole = Narrow(Vec::new(), usize::MAX, 0);
    write(&mut whole, &connection).unwrap();
    assert_eq!(whole.2, 3, "preamble, connection, end");
    for width in [1, 7, 4096] {
        let mut narrow = Narrow(Vec::new(), width, 0);
        write(&mut narrow, &connection).unwrap();
        assert!(narrow.0 == whole.0);
    }
    assert_eq!(read(&whole.0[..]).unwrap(), connection);
}

#[test]
fn memory_of_one_connection_serves_the_next() {
    let mut connection = sample();
    connection.urgent = None;
    connection.set_queues(vec![1; 50_000], vec![2; 70_000]);
    let mut writer = Writer::new(Vec::new()).unwrap();
    (1..=3).for_each(|id| writer.connection(id, "", &connection).unwrap());
    let bytes = writer.finish().unwrap();
    let mut reader = Reader::new(&bytes[..]).unwrap();
    let mut places = Vec::new();
    while let Some(Message::Connection { connection: read, .. }) = reader.receive().unwrap() {
        assert_eq!(read, connection);
        places.push((read.receive_queue.as_ptr(), read.send_queue.as_ptr()));
        reader.recycle(read);
    }
    assert_eq!(places.len(), 3);
    assert!(places.iter().all(|place| *place == places[0]), "{places:?}");
}

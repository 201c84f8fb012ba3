//! The stream: what is written reads back, and nothing else reads as a connection.

mod common;

use std::io::{self, IoSlice, Read, Write};

use common::{SetQueues, connection, idle, sample};
use proptest::prelude::*;
use soccr::connection::{Owner, Tls, Tracked};
use soccr::settings::Value;
use soccr::steer::Tunnel;
use soccr::tls::{Cipher, Record, Secrets, Version};
use soccr::{Connection, Flow};
use soccr_image::stream::{Decoded, Decoder, Message, Place, Reader, STATE_LIMIT, Steered, Writer};
use soccr_image::{AddressMap, ErrorKind, read, write};

fn bytes_of(connection: &Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes, connection).unwrap();
    bytes
}

/// The format by hand, as the documentation draws it.
fn record(kind: u16, flags: u16, connection: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
    bytes.extend(connection.to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend(payload);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn field(tag: u16, value: &[u8]) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &(value.len() as u32).to_le_bytes(), value].concat()
}

fn preamble(major: u16, minor: u16) -> Vec<u8> {
    let mut bytes = b"\x89SOCCR\r\n".to_vec();
    bytes.extend(major.to_le_bytes());
    bytes.extend(minor.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn end(records: u32) -> Vec<u8> {
    record(9, 1, 0, &field(0x8003, &records.to_le_bytes()))
}

/// The payload of the only connection in `bytes`.
fn payload(bytes: &[u8]) -> Vec<u8> {
    let length = u32::from_le_bytes(bytes[24..28].try_into().unwrap()) as usize;
    bytes[32..32 + length].to_vec()
}

fn kind(result: soccr_image::Result<impl std::fmt::Debug>) -> ErrorKind {
    result.unwrap_err().kind()
}

/// A reader that gives one byte at a time, and is interrupted in between.
struct Dribble<'a>(&'a [u8], bool);

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

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_reads_back(connection in connection()) {
        prop_assert_eq!(read(&bytes_of(&connection)[..]).unwrap(), connection);
    }

    #[test]
    fn drawing_any_connection_fits_a_terminal(connection in connection()) {
        let drawing = soccr_image::draw(&connection);
        prop_assert!(drawing.lines().all(|line| line.chars().count() <= 80), "{drawing}");
    }

    #[test]
    fn many_changes_never_make_another_connection(
        connection in connection(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = bytes_of(&connection);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(other) = read(&bytes[..]) {
            prop_assert_eq!(other, connection);
        }
    }

    #[test]
    fn any_bytes_behind_a_good_beginning_are_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let tails = [preamble(1, 0), [preamble(1, 0), record(1, 1, 1, &bytes), end(1)].concat()];
        for tail in tails {
            let mut reader = Reader::new(&tail[..]).unwrap();
            while let Ok(Some(_)) = reader.receive() {}
        }
        prop_assert!(read(&[preamble(1, 0), bytes].concat()[..]).is_err());
    }
}

#[test]
fn every_field_comes_through() {
    assert_eq!(read(&bytes_of(&sample())[..]).unwrap(), sample());
    assert_eq!(read(&bytes_of(&idle())[..]).unwrap(), idle());
}

#[test]
fn the_format_is_the_one_drawn() {
    let bytes = bytes_of(&sample());
    let built = [preamble(1, 0), record(1, 1, 1, &payload(&bytes)), end(1)].concat();
    assert_eq!(bytes, built);
}

#[test]
fn a_stream_cut_off_anywhere_is_truncated() {
    let bytes = bytes_of(&sample());
    for length in 0..bytes.len() {
        assert_eq!(kind(read(&bytes[..length])), ErrorKind::Truncated, "{length} of {}", bytes.len());
    }
}

#[test]
fn a_changed_bit_anywhere_is_seen() {
    let bytes = bytes_of(&sample());
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bytes[..]).is_err(), "bit {bit}");
    }
}

#[test]
fn other_formats_are_foreign() {
    for bytes in [&b"\x7fELF\x02\x01\x01\0 and so on"[..], include_bytes!("criu/images/files.img")] {
        assert_eq!(kind(read(bytes)), ErrorKind::Foreign);
    }
}

#[test]
fn a_newer_minor_version_is_read_and_its_additions_skipped() {
    let known = payload(&bytes_of(&sample()));
    let bytes = [
        preamble(1, 9),
        record(99, 0, 1, b"a record of the future"),
        record(1, 1, 1, &[field(63, &[7; 20_000]), known, field(0x7fff, b"")].concat()),
        end(2),
    ]
    .concat();
    assert_eq!(read(&bytes[..]).unwrap(), sample());
}

#[test]
fn what_cannot_be_ignored_is_refused_for_its_connection_only() {
    let known = payload(&bytes_of(&sample()));
    let pathless = Connection { path: None, ..sample() };
    let bytes = [
        preamble(1, 1),
        record(1, 1, 1, &[known.clone(), field(0x8000 | 63, b"")].concat()),
        // What is known as optional only, made critical.
        record(1, 1, 2, &[payload(&bytes_of(&pathless)), field(0x8000 | 25, &[0; 40])].concat()),
        record(99, 1, 3, b"?"),
        record(1, 1, 4, &known),
        end(4),
    ]
    .concat();
    let mut reader = Reader::new(&bytes[..]).unwrap();
    for id in 1..=3 {
        let error = reader.receive().unwrap_err();
        assert_eq!((error.kind(), error.connection()), (ErrorKind::Newer, Some(id)), "{error}");
    }
    assert!(matches!(reader.receive().unwrap(), Some(Message::Connection { id: 4, .. })));
    assert_eq!(reader.receive().unwrap(), None);
    assert_eq!(kind(read(&[preamble(2, 0), end(0)].concat()[..])), ErrorKind::Newer);
}

#[test]
fn one_bad_connection_leaves_the_others_in_step() {
    let mut writer = Writer::new(Vec::new()).unwrap();
    let mut starts = Vec::new();
    for id in 1..=4 {
        let mut connection = sample();
        connection.local.set_port(id as u16);
        writer.connection(id, &format!("fd {id}"), &connection).unwrap();
        starts.push(());
    }
    let mut bytes = writer.finish().unwrap();
    let size = (bytes.len() - preamble(1, 0).len() - end(4).len()) / starts.len();
    // The second connection: one bit of its receive queue.
    let at = bytes[..16 + 2 * size].windows(9).rposition(|queue| queue == b"unread by").unwrap();
    bytes[at] ^= 1;
    // The third: well-formed, but contradicting itself (unsq_len).
    let start = 16 + 2 * size;
    let mut third = bytes[start + 16..start + size - 4].to_vec();
    let control = third.windows(6).position(|bytes| bytes == [18, 0x80, 22, 0, 0, 0]).unwrap();
    third[control + 6 + 18] = 200;
    bytes.splice(start..start + size, record(1, 1, 3, &third));

    let mut reader = Reader::new(&bytes[..]).unwrap();
    assert!(matches!(reader.receive(), Ok(Some(Message::Connection { id: 1, .. }))));
    let error = reader.receive().unwrap_err();
    assert_eq!((error.kind(), error.connection()), (ErrorKind::Damaged, Some(2)));
    let error = reader.receive().unwrap_err();
    assert_eq!((error.kind(), error.connection(), error.name()), (ErrorKind::Invalid, Some(3), Some("fd 3")));
    assert!(error.to_string().starts_with("connection 3 (fd 3): unsq_len"), "{error}");
    match reader.receive().unwrap() {
        Some(Message::Connection { id: 4, name, connection }) => {
            assert_eq!((name.as_str(), connection.local.port()), ("fd 4", 4));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(reader.receive().unwrap(), None);

    let mut reader = Reader::new(&bytes[..]).unwrap().without_validation();
    let third = (0..3).map(|_| reader.receive()).last().unwrap();
    assert!(matches!(third, Ok(Some(Message::Connection { id: 3, connection, .. }))
        if connection.control.unsq_len == 200));
}

#[test]
fn a_record_that_is_missing_is_missed() {
    let one = record(6, 1, 1, b"");
    let mut reader = Reader::new(io::Cursor::new([preamble(1, 0), one.clone(), end(2)].concat())).unwrap();
    assert_eq!(reader.receive().unwrap(), Some(Message::Ready { connection: 1 }));
    assert_eq!(kind(reader.receive()), ErrorKind::Damaged);
}

#[test]
fn an_invalid_connection_is_not_written() {
    let mut invalid = sample();
    invalid.control.unsq_len = 100;
    let mut unnamed = sample();
    unnamed.settings.set("no\x1bname", Value::Number(1));
    let mut large = sample();
    (0..3).for_each(|i| large.settings.set(&format!("SO_{i}"), Value::Bytes(vec![0; 400_000])));
    let mut many = sample();
    (0..255).for_each(|i| many.settings.set(&format!("SO_{i}"), Value::Number(i)));
    let mut writer = Writer::new(Vec::new()).unwrap();
    for connection in [&invalid, &unnamed, &large, &many] {
        let error = writer.connection(7, "fd 7", connection).unwrap_err();
        assert_eq!((error.kind(), error.connection()), (ErrorKind::Invalid, Some(7)), "{error}");
    }
    assert_eq!(writer.finish().unwrap(), [preamble(1, 0), end(0)].concat());
}

#[test]
fn a_field_twice_or_none_at_all_is_damage() {
    let known = payload(&bytes_of(&sample()));
    let twice = [known.clone(), field(0x8000 | 27, b"more queue")].concat();
    for payload in [twice, Vec::new(), known[1..].to_vec()] {
        let bytes = [preamble(1, 0), record(1, 1, 1, &payload), end(1)].concat();
        assert_eq!(kind(read(&bytes[..])), ErrorKind::Damaged);
    }
}

#[test]
fn small_fields_do_not_add_up_to_much_memory() {
    let settings = [
        (field(26, &[0, 1, b'A', 1, 0, 0, 0]).repeat(300), "more than 256 settings"),
        (field(26, &[&[1, 1, b'A'][..], &[0; 60_000]].concat()).repeat(20), "settings of over 1 MiB"),
    ];
    for (settings, expected) in settings {
        let payload = [payload(&bytes_of(&sample())), settings].concat();
        let bytes = [preamble(1, 0), record(1, 1, 1, &payload), end(1)].concat();
        let error = read(&bytes[..]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn every_message_comes_through() {
    let messages = [
        Message::Begin {
            connections: 2,
            answers: true,
            place: Some(Place { host: *b"0123456789abcdef", namespace: [4, 4_026_531_840] }),
            steered: Some(Steered::default()),
        },
        Message::Begin {
            connections: 3,
            answers: true,
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
        Message::Begin { connections: 1, answers: false, place: None, steered: None },
        Message::State { connection: 1, critical: true, bytes: vec![7; 100_000] },
        Message::Connection { id: 1, name: "pid 7 fd 3".into(), connection: sample() },
        Message::State { connection: 2, critical: false, bytes: Vec::new() },
        Message::Connection { id: 2, name: String::new(), connection: idle() },
        Message::Held { connection: 1, packets: vec![vec![0x45; 20], vec![0x60; 1500]] },
        Message::Commit { connection: 1 },
        Message::Abort { connection: 2, reason: "changed my mind".into() },
        Message::Ready { connection: 1 },
        Message::Refused { connection: 2, reason: "Größe".into() },
        Message::Taken { connection: 1 },
    ];
    let mut writer = Writer::new(Vec::new()).unwrap();
    messages.iter().for_each(|message| writer.send(message).unwrap());
    let bytes = writer.finish().unwrap();
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
fn a_decoder_of_words_takes_no_more_than_its_limit() {
    let bytes = bytes_of(&sample());
    let mut decoder = Decoder::with_limit(100);
    decoder.feed(&bytes[..PREAMBLE_AND_HEADER]);
    assert!(matches!(decoder.decode(), Ok(Decoded::Begin)));
    assert_eq!(kind(decoder.decode()), ErrorKind::Damaged);
}

const PREAMBLE_AND_HEADER: usize = 32;

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
fn nothing_is_read_beyond_the_end() {
    let bytes = [bytes_of(&sample()), bytes_of(&idle()), b"rest".to_vec()].concat();
    let mut rest = &bytes[..];
    assert_eq!(read(&mut rest).unwrap(), sample());
    assert_eq!(read(&mut rest).unwrap(), idle());
    assert_eq!(rest, b"rest");
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

#[test]
fn files_hold_one_connection_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    soccr_image::save_file(&path, &sample()).unwrap();
    soccr_image::save_file(&path, &idle()).unwrap();
    assert_eq!(soccr_image::load_file(&path).unwrap(), idle());
    let mut invalid = sample();
    invalid.control.inq_len += 1;
    assert_eq!(kind(soccr_image::save_file(&path, &invalid)), ErrorKind::Invalid);
    assert_eq!(soccr_image::load_file(&path).unwrap(), idle());
    std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"!").unwrap();
    let error = soccr_image::load_file(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().starts_with(path.to_str().unwrap()), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    assert_eq!(kind(soccr_image::load_file(directory.path().join("none"))), ErrorKind::Io);
}

#[test]
fn what_others_know_of_it_travels_along() {
    let wire =
        Flow { local: "[2001:db8::1]:443".parse().unwrap(), remote: "[2001:db8::2]:5000".parse().unwrap() };
    let tracked = Some(Tracked { wire, initiator: true, mark: 0x1234_5678 });
    let mut connection = Connection { tracked, owner: Some(Owner { user: 1000, group: 100 }), ..sample() };
    assert_eq!(read(&bytes_of(&connection)[..]).unwrap(), connection);

    let map: AddressMap = "[2001:db8::1]:443=[2001:db8::9]:444".parse().unwrap();
    AddressMap::apply_to_connection(&[map], &mut connection);
    assert_eq!(connection.tracked.unwrap().wire.local, "[2001:db8::9]:444".parse().unwrap());
    assert_eq!(connection.local, sample().local);

    let family = Flow { local: "192.0.2.1:443".parse().unwrap(), remote: "192.0.2.2:5000".parse().unwrap() };
    connection.tracked = Some(Tracked { wire: family, initiator: false, mark: 0 });
    connection.validate().unwrap_err();
}

#[test]
fn kernel_tls_travels_along() {
    let secrets = |cipher: Cipher, number: u8| {
        let mut bytes = vec![0xA5; cipher.secrets_len()];
        bytes.splice(cipher.secrets_len() - 8.., [0, 0, 0, 0, 0, 0, 0, number]);
        Some(Secrets::new(cipher, &bytes).unwrap())
    };
    for cipher in Cipher::ALL {
        let mut tls = Tls::new(Version::Tls13, cipher);
        tls.transmit = secrets(cipher, 9);
        tls.zerocopy_sendfile = true;
        let transmitting = Connection { tls: Some(tls.clone()), ..sample() };
        assert_eq!(read(&bytes_of(&transmitting)[..]).unwrap(), transmitting);

        tls.receive = secrets(cipher, 3);
        let record = |content_type, bytes: &[u8]| Record { content_type, bytes: bytes.to_vec() };
        tls.unread = vec![record(23, &[7; 20_000]), record(21, b"\x01\x00")];
        let mut both =
            Connection { tls: Some(tls.clone()), urgent: None, send_queue: Vec::new(), ..sample() };
        (both.control.outq_len, both.control.unsq_len) = (0, 0);
        assert_eq!(read(&bytes_of(&both)[..]).unwrap(), both);

        // A record cannot have been read before the first one.
        tls.receive = secrets(cipher, 2);
        let impossible = Connection { tls: Some(tls), ..both };
        assert_eq!(kind(soccr_image::write(Vec::new(), &impossible)), ErrorKind::Invalid);
    }
}

#[test]
fn images_of_version_1_stay_readable() {
    let golden = include_bytes!("v1.soccr");
    assert_eq!(read(&golden[..]).unwrap(), sample());
    assert_eq!(bytes_of(&sample()), golden);
}

//! What is damaged, cut off or of the future: seen, and only for the connection that it concerns.

use std::io;

use soccr::Connection;
use soccr_image::stream::{Message, Reader, Writer};
use soccr_image::{ErrorKind, read};

use super::{bytes_of, end, field, kind, payload, preamble, record, sample};

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
    for bytes in [&b"\x7fELF\x02\x01\x01\0 and so on"[..], include_bytes!("../criu/images/files.img")] {
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

/// What is known of one kind of record is not of another, and no less critical there.
#[test]
fn a_field_of_another_record_is_unknown() {
    let known = payload(&bytes_of(&sample()));
    let address = &known[6..][..known[2].into()];
    for (tag, value) in [(5, &b"packet"[..]), (6, b"state"), (16, address), (17, address)] {
        let commit = record(4, 1, 1, &field(0x8000 | tag, value));
        let bytes = [preamble(1, 0), commit, end(1)].concat();
        let mut reader = Reader::new(&bytes[..]).unwrap();
        assert_eq!(kind(reader.receive()), ErrorKind::Newer, "{tag}");
    }
}

#[test]
fn a_field_ends_where_its_value_ends() {
    let mut longer = payload(&bytes_of(&sample()));
    longer.insert(6 + usize::from(longer[2]), 0);
    longer[2] += 1;
    let bytes = [preamble(1, 0), record(1, 1, 1, &longer), end(1)].concat();
    assert_eq!(kind(read(&bytes[..])), ErrorKind::Damaged);
}

#[test]
fn a_record_belongs_to_a_connection() {
    let known = payload(&bytes_of(&sample()));
    for number in [1, 2, 4, 6, 8, 10, 13] {
        let payload = if number == 1 { &known[..] } else { &[] };
        let bytes = [preamble(1, 0), record(number, 1, 0, payload), end(1)].concat();
        assert_eq!(kind(Reader::new(&bytes[..]).unwrap().receive()), ErrorKind::Damaged, "{number}");
    }
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

/// A record of held packets is closed early: one that is not would take memory without a limit.
#[test]
fn a_record_of_held_packets_has_a_limit() {
    let held = |fields| {
        let packets = field(0x8005, &vec![7; 1 << 20]).repeat(fields);
        Reader::new(&[preamble(1, 0), record(2, 1, 1, &packets)].concat()[..]).unwrap().receive()
    };
    assert!(matches!(held(1), Ok(Some(Message::Held { .. }))));
    assert_eq!(kind(held(3)), ErrorKind::Damaged);
}

#[test]
fn a_record_that_is_missing_is_missed() {
    let one = record(6, 1, 1, b"");
    let mut reader = Reader::new(io::Cursor::new([preamble(1, 0), one.clone(), end(2)].concat())).unwrap();
    assert_eq!(reader.receive().unwrap(), Some(Message::Ready { connection: 1 }));
    assert_eq!(kind(reader.receive()), ErrorKind::Damaged);
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

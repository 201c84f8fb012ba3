//! The stream: what is written reads back, and nothing else reads as a connection.

mod connections;
mod damage;
mod messages;

use std::io::Write as _;

use connections::{connection, idle, sample};
use proptest::prelude::*;
use soccr::connection::{Owner, Tls, Tracked};
use soccr::settings::Value;
use soccr::tls::{Cipher, Record, Secrets, Version};
use soccr::{Connection, Flow};
use soccr_image::stream::{Reader, Writer};
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

/// For eyes. A change of the layout is to be looked at, and its picture put here.
#[test]
fn a_drawing_is_laid_out_as_ever() {
    assert_eq!(soccr_image::draw_svg(&[&sample(), &idle()]), include_str!("drawing.svg"));
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

        let svg = soccr_image::draw_svg(&[&connection, &connection]);
        // Both drawings name the same places.
        let places = drawing.split_whitespace().filter(|word| word.parse::<u32>().is_ok());
        prop_assert!(places.into_iter().all(|place| svg.contains(place)), "{svg}");
        prop_assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        prop_assert_eq!(svg.matches("rcv_nxt").count(), 2);
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
fn an_image_holds_one_connection() {
    let mut writer = Writer::new(Vec::new()).unwrap();
    (1..=2).for_each(|id| writer.connection(id, "", &idle()).unwrap());
    assert_eq!(kind(read(&writer.finish().unwrap()[..])), ErrorKind::Invalid);
}

#[test]
fn settings_have_their_limit() {
    for (count, is_written) in [(256, true), (257, false)] {
        let mut connection = idle();
        connection.settings = Default::default();
        (0..count).for_each(|number| connection.settings.set(&format!("SO_{number}"), Value::Number(1)));
        let mut bytes = Vec::new();
        assert_eq!(write(&mut bytes, &connection).is_ok(), is_written);
        assert_eq!(read(&bytes[..]).is_ok_and(|found| found == connection), is_written);
    }
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
        let mut written = Vec::new();
        assert_eq!(kind(soccr_image::write(&mut written, &impossible)), ErrorKind::Invalid);
        assert!(written.is_empty(), "{written:?}");
    }
}

#[test]
fn images_of_version_1_stay_readable() {
    let golden = include_bytes!("v1.soccr");
    assert_eq!(read(&golden[..]).unwrap(), sample());
    assert_eq!(bytes_of(&sample()), golden);
}

//! The stream: the input is read as it is, and as the records of a stream whose checksums are right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use soccr_image::stream::{Message, Reader, Writer};

fuzz_target!(|bytes: &[u8]| {
    receive(bytes);
    receive(&sealed(bytes));
});

/// Whatever can be received can be sent, and is the same then.
fn receive(bytes: &[u8]) {
    let Ok(mut reader) = Reader::new(bytes) else { return };
    loop {
        match reader.receive() {
            Ok(Some(message)) => {
                let mut writer = Writer::new(Vec::new()).unwrap();
                if let Message::Connection { connection, .. } = &message {
                    soccr_image::draw(connection);
                }
                writer.send(&message).unwrap();
                let bytes = writer.finish().unwrap();
                let again = Reader::new(&bytes[..]).unwrap().receive().unwrap();
                assert!(again.is_none() || again == Some(message));
            }
            Ok(None) => return,
            Err(error) if error.connection().is_none() => return,
            Err(_) => {}
        }
    }
}

/// Takes the input for records without checksums: a type, a connection, a length, fields.
fn sealed(mut input: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x89SOCCR\r\n\x01\0\0\0".to_vec();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    while let Some(([kind, connection, low, high], rest)) = input.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let start = bytes.len();
        bytes.extend([kind & 0x7f, 0, kind >> 7, 0, *connection, 0, 0, 0]);
        bytes.extend((length as u32).to_le_bytes());
        bytes.extend(crc32fast::hash(&bytes[start..]).to_le_bytes());
        bytes.extend(&rest[..length]);
        bytes.extend(crc32fast::hash(&bytes[start..]).to_le_bytes());
        input = &rest[length..];
    }
    bytes
}

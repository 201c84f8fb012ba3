//! `tcp-stream`: read, and joined with a socket to a connection.
#![no_main]

use libfuzzer_sys::fuzz_target;
use soccr_image::criu::{Stream, sockets};

const FILES: &[u8] = include_bytes!("../../crates/soccr-image/tests/criu/images/files.img");

fuzz_target!(|bytes: &[u8]| {
    let Ok(stream) = Stream::parse(bytes) else { return };
    for socket in sockets(FILES).unwrap() {
        if let Ok(connection) = socket.connection(stream.clone()) {
            let mut image = Vec::new();
            soccr_image::write(&mut image, &connection).unwrap();
            assert_eq!(soccr_image::read(&image[..]).unwrap(), connection);
            soccr_image::draw(&connection);
        }
    }
});

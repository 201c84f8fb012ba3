//! Moves while both ends write and read.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::{SendFlags, send};
use soccr::tls::{Cipher, Version};
use soccr_lab::{Flags, Sniffer, Test};

use crate::ends::{Ends, Kind};

/// What our end does between two moves.
const ROUNDS: usize = 12;

type Connect = fn(Kind) -> Option<Ends>;

/// One per cipher, version and direction.
pub fn tests() -> impl Iterator<Item = Test> {
    let connects: [(&str, Connect); 2] = [("both", Ends::both), ("transmit", Ends::transmitting)];
    Cipher::ALL.into_iter().flat_map(move |cipher| {
        [Version::Tls12, Version::Tls13].into_iter().flat_map(move |version| {
            connects.into_iter().map(move |(name, connect)| {
                let name = format!("moves::{name} {version} {cipher}");
                Test::new(name, move || connect((version, cipher)).map_or((), under_traffic))
            })
        })
    })
}

/// Of each connection: as many as MOVES in the environment says.
pub fn moves() -> usize {
    let usual = if std::env::var_os("SOCCR_EMULATED").is_some() { 6 } else { 25 };
    std::env::var("MOVES").map_or(usual, |moves| moves.parse().expect("MOVES is a number"))
}

/// The peer writes more than our end reads, so the receive buffer is nearly always full.
fn under_traffic(mut ends: Ends) {
    let mut resets = [&ends.pair.a, &ends.pair.b]
        .map(|host| Sniffer::flagged(&host.namespace, "eth0", Flags::RST).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let (reader, writer) = (ends.peer.try_clone().unwrap(), ends.peer.try_clone().unwrap());
    let reader = std::thread::spawn(move || read_pattern(reader));
    let writer = std::thread::spawn({
        let stop = stop.clone();
        move || write_pattern(writer, &stop)
    });
    let (mut written, mut read) = (0, 0);
    for _ in 0..moves() {
        ends.ours.set_nonblocking(true).unwrap();
        for round in 0..ROUNDS {
            let length = 700 + written % 9000;
            let more = if round % 5 == 0 { SendFlags::MORE } else { SendFlags::empty() };
            match send(&ends.ours, &pattern(written, length), more | SendFlags::NOSIGNAL) {
                Ok(length) => written += length,
                Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => panic!("{error}"),
            }
            let mut bytes = vec![0; 1000 + read % 7000];
            match ends.ours.read(&mut bytes) {
                Ok(length) => check(&mut read, &bytes[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
        ends = ends.move_ours();
    }
    ends.ours.set_nonblocking(false).unwrap();
    stop.store(true, Ordering::Relaxed);
    soccr::tls::settle(&ends.ours, crate::ends::LIMIT).unwrap();
    ends.ours.shutdown(Shutdown::Write).unwrap();
    let mut bytes = vec![0; 1 << 16];
    loop {
        match ends.ours.read(&mut bytes).unwrap() {
            0 => break,
            length => check(&mut read, &bytes[..length]),
        }
    }
    assert_eq!(reader.join().unwrap(), written, "what our end wrote and the peer read");
    assert_eq!(writer.join().unwrap(), read, "what the peer wrote and our end read");
    assert!(written > 0 && read > 0);
    for resets in &mut resets {
        assert_eq!(resets.segments().unwrap().len(), 0);
    }
}

/// Bytes of a stream that tell where they belong.
fn pattern(start: usize, length: usize) -> Vec<u8> {
    (start..start + length).map(|place| (place % 251) as u8 ^ (place >> 12) as u8).collect()
}

fn check(position: &mut usize, bytes: &[u8]) {
    assert!(bytes == pattern(*position, bytes.len()), "other bytes from {position} on");
    *position += bytes.len();
}

fn read_pattern(mut stream: TcpStream) -> usize {
    let (mut bytes, mut read) = (vec![0; 1 << 16], 0);
    loop {
        match stream.read(&mut bytes).unwrap() {
            0 => return read,
            length => check(&mut read, &bytes[..length]),
        }
    }
}

fn write_pattern(mut stream: TcpStream, stop: &AtomicBool) -> usize {
    let mut written = 0;
    while !stop.load(Ordering::Relaxed) {
        let length = 500 + written % 12_000;
        stream.write_all(&pattern(written, length)).unwrap();
        written += length;
    }
    stream.shutdown(Shutdown::Write).unwrap();
    written
}

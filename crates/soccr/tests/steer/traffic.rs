//! A peer that sends and receives all the time, and compares every byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The byte at a place of a stream.
fn byte(place: u64, seed: u64) -> u8 {
    let word = (place / 8 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word >> (8 * (place % 8))) as u8 ^ (word >> 29) as u8
}

/// One end of a connection whose both directions are checked.
#[derive(Debug)]
pub struct End {
    seeds: [u64; 2],
    pub sent: u64,
    pub received: u64,
}

impl End {
    /// The end of the peer, or that of the host.
    pub fn new(peer: bool) -> Self {
        let seeds = if peer { [1, 2] } else { [2, 1] };
        Self { seeds, sent: 0, received: 0 }
    }

    /// Sends what fits and takes in what is there. Returns whether the stream goes on.
    pub fn step(&mut self, mut stream: &TcpStream, send: bool) -> bool {
        if send {
            let chunk: Vec<u8> = (self.sent..self.sent + 16384).map(|at| byte(at, self.seeds[0])).collect();
            match stream.write(&chunk) {
                Ok(written) => self.sent += written as u64,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
            }
        }
        let mut buffer = vec![0; 65536];
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(read) => {
                for (index, found) in buffer[..read].iter().enumerate() {
                    let place = self.received + index as u64;
                    assert_eq!(*found, byte(place, self.seeds[1]), "at byte {place}");
                }
                self.received += read as u64;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
        true
    }
}

/// The peer, on a thread of its own.
pub struct Peer {
    thread: Option<JoinHandle<End>>,
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
}

impl Peer {
    pub fn start(stream: TcpStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&received));
        let thread = thread::spawn(move || {
            let mut end = End::new(true);
            let mut closed = false;
            while end.step(&stream, !closed) {
                counter.store(end.received, Ordering::Relaxed);
                if !closed && stopped.load(Ordering::Relaxed) {
                    closed = true;
                    stream.shutdown(Shutdown::Write).unwrap();
                }
                // Slow enough for a busy machine with two processors.
                thread::sleep(Duration::from_micros(500));
            }
            end
        });
        Self { thread: Some(thread), stop, received }
    }

    /// How many bytes it has received.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Has it send a FIN. It goes on receiving until it gets one, too.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn join(mut self) -> End {
        self.thread.take().unwrap().join().unwrap()
    }
}

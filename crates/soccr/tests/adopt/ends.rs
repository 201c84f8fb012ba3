//! A client, a server that has accepted it and one that has not heard of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use soccr::adopt::Adopter;
use soccr::lock::{Locker, Mode};
use soccr::{Connection, Flow, Lock, pause};
use soccr_lab::{Family, Flags, Host, LIMIT, Pair, Sniffer, TcpInfo, obstacle_to_bpf, wait_until};

/// The port of both servers.
pub const PORT: u16 = 80;

pub struct Ends {
    pub pair: Pair,
    pub client: TcpStream,
    /// The connection at the old server.
    pub ours: TcpStream,
    resets: Sniffer,
}

/// What the new server listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    Address,
    Wildcard,
    DualStack,
}

impl Ends {
    pub fn new(family: Family) -> Self {
        Self::prepared(family, |_| {})
    }

    pub fn prepared(family: Family, prepare: impl Fn(&Host)) -> Self {
        let pair = Pair::new().unwrap();
        prepare(&pair.a);
        prepare(&pair.b);
        let old = pair.a.run(|| TcpListener::bind(pair.a.address(family, PORT))).unwrap();
        let client = connect(&pair, family);
        let ours = old.accept().unwrap().0;
        let resets = Sniffer::flagged(&pair.b.namespace, "eth0", Flags::RST).unwrap();
        limit(&ours);
        Self { pair, client, ours, resets }
    }

    /// The new server begins to listen.
    pub fn listen(&self, family: Family, on: On) -> TcpListener {
        let address: SocketAddr = match (on, family) {
            (On::Address, _) => self.pair.a.address(family, PORT),
            (On::Wildcard, Family::V4) => ([0, 0, 0, 0], PORT).into(),
            _ => ([0_u16; 8], PORT).into(),
        };
        self.pair.a.run(|| TcpListener::bind(address)).unwrap()
    }

    /// The connection leaves the old server, under a lock.
    pub fn leave(&self) -> (Lock, Connection) {
        let lock = self.pair.a.run(|| Lock::hold(&[Flow::of(&self.ours).unwrap()])).unwrap();
        let paused = pause(&self.ours).unwrap();
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        (lock, connection)
    }

    pub fn locker(&self) -> Locker {
        self.pair.a.run(|| Locker::new(Mode::HOLD)).unwrap()
    }

    /// Waits until the old server has as many unread bytes.
    pub fn received(&self, bytes: usize) {
        wait_until("the unread bytes are there", || TcpInfo::of(&self.ours).unwrap().unread == bytes);
    }

    /// Client and server exchange words, and nobody was reset.
    pub fn talk(&mut self, server: &TcpStream) {
        carry(&self.client, server);
        carry(server, &self.client);
        self.no_reset();
    }

    pub fn no_reset(&mut self) {
        let resets = self.resets.segments().unwrap();
        assert!(resets.is_empty(), "{resets:?}");
    }
}

pub fn connect(pair: &Pair, family: Family) -> TcpStream {
    let client = pair.b.run(|| TcpStream::connect(pair.b.address_of(&pair.a, family, PORT))).unwrap();
    limit(&client);
    client
}

/// The server accepts; its socket gives up on a dead connection.
pub fn accept(listener: &TcpListener) -> TcpStream {
    let (server, _) = listener.accept().unwrap();
    limit(&server);
    server
}

fn limit(stream: &TcpStream) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
}

/// An adopter on the host of the server, where this user may have one. Says why, where not.
pub fn adopter(pair: &Pair) -> Option<Adopter> {
    let adopter = pair.a.run(Adopter::new);
    adopter.map_err(|error| eprintln!("\nSKIPPED: {}\n", obstacle_to_bpf([6, 9], error))).ok()
}

pub fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

fn carry(mut from: &TcpStream, mut to: &TcpStream) {
    let bytes = pattern(300_000);
    let mut read = vec![0; bytes.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| from.write_all(&bytes).unwrap());
        to.read_exact(&mut read).unwrap();
    });
    assert!(read == bytes, "other bytes than were sent");
}

pub fn read(mut stream: &TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

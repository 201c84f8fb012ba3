//! Two ends of a connection with TLS in the kernel, by keys that both know, and how our end moves.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use soccr::tls::{Cipher, Version};
use soccr::{Connection, Flow, Lock};
pub use soccr_lab::LIMIT;
use soccr_lab::{Pair, set_option};

/// How long a peer may take to acknowledge.
/// Version and cipher.
pub type Kind = (Version, Cipher);

/// Keys of one direction, the first record before them.
pub fn keys(cipher: Cipher, seed: u8) -> Vec<u8> {
    let length = if matches!(cipher, Cipher::AesGcm128 | Cipher::AesCcm128) { 36 } else { 52 };
    let mut keys: Vec<u8> =
        (0..length).map(|index: u8| seed.wrapping_mul(31) ^ index.wrapping_mul(37)).collect();
    keys[usize::from(length) - 8..].fill(0);
    keys
}

/// Those of our end, and those of the peer.
pub const OURS: u8 = 1;
pub const THEIRS: u8 = 101;

pub fn set_layer(stream: &TcpStream) -> std::io::Result<()> {
    set_option(stream, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
}

/// Gives a direction its keys: 1 to encrypt, 2 to decrypt.
pub fn set_keys(stream: &TcpStream, direction: i32, kind: Kind, seed: u8) {
    let mut whole = (kind.0 as u16).to_ne_bytes().to_vec();
    whole.extend((kind.1 as u16).to_ne_bytes());
    whole.extend(keys(kind.1, seed));
    set_option(stream, 282, direction, &whole).unwrap();
}

/// A connection between two hosts, and TLS where the kernel has it.
pub struct Ends {
    pub pair: Pair,
    pub ours: TcpStream,
    pub peer: TcpStream,
}

impl Ends {
    /// Connects; `None` where the kernel has no TLS, which is said.
    pub fn plain() -> Option<Self> {
        let pair = Pair::new().unwrap();
        let listener = pair.b.run(|| TcpListener::bind((pair.b.v4, 443))).unwrap();
        let ours = pair.a.run(|| TcpStream::connect((pair.b.v4, 443))).unwrap();
        let peer = listener.accept().unwrap().0;
        peer.set_nodelay(true).unwrap();
        for end in [&ours, &peer] {
            end.set_read_timeout(Some(LIMIT)).unwrap();
        }
        let probe = TcpListener::bind("127.0.0.1:0").unwrap();
        let probe = TcpStream::connect(probe.local_addr().unwrap()).unwrap();
        if let Err(error) = set_layer(&probe) {
            soccr_lab::skip(format_args!("the kernel has no TLS (modprobe tls): {error}"));
            return None;
        }
        Some(Self { pair, ours, peer })
    }

    /// Both ends encrypt and decrypt in the kernel.
    pub fn both(kind: Kind) -> Option<Self> {
        let ends = Self::plain()?;
        for (end, out, back) in [(&ends.ours, OURS, THEIRS), (&ends.peer, THEIRS, OURS)] {
            set_layer(end).unwrap();
            set_keys(end, 1, kind, out);
            set_keys(end, 2, kind, back);
        }
        Some(ends)
    }

    /// The kernel encrypts for our end alone, and decrypts at the peer; the way back is plain.
    pub fn transmitting(kind: Kind) -> Option<Self> {
        let ends = Self::plain()?;
        for (end, direction) in [(&ends.ours, 1), (&ends.peer, 2)] {
            set_layer(end).unwrap();
            set_keys(end, direction, kind, OURS);
        }
        Some(ends)
    }

    /// Our end decrypts in the kernel and encrypts; the peer has no TLS and writes what it likes.
    pub fn receiving(kind: Kind) -> Option<Self> {
        let ends = Self::plain()?;
        set_layer(&ends.ours).unwrap();
        set_keys(&ends.ours, 1, kind, OURS);
        set_keys(&ends.ours, 2, kind, THEIRS);
        Some(ends)
    }

    /// Takes our end out of its socket and puts it into another one.
    pub fn move_ours(self) -> Self {
        let Self { pair, ours, peer } = self;
        let ours = pair.a.run(|| {
            let lock = settle_and_lock(&ours);
            let connection = leave(ours);
            let restored = connection.restore().unwrap();
            lock.release().unwrap();
            restored.resume().unwrap()
        });
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        Self { pair, ours, peer }
    }

    /// What our end reads next is this.
    #[track_caller]
    pub fn assert_reads(&mut self, expected: &[u8]) {
        assert_reads(&mut self.ours, expected);
    }

    /// Both ends hear from each other, where both have TLS.
    #[track_caller]
    pub fn assert_alive(&mut self) {
        self.ours.write_all(b"to the peer").unwrap();
        assert_reads(&mut self.peer, b"to the peer");
        self.peer.write_all(b"and back").unwrap();
        assert_reads(&mut self.ours, b"and back");
    }
}

#[track_caller]
pub fn assert_reads(stream: &mut TcpStream, expected: &[u8]) {
    let mut read = vec![0; expected.len()];
    stream.read_exact(&mut read).unwrap();
    assert!(read == expected, "{} other bytes", read.len());
}

/// From here on nothing arrives, and the TLS layer holds no part of a record.
pub fn settle_and_lock(stream: &impl AsFd) -> Lock {
    soccr::tls::settle(stream, LIMIT).unwrap();
    Lock::hold(&[Flow::of(stream).unwrap()]).unwrap()
}

/// Saves a connection whose traffic is locked, and closes its socket.
pub fn leave(stream: TcpStream) -> Connection {
    let paused = soccr::pause(&stream).unwrap().with_tls();
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    // Closing it would do, if no other test were forking a program just now, which has all descriptors for a moment.
    if connection.tls.is_some() {
        soccr::tls::discard(&stream, connection.flow()).unwrap();
    }
    connection
}

/// Records with the keys of the peer, as they are on the wire.
pub fn records(kind: Kind, plain: &[(u8, &[u8])]) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let writer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut reader = listener.accept().unwrap().0;
    set_layer(&writer).unwrap();
    set_keys(&writer, 1, kind, THEIRS);
    for (content_type, bytes) in plain {
        assert_eq!(super::sys::send_record(&writer, *content_type, bytes).unwrap(), bytes.len());
    }
    drop(writer);
    let mut sealed = Vec::new();
    reader.read_to_end(&mut sealed).unwrap();
    sealed
}

//! The steps by which a [`Case`](crate::Case) comes about.

use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, connect, getsockname, socket_with, sockopt::set_tcp_quickack,
};

use crate::sys::{attach_filter, silence};
use crate::{Host, Made, Peer, State, TcpInfo};

pub(crate) type Outcome<T> = Result<T, String>;

/// How long a step may take before the connection is given up.
const NAP: Duration = Duration::from_micros(200);

/// A connection that is not yet as wanted.
pub(crate) struct Making {
    pub(crate) socket: TcpStream,
    pub(crate) peer: TcpStream,
    pub(crate) incoming: Vec<u8>,
    pub(crate) outgoing: Vec<u8>,
}

impl Making {
    /// Puts `length` bytes into our receive queue, all of them acknowledged.
    pub(crate) fn receive(&mut self, length: usize) -> Outcome<()> {
        self.incoming = pattern(3, length);
        write_all(&self.peer, &self.incoming)?;
        self.reach("everything received", |ours, peer| ours.unread == length && peer.unacknowledged == 0)
    }

    /// Sends `length` bytes. With `exhaust` they are cut into as many segments as the congestion window allows, so that
    /// nothing more can leave before one is acknowledged.
    pub(crate) fn send(&mut self, length: usize, exhaust: bool) -> Outcome<()> {
        if length == 0 {
            return Ok(());
        }
        let info = TcpInfo::of(&self.socket).map_err(failed("TCP_INFO"))?;
        let (segments, mss) = (info.snd_cwnd as usize, info.snd_mss as usize);
        if length > segments * mss || (exhaust && length < segments) {
            return Err(format!("{length} bytes are no {segments} segments of at most {mss}"));
        }
        let bytes = self.next_outgoing(length);
        // The algorithm of Nagle would join the segments.
        self.socket.set_nodelay(true).map_err(failed("TCP_NODELAY"))?;
        let segments = if exhaust { segments } else { length.div_ceil(mss) };
        for number in 0..segments {
            let at = |number: usize| length * number / segments;
            write_all(&self.socket, &bytes[at(number)..at(number + 1)])?;
            // The next piece would be appended to a segment that still waits for the device.
            self.reach("everything sent", |ours, _| ours.unsent == 0)?;
        }
        self.socket.set_nodelay(false).map_err(failed("TCP_NODELAY"))
    }

    /// Writes `length` bytes, wherever they get to.
    pub(crate) fn write(&mut self, length: usize) -> Outcome<()> {
        let bytes = self.next_outgoing(length);
        write_all(&self.socket, &bytes)
    }

    /// Sends to a peer that does not read, until it announces a window of zero.
    pub(crate) fn close_window(&mut self) -> Outcome<()> {
        let start = Instant::now();
        loop {
            let info = TcpInfo::of(&self.socket).map_err(failed("TCP_INFO"))?;
            match (info.unacknowledged, info.snd_wnd) {
                (0, 0) => return Ok(()),
                (0, window) => {
                    // Without this the peer delays its acknowledgement, and the window with it.
                    set_tcp_quickack(&self.peer, true).map_err(failed("TCP_QUICKACK"))?;
                    self.write(window as usize)?;
                }
                _ if start.elapsed() > crate::LIMIT => {
                    return Err(format!("the peer's window stays open: {info:?}"));
                }
                _ => thread::sleep(NAP),
            }
        }
    }

    /// Sends a FIN from the peer.
    pub(crate) fn shutdown_peer(&mut self) -> Outcome<()> {
        self.peer.shutdown(Shutdown::Write).map_err(failed("shutdown of the peer"))
    }

    /// Waits until both ends are as they should.
    pub(crate) fn reach(&self, what: &str, holds: impl Fn(&TcpInfo, &TcpInfo) -> bool) -> Outcome<()> {
        let start = Instant::now();
        loop {
            let info = |socket: &TcpStream| TcpInfo::of(socket).map_err(failed("TCP_INFO"));
            let (ours, peer) = (info(&self.socket)?, info(&self.peer)?);
            if holds(&ours, &peer) {
                return Ok(());
            }
            // A timer that has run leaves a congestion window of one segment.
            let is_too_late = ours.total_retrans > 0 && ours.unacknowledged > 0;
            if is_too_late || start.elapsed() > crate::LIMIT {
                return Err(format!(
                    "not reached after {:?}: {what}: ours {ours:?}, peer {peer:?}",
                    start.elapsed()
                ));
            }
            thread::sleep(NAP);
        }
    }

    /// Closes both ends without a packet.
    pub(crate) fn forget(self) {
        for end in [&self.socket, &self.peer] {
            // Without the privilege, the close sends a reset.
            let _ = silence(end);
        }
    }

    fn next_outgoing(&mut self, length: usize) -> Vec<u8> {
        let bytes = pattern(101 + self.outgoing.len(), length);
        self.outgoing.extend_from_slice(&bytes);
        bytes
    }
}

/// Connects to a listener that is deaf.
pub(crate) fn syn_sent(ours: &Host, listener: TcpListener, remote: SocketAddr) -> Outcome<Made> {
    deafen(&listener)?;
    let family = if remote.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        ours.run(|| socket_with(family, SocketType::STREAM, flags, None)).map_err(failed("socket"))?;
    match connect(&socket, &remote) {
        Err(Errno::INPROGRESS) => {}
        other => return Err(format!("connect to a deaf listener: {other:?}")),
    }
    let local = getsockname(&socket).and_then(SocketAddr::try_from).map_err(failed("getsockname"))?;
    let socket = TcpStream::from(socket);
    socket.set_nonblocking(false).map_err(failed("O_NONBLOCK"))?;
    match TcpInfo::of(&socket).map_err(failed("TCP_INFO"))?.state {
        State::SynSent => {}
        other => return Err(format!("connecting led to {other:?}")),
    }
    let (incoming, outgoing) = Default::default();
    Ok(Made { socket, local, remote, peer: Peer::Listening(listener), incoming, outgoing })
}

/// Drops everything that arrives at the socket.
pub(crate) fn deafen(socket: impl AsFd) -> Outcome<()> {
    let drop = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    attach_filter(socket, &[drop]).map_err(failed("SO_ATTACH_FILTER"))
}

pub(crate) fn failed<E: Into<io::Error>>(what: &str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {}", error.into())
}

/// Bytes that tell where they belong.
fn pattern(start: usize, length: usize) -> Vec<u8> {
    // A prime number of values, so that no power of two is a period.
    (start..start + length).map(|n| (n % 251) as u8).collect()
}

/// Writes without ever waiting for longer than the limit. Leaves the socket blocking.
fn write_all(mut stream: &TcpStream, mut bytes: &[u8]) -> Outcome<()> {
    let mut progress = Instant::now();
    stream.set_nonblocking(true).map_err(failed("O_NONBLOCK"))?;
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(written) => (bytes, progress) = (&bytes[written..], Instant::now()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && progress.elapsed() < crate::LIMIT => {
                thread::sleep(NAP);
            }
            Err(error) => return Err(format!("write with {} bytes to go: {error}", bytes.len())),
        }
    }
    stream.set_nonblocking(false).map_err(failed("O_NONBLOCK"))
}

//! Connections relayed to a server that cannot take them over: for each, this process opens a new one to the server, and passes the bytes on.
//!
//! The bytes never enter this process: splice(2) moves them from socket to pipe to socket. A side that does not read slows the
//! other; the end of one direction is passed on alone, a reset as a reset, an urgent byte as an urgent byte.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use libc::c_int;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use soccr::Flow;

use crate::signals::Deaf;
use crate::sys;

use super::Live;
use super::parting::Parting;

/// How long the server may take to accept a connection.
const LIMIT: Duration = Duration::from_secs(10);

/// How much is moved at a time, which is what a pipe holds, and how often before the other pairs have their turn.
const PIECE: usize = 64 << 10;
const TURNS: usize = 16;

/// The server.
#[derive(Debug)]
pub(crate) struct Relay {
    server: SocketAddr,
    protocol: Option<Protocol>,
}

/// How the server is told whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// A line of text
    #[value(name = "1")]
    Text,
    /// Binary
    #[value(name = "2")]
    Binary,
}

impl Relay {
    /// A server that is known to be there.
    pub(crate) fn new(server: SocketAddr, protocol: Option<Protocol>) -> Result<Self> {
        TcpStream::connect_timeout(&server, LIMIT).with_context(|| format!("--connect {server}"))?;
        Ok(Self { server, protocol })
    }

    /// Relays until every connection has ended. Where the server does not accept them, all are left in `connections`.
    pub(crate) fn give(self, connections: &mut Vec<Live>, deaf: Deaf, parting: &mut Parting) -> Result<()> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("epoll_create")?;
        let mut servers = Vec::with_capacity(connections.len());
        for (Live { flow, stream: client, .. }, number) in connections.iter().zip(0..) {
            let server = self.connect(*flow).with_context(|| format!("--connect {}", self.server))?;
            make_ours(client)?;
            for side in [client, &server] {
                side.set_nonblocking(true).context("fcntl(O_NONBLOCK)")?;
                // An urgent byte stays in its place, where `pass_urgent` finds it.
                sockopt::set_socket_oobinline(side, true).context("SO_OOBINLINE")?;
                let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
                epoll::add(&epoll, side, EventData::new_u64(number), events).context("epoll_ctl")?;
            }
            servers.push(server);
        }
        // Everything is given, so signals may end this process, and with it the connections.
        drop(deaf);
        parting.make_room(0)?;
        parting.end();
        parting.leave()?;
        *parting = Parting::default();
        let pairs = connections.drain(..).zip(servers).map(|(client, server)| {
            Some(Pair { ways: [Way::default(), Way::default()], sides: [client.stream, server] })
        });
        run(&epoll, pairs.collect())
    }

    fn connect(&self, client: Flow) -> std::io::Result<TcpStream> {
        let mut server = TcpStream::connect_timeout(&self.server, LIMIT)?;
        server.set_nodelay(true)?;
        let ends = [client.remote, client.local];
        match self.protocol {
            Some(Protocol::Text) => server.write_all(text_header(ends).as_bytes())?,
            Some(Protocol::Binary) => server.write_all(&binary_header(ends))?,
            None => {}
        }
        Ok(server)
    }
}

/// Takes back what the old program has set for itself: how it was told of bytes and errors, when its own bytes should leave, and
/// how it closed. What the connection itself needs stays, such as keepalive, time limits, buffers, rate and headers.
fn make_ours(client: &TcpStream) -> Result<()> {
    const ORDINARY: [(&str, c_int, c_int, c_int); 7] = [
        // With more, few bytes would not wake us.
        ("SO_RCVLOWAT", libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1),
        // `pass_urgent` peeks at the next byte.
        ("SO_PEEK_OFF", libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1),
        // Nobody reads the notices that it asks for, and they would fill the receive buffer.
        ("SO_TIMESTAMPING", libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 0),
        // With it an ICMP message ends the connection, which would otherwise try again.
        ("IP_RECVERR", libc::IPPROTO_IP, libc::IP_RECVERR, 0),
        ("IPV6_RECVERR", libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 0),
        // The server has decided already when its bytes leave.
        ("TCP_CORK", libc::IPPROTO_TCP, libc::TCP_CORK, 0),
        ("TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    ];
    // A close would wait, and all other connections with it, or cut off what has not been sent yet.
    sockopt::set_socket_linger(client, None).context("SO_LINGER")?;
    for (name, level, number, value) in ORDINARY {
        match sys::set_option(client.as_fd(), level, number, value) {
            // What this kernel does not have, or not for such a socket, is not set.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => {}
            outcome => outcome.context(name)?,
        }
    }
    Ok(())
}

/// Version 1 of the PROXY protocol: source, then destination.
fn text_header(ends: [SocketAddr; 2]) -> String {
    let [source, destination] = ends.map(|end| end.ip().to_canonical());
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    format!("PROXY {family} {source} {destination} {} {}\r\n", ends[0].port(), ends[1].port())
}

/// Version 2: a signature, version and command, family, length, addresses, ports.
fn binary_header(ends: [SocketAddr; 2]) -> Vec<u8> {
    let mut addresses = Vec::new();
    for end in ends {
        match end.ip().to_canonical() {
            IpAddr::V4(ip) => addresses.extend(ip.octets()),
            IpAddr::V6(ip) => addresses.extend(ip.octets()),
        }
    }
    let family = if addresses.len() == 8 { 0x11 } else { 0x21 };
    ends.iter().for_each(|end| addresses.extend(end.port().to_be_bytes()));
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    header.push(family);
    header.extend((addresses.len() as u16).to_be_bytes());
    header.extend(addresses);
    header
}

/// A connection, and the one to the server that belongs to it.
struct Pair {
    sides: [TcpStream; 2],
    /// From the first side to the second, and back.
    ways: [Way; 2],
}

/// One direction.
#[derive(Default)]
struct Way {
    /// The pipe with bytes that have been read and not written; `None` if there are none.
    pipe: Option<Pipe>,
    /// The end has been read from one side and passed on to the other.
    is_over: bool,
    has_ended: bool,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    filled: usize,
}

/// How far a pair has got.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Nothing can be moved until epoll reports one of the sockets.
    Waits,
    /// More can be moved; the other pairs come first.
    More,
    Over,
}

/// Passes bytes on until every pair is over.
fn run(epoll: &OwnedFd, mut pairs: Vec<Option<Pair>>) -> Result<()> {
    let mut left = pairs.len();
    // Every pair is tried once, before epoll reports news.
    let mut ready: VecDeque<usize> = (0..left).collect();
    let mut spare = Vec::new();
    let mut events = Vec::with_capacity(256);
    while left > 0 {
        let patience = (!ready.is_empty()).then(Default::default);
        match epoll::wait(epoll, spare_capacity(&mut events), patience.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("epoll_wait"),
        }
        ready.extend(events.drain(..).map(|event| event.data.u64() as usize));
        for _ in 0..ready.len() {
            let Some(number) = ready.pop_front() else { break };
            let Some(pair) = &mut pairs[number] else { continue };
            match pair.pass_on(&mut spare) {
                Ok(Progress::Waits) => {}
                Ok(Progress::More) => ready.push_back(number),
                ended => {
                    if ended.is_err() {
                        pair.reset();
                    }
                    pairs[number] = None;
                    left -= 1;
                }
            }
        }
    }
    Ok(())
}

impl Pair {
    fn pass_on(&mut self, spare: &mut Vec<Pipe>) -> rustix::io::Result<Progress> {
        let [one, other] = self.sides.each_ref().map(AsFd::as_fd);
        let [there, back] = &mut self.ways;
        // Try both directions first: a reset on one side discards what the other has not passed on.
        let (there, back) = (there.pass_on(one, other, spare), back.pass_on(other, one, spare));
        let progress = [there?, back?];
        Ok(match progress {
            [Progress::Over, Progress::Over] => Progress::Over,
            _ if progress.contains(&Progress::More) => Progress::More,
            _ => Progress::Waits,
        })
    }

    /// One side has been reset: so is the other.
    fn reset(&self) {
        for side in &self.sides {
            let _ = sockopt::set_socket_linger(side, Some(Duration::ZERO));
        }
    }
}

impl Way {
    fn pass_on(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        spare: &mut Vec<Pipe>,
    ) -> rustix::io::Result<Progress> {
        for _ in 0..TURNS {
            if self.is_over {
                return Ok(Progress::Over);
            }
            let mut pipe = match self.pipe.take().or_else(|| spare.pop()) {
                Some(pipe) => pipe,
                None => Pipe::new()?,
            };
            let read = self.take_in(from, to, &mut pipe)?;
            let written = match pipe.filled {
                0 => 0,
                filled => moved(pipe.read.as_fd(), to, filled)?.unwrap_or(0),
            };
            pipe.filled -= written;
            match pipe.filled {
                // An empty pipe can serve another direction.
                0 => spare.push(pipe),
                _ => self.pipe = Some(pipe),
            }
            if self.has_ended && self.pipe.is_none() {
                self.is_over = true;
                return match shutdown(to, Shutdown::Write) {
                    // The other side is gone already.
                    Ok(()) | Err(Errno::NOTCONN) => Ok(Progress::Over),
                    Err(error) => Err(error),
                };
            }
            if read + written == 0 {
                return Ok(Progress::Waits);
            }
        }
        Ok(Progress::More)
    }

    /// Reads into the pipe; the number of bytes that have moved on.
    fn take_in(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        pipe: &mut Pipe,
    ) -> rustix::io::Result<usize> {
        if self.has_ended || pipe.filled == PIECE {
            return Ok(0);
        }
        let mut read = moved(from, pipe.write.as_fd(), PIECE - pipe.filled)?;
        if let Some(length @ 1..) = read {
            pipe.filled += length;
            return Ok(length);
        }
        // Before an urgent byte splice(2) finds nothing, or the end that is behind it. What is in the pipe goes first.
        if is_urgent(from)? {
            read = if pipe.filled == 0 { pass_urgent(from, to)? } else { None };
        }
        self.has_ended = read == Some(0);
        Ok(read.unwrap_or(0))
    }
}

impl Pipe {
    fn new() -> rustix::io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { read, write, filled: 0 })
    }
}

/// Moves bytes; `None` where `from` is empty or `to` is full.
fn moved(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> rustix::io::Result<Option<usize>> {
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    unless_empty_or_full(splice(from, None, to, None, length, flags))
}

fn unless_empty_or_full(moved: rustix::io::Result<usize>) -> rustix::io::Result<Option<usize>> {
    match moved {
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        moved => moved.map(Some),
    }
}

/// Whether an urgent byte is next. With kernel TLS the mark is among the encrypted bytes, which only the kernel reads.
fn is_urgent(from: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    Ok(sys::is_at_mark(from)? && !soccr::tls::is_on(&from).unwrap_or(false))
}

/// Passes an urgent byte on; the answers are those of [`moved`].
fn pass_urgent(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> rustix::io::Result<Option<usize>> {
    let mut byte = [0];
    let mut pass = || {
        // The byte stays until the other side has it.
        match recv(from, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT)? {
            (_, 0) => Ok(0),
            _ => {
                send(to, &byte, SendFlags::OOB | SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
                recv(from, &mut byte, RecvFlags::DONTWAIT).map(|(_, length)| length)
            }
        }
    };
    unless_empty_or_full(pass())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_is_told_whose_connection_it_is() {
        let v4 = ["192.0.2.7:1000", "198.51.100.1:80"].map(|end| end.parse().unwrap());
        assert_eq!(text_header(v4), "PROXY TCP4 192.0.2.7 198.51.100.1 1000 80\r\n");
        let mapped = ["[::ffff:192.0.2.7]:1000", "[::ffff:198.51.100.1]:80"].map(|end| end.parse().unwrap());
        assert_eq!(text_header(mapped), text_header(v4));
        assert_eq!(
            binary_header(v4),
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\xc6\x33\x64\x01\x03\xe8\0\x50"
        );
        let v6 = ["[2001:db8::1]:1", "[2001:db8::2]:2"].map(|end| end.parse().unwrap());
        assert_eq!(text_header(v6), "PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n");
        assert_eq!(binary_header(v6)[12..16], *b"\x21\x21\0\x24");
    }
}

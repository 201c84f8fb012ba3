//! Packets that were held back, and how they reach the connection after all.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::connection::{Flow, State};
use crate::error::{Error, Result};
use crate::segment::{Checksum, Parsed, Run, flags};
use crate::sys::raw::{Injector, Via};
use crate::sys::sockopt;
use crate::{conntrack, fin, save};

/// What the peer of a connection sent while the connection was locked: plain data, which travels with the
/// [`Connection`](crate::Connection) to another host and is replayed there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The connection. Where it gets other addresses, set them here: the packets follow.
    pub flow: Flow,
    /// The packets in the order of their arrival, each from its IP header on.
    pub packets: Vec<Vec<u8>>,
}

impl Held {
    /// Hands the packets to the connection as if they had just arrived, in their order. Returns how many.
    ///
    /// `socket` is the restored connection, best before it is [resumed](crate::Restored::resume). It must not be locked
    /// (any more): its answers have to reach the peer. Packets that are
    /// damaged, or no TCP segments of that address family, are left out: the peer sends again what is missing.
    /// Replaying twice does no harm.
    ///
    /// # Errors
    /// Refused: nothing arrived, because of a firewall. `EPERM` without `CAP_NET_RAW`, or where a firewall drops what the
    /// host sends to itself. The peer sends again what it misses.
    pub fn replay(&self, socket: impl AsFd) -> Result<usize> {
        self.replay_into(socket.as_fd()).map_err(|error| error.at("replay"))
    }

    fn replay_into(&self, socket: BorrowedFd<'_>) -> Result<usize> {
        // A connection that is over takes nothing more, and the packets would draw a reset.
        if self.packets.is_empty() || save::state(socket)? == State::Close {
            return Ok(0);
        }
        // A firewall may let only established connections pass, and not know that this is one.
        self.inject_into(socket, fin::FIRST_ARRIVAL).or_else(|error| {
            match conntrack::enter(socket, self.flow) {
                Ok(()) => self.inject_into(socket, fin::ARRIVAL),
                Err(_) => Err(error),
            }
        })
    }

    fn inject_into(&self, socket: BorrowedFd<'_>, limit: Duration) -> Result<usize> {
        let before = segments_in(socket)?;
        let injector = Injector::for_socket(socket, Via::routed(self.flow.local.ip()))?;
        let mut replay = Replay::new(self.flow);
        replay.packets(&injector, &self.packets)?;
        let count = replay.finish(&injector)?;
        if count > 0 && !fin::wait_for(limit, &|| Ok(segments_in(socket)? != before))? {
            return Err(Error::refused(
                "packets of the peer that did not arrive",
                "let packets with the mark 0xC114 pass the firewall, from `lo` too",
            ));
        }
        Ok(count)
    }
}

/// Segments that a socket has received (`tcpi_segs_in`, Linux 4.2).
fn segments_in(socket: BorrowedFd<'_>) -> Result<u32> {
    let info: [u32; 36] = sockopt::get(socket, libc::IPPROTO_TCP, libc::TCP_INFO)
        .map_err(|error| Error::system("TCP_INFO", error))?;
    Ok(info[35])
}

/// Packets on their way into a socket.
#[derive(Debug)]
pub(super) struct Replay {
    flow: Flow,
    count: usize,
    newest: Option<Newest>,
    run: Run,
    scratch: Vec<u8>,
}

/// The end of the packet that reaches furthest into the sequence space: its headers and its last byte.
#[derive(Debug)]
struct Newest {
    bytes: Vec<u8>,
    parsed: Parsed,
    /// The sequence number behind it.
    end: u32,
}

impl Replay {
    pub(super) fn new(flow: Flow) -> Self {
        Self { flow, count: 0, newest: None, run: Run::default(), scratch: Vec::new() }
    }

    pub(super) fn flow(&self) -> Flow {
        self.flow
    }

    /// Injects packets, except those that are damaged.
    ///
    /// # Errors
    /// The first error. Every packet is tried nevertheless.
    pub(super) fn packets(&mut self, injector: &Injector, packets: &[impl AsRef<[u8]>]) -> Result<()> {
        let mut outcome = Ok(());
        for packet in packets {
            let packet = packet.as_ref();
            let Some(parsed) = Parsed::new(packet) else { continue };
            if parsed.checksum(packet) == Checksum::Wrong || parsed.source.is_ipv4() != self.flow.is_ipv4() {
                continue;
            }
            self.count += 1;
            if !self.run.join(packet, &parsed, LONGEST) {
                outcome = outcome.and(self.inject_run(injector));
                self.run.start(packet, parsed);
            }
        }
        outcome.and(self.inject_run(injector))
    }

    fn inject_run(&mut self, injector: &Injector) -> Result<()> {
        let Some((mut parsed, packet)) = self.run.take() else { return Ok(()) };
        (parsed.source, parsed.destination) = (self.flow.remote, self.flow.local);
        inject(injector, &parsed, packet, &mut self.scratch)?;
        self.newest = newest(self.newest.take(), parsed, packet);
        Ok(())
    }

    /// Makes the connection answer to what has been replayed, and returns how many packets that were.
    ///
    /// Its answers were dropped, where the lock was still on. It acknowledges at once what it gets a second
    /// time (RFC 9293 §3.10.7.4), and at any acknowledgement it sends what it may.
    pub(super) fn finish(mut self, injector: &Injector) -> Result<usize> {
        if let Some(Newest { bytes, parsed, .. }) = self.newest.take() {
            inject(injector, &parsed, &bytes, &mut self.scratch)?;
        }
        Ok(self.count)
    }
}

/// With what the kernel adds this fills its 64 KiB of memory. More would take 128 KiB of the receive buffer,
/// and the peer's window allows for no such waste.
const LONGEST: usize = 65_000;

fn inject(injector: &Injector, parsed: &Parsed, packet: &[u8], scratch: &mut Vec<u8>) -> Result<()> {
    /// What every link can carry (RFC 8200 §5).
    const SMALLEST_MTU: usize = 1280;
    let mut send = |limit| parsed.rewrite(packet, limit, scratch, |p| injector.send(p, parsed.destination));
    match send(LONGEST) {
        Err(error) if error.errno() == Some(libc::EMSGSIZE) => send(SMALLEST_MTU),
        other => other,
    }
}

/// The packet that reaches further: `before` or this one.
fn newest(before: Option<Newest>, mut parsed: Parsed, packet: &[u8]) -> Option<Newest> {
    let fin = if parsed.missing == 0 { parsed.flags & flags::FIN } else { 0 };
    let length = parsed.payload.len() as u32;
    let end = parsed.seq.wrapping_add(length).wrapping_add((fin != 0).into());
    let behind = |newest: &Newest| (end.wrapping_sub(newest.end) as i32) < 0;
    if parsed.flags & (flags::RST | flags::SYN) != 0 || before.as_ref().is_some_and(behind) {
        return before;
    }
    let mut bytes = packet[..parsed.payload.start].to_vec();
    bytes[parsed.header.start + 13] = flags::ACK | fin;
    bytes.extend(packet[parsed.payload.clone()].last());
    parsed.payload = parsed.payload.start..bytes.len();
    parsed.seq = parsed.seq.wrapping_add(length.saturating_sub(1));
    parsed.missing = 0;
    Some(Newest { bytes, parsed, end })
}

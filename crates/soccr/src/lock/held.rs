//! Packets that were held back, and how they reach the connection after all.

use std::os::fd::AsFd;

use crate::connection::Flow;
use crate::error::Result;
use crate::segment::{Checksum, Parsed, flags};
use crate::sys::raw::{Injector, Via};

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
    /// `EPERM` without `CAP_NET_RAW`, or where a firewall drops what the host sends to itself.
    pub fn replay(&self, socket: impl AsFd) -> Result<usize> {
        self.replay_into(socket.as_fd()).map_err(|error| error.at("replay"))
    }

    fn replay_into(&self, socket: std::os::fd::BorrowedFd<'_>) -> Result<usize> {
        if self.packets.is_empty() {
            return Ok(0);
        }
        let injector = Injector::for_socket(socket, Via::routed(self.flow.local.ip()))?;
        let mut replay = Replay::new(self.flow);
        for packet in &self.packets {
            replay.packet(&injector, packet)?;
        }
        replay.finish(&injector)
    }
}

/// Packets on their way into a socket.
#[derive(Debug)]
pub(super) struct Replay {
    flow: Flow,
    count: usize,
    newest: Option<Newest>,
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
        Self { flow, count: 0, newest: None, scratch: Vec::new() }
    }

    pub(super) fn flow(&self) -> Flow {
        self.flow
    }

    /// Injects a packet, unless it is damaged.
    pub(super) fn packet(&mut self, injector: &Injector, packet: &[u8]) -> Result<()> {
        let Some(mut parsed) = Parsed::new(packet) else { return Ok(()) };
        if parsed.checksum == Checksum::Wrong || parsed.source.is_ipv4() != self.flow.is_ipv4() {
            return Ok(());
        }
        (parsed.source, parsed.destination) = (self.flow.remote, self.flow.local);
        self.inject(injector, &parsed, packet)?;
        self.count += 1;
        self.remember(parsed, packet);
        Ok(())
    }

    /// Makes the connection answer to what has been replayed, and returns how many packets that were.
    ///
    /// Its answers were dropped, where the lock was still on. It acknowledges at once what it gets a second
    /// time (RFC 9293 §3.10.7.4), and at any acknowledgement it sends what it may.
    pub(super) fn finish(mut self, injector: &Injector) -> Result<usize> {
        if let Some(Newest { bytes, parsed, .. }) = self.newest.take() {
            self.inject(injector, &parsed, &bytes)?;
        }
        Ok(self.count)
    }

    fn remember(&mut self, mut parsed: Parsed, packet: &[u8]) {
        let fin = if parsed.missing == 0 { parsed.flags & flags::FIN } else { 0 };
        let length = parsed.payload.len() as u32;
        let end = parsed.seq.wrapping_add(length).wrapping_add((fin != 0).into());
        let behind = |newest: &Newest| (end.wrapping_sub(newest.end) as i32) < 0;
        if parsed.flags & (flags::RST | flags::SYN) != 0 || self.newest.as_ref().is_some_and(behind) {
            return;
        }
        let mut bytes = packet[..parsed.payload.start].to_vec();
        bytes[parsed.header.start + 13] = flags::ACK | fin;
        bytes.extend(packet[parsed.payload.clone()].last());
        parsed.payload = parsed.payload.start..bytes.len();
        parsed.seq = parsed.seq.wrapping_add(length.saturating_sub(1));
        parsed.missing = 0;
        self.newest = Some(Newest { bytes, parsed, end });
    }

    fn inject(&mut self, injector: &Injector, parsed: &Parsed, packet: &[u8]) -> Result<()> {
        /// With what the kernel adds this fills its 64 KiB of memory. More would take 128 KiB of the receive buffer,
        /// and the peer's window allows for no such waste.
        const LONGEST: usize = 65_000;
        /// What every link can carry (RFC 8200 §5).
        const SMALLEST_MTU: usize = 1280;
        let mut send =
            |limit| parsed.rewrite(packet, limit, &mut self.scratch, |p| injector.send(p, self.flow.local));
        match send(LONGEST) {
            Err(error) if error.errno() == Some(libc::EMSGSIZE) => send(SMALLEST_MTU),
            other => other,
        }
    }
}

//! Packets that were held back, and how they reach the connection after all.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::connection::{Flow, State, after};
use crate::error::{Error, Result};
use crate::segment::{Checksum, Parsed, Run, flags};
use crate::sys::raw::{Injector, Via};
use crate::sys::sockopt;
use crate::{conntrack, fin, save};

/// With what the kernel adds this fills its 64 KiB of memory. More would take 128 KiB of the receive buffer,
/// and the peer's window allows for no such waste.
pub(super) const LONGEST: usize = 65_000;

/// What the peer of a connection sent while the connection was locked: plain data, which travels with the
/// [`Connection`](crate::Connection) to another host and is replayed there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The connection. Where it gets other addresses, set them here: the packets follow.
    pub flow: Flow,
    /// The packets in the order of their arrival, each from its IP header on. Segments that followed each other may have
    /// been joined.
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
        for packet in &self.packets {
            let Some(parsed) = Parsed::new(packet) else { continue };
            if parsed.source.is_ipv4() == self.flow.is_ipv4() && parsed.checksum(packet) != Checksum::Wrong {
                replay.packet(&injector, Run::new(packet, parsed))?;
            }
        }
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
    /// The end of what reaches furthest into the sequence space, and the sequence number behind it.
    furthest: Option<(Run, u32)>,
    /// What has been injected. To give back the memory takes as long as that: not while anybody waits.
    pub(super) spent: Vec<Run>,
}

impl Replay {
    pub(super) fn new(flow: Flow) -> Self {
        Self { flow, count: 0, furthest: None, spent: Vec::new() }
    }

    pub(super) fn flow(&self) -> Flow {
        self.flow
    }

    /// Injects an undamaged packet.
    pub(super) fn packet(&mut self, injector: &Injector, mut run: Run) -> Result<()> {
        let ends = self.flow.on_the_wire();
        run.readdress(ends.remote, ends.local);
        self.inject(injector, &mut run)?;
        self.count += 1;
        self.remember(&run);
        self.spent.push(run);
        Ok(())
    }

    /// Makes the connection answer to what has been replayed, and returns how many packets that were.
    ///
    /// Its answers were dropped, where the lock was still on. It acknowledges at once what it gets a second
    /// time (RFC 9293 §3.10.7.4), and at any acknowledgement it sends what it may.
    pub(super) fn finish(&mut self, injector: &Injector) -> Result<usize> {
        if let Some((mut run, _)) = self.furthest.take() {
            self.inject(injector, &mut run)?;
        }
        Ok(self.count)
    }

    fn remember(&mut self, run: &Run) {
        let parsed = run.parsed();
        let fin = u32::from(parsed.flags & flags::FIN != 0);
        let end = parsed.seq.wrapping_add(parsed.payload.len() as u32).wrapping_add(fin);
        let is_behind = self.furthest.as_ref().is_some_and(|(_, furthest)| after(*furthest, end));
        if parsed.flags & (flags::RST | flags::SYN) == 0 && !is_behind {
            self.furthest = Some((run.end(), end));
        }
    }

    fn inject(&self, injector: &Injector, run: &mut Run) -> Result<()> {
        /// What every link can carry (RFC 8200 §5).
        const SMALLEST_MTU: usize = 1280;
        let mut send = |limit| run.pieces(limit, |packet| injector.send(packet, self.flow.local));
        match send(LONGEST) {
            Err(error) if error.errno() == Some(libc::EMSGSIZE) => send(SMALLEST_MTU),
            other => other,
        }
    }
}

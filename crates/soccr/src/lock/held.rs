//! Packets that were held back, and how they reach the connection after all.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::replay::Replay;
use crate::connection::{Flow, State};
use crate::error::{Error, Result};
use crate::segment::{Checksum, Parsed, Run};
use crate::sys::namespace::Recently;
use crate::sys::raw::{Injectors, Via, bound_interface};
use crate::sys::sockopt;
use crate::{conntrack, fin, save};

/// What the peer of a connection sent while the connection was locked: plain data, which travels with the
/// [`Connection`](crate::Connection) to another host and is replayed there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The connection. Where it gets other addresses, set them here: the packets follow.
    pub flow: Flow,
    /// The packets in their order, each from its IP header on. Segments that followed each other may have been joined, and
    /// packets that were overtaken on the way are put back into their place.
    pub packets: Vec<Vec<u8>>,
}

/// After packets were swallowed, a while without waiting for others.
const REST: Duration = Duration::from_secs(1);

/// Packets were swallowed.
static SWALLOWED: Recently = Recently::within(REST);

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
        let before = segments_in(socket)?;
        let mut injectors = Injectors::default();
        // A firewall may let only established connections pass, and not know that this is one.
        let wire = conntrack::admit(&mut injectors, socket, self.flow, save::state(socket)?, None)?;
        let way = injectors.inward(socket, Via::routed(wire.local.ip()), wire.remote, wire.local)?;
        let mut replay = Replay::new(self.flow, wire, bound_interface(socket)?);
        let runs = self.packets.iter().filter_map(|packet| {
            let parsed = Parsed::new(packet)?;
            let fits = parsed.source.is_ipv4() == self.flow.is_ipv4();
            (fits && parsed.checksum(packet) != Checksum::Wrong).then(|| Run::new(packet, parsed))
        });
        replay.packets(&way, runs, None)?;
        let count = replay.finish(&way)?;
        let arrived = || Ok((segments_in(socket)? != before).then_some(()));
        // To wait once is enough: whoever swallows packets does so with every connection.
        let limit = if SWALLOWED.at(socket).is_some() { Duration::ZERO } else { fin::ARRIVAL };
        if count > 0 && fin::wait_for(limit, arrived)?.is_none() {
            SWALLOWED.note_at(socket, ());
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

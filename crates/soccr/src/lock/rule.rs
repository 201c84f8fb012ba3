//! One rule of a lock.

use crate::nftables::rule::{Direction, Expressions, Load};
use crate::sys::MARK;

/// The most that the kernel copies of a packet to a log group.
pub(super) const LOG_LIMIT: usize = 65531;

/// What the longest packets, those on `lo`, have beyond that (IPv4, IPv6).
pub(super) const TAIL: [usize; 2] = [4, 5];

/// Marks the copies of packets whose tail is in the place of their Ethernet address. Before Linux 6.18 a copy without
/// any mark comes with an empty one.
pub(super) const TAIL_SAVED: &str = "tail";

/// What the connections in a set may not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Set {
    /// Neither send nor receive.
    Flows,
    /// Send: they receive again, and what was held for them is on its way. Only where packets are held.
    Silent,
}

impl Set {
    /// The name of the part for one address family.
    pub(super) fn name(self, ipv6: bool) -> &'static str {
        match (self, ipv6) {
            (Self::Flows, false) => "flows4",
            (Self::Flows, true) => "flows6",
            (Self::Silent, false) => "silent4",
            (Self::Silent, true) => "silent6",
        }
    }
}

/// Drops the packets of the connections in a set, in one direction and of one address family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) set: Set,
    pub(super) direction: Direction,
    pub(super) ipv6: bool,
    /// The group to which the packets are copied first.
    pub(super) log: Option<u16>,
    /// Only packets that are longer than [`LOG_LIMIT`]. Their [`TAIL`] is copied as well: in the place of the
    /// Ethernet address to which they were sent, which nobody needs any more (Linux 6.18).
    pub(super) long: bool,
}

impl Rule {
    /// Appends the expressions: they load what the sets hold as keys, compare, and drop.
    pub(super) fn write(self, rule: &mut Expressions<'_, '_>) {
        let tail = Load::aside(LOG_LIMIT as u32, TAIL[usize::from(self.ipv6)] as u32);
        rule.is_ipv6(self.ipv6);
        if self.long {
            // Almost every packet is too short, and the rule ends here.
            rule.load(tail);
        }
        rule.is_protocol(libc::IPPROTO_TCP);
        rule.is_in(self.set.name(self.ipv6), self.ipv6, self.direction);
        rule.lacks_mark(MARK);
        if self.long {
            rule.store_in_ethernet_header(tail);
        }
        if let Some(group) = self.log {
            rule.log(group, self.long.then_some(TAIL_SAVED));
        }
        rule.drop();
    }
}

//! The nftables table of a lock.
//!
//! ```text
//! table inet soccr-04711b2a {
//!   set flows4 { type ipv4_addr . inet_service . ipv4_addr . inet_service }      # remote, local
//!   set flows6 { type ipv6_addr . inet_service . ipv6_addr . inet_service }
//!   set silent4, set silent6                                                     # of the same types
//!   chain in  { type filter hook prerouting priority raw        # before connection tracking and early demux
//!     meta l4proto tcp ip  saddr . tcp sport . ip  daddr . tcp dport @flows4 mark != 0xc114 log group 1 drop
//!     meta l4proto tcp ip6 saddr . tcp sport . ip6 daddr . tcp dport @flows6 mark != 0xc114 log group 1 drop }
//!   chain out { type filter hook output priority raw
//!     meta l4proto tcp ip  daddr . tcp dport . ip  saddr . tcp sport @flows4 mark != 0xc114 drop
//!     meta l4proto tcp ip6 daddr . tcp dport . ip6 saddr . tcp sport @flows6 mark != 0xc114 drop
//!     meta l4proto tcp ip  daddr . tcp dport . ip  saddr . tcp sport @silent4 mark != 0xc114 drop
//!     meta l4proto tcp ip6 daddr . tcp dport . ip6 saddr . tcp sport @silent6 mark != 0xc114 drop } }
//! ```
//!
//! One element locks both directions of a connection, or keeps it silent. Sets without time limits have a fixed size
//! where they may become large.

use std::io;
use std::time::Duration;

use soccr_netlink::{Batch, Socket};

use super::rule::{Rule, Set};
use crate::connection::Flow;
use crate::nftables::rule::Direction;
use crate::nftables::set::{self, ELEMENT_EXPIRATION, ELEMENT_TIMEOUT};
use crate::nftables::{self, Family, Hook, Table, milliseconds, to_milliseconds, value};

pub(super) use crate::nftables::set::CAPACITY;
pub(super) use crate::nftables::{most_elements, set_longest};

/// What distinguishes one table from another.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// The kernel removes it when the socket that made it is closed.
    Owned(Option<Log>),
    /// It stays, and its elements can have a time limit.
    Persistent,
}

/// To where incoming packets are copied before they are dropped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Log {
    pub(super) group: u16,
    /// Packets of more than [`LOG_LIMIT`](super::rule::LOG_LIMIT) bytes are copied whole.
    pub(super) long: bool,
}

/// The chains of a table.
const IN: &str = "in";
const OUT: &str = "out";

/// A transaction about the table of a lock: all of it happens, or nothing.
pub(super) struct Transaction<'a>(nftables::Transaction<'a>);

impl<'a> Transaction<'a> {
    /// Begins a transaction about the table of this name. What `batch` held is forgotten.
    pub(super) fn begin(batch: &'a mut Batch, table: &'a str) -> Self {
        Self(nftables::Transaction::begin(batch, Table::inet(table)))
    }

    /// Makes the table.
    pub(super) fn create(&mut self, kind: Kind) {
        let (owned, log) = match kind {
            Kind::Owned(log) => (true, log),
            Kind::Persistent => (false, None),
        };
        self.0.create_table(owned);
        let sets: &[Set] = if log.is_some() { &[Set::Flows, Set::Silent] } else { &[Set::Flows] };
        for (set, ipv6) in sets.iter().flat_map(|set| [(*set, false), (*set, true)]) {
            let size = (owned && set == Set::Flows).then_some(CAPACITY);
            self.0.create_set(&set::Set {
                name: set.name(ipv6),
                ipv6,
                size,
                timeout: !owned,
                map: false,
                dynamic: None,
            });
        }
        for (chain, hook, direction) in
            [(IN, Hook::PREROUTING, Direction::In), (OUT, Hook::OUTPUT, Direction::Out)]
        {
            // A lock that may hold comes before one that stays, which only drops.
            let priority = Hook::RAW + i32::from(!owned);
            self.0.create_chain(chain, Hook { number: hook, priority, device: None });
            let incoming = direction == Direction::In;
            for &set in if incoming { &[Set::Flows] } else { sets } {
                for ipv6 in [false, true] {
                    let log = log.filter(|_| incoming);
                    let rule = Rule { set, direction, ipv6, log: log.map(|log| log.group), long: false };
                    if log.is_some_and(|log| log.long) {
                        self.0.rule(chain, |expressions| Rule { long: true, ..rule }.write(expressions));
                    }
                    self.0.rule(chain, |expressions| rule.write(expressions));
                }
            }
        }
    }

    /// Adds connections, each for the time given.
    pub(super) fn add(&mut self, set: Set, flows: &[Flow], limit: Option<Duration>) {
        for ipv6 in [false, true] {
            self.0.add(set.name(ipv6), of_family(flows, ipv6), |element, _| {
                if let Some(limit) = limit {
                    element.attribute(ELEMENT_TIMEOUT, &to_milliseconds(limit));
                }
            });
        }
    }

    /// Takes connections out.
    pub(super) fn delete(&mut self, set: Set, flows: &[Flow]) {
        for ipv6 in [false, true] {
            self.0.delete(set.name(ipv6), of_family(flows, ipv6));
        }
    }

    /// Removes the table.
    pub(super) fn remove(&mut self) {
        self.0.remove();
    }

    /// Removes the table of a persistent lock; `EBUSY` where it locks anything.
    pub(super) fn remove_empty(&mut self) {
        self.0.remove_empty(&[IN, OUT], [false, true].map(|ipv6| Set::Flows.name(ipv6)));
    }

    /// Sends the transaction and waits for the kernel's verdict.
    pub(super) fn commit(self, socket: &mut Socket) -> io::Result<()> {
        self.0.commit(socket)
    }
}

fn of_family(flows: &[Flow], ipv6: bool) -> impl Iterator<Item = &Flow> {
    flows.iter().filter(move |flow| flow.is_ipv4() != ipv6)
}

/// The names of all tables in the namespace of `socket`.
pub(super) fn names(socket: &mut Socket) -> io::Result<Vec<String>> {
    nftables::names(socket, Family::Inet)
}

/// The connections that a table locks, and for how much longer.
pub(super) fn contents(socket: &mut Socket, table: &str) -> io::Result<Vec<(Flow, Option<Duration>)>> {
    let mut contents = Vec::new();
    for ipv6 in [false, true] {
        let read = |flow, element: &[u8]| (flow, value(element, ELEMENT_EXPIRATION).and_then(milliseconds));
        contents.extend(nftables::contents(socket, Table::inet(table), Set::Flows.name(ipv6), read)?);
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, SocketAddr};

    use super::*;
    use crate::nftables::elements_in;

    #[test]
    fn as_many_connections_as_fit() {
        for length in [8 << 10, 200_000, 8 << 20] {
            let end = |port| SocketAddr::from((Ipv6Addr::LOCALHOST, port));
            let flow = Flow { local: end(1), remote: end(2) };
            let mut batch = Batch::new();
            let mut transaction =
                Transaction::begin(&mut batch, "soccr-persistent-0123456789012345678901234567890");
            transaction.create(Kind::Persistent);
            transaction.add(Set::Flows, &vec![flow; elements_in(length)], Some(Duration::MAX));
            assert!(batch.as_bytes().len() < length, "{} of {length}", batch.as_bytes().len());
        }
    }
}

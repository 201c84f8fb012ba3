//! The nftables table of a lock, as netlink messages.
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
//! One element locks both directions of a connection, or keeps it silent, and no rule is ever added for one. Sets
//! without time limits have a fixed size where they may become large, which halves the time to add to them.
//!
//! # References
//! `linux/netfilter/nf_tables.h`; nft(8).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::net::sockopt;
use soccr_netlink::{APPEND, Batch, CREATE, DUMP, EXCLUSIVE, Message, REQUEST, Socket, attributes};

use super::rule::{IPV4, IPV6, PORT, Rule};
use crate::connection::Flow;
use crate::error::{Error, Result};

/// The most connections of each address family that one table can lock.
pub(super) const CAPACITY: u32 = 65536;

/// Opens the way for transactions about many connections: an ordinary user may get less.
pub(super) fn set_longest(socket: &Socket) -> Result<()> {
    /// Enough to lock as many connections at once as a table can.
    const LONGEST: usize = 8 << 20;
    socket.set_send_buffer(LONGEST).map_err(|error| Error::system("SO_SNDBUF", error))
}

/// How many connections one transaction through this socket can add or delete.
pub(super) fn most_elements(socket: &Socket) -> Result<usize> {
    sockopt::socket_send_buffer_size(socket)
        .map(elements_in)
        .map_err(|errno| Error::system("SO_SNDBUF", errno))
}

fn elements_in(length: usize) -> usize {
    /// What frames the elements, and the table where it is made.
    const TABLE: usize = 4096;
    /// One IPv6 element with its time limit, and its share of the headers.
    const ELEMENT: usize = 72;
    (length.saturating_sub(TABLE) / ELEMENT).max(1)
}

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

/// A netfilter transaction in the making: all of it happens, or nothing.
pub(super) struct Transaction<'a> {
    batch: &'a mut Batch,
    table: &'a str,
}

impl<'a> Transaction<'a> {
    /// Begins a transaction about the table of this name. What `batch` held is forgotten.
    pub(super) fn begin(batch: &'a mut Batch, table: &'a str) -> Self {
        batch.clear();
        batch.message(BATCH_BEGIN, REQUEST, |m| m.bytes(&header(0, NFTABLES)));
        Self { batch, table }
    }

    /// Makes the table.
    pub(super) fn create(&mut self, kind: Kind) {
        let (owned, log) = match kind {
            Kind::Owned(log) => (true, log),
            Kind::Persistent => (false, None),
        };
        self.message(NEW_TABLE, CREATE | EXCLUSIVE, |m| m.be32(TABLE_FLAGS, u32::from(owned) * TABLE_OWNER));
        let sets: &[Set] = if log.is_some() { &[Set::Flows, Set::Silent] } else { &[Set::Flows] };
        let families = sets.iter().flat_map(|set| [(*set, false), (*set, true)]);
        for (id, (set, ipv6)) in families.enumerate() {
            let address = if ipv6 { IPV6 } else { IPV4 };
            self.message(NEW_SET, CREATE, |m| {
                m.string(SET_NAME, set.name(ipv6));
                m.be32(SET_FLAGS, if owned { SET_CONCATENATED } else { SET_CONCATENATED | SET_TIMEOUT });
                m.be32(
                    SET_KEY_TYPE,
                    [address, PORT, address, PORT].iter().fold(0, |all, field| all << 6 | field.kind),
                );
                m.be32(SET_KEY_LENGTH, 2 * (address.registers() + PORT.registers()) * 4);
                m.be32(SET_ID, id as u32 + 1);
                m.nested(SET_DESCRIPTION, |description| {
                    if owned && set == Set::Flows {
                        description.be32(SET_SIZE, CAPACITY);
                    }
                    description.nested(SET_FIELDS, |fields| {
                        for field in [address, PORT, address, PORT] {
                            fields.nested(LIST_ELEMENT, |f| f.be32(FIELD_LENGTH, field.length));
                        }
                    });
                });
            });
        }
        for (chain, hook) in [("in", HOOK_PREROUTING), ("out", HOOK_OUTPUT)] {
            self.message(NEW_CHAIN, CREATE, |m| {
                m.string(CHAIN_NAME, chain);
                m.nested(CHAIN_HOOK, |h| {
                    h.be32(HOOK_NUMBER, hook);
                    // A lock that may hold comes before one that stays, which only drops.
                    h.be32(HOOK_PRIORITY, (PRIORITY_RAW + i32::from(!owned)) as u32);
                });
                m.string(CHAIN_TYPE, "filter");
            });
            let incoming = hook == HOOK_PREROUTING;
            for &set in if incoming { &[Set::Flows] } else { sets } {
                for ipv6 in [false, true] {
                    let log = log.filter(|_| incoming);
                    let rule = Rule { set, incoming, ipv6, log: log.map(|log| log.group), long: false };
                    if log.is_some_and(|log| log.long) {
                        self.rule(chain, Rule { long: true, ..rule });
                    }
                    self.rule(chain, rule);
                }
            }
        }
    }

    /// Adds connections, each for the time given.
    pub(super) fn add(&mut self, set: Set, flows: &[Flow], limit: Option<Duration>) {
        self.elements(NEW_ELEMENTS, CREATE | EXCLUSIVE, set, flows, limit);
    }

    /// Takes connections out.
    pub(super) fn delete(&mut self, set: Set, flows: &[Flow]) {
        self.elements(DELETE_ELEMENTS, 0, set, flows, None);
    }

    /// Removes the table.
    pub(super) fn remove(&mut self) {
        self.message(DELETE_TABLE, 0, |_| ());
    }

    /// Sends the transaction and waits for the kernel's verdict.
    pub(super) fn commit(self, socket: &mut Socket) -> io::Result<()> {
        self.batch.acknowledge_last();
        self.batch.message(BATCH_END, REQUEST, |m| m.bytes(&header(0, NFTABLES)));
        socket.transact(self.batch)
    }

    fn rule(&mut self, chain: &str, rule: Rule) {
        self.message(NEW_RULE, CREATE | APPEND, |m| {
            m.string(RULE_CHAIN, chain);
            m.nested(RULE_EXPRESSIONS, |list| rule.write(list));
        });
    }

    fn elements(&mut self, kind: u16, flags: u16, set: Set, flows: &[Flow], limit: Option<Duration>) {
        /// As many as fit into one attribute, whose length has 16 bits, with keys of 40 bytes.
        const AT_ONCE: usize = 900;
        for ipv6 in [false, true] {
            let mut family = flows.iter().filter(|flow| flow.is_ipv4() != ipv6).peekable();
            while family.peek().is_some() {
                self.message(kind, flags, |m| {
                    m.string(ELEMENTS_SET, set.name(ipv6));
                    m.nested(ELEMENTS, |list| {
                        for flow in family.by_ref().take(AT_ONCE) {
                            list.nested(LIST_ELEMENT, |element| {
                                element.nested(ELEMENT_KEY, |key| key.attribute(DATA_VALUE, &key_of(flow)));
                                if let Some(limit) = limit {
                                    let milliseconds = limit.as_millis().clamp(1, u64::MAX.into()) as u64;
                                    element.attribute(ELEMENT_TIMEOUT, &milliseconds.to_be_bytes());
                                }
                            });
                        }
                    });
                });
            }
        }
    }

    fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Message<'_>)) {
        self.batch.message(SUBSYSTEM | kind, REQUEST | flags, |m| {
            m.bytes(&header(INET, 0));
            m.string(TABLE, self.table);
            body(m);
        });
    }
}

/// The names of all tables in the namespace of `socket`.
pub(super) fn names(socket: &mut Socket) -> io::Result<Vec<String>> {
    let mut batch = Batch::new();
    batch.message(SUBSYSTEM | GET_TABLE, REQUEST | DUMP, |m| m.bytes(&header(INET, 0)));
    let mut names = Vec::new();
    socket.dump(&batch, |_, payload| {
        let name = value(payload.get(HEADER..).unwrap_or_default(), TABLE);
        names.extend(
            name.and_then(|bytes| std::str::from_utf8(bytes.strip_suffix(&[0])?).ok()).map(str::to_owned),
        );
    })?;
    Ok(names)
}

/// The connections that a table locks, and for how much longer.
pub(super) fn contents(socket: &mut Socket, table: &str) -> io::Result<Vec<(Flow, Option<Duration>)>> {
    let mut contents = Vec::new();
    for ipv6 in [false, true] {
        let mut batch = Batch::new();
        batch.message(SUBSYSTEM | GET_ELEMENTS, REQUEST | DUMP, |m| {
            m.bytes(&header(INET, 0));
            m.string(TABLE, table);
            m.string(ELEMENTS_SET, Set::Flows.name(ipv6));
        });
        socket.dump(&batch, |_, payload| {
            let list = value(payload.get(HEADER..).unwrap_or_default(), ELEMENTS).unwrap_or_default();
            for (_, element) in attributes(list) {
                let key = value(element, ELEMENT_KEY).and_then(|key| flow_of(value(key, DATA_VALUE)?));
                let left = value(element, ELEMENT_EXPIRATION).and_then(<[u8]>::first_chunk);
                let left = left.map(|left| Duration::from_millis(u64::from_be_bytes(*left)));
                contents.extend(key.map(|flow| (flow, left)));
            }
        })?;
    }
    Ok(contents)
}

fn value(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|attribute| attribute.0 == kind).map(|attribute| attribute.1)
}

/// The key of a connection in a set: remote and local address and port, each padded to four bytes.
fn key_of(flow: &Flow) -> Vec<u8> {
    let mut key = Vec::with_capacity(40);
    for end in [flow.remote, flow.local] {
        match end.ip().to_canonical() {
            IpAddr::V4(address) => key.extend_from_slice(&address.octets()),
            IpAddr::V6(address) => key.extend_from_slice(&address.octets()),
        }
        key.extend_from_slice(&end.port().to_be_bytes());
        key.extend_from_slice(&[0; 2]);
    }
    key
}

fn flow_of(key: &[u8]) -> Option<Flow> {
    let end = |bytes: &[u8]| {
        let (address, port) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
        let address = match address.len() {
            4 => IpAddr::from(Ipv4Addr::from(*address.first_chunk()?)),
            16 => IpAddr::from(Ipv6Addr::from(*address.first_chunk()?)),
            _ => return None,
        };
        Some(SocketAddr::new(address, u16::from_be_bytes([port[0], port[1]])))
    };
    let (remote, local) = key.split_at(key.len() / 2);
    Some(Flow { local: end(local)?, remote: end(remote)? })
}

/// `struct nfgenmsg`: the address family and a resource.
fn header(family: u8, resource: u16) -> [u8; HEADER] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

// linux/netfilter.h, linux/netfilter_ipv4.h, linux/netfilter/nfnetlink.h
const HEADER: usize = 4;
const NFTABLES: u16 = 10;
const SUBSYSTEM: u16 = NFTABLES << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const INET: u8 = 1;
const HOOK_PREROUTING: u32 = 0;
const HOOK_OUTPUT: u32 = 3;
const PRIORITY_RAW: i32 = -300;

// linux/netfilter/nf_tables.h: message types
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const DELETE_ELEMENTS: u16 = 14;

// Attributes of every message
const TABLE: u16 = 1;
pub(super) const LIST_ELEMENT: u16 = 1;

// Attributes of one kind of message each
const TABLE_FLAGS: u16 = 2;
const TABLE_OWNER: u32 = 0x2;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_TIMEOUT: u32 = 0x10;
const SET_CONCATENATED: u32 = 0x80;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_DESCRIPTION: u16 = 9;
const SET_ID: u16 = 10;
const SET_SIZE: u16 = 1;
const SET_FIELDS: u16 = 2;
const FIELD_LENGTH: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_TIMEOUT: u16 = 4;
const ELEMENT_EXPIRATION: u16 = 5;
pub(super) const DATA_VALUE: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

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

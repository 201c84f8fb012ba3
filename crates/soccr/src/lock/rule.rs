//! One rule of a lock, as the expressions that the kernel runs for each packet.
//!
//! # References
//! `linux/netfilter/nf_tables.h`.

use soccr_netlink::Message;

use super::transaction::{DATA_VALUE, LIST_ELEMENT, Set};
use crate::sys::raw::MARK;

/// The kernel copies at most so much of a packet to a log group.
pub(super) const LOG_LIMIT: usize = 65531;

/// The longest packets that exist otherwise, those on `lo`, have so much more (IPv4, IPv6).
pub(super) const TAIL: [usize; 2] = [4, 5];

/// Marks the copies of packets whose tail is in the place of their Ethernet address.
const TAIL_SAVED: &str = "tail";

/// Drops the packets of the connections in a set, in one direction and of one address family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) set: Set,
    pub(super) incoming: bool,
    pub(super) ipv6: bool,
    /// The group to which the packets are copied first.
    pub(super) log: Option<u16>,
    /// Only packets that are longer than [`LOG_LIMIT`]. Their [`TAIL`] is copied as well: in the place of the
    /// Ethernet address to which they were sent, which nobody needs any more (Linux 6.12).
    pub(super) long: bool,
}

impl Rule {
    /// Appends the expressions: they load what the sets hold as keys, compare, and drop.
    pub(super) fn write(self, list: &mut Message<'_>) {
        let (protocol, address, source, destination) =
            if self.ipv6 { (NFPROTO_IPV6, IPV6, 8, 24) } else { (NFPROTO_IPV4, IPV4, 12, 16) };
        let (remote, local) = if self.incoming { (source, destination) } else { (destination, source) };
        let (remote_port, local_port) = if self.incoming { (0, 2) } else { (2, 0) };
        let tail = Load {
            base: NETWORK_HEADER,
            offset: LOG_LIMIT as u32,
            length: TAIL[usize::from(self.ipv6)] as u32,
            register: LAST_REGISTERS,
        };

        meta(list, META_NFPROTO);
        compare(list, COMPARE_EQUAL, &[protocol]);
        if self.long {
            // Almost every packet is too short, and the rule ends here.
            tail.write(list);
        }
        meta(list, META_L4PROTO);
        compare(list, COMPARE_EQUAL, &[libc::IPPROTO_TCP as u8]);
        let mut register = FIRST_REGISTER;
        for (base, offset, field) in [
            (NETWORK_HEADER, remote, address),
            (TRANSPORT_HEADER, remote_port, PORT),
            (NETWORK_HEADER, local, address),
            (TRANSPORT_HEADER, local_port, PORT),
        ] {
            Load { base, offset, length: field.length, register }.write(list);
            register += field.registers();
        }
        expression(list, "lookup", |data| {
            data.string(LOOKUP_SET, self.set.name(self.ipv6));
            data.be32(LOOKUP_REGISTER, FIRST_REGISTER);
        });
        meta(list, META_MARK);
        compare(list, COMPARE_UNEQUAL, &MARK.to_ne_bytes());
        if self.long {
            tail.store_in_ethernet_header(list);
        }
        if let Some(group) = self.log {
            expression(list, "log", |data| {
                data.attribute(LOG_GROUP, &group.to_be_bytes());
                // Every packet is delivered at once, not with the next one.
                data.attribute(LOG_THRESHOLD, &1u16.to_be_bytes());
                if self.long {
                    data.string(LOG_PREFIX, TAIL_SAVED);
                }
            });
        }
        expression(list, "immediate", |data| {
            data.be32(IMMEDIATE_REGISTER, VERDICT_REGISTER);
            data.nested(IMMEDIATE_DATA, |value| {
                value.nested(DATA_VERDICT, |v| v.be32(VERDICT_CODE, NF_DROP))
            });
        });
    }
}

/// A field of a set's key.
#[derive(Clone, Copy)]
pub(super) struct Field {
    /// nft's number for the type, by which it prints the set.
    pub(super) kind: u32,
    /// In bytes.
    pub(super) length: u32,
}

impl Field {
    /// Registers of four bytes that the field takes.
    pub(super) fn registers(self) -> u32 {
        self.length.div_ceil(4)
    }
}

pub(super) const IPV4: Field = Field { kind: 7, length: 4 };
pub(super) const IPV6: Field = Field { kind: 8, length: 16 };
pub(super) const PORT: Field = Field { kind: 13, length: 2 };

/// Bytes of the packet in registers. A rule ends without a verdict where the packet has no such bytes.
#[derive(Clone, Copy)]
struct Load {
    base: u32,
    offset: u32,
    length: u32,
    register: u32,
}

impl Load {
    fn write(self, list: &mut Message<'_>) {
        expression(list, "payload", |data| {
            data.be32(PAYLOAD_DESTINATION, self.register);
            data.be32(PAYLOAD_BASE, self.base);
            data.be32(PAYLOAD_OFFSET, self.offset);
            data.be32(PAYLOAD_LENGTH, self.length);
        });
    }

    fn store_in_ethernet_header(self, list: &mut Message<'_>) {
        expression(list, "payload", |data| {
            data.be32(PAYLOAD_SOURCE, self.register);
            data.be32(PAYLOAD_BASE, LINK_HEADER);
            data.be32(PAYLOAD_OFFSET, 0);
            data.be32(PAYLOAD_LENGTH, self.length);
        });
    }
}

fn meta(list: &mut Message<'_>, key: u32) {
    expression(list, "meta", |data| {
        data.be32(META_KEY, key);
        data.be32(META_REGISTER, FIRST_REGISTER);
    });
}

fn compare(list: &mut Message<'_>, operation: u32, value: &[u8]) {
    expression(list, "cmp", |data| {
        data.be32(COMPARE_REGISTER, FIRST_REGISTER);
        data.be32(COMPARE_OPERATION, operation);
        data.nested(COMPARE_DATA, |d| d.attribute(DATA_VALUE, value));
    });
}

fn expression(list: &mut Message<'_>, name: &str, data: impl FnOnce(&mut Message<'_>)) {
    list.nested(LIST_ELEMENT, |element| {
        element.string(EXPRESSION_NAME, name);
        element.nested(EXPRESSION_DATA, data);
    });
}

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NF_DROP: u32 = 0;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const VERDICT_REGISTER: u32 = 0;
const FIRST_REGISTER: u32 = 8;
/// Two registers that no key reaches.
const LAST_REGISTERS: u32 = 22;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const META_REGISTER: u16 = 1;
const META_KEY: u16 = 2;
const META_MARK: u32 = 3;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const COMPARE_REGISTER: u16 = 1;
const COMPARE_OPERATION: u16 = 2;
const COMPARE_DATA: u16 = 3;
const COMPARE_EQUAL: u32 = 0;
const COMPARE_UNEQUAL: u32 = 1;
const PAYLOAD_DESTINATION: u16 = 1;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
const PAYLOAD_SOURCE: u16 = 5;
const LINK_HEADER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const LOOKUP_SET: u16 = 1;
const LOOKUP_REGISTER: u16 = 2;
const LOG_GROUP: u16 = 1;
const LOG_PREFIX: u16 = 2;
const LOG_THRESHOLD: u16 = 4;
const IMMEDIATE_REGISTER: u16 = 1;
const IMMEDIATE_DATA: u16 = 2;

//! A rule, as the expressions that the kernel runs for each packet.

use soccr_netlink::Message;

use super::set::{IPV4, IPV6, PORT};
use super::{DATA_VALUE, LIST_ELEMENT};

/// The expressions of a rule while it is written. The rule ends, and the next one begins, where a comparison or a
/// look-up fails, or where a packet lacks the bytes that are to be loaded.
pub(crate) struct Expressions<'m, 'b> {
    list: &'m mut Message<'b>,
}

/// Whose packets a rule is about: it decides which ends of a packet are remote and local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    In,
    Out,
}

impl<'m, 'b> Expressions<'m, 'b> {
    pub(super) fn new(list: &'m mut Message<'b>) -> Self {
        Self { list }
    }

    /// Goes on for packets of this address family.
    pub(crate) fn is_ipv6(&mut self, ipv6: bool) {
        self.meta(META_NFPROTO);
        self.equals(&[if ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 }]);
    }

    /// Goes on for packets of this protocol over IP.
    pub(crate) fn is_protocol(&mut self, protocol: i32) {
        self.meta(META_L4PROTO);
        self.equals(&[protocol as u8]);
    }

    /// Goes on for packets without this mark.
    pub(crate) fn lacks_mark(&mut self, mark: u32) {
        self.meta(META_MARK);
        self.compare(COMPARE_UNEQUAL, &mark.to_ne_bytes());
    }

    /// Goes on for TCP packets of the connections in a set.
    pub(crate) fn is_in(&mut self, set: &str, ipv6: bool, direction: Direction) {
        let (address, source, destination) = if ipv6 { (IPV6, 8, 24) } else { (IPV4, 12, 16) };
        let (remote, remote_port, local, local_port) = match direction {
            Direction::In => (source, 0, destination, 2),
            Direction::Out => (destination, 2, source, 0),
        };
        let mut register = FIRST_REGISTER;
        for (base, offset, field) in [
            (NETWORK_HEADER, remote, address),
            (TRANSPORT_HEADER, remote_port, PORT),
            (NETWORK_HEADER, local, address),
            (TRANSPORT_HEADER, local_port, PORT),
        ] {
            self.load(Load { base, offset, length: field.length, register });
            register += field.registers();
        }
        self.expression("lookup", |data| {
            data.string(LOOKUP_SET, set);
            data.be32(LOOKUP_REGISTER, FIRST_REGISTER);
        });
    }

    /// Puts bytes of the packet into registers.
    pub(crate) fn load(&mut self, load: Load) {
        self.expression("payload", |data| {
            data.be32(PAYLOAD_DESTINATION, load.register);
            data.be32(PAYLOAD_BASE, load.base);
            data.be32(PAYLOAD_OFFSET, load.offset);
            data.be32(PAYLOAD_LENGTH, load.length);
        });
    }

    /// Writes what has been loaded over the beginning of the Ethernet header.
    pub(crate) fn store_in_ethernet_header(&mut self, loaded: Load) {
        self.expression("payload", |data| {
            data.be32(PAYLOAD_SOURCE, loaded.register);
            data.be32(PAYLOAD_BASE, LINK_HEADER);
            data.be32(PAYLOAD_OFFSET, 0);
            data.be32(PAYLOAD_LENGTH, loaded.length);
        });
    }

    /// Copies the packet to a log group.
    pub(crate) fn log(&mut self, group: u16, prefix: Option<&str>) {
        self.expression("log", |data| {
            data.attribute(LOG_GROUP, &group.to_be_bytes());
            // Every packet is delivered at once, not with the next one.
            data.attribute(LOG_THRESHOLD, &1u16.to_be_bytes());
            if let Some(prefix) = prefix {
                data.string(LOG_PREFIX, prefix);
            }
        });
    }

    /// Ends the way of the packet.
    pub(crate) fn drop(&mut self) {
        self.expression("immediate", |data| {
            data.be32(IMMEDIATE_REGISTER, VERDICT_REGISTER);
            data.nested(IMMEDIATE_DATA, |value| {
                value.nested(DATA_VERDICT, |v| v.be32(VERDICT_CODE, NF_DROP));
            });
        });
    }

    fn meta(&mut self, key: u32) {
        self.expression("meta", |data| {
            data.be32(META_KEY, key);
            data.be32(META_REGISTER, FIRST_REGISTER);
        });
    }

    fn equals(&mut self, value: &[u8]) {
        self.compare(COMPARE_EQUAL, value);
    }

    fn compare(&mut self, operation: u32, value: &[u8]) {
        self.expression("cmp", |data| {
            data.be32(COMPARE_REGISTER, FIRST_REGISTER);
            data.be32(COMPARE_OPERATION, operation);
            data.nested(COMPARE_DATA, |d| d.attribute(DATA_VALUE, value));
        });
    }

    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Message<'_>)) {
        self.list.nested(LIST_ELEMENT, |element| {
            element.string(EXPRESSION_NAME, name);
            element.nested(EXPRESSION_DATA, data);
        });
    }
}

/// Bytes of the packet in registers.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    base: u32,
    offset: u32,
    length: u32,
    register: u32,
}

impl Load {
    /// Up to eight bytes behind the beginning of the IP header, in registers that no key reaches.
    pub(crate) fn aside(offset: u32, length: u32) -> Self {
        Self { base: NETWORK_HEADER, offset, length, register: LAST_REGISTERS }
    }
}

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NF_DROP: u32 = 0;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const VERDICT_REGISTER: u32 = 0;
const FIRST_REGISTER: u32 = 8;
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

//! A rule, as the expressions that the kernel runs for each packet.

use std::net::IpAddr;
use std::time::Duration;

use soccr_netlink::Message;

use super::set::{EXPRESSION_DATA, EXPRESSION_NAME, IPV4, IPV6, PORT};
use super::{DATA_VALUE, LIST_ELEMENT, to_milliseconds};

/// The expressions of a rule while it is written. The rule ends, and the next one begins, where a comparison or a
/// look-up fails, or where a packet lacks the bytes that are to be loaded.
pub(crate) struct Expressions<'m, 'b> {
    list: &'m mut Message<'b>,
}

/// The direction of a rule's packets: it decides which address of a packet is local, and which remote.
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

    /// Goes on for packets that arrive by this device.
    pub(crate) fn arrives_by(&mut self, device: u32) {
        self.meta(META_IIF);
        self.equals(&device.to_ne_bytes());
    }

    /// Goes on for packets with this mark.
    pub(crate) fn has_mark(&mut self, mark: u32) {
        self.meta(META_MARK);
        self.equals(&mark.to_ne_bytes());
    }

    /// Goes on for packets without this mark.
    pub(crate) fn lacks_mark(&mut self, mark: u32) {
        self.meta(META_MARK);
        self.compare(COMPARE_UNEQUAL, &mark.to_ne_bytes());
    }

    /// Goes on for frames of this address family, in a table of devices.
    pub(crate) fn carries_ipv6(&mut self, ipv6: bool) {
        self.meta(META_PROTOCOL);
        self.equals(&if ipv6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 });
    }

    /// Goes on for TCP packets of the connections in a set.
    pub(crate) fn is_in(&mut self, set: &str, ipv6: bool, direction: Direction) {
        self.load_key(ipv6, direction);
        self.has_key(set);
    }

    /// Loads the connection to which a TCP packet belongs.
    pub(crate) fn load_key(&mut self, ipv6: bool, direction: Direction) {
        let (source, destination) = if ipv6 { (8, 24) } else { (12, 16) };
        let (remote, remote_port, local, local_port) = match direction {
            Direction::In => (source, 0, destination, 2),
            Direction::Out => (destination, 2, source, 0),
        };
        self.load_fields(
            ipv6,
            [
                (NETWORK_HEADER, remote),
                (TRANSPORT_HEADER, remote_port),
                (NETWORK_HEADER, local),
                (TRANSPORT_HEADER, local_port),
            ],
        );
    }

    /// Loads the connection about which an ICMP error is: it quotes a TCP packet that we have sent, without IP options.
    pub(crate) fn load_quoted_key(&mut self, ipv6: bool) {
        let (source, destination, ports, protocol) = if ipv6 { (16, 32, 48, 14) } else { (20, 24, 28, 17) };
        self.transport_byte(protocol);
        self.equals(&[libc::IPPROTO_TCP as u8]);
        self.load_fields(
            ipv6,
            [destination, ports + 2, source, ports].map(|offset| (TRANSPORT_HEADER, offset)),
        );
    }

    fn load_fields(&mut self, ipv6: bool, places: [(u32, u32); 4]) {
        let address = if ipv6 { IPV6 } else { IPV4 };
        let mut register = FIRST_REGISTER;
        for ((base, offset), field) in places.into_iter().zip([address, PORT, address, PORT]) {
            self.load(Load { base, offset, length: field.length, register });
            register += field.registers();
        }
    }

    /// Goes on for connections in a set, whose key is loaded.
    pub(crate) fn has_key(&mut self, set: &str) {
        self.lookup(set, |_| {});
    }

    /// Goes on for connections that are not in a set, and whose key is loaded.
    pub(crate) fn lacks_key(&mut self, set: &str) {
        self.lookup(set, |data| data.be32(LOOKUP_FLAGS, INVERTED));
    }

    /// Goes on for connections in a map, whose key is loaded. Loads the address that belongs to it.
    pub(crate) fn look_up(&mut self, map: &str) {
        self.lookup(map, |data| data.be32(LOOKUP_DESTINATION, ADDRESS_REGISTERS));
    }

    fn lookup(&mut self, set: &str, more: impl FnOnce(&mut Message<'_>)) {
        self.expression("lookup", |data| {
            data.string(LOOKUP_SET, set);
            data.be32(LOOKUP_REGISTER, FIRST_REGISTER);
            more(data);
        });
    }

    /// Has the connection whose key is loaded stay in a set for a time, its default where none is given.
    pub(crate) fn keep_in(&mut self, set: &str, timeout: Option<Duration>) {
        self.change_set(set, DYNAMIC_UPDATE, timeout);
    }

    /// Takes the connection whose key is loaded out of a set.
    pub(crate) fn take_out(&mut self, set: &str) {
        self.change_set(set, DYNAMIC_DELETE, None);
    }

    fn change_set(&mut self, set: &str, operation: u32, timeout: Option<Duration>) {
        self.expression("dynset", |data| {
            data.string(DYNAMIC_SET, set);
            data.be32(DYNAMIC_OPERATION, operation);
            data.be32(DYNAMIC_KEY, FIRST_REGISTER);
            if let Some(timeout) = timeout {
                data.attribute(DYNAMIC_TIMEOUT, &to_milliseconds(timeout));
            }
        });
    }

    /// Goes on for TCP packets whose flags are these, among those of the mask.
    pub(crate) fn has_tcp_flags(&mut self, mask: u8, flags: u8) {
        self.transport_byte(13);
        self.expression("bitwise", |data| {
            data.be32(BITWISE_SOURCE, FIRST_REGISTER);
            data.be32(BITWISE_DESTINATION, FIRST_REGISTER);
            data.be32(BITWISE_LENGTH, 1);
            data.nested(BITWISE_MASK, |d| d.attribute(DATA_VALUE, &[mask]));
            data.nested(BITWISE_XOR, |d| d.attribute(DATA_VALUE, &[0]));
        });
        self.equals(&[flags]);
    }

    /// Goes on for ICMP messages of this type.
    pub(crate) fn is_icmp(&mut self, ipv6: bool, kind: u8) {
        self.is_protocol(if ipv6 { libc::IPPROTO_ICMPV6 } else { libc::IPPROTO_ICMP });
        self.transport_byte(0);
        self.equals(&[kind]);
    }

    /// Goes on for packets to this address. In tables of its address family alone.
    pub(crate) fn is_to(&mut self, address: IpAddr) {
        self.has_address(address, [16, 24]);
    }

    /// Goes on for packets from this address. In tables of its address family alone.
    pub(crate) fn is_from(&mut self, address: IpAddr) {
        self.has_address(address, [12, 8]);
    }

    fn has_address(&mut self, address: IpAddr, [in_ipv4, in_ipv6]: [u32; 2]) {
        // The table says the family. Where a rule of such a table says it again, nft 1.0.6 aborts when it lists the rules.
        let mut load = |offset, octets: &[u8]| {
            let length = octets.len() as u32;
            self.load(Load { base: NETWORK_HEADER, offset, length, register: FIRST_REGISTER });
            self.equals(octets);
        };
        match address {
            IpAddr::V4(address) => load(in_ipv4, &address.octets()),
            IpAddr::V6(address) => load(in_ipv6, &address.octets()),
        }
    }

    /// Goes on for packets to a transparent socket of this host (`IP_TRANSPARENT`), and for ICMP errors about those it sent.
    pub(crate) fn is_for_transparent_socket(&mut self) {
        self.expression("socket", |data| {
            data.be32(SOCKET_KEY, SOCKET_TRANSPARENT);
            data.be32(SOCKET_REGISTER, FIRST_REGISTER);
        });
        self.equals(&[1]);
    }

    /// Marks the packet.
    pub(crate) fn mark(&mut self, mark: u32) {
        self.set_register(FIRST_REGISTER, &mark.to_ne_bytes());
        self.expression("meta", |data| {
            data.be32(META_KEY, META_MARK);
            data.be32(META_SOURCE, FIRST_REGISTER);
        });
    }

    /// Sends the packet out of a device, to the neighbour whose address is loaded.
    pub(crate) fn forward(&mut self, device: u32, ipv6: bool) {
        self.set_register(DEVICE_REGISTER, &device.to_ne_bytes());
        self.expression("fwd", |data| {
            data.be32(FORWARD_DEVICE, DEVICE_REGISTER);
            data.be32(FORWARD_ADDRESS, ADDRESS_REGISTERS);
            data.be32(FORWARD_FAMILY, u32::from(if ipv6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 }));
        });
    }

    /// Sends a copy of the packet out of a device, by way of this host. In tables of one address family alone.
    pub(crate) fn copy_to(&mut self, hop: IpAddr, device: u32) {
        match hop {
            IpAddr::V4(hop) => self.set_register(FIRST_REGISTER, &hop.octets()),
            IpAddr::V6(hop) => self.set_register(FIRST_REGISTER, &hop.octets()),
        }
        self.set_register(DEVICE_REGISTER, &device.to_ne_bytes());
        self.expression("dup", |data| {
            data.be32(COPY_ADDRESS, FIRST_REGISTER);
            data.be32(COPY_DEVICE, DEVICE_REGISTER);
        });
    }

    fn set_register(&mut self, register: u32, bytes: &[u8]) {
        self.expression("immediate", |data| {
            data.be32(IMMEDIATE_REGISTER, register);
            data.nested(IMMEDIATE_DATA, |value| value.attribute(DATA_VALUE, bytes));
        });
    }

    fn transport_byte(&mut self, offset: u32) {
        self.load(Load { base: TRANSPORT_HEADER, offset, length: 1, register: FIRST_REGISTER });
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
        self.verdict(NF_DROP);
    }

    /// Ends the chain: the packet goes on.
    pub(crate) fn accept(&mut self) {
        self.verdict(NF_ACCEPT);
    }

    fn verdict(&mut self, verdict: u32) {
        self.expression("immediate", |data| {
            data.be32(IMMEDIATE_REGISTER, VERDICT_REGISTER);
            data.nested(IMMEDIATE_DATA, |value| {
                value.nested(DATA_VERDICT, |v| v.be32(VERDICT_CODE, verdict));
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
pub(crate) const NF_DROP: u32 = 0;
pub(crate) const NF_ACCEPT: u32 = 1;
pub(crate) const NFT_JUMP: u32 = -3i32 as u32;
pub(crate) const NFT_GOTO: u32 = -4i32 as u32;
pub(crate) const NFT_RETURN: u32 = -5i32 as u32;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
pub(crate) const VERDICT_REGISTER: u32 = 0;
const FIRST_REGISTER: u32 = 8;
const LAST_REGISTERS: u32 = 22;
/// Behind the longest key.
const ADDRESS_REGISTERS: u32 = 18;
const DEVICE_REGISTER: u32 = 22;
pub(crate) const DATA_VERDICT: u16 = 2;
pub(crate) const VERDICT_CODE: u16 = 1;
pub(super) const VERDICT_CHAIN: u16 = 2;
pub(crate) const META_REGISTER: u16 = 1;
pub(crate) const META_KEY: u16 = 2;
const META_SOURCE: u16 = 3;
const META_PROTOCOL: u32 = 1;
pub(crate) const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_NFPROTO: u32 = 15;
pub(crate) const META_L4PROTO: u32 = 16;
pub(crate) const COMPARE_REGISTER: u16 = 1;
pub(crate) const COMPARE_OPERATION: u16 = 2;
pub(crate) const COMPARE_DATA: u16 = 3;
pub(crate) const COMPARE_EQUAL: u32 = 0;
pub(crate) const COMPARE_UNEQUAL: u32 = 1;
const PAYLOAD_DESTINATION: u16 = 1;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
const PAYLOAD_SOURCE: u16 = 5;
const LINK_HEADER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
pub(crate) const LOOKUP_SET: u16 = 1;
pub(crate) const LOOKUP_REGISTER: u16 = 2;
const LOOKUP_DESTINATION: u16 = 3;
pub(crate) const LOOKUP_FLAGS: u16 = 5;
pub(crate) const INVERTED: u32 = 1;
const DYNAMIC_SET: u16 = 1;
const DYNAMIC_OPERATION: u16 = 3;
const DYNAMIC_KEY: u16 = 4;
const DYNAMIC_TIMEOUT: u16 = 6;
const DYNAMIC_UPDATE: u32 = 1;
const DYNAMIC_DELETE: u32 = 2;
pub(crate) const BITWISE_SOURCE: u16 = 1;
pub(crate) const BITWISE_DESTINATION: u16 = 2;
const BITWISE_LENGTH: u16 = 3;
pub(crate) const BITWISE_MASK: u16 = 4;
pub(crate) const BITWISE_XOR: u16 = 5;
const SOCKET_KEY: u16 = 1;
const SOCKET_REGISTER: u16 = 2;
const SOCKET_TRANSPARENT: u32 = 0;
const COPY_ADDRESS: u16 = 1;
const COPY_DEVICE: u16 = 2;
const FORWARD_DEVICE: u16 = 1;
const FORWARD_ADDRESS: u16 = 2;
const FORWARD_FAMILY: u16 = 3;
const LOG_GROUP: u16 = 1;
const LOG_PREFIX: u16 = 2;
const LOG_THRESHOLD: u16 = 4;
pub(crate) const IMMEDIATE_REGISTER: u16 = 1;
pub(crate) const IMMEDIATE_DATA: u16 = 2;

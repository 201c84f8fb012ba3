//! Sets of connections, and their elements.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use soccr_netlink::Message;

use super::{DATA_VALUE, LIST_ELEMENT, to_milliseconds, value};
use crate::connection::Flow;

/// The most connections of one address family that a set of fixed size holds.
pub(crate) const CAPACITY: u32 = 65536;

/// A set of connections of one address family: remote address and port, local address and port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Set<'a> {
    pub(crate) name: &'a str,
    pub(crate) ipv6: bool,
    /// How many elements the kernel makes room for at once, which halves the time to add them.
    pub(crate) size: Option<u32>,
    /// Its elements can have a time limit.
    pub(crate) timeout: bool,
    /// It is a map: each connection has an address of its own family.
    pub(crate) map: bool,
    /// Rules change it. An element stays for this time after its last change, unless a rule says otherwise, and counts its packets.
    pub(crate) dynamic: Option<Duration>,
}

impl Set<'_> {
    pub(super) fn write(self, m: &mut Message<'_>, id: u32) {
        let address = if self.ipv6 { IPV6 } else { IPV4 };
        let fields = [address, PORT, address, PORT];
        m.string(SET_NAME, self.name);
        let dynamic = self.dynamic.is_some();
        let flags = [(self.timeout || dynamic, SET_TIMEOUT), (dynamic, SET_DYNAMIC), (self.map, SET_MAP)];
        m.be32(
            SET_FLAGS,
            flags.iter().fold(SET_CONCATENATED, |all, (is, flag)| all | if *is { *flag } else { 0 }),
        );
        m.be32(SET_KEY_TYPE, fields.iter().fold(0, |all, field| all << 6 | field.kind));
        m.be32(SET_KEY_LENGTH, 2 * (address.registers() + PORT.registers()) * 4);
        if self.map {
            m.be32(SET_DATA_TYPE, address.kind);
            m.be32(SET_DATA_LENGTH, address.length);
        }
        if let Some(timeout) = self.dynamic {
            m.attribute(SET_DEFAULT_TIMEOUT, &to_milliseconds(timeout));
            m.nested(SET_EXPRESSION, |expression| expression.string(EXPRESSION_NAME, "counter"));
        }
        m.be32(SET_ID, id);
        m.nested(SET_DESCRIPTION, |description| {
            if let Some(size) = self.size {
                description.be32(SET_SIZE, size);
            }
            description.nested(SET_FIELDS, |list| {
                for field in fields {
                    list.nested(LIST_ELEMENT, |f| f.be32(FIELD_LENGTH, field.length));
                }
            });
        });
    }
}

/// A field of a set's key.
#[derive(Clone, Copy)]
pub(super) struct Field {
    /// nft's number for the type, by which it prints the set.
    kind: u32,
    /// In bytes.
    pub(super) length: u32,
}

impl Field {
    /// Registers of four bytes that the field takes.
    pub(super) fn registers(self) -> u32 {
        self.length.div_ceil(4)
    }
}

pub(crate) const EXPRESSION_NAME: u16 = 1;
pub(crate) const EXPRESSION_DATA: u16 = 2;
pub(super) const IPV4: Field = Field { kind: 7, length: 4 };
pub(super) const IPV6: Field = Field { kind: 8, length: 16 };
pub(super) const PORT: Field = Field { kind: 13, length: 2 };

/// The key of a connection in a set: remote and local address and port, each padded to four bytes.
pub(super) fn key_of(flow: &Flow) -> Vec<u8> {
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

pub(super) fn flow_of(key: &[u8]) -> Option<Flow> {
    let end = |bytes: &[u8]| {
        let (address, port) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
        Some(SocketAddr::new(address_of(address)?, u16::from_be_bytes([port[0], port[1]])))
    };
    let (remote, local) = key.split_at(key.len() / 2);
    Some(Flow { local: end(local)?, remote: end(remote)? })
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(*bytes.first_chunk()?).into()),
        16 => Some(Ipv6Addr::from(*bytes.first_chunk()?).into()),
        _ => None,
    }
}

/// Gives an element of a map its address.
pub(crate) fn write_address(element: &mut Message<'_>, address: IpAddr) {
    element.nested(ELEMENT_DATA, |data| match address {
        IpAddr::V4(address) => data.attribute(DATA_VALUE, &address.octets()),
        IpAddr::V6(address) => data.attribute(DATA_VALUE, &address.octets()),
    });
}

/// The address that an element of a map has.
pub(crate) fn read_address(element: &[u8]) -> Option<IpAddr> {
    address_of(value(value(element, ELEMENT_DATA)?, DATA_VALUE)?)
}

/// The packets and bytes that an element has counted.
pub(crate) fn read_counter(element: &[u8]) -> Option<[u64; 2]> {
    let counter = value(value(element, ELEMENT_EXPRESSION)?, EXPRESSION_DATA)?;
    let number = |kind| Some(u64::from_be_bytes(*value(counter, kind)?.first_chunk()?));
    Some([number(COUNTER_PACKETS)?, number(COUNTER_BYTES)?])
}

pub(super) const ELEMENT_KEY: u16 = 1;
/// The time limit of an element, in milliseconds.
pub(crate) const ELEMENT_TIMEOUT: u16 = 4;
/// What is left of it.
pub(crate) const ELEMENT_EXPIRATION: u16 = 5;
pub(super) const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_TIMEOUT: u32 = 0x10;
const SET_CONCATENATED: u32 = 0x80;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_DESCRIPTION: u16 = 9;
const SET_ID: u16 = 10;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LENGTH: u16 = 7;
pub(super) const SET_DEFAULT_TIMEOUT: u16 = 11;
const SET_EXPRESSION: u16 = 17;
const SET_MAP: u32 = 0x8;
const SET_DYNAMIC: u32 = 0x20;
pub(super) const ELEMENT_DATA: u16 = 2;
const ELEMENT_EXPRESSION: u16 = 7;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;
const SET_SIZE: u16 = 1;
const SET_FIELDS: u16 = 2;
const FIELD_LENGTH: u16 = 1;

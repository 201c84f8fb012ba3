//! Other addresses in the images of a network namespace: what `ip address save` and `ip route save` have written.
//!
//! ```text
//!  magic u32 · one netlink message behind another: nlmsghdr · ifaddrmsg or rtmsg · attributes
//! ```
//!
//! # References
//! `linux/if_addr.h`, `linux/rtnetlink.h`; `ip-address(8)`, `ip-route(8)`: save and restore.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::AddressMap;
use crate::error::{Error, ErrorKind, Result};

/// What begins the output of `ip address save` and of `ip route save`.
const ADDRESSES: u32 = 0x4736_1222;
const ROUTES: u32 = 0x4531_1224;

const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;

/// `struct nlmsghdr`, and what follows it in the two kinds of messages.
const HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;

/// `rtm_protocol` of a route that the kernel has made for an address.
const BY_KERNEL: u8 = 2;

/// The attributes that hold addresses.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const BROADCAST: u16 = 4;
const DESTINATION: u16 = 1;
const SOURCE: u16 = 2;
const GATEWAY: u16 = 5;
const PREFERRED_SOURCE: u16 = 7;
/// `struct rtvia`, a gateway of another family than the route's: the family comes before the address.
const VIA: u16 = 18;
const VIA_FAMILY: usize = 2;

/// Several ways: in each, attributes follow `struct rtnexthop`.
const MULTIPATH: u16 = 9;
const NEXT_HOP: usize = 8;

/// The addresses or routes of one network namespace.
#[derive(Debug)]
pub(super) struct Dump {
    pub(super) bytes: Vec<u8>,
    /// Addresses, or routes, that became other ones.
    pub(super) changed: usize,
    /// The addresses that it configures, with the length of their networks' prefix; none where it has routes.
    pub(super) configured: Vec<(IpAddr, u8)>,
    /// The gateways of its routes.
    pub(super) gateways: Vec<IpAddr>,
}

impl Dump {
    /// Gives every address that one of `maps` concerns, whatever its port, its new value. Everything else stays as it
    /// is, byte for byte.
    ///
    /// # Errors
    /// [`Foreign`](crate::ErrorKind::Foreign) where it is another file; a message that is malformed.
    pub(super) fn rewrite(mut bytes: Vec<u8>, maps: &[AddressMap]) -> Result<Self> {
        let (kind, fixed) = match bytes.first_chunk().map(|magic| u32::from_le_bytes(*magic)) {
            Some(ADDRESSES) => (NEW_ADDRESS, ADDRESS_HEADER),
            Some(ROUTES) => (NEW_ROUTE, ROUTE_HEADER),
            _ => return Err(Error::new(ErrorKind::Foreign, "neither addresses nor routes of `ip save`")),
        };
        let (mut changed, mut configured, mut gateways) = (0, Vec::new(), Vec::new());
        let mut rest = &mut bytes[size_of::<u32>()..];
        while !rest.is_empty() {
            let (message, behind) = split_message(rest)?;
            rest = behind;
            if u16::from_ne_bytes([message[4], message[5]]) != kind || message.len() < HEADER + fixed {
                continue;
            }
            let (header, attributes) = message[HEADER..].split_at_mut(fixed);
            let before = attributes.to_vec();
            if kind == NEW_ADDRESS {
                configured.extend(rewrite_address(header, attributes, maps)?.map(|ip| (ip, header[1])));
            } else {
                gateways.extend(rewrite_route(header, attributes, maps)?);
            }
            changed += usize::from(before != attributes);
        }
        Ok(Self { bytes, changed, configured, gateways })
    }
}

/// Splits a message off, whose length is told at its begin, and the bytes that align the next one.
fn split_message(bytes: &mut [u8]) -> Result<(&mut [u8], &mut [u8])> {
    let damaged = || Error::damaged("a netlink message is malformed");
    let length = u32::from_ne_bytes(*bytes.first_chunk().ok_or_else(damaged)?) as usize;
    if length < HEADER {
        return Err(damaged());
    }
    let aligned = length.next_multiple_of(4).min(bytes.len());
    let (message, behind) = bytes.split_at_mut_checked(aligned).ok_or_else(damaged)?;
    Ok((message.get_mut(..length).ok_or_else(damaged)?, behind))
}

/// The new address, where it is configured: a peer's is not.
fn rewrite_address(header: &[u8], attributes: &mut [u8], maps: &[AddressMap]) -> Result<Option<IpAddr>> {
    let prefix = header[1];
    let (mut local, mut address, mut broadcast) = (None, None, None);
    each_address(attributes, |kind, value| {
        match kind {
            LOCAL => local = Some(value),
            ADDRESS => address = Some(value),
            BROADCAST => broadcast = Some(value),
            _ => {}
        }
        None
    })?;
    let Some(old) = local.or(address) else { return Ok(None) };
    let new = apply(maps, old);
    each_address(attributes, |kind, value| match kind {
        ADDRESS | LOCAL => Some(apply(maps, value)),
        BROADCAST if value == last_of(old, prefix) => Some(last_of(new, prefix)),
        _ => None,
    })?;
    Ok(Some(new))
}

/// A route that the kernel has made for an address goes to the network of the new one. Returns the gateways.
fn rewrite_route(header: &[u8], attributes: &mut [u8], maps: &[AddressMap]) -> Result<Vec<IpAddr>> {
    let (prefix, by_kernel) = (header[1], header[5] == BY_KERNEL);
    let network = |ip| first_of(ip, prefix);
    let of_network = |destination| {
        // Each rule is for one address: the route is its network's, if that is where the address lies.
        let mut rules = maps.iter().map(AddressMap::ips).filter(|_| by_kernel);
        let rule = rules.find(|(old, _)| network(*old) == destination);
        rule.map_or_else(|| apply(maps, destination), |(_, new)| network(new))
    };
    let mut gateways = Vec::new();
    let mut change = |kind, value: &mut [u8]| {
        let address = if kind == VIA { value.get_mut(VIA_FAMILY..).unwrap_or_default() } else { value };
        change_address(address, |old| match kind {
            DESTINATION => Some(of_network(old)),
            GATEWAY | VIA => {
                gateways.push(apply(maps, old));
                gateways.last().copied()
            }
            SOURCE | PREFERRED_SOURCE => Some(apply(maps, old)),
            _ => None,
        });
        Ok(())
    };
    each_attribute(attributes, |kind, value| match kind {
        MULTIPATH => each_block(value, NEXT_HOP, |hop| each_attribute(&mut hop[NEXT_HOP..], &mut change)),
        _ => change(kind, value),
    })?;
    Ok(gateways)
}

/// Shows every attribute that holds an address, and puts in its place what is returned, if it is of the same family.
fn each_address(attributes: &mut [u8], mut change: impl FnMut(u16, IpAddr) -> Option<IpAddr>) -> Result<()> {
    each_attribute(attributes, |kind, value| {
        change_address(value, |old| change(kind, old));
        Ok(())
    })
}

/// Shows an address, if this is one, and puts in its place what is returned.
fn change_address(bytes: &mut [u8], change: impl FnOnce(IpAddr) -> Option<IpAddr>) {
    let old = match bytes.len() {
        4 => <[u8; 4]>::try_from(&*bytes).ok().map(|bytes| IpAddr::from(Ipv4Addr::from(bytes))),
        16 => <[u8; 16]>::try_from(&*bytes).ok().map(|bytes| IpAddr::from(Ipv6Addr::from(bytes))),
        _ => None,
    };
    match old.and_then(change) {
        Some(IpAddr::V4(new)) if bytes.len() == 4 => bytes.copy_from_slice(&new.octets()),
        Some(IpAddr::V6(new)) if bytes.len() == 16 => bytes.copy_from_slice(&new.octets()),
        _ => {}
    }
}

/// Shows the kind and the value of every attribute.
fn each_attribute(attributes: &mut [u8], mut each: impl FnMut(u16, &mut [u8]) -> Result<()>) -> Result<()> {
    const HEADER: usize = 4;
    each_block(attributes, HEADER, |attribute| {
        let (header, value) = attribute.split_at_mut(HEADER);
        each(u16::from_ne_bytes([header[2], header[3]]), value)
    })
}

/// Shows every block of those that begin with their length, and have a header of `least` bytes.
fn each_block(
    mut rest: &mut [u8],
    least: usize,
    mut each: impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<()> {
    let damaged = || Error::damaged("a netlink attribute is malformed");
    while !rest.is_empty() {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk().ok_or_else(damaged)?));
        each(rest.get_mut(..length).filter(|bytes| bytes.len() >= least).ok_or_else(damaged)?)?;
        let aligned = length.next_multiple_of(4).min(rest.len());
        rest = &mut rest[aligned..];
    }
    Ok(())
}

/// What an address becomes by the first rule that concerns it, whatever the port.
fn apply(maps: &[AddressMap], address: IpAddr) -> IpAddr {
    let mut rules = maps.iter().map(AddressMap::ips);
    rules.find(|(old, _)| *old == address).map_or(address, |(_, new)| new)
}

/// The first address of a network, which names it.
pub(super) fn first_of(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() & !hosts(32, prefix) as u32).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !hosts(128, prefix)).into(),
    }
}

/// The last one, for broadcasts.
fn last_of(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() | hosts(32, prefix) as u32).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() | hosts(128, prefix)).into(),
    }
}

/// The bits behind the prefix.
fn hosts(bits: u32, prefix: u8) -> u128 {
    let free = bits.saturating_sub(prefix.into());
    u128::MAX.checked_shr(128 - free).unwrap_or(0)
}

//! A host: a namespace and the addresses it has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use crate::Namespace;

/// The kinds of addresses that a TCP socket of this kernel can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6 with global addresses.
    V6,
    /// An IPv6 socket that speaks IPv4: `::ffff:192.0.2.1` (RFC 4291 §2.5.5.2).
    Mapped,
    /// IPv6 with link-local addresses and their scope id.
    LinkLocal,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::V4, Self::V6, Self::Mapped, Self::LinkLocal];
}

/// A host with one link, `eth0`.
#[derive(Debug)]
pub struct Host {
    /// Its network.
    pub namespace: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its global IPv6 address.
    pub v6: Ipv6Addr,
    /// Its link-local IPv6 address, which no router forwards.
    pub link_local: Ipv6Addr,
    /// The scope id of link-local addresses on `eth0`.
    pub scope: u32,
}

impl Host {
    /// Runs `inside` on this host, see [`Namespace::run`].
    ///
    /// # Panics
    /// As [`Namespace::run`] does.
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> T {
        self.namespace.run(inside)
    }

    /// The address of this host, for a socket on it.
    pub fn address(&self, family: Family, port: u16) -> SocketAddr {
        self.address_of(self, family, port)
    }

    /// The address of `other`, for a socket on this host.
    pub fn address_of(&self, other: &Self, family: Family, port: u16) -> SocketAddr {
        match family {
            Family::V4 => (other.v4, port).into(),
            Family::V6 => (other.v6, port).into(),
            Family::Mapped => (other.v4.to_ipv6_mapped(), port).into(),
            Family::LinkLocal => SocketAddrV6::new(other.link_local, port, 0, self.scope).into(),
        }
    }

    /// The addresses with the length of the network's prefix.
    pub(crate) fn prefixes(&self) -> [(IpAddr, u8); 3] {
        [(self.v4.into(), 24), (self.v6.into(), 64), (self.link_local.into(), 64)]
    }
}

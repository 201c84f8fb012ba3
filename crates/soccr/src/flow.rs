//! The two ends of a connection: what names it on the network.

use std::net::{IpAddr, SocketAddr};

use crate::error::{Error, Result};

/// The two ends of a connection, as one of them sees it: what names it on the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Our end.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
}

impl Flow {
    /// The packets are IPv4: of an IPv4 socket, or of an IPv6 socket with IPv4-mapped addresses.
    pub fn is_ipv4(&self) -> bool {
        self.remote.ip().to_canonical().is_ipv4()
    }

    /// The connection as its packets show it: its addresses neither IPv4-mapped nor with a scope. So locks name it.
    pub fn on_the_wire(&self) -> Self {
        let plain = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
        Self { local: plain(self.local), remote: plain(self.remote) }
    }

    /// The connection as the peer sees it.
    pub fn reversed(&self) -> Self {
        Self { local: self.remote, remote: self.local }
    }

    /// Checks the two addresses against each other.
    ///
    /// # Errors
    /// Invalid: addresses of two families, unspecified ones, link-local ones without a scope.
    pub fn validate(&self) -> Result<()> {
        self.validate_on_the_wire()?;
        let is_scoped = |end: SocketAddr| match end {
            SocketAddr::V6(end) => !end.ip().is_unicast_link_local() || end.scope_id() != 0,
            SocketAddr::V4(_) => true,
        };
        if is_scoped(self.local) && is_scoped(self.remote) {
            return Ok(());
        }
        Err(Error::invalid("a link-local address has no scope id"))
    }

    /// The same for addresses as packets show them: those have no scope.
    pub(crate) fn validate_on_the_wire(&self) -> Result<()> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Error::invalid(what)) };
        check(self.local.is_ipv4() == self.remote.is_ipv4(), "the addresses are of two families")?;
        if let (IpAddr::V6(local), IpAddr::V6(remote)) = (self.local.ip(), self.remote.ip()) {
            check(
                local.to_ipv4_mapped().is_some() == remote.to_ipv4_mapped().is_some(),
                "one address is IPv4-mapped, the other is not",
            )?;
        }
        check(self.local.port() != 0, "the local port is zero")?;
        check(self.remote.port() != 0, "the remote port is zero")?;
        check(!self.local.ip().is_unspecified(), "the local address is unspecified")?;
        check(!self.remote.ip().is_unspecified(), "the remote address is unspecified")
    }
}

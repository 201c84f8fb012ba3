//! NAT on the way of a connection: its new home must translate in the same way, or the peer sees another address.

use std::fmt;
use std::net::SocketAddr;

use anyhow::Result;
use serde::Serialize;
use soccr::Flow;
use soccr::conntrack::Tracking;
use soccr_handover::foreign::namespace::Identity;

/// The connection tracking tables that may know a connection.
#[derive(Debug)]
pub(crate) struct Nat {
    /// The network namespace of the connections.
    inside: Option<Tracking>,
    /// The namespace in which this command was started, if that is another one: the host of a container.
    outside: Option<Tracking>,
}

/// A connection as its packets show it before they are translated.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Translated {
    local: SocketAddr,
    remote: SocketAddr,
    outside: bool,
}

impl Nat {
    /// Opens the table of this network namespace, and that of the one which `enter` enters. A table that cannot be opened counts as empty.
    pub(crate) fn around(enter: impl FnOnce() -> Result<()>) -> Result<Self> {
        let look = || Tracking::open().ok().flatten();
        let (here, outside) = (Identity::here()?, look());
        enter()?;
        Ok(Self {
            inside: look(),
            outside: outside.filter(|_| Identity::here().is_ok_and(|now| now != here)),
        })
    }

    /// What NAT makes of the addresses of a connection; `None` if they stay.
    pub(crate) fn of(&mut self, flow: Flow) -> Option<Translated> {
        let find = |tracking: &mut Option<Tracking>, outside| {
            let tracked = tracking.as_mut()?.find(flow).ok()??;
            let Flow { local, remote } = tracked.wire;
            tracked.is_translated(flow).then_some(Translated { local, remote, outside })
        };
        find(&mut self.outside, true).or_else(|| find(&mut self.inside, false))
    }
}

impl Translated {
    /// What that means for a move.
    pub(crate) fn warning(&self) -> String {
        match self.outside {
            true => format!(
                "{self}: on another host its peer resets it, unless that has an entry like it (docs/containers.md)"
            ),
            false => format!("{self}: the target must have the same rules"),
        }
    }
}

impl fmt::Display for Translated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.outside { "outside of" } else { "in" };
        write!(f, "NAT {place} its network: on the wire it is {} to {}", self.local, self.remote)
    }
}

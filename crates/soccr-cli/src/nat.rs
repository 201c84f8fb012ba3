//! NAT on the way of a connection: its new home must translate in the same way, or the peer sees another address.

use std::fmt;
use std::net::SocketAddr;

use anyhow::Result;
use serde::Serialize;
use soccr::conntrack::Tracking;
use soccr::{Error, Flow};
use soccr_handover::foreign::namespace::Identity;

use crate::exit;

/// The connection tracking tables that may know a connection.
#[derive(Debug)]
pub(crate) struct Nat {
    /// The network namespace of the connections.
    inside: Option<Tracking>,
    /// The namespace in which this command was started, if that is another one: the host of a container.
    outside: Option<Tracking>,
    /// Why it is not known of all connections whether they are translated: the first reason.
    unknown: Option<Error>,
    /// People have been told.
    told: bool,
}

/// A connection as its packets show it before they are translated.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Translated {
    local: SocketAddr,
    remote: SocketAddr,
    outside: bool,
}

impl Nat {
    /// Opens the table of this network namespace, and that of the one which `enter` enters.
    pub(crate) fn around(enter: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (here, outside) = (Identity::here()?, Tracking::open());
        enter()?;
        let outside = if Identity::here()? == here { Ok(None) } else { outside };
        let mut unknown = None;
        let mut opened = |table: soccr::Result<Option<Tracking>>| note(&mut unknown, table).flatten();
        Ok(Self { inside: opened(Tracking::open()), outside: opened(outside), unknown, told: false })
    }

    /// What NAT makes of the addresses of a connection; `None` if they stay.
    pub(crate) fn of(&mut self, flow: Flow) -> Option<Translated> {
        let unknown = &mut self.unknown;
        let mut find = |tracking: &mut Option<Tracking>, outside| {
            let tracked = note(unknown, tracking.as_mut()?.find(flow))??;
            let Flow { local, remote } = tracked.wire;
            tracked.is_translated(flow).then_some(Translated { local, remote, outside })
        };
        find(&mut self.outside, true).or_else(|| find(&mut self.inside, false))
    }

    /// Says why it is not known of all connections whether they are translated, where that is so: once.
    pub(crate) fn complain(&mut self) {
        let Some(error) = self.unknown.take_if(|_| !self.told) else { return };
        self.told = true;
        let reason = match error.errno() {
            Some(libc::EINVAL | libc::EPROTONOSUPPORT) => {
                "the kernel tells nobody what it tracks: modprobe nf_conntrack_netlink".to_owned()
            }
            _ => error.to_string(),
        };
        exit::complain(&format!("whether NAT translates connections is not known here: {reason}"));
    }
}

/// What connection tracking has answered. Users without rights over it get no answer, which is nothing to complain of.
fn note<T>(unknown: &mut Option<Error>, answer: soccr::Result<T>) -> Option<T> {
    match answer {
        Ok(answer) => Some(answer),
        Err(error) => {
            if error.errno() != Some(libc::EPERM) {
                unknown.get_or_insert(error);
            }
            None
        }
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

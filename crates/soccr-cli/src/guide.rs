//! What becomes of packets for connections that have left this host: they are steered to where those are, or dropped.

use std::net::IpAddr;

use anyhow::{Result, bail};
use soccr::Flow;
use soccr::steer::{self, NextHop};

use crate::exit;
use crate::silence::Silence;

/// A next hop on the command line: `192.0.2.2`, or `fe80::2 dev tun0`.
#[derive(Clone, Debug)]
pub(crate) struct Hop {
    address: IpAddr,
    device: Option<String>,
}

/// Reads a [`Hop`].
pub(crate) fn parse_hop(text: &str) -> Result<Hop, String> {
    let wrong = || "an address of the target, or ADDRESS dev DEVICE".to_owned();
    let words: Vec<&str> = text.split_whitespace().collect();
    let (address, device) = match words[..] {
        [address] => (address, None),
        [address, "dev", device] => (address, Some(device.to_owned())),
        _ => return Err(wrong()),
    };
    Ok(Hop { address: address.parse().map_err(|_| wrong())?, device })
}

impl Hop {
    /// Looks for it in the network of this thread.
    pub(crate) fn find(&self) -> Result<NextHop> {
        Ok(match &self.device {
            Some(device) => NextHop::on(self.address, device)?,
            None => NextHop::new(self.address)?,
        })
    }
}

/// The next hops for connections, one for each address family.
pub(crate) fn find_hops(hops: &[Hop], flows: &[Flow]) -> Result<Vec<NextHop>> {
    for flow in flows {
        if !hops.iter().any(|hop| hop.address.is_ipv4() == flow.is_ipv4()) {
            let family = if flow.is_ipv4() { "IPv4" } else { "IPv6" };
            bail!("{} {}: no next hop for {family}: name one more", flow.local, flow.remote);
        }
    }
    let needed = |hop: &&Hop| flows.iter().any(|flow| flow.is_ipv4() == hop.address.is_ipv4());
    hops.iter().filter(needed).map(Hop::find).collect()
}

/// Steers connections, each to the next hop of its family.
pub(crate) fn redirect(flows: &[Flow], hops: &[NextHop]) -> Result<()> {
    for hop in hops {
        let flows: Vec<Flow> =
            flows.iter().filter(|flow| flow.is_ipv4() == hop.address().is_ipv4()).copied().collect();
        if !flows.is_empty() {
            steer::redirect(&flows, hop)?;
        }
    }
    Ok(())
}

/// What this host does about connections that have left it. Dropping it undoes that, until it is told to
/// [stay](Self::stay).
#[derive(Debug)]
pub(crate) enum Guide {
    Silent(Silence),
    Steering { hops: Vec<NextHop>, flows: Vec<Flow> },
}

impl Guide {
    /// Takes care of more connections.
    pub(crate) fn extend(&mut self, more: Vec<Flow>) -> Result<()> {
        match self {
            Self::Silent(silence) => silence.extend(more),
            Self::Steering { hops, flows } => {
                flows.extend(&more);
                redirect(&more, hops)
            }
        }
    }

    /// These connections have not left after all.
    pub(crate) fn end_about(&mut self, back: &[Flow]) -> Result<()> {
        match self {
            Self::Silent(silence) => silence.end_about(back),
            Self::Steering { flows, .. } => {
                let (ended, stay) = flows.iter().partition::<Vec<Flow>, _>(|flow| back.contains(flow));
                *flows = stay;
                Ok(steer::stop(&ended).map(drop)?)
            }
        }
    }

    /// The connections have left for good.
    pub(crate) fn stay(&mut self) {
        match self {
            Self::Silent(silence) => silence.stay(),
            Self::Steering { flows, .. } => flows.clear(),
        }
    }
}

impl Drop for Guide {
    fn drop(&mut self) {
        if let Self::Steering { flows, .. } = self
            && !flows.is_empty()
            && let Err(error) = steer::stop(flows)
        {
            exit::complain(&error.to_string());
        }
    }
}

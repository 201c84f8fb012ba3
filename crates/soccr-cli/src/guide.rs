//! Next hops, as the command line names them.

use std::net::IpAddr;

use anyhow::{Result, bail};
use soccr::Flow;
use soccr::steer::NextHop;

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

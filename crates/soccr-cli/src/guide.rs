//! Next hops and tunnels, as the command line names them.

use std::fmt;
use std::net::IpAddr;

use anyhow::{Result, bail};
use soccr::Flow;
use soccr::steer::{NextHop, Steerer, Tunnel};
use soccr_handover::Path;

use crate::exit::{self, Coded, Exit};

/// A next hop on the command line: `192.0.2.2`, or `fe80::2 dev tun0`, or `vxlan:203.0.113.2`.
#[derive(Clone, Debug)]
pub(crate) enum Hop {
    Address { address: IpAddr, device: Option<String> },
    Tunnel(IpAddr),
}

/// Reads a [`Hop`].
pub(crate) fn parse_hop(text: &str) -> Result<Hop, String> {
    let wrong = || "an address of the target, ADDRESS dev DEVICE, or vxlan:ADDRESS".to_owned();
    let address = |text: &str| text.parse().map_err(|_| wrong());
    if let Some(remote) = text.strip_prefix("vxlan:") {
        return Ok(Hop::Tunnel(address(remote)?));
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    let (text, device) = match words[..] {
        [address] => (address, None),
        [address, "dev", device] => (address, Some(device.to_owned())),
        _ => return Err(wrong()),
    };
    Ok(Hop::Address { address: address(text)?, device })
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { address, device: None } => address.fmt(f),
            Self::Address { address, device: Some(device) } => write!(f, "{address} dev {device}"),
            Self::Tunnel(remote) => write!(f, "vxlan:{remote}"),
        }
    }
}

impl Hop {
    /// Whether it serves connections of this family.
    fn serves(&self, ipv4: bool) -> bool {
        match self {
            Self::Address { address, .. } => address.is_ipv4() == ipv4,
            Self::Tunnel(_) => true,
        }
    }

    /// Looks for the next hop in the network of this thread.
    fn find(&self, ipv6: bool) -> Result<NextHop> {
        Ok(match self {
            Self::Address { address, device: Some(device) } => NextHop::on(*address, device)?,
            Self::Address { address, device: None } => NextHop::new(*address)?,
            Self::Tunnel(remote) => Tunnel::to(*remote)?.other_end(ipv6)?,
        })
    }
}

/// Refuses next hops of which not all can serve: what is named must count.
pub(crate) fn check_hops(hops: &[Hop]) -> Result<()> {
    let serve = |ipv4: bool| hops.iter().filter(move |hop| hop.serves(ipv4)).count();
    match [true, false].into_iter().all(|ipv4| serve(ipv4) <= 1) {
        true => Ok(()),
        false => {
            let what = "--steer: one next hop for each address family, or one tunnel, which serves both";
            bail!(Coded(Exit::Usage, what.into()))
        }
    }
}

/// The next hops for connections, one for each address family that they have.
fn find_hops(hops: &[Hop], flows: &[Flow]) -> Result<Vec<NextHop>> {
    let mut found = Vec::new();
    for ipv4 in [true, false] {
        let Some(flow) = flows.iter().find(|flow| flow.is_ipv4() == ipv4) else { continue };
        let Some(hop) = hops.iter().find(|hop| hop.serves(ipv4)) else {
            let family = if ipv4 { "IPv4" } else { "IPv6" };
            bail!("{} {}: no next hop for {family}: name one more", flow.local, flow.remote);
        };
        found.push(hop.find(!ipv4)?);
    }
    Ok(found)
}

/// A tunnel that was made for a hand-over. It is removed again if nothing is steered through it in the end.
#[derive(Debug)]
pub(crate) struct Made(Tunnel);

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove_unused() {
            exit::complain(&error.to_string());
        }
    }
}

/// How packets for connections follow them, where the target makes its end of a tunnel. Call this, and drop the result, in the
/// network of the connections.
pub(crate) fn path(hops: &[Hop], flows: &[Flow]) -> Result<(Path, Option<Made>)> {
    match hops {
        [Hop::Tunnel(remote)] => {
            let tunnel = Tunnel::to(*remote)?;
            // Only then: one that is dropped removes the tunnel.
            let made = tunnel.open()?.then(|| Made(tunnel));
            Ok((tunnel.into(), made))
        }
        hops => Ok((find_hops(hops, flows)?.into(), None)),
    }
}

/// Steers connections, each to the next hop of its family, through a tunnel that is there already. Their answers come as before.
pub(crate) fn redirect(hop: &Hop, flows: &[Flow]) -> Result<()> {
    let mut steerer = Steerer::new()?;
    for (number, hop) in find_hops(std::slice::from_ref(hop), flows)?.into_iter().enumerate() {
        let is_ipv4 = hop.address().is_ipv4();
        let flows: Vec<Flow> = flows.iter().filter(|flow| flow.is_ipv4() == is_ipv4).copied().collect();
        match steerer.redirect_only(&flows, &hop) {
            // Those of the other family are steered.
            Err(error) if number > 0 => bail!(Coded(Exit::SomeFailed, error.to_string())),
            outcome => outcome?,
        }
    }
    Ok(())
}

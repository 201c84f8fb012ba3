//! Connections are steered, each from where its packets arrive.

use std::collections::HashMap;
use std::net::IpAddr;

use soccr_netlink::{Packet, Rtnetlink};

use super::{NextHop, Steering, Times, Tunnel, index, system, with_route};
use crate::connection::Flow;
use crate::error::{Error, Result};

/// Steers connections to a host from now on, in the network namespace of the calling thread, whatever was steered where
/// before. Each arrives by the device that has its local address, or, where none has, by that of the route to the peer, or by
/// a [`Tunnel`].
///
/// # Errors
/// Refused: the next hop has another address family than a connection. `EPERM` without `CAP_NET_ADMIN`;
/// `EOPNOTSUPP` or `ENOENT` where the kernel lacks `CONFIG_NFT_FWD_NETDEV`.
pub fn redirect(flows: &[Flow], to: &NextHop) -> Result<()> {
    let others = Steering::list()?;
    let arrivals = arrivals(flows)?;
    let mut used = Vec::with_capacity(arrivals.len());
    for (device, flows) in &arrivals {
        let steering = Steering::open(device, to.device(), Times::default())?;
        steering.steer(flows, to.address())?;
        used.push(steering);
    }
    let answers: Vec<Flow> = flows.iter().map(Flow::reversed).collect();
    for other in others {
        if !used.contains(&other) {
            other.stop(flows)?;
        }
        other.stop(&answers)?;
    }
    Ok(())
}

/// Sends on what the new host answers, too, where the network between it and the peers forbids foreign sources: it
/// [answers through this host](super::Foreign::answer_through), by the device of `from`. To be called after [`redirect`], which
/// ends it, as [`stop`] does.
///
/// # Errors
/// Those of [`redirect`]; refused where no router and no neighbour answers on the way to a peer.
pub fn redirect_answers(flows: &[Flow], from: &NextHop) -> Result<()> {
    let mut ways: HashMap<NextHop, Vec<Flow>> = HashMap::new();
    let mut hops = HashMap::new();
    for flow in flows.iter().map(Flow::on_the_wire) {
        let peer = flow.remote.ip();
        let hop = match hops.get(&peer) {
            Some(hop) => hop,
            None => hops.entry(peer).or_insert(NextHop::towards(peer)?),
        };
        ways.entry(hop.clone()).or_default().push(flow.reversed());
    }
    for (hop, answers) in ways {
        let steering = Steering::open(from.device(), hop.device(), Times::default())?;
        steering.steer(&answers, hop.address())?;
    }
    Ok(())
}

/// Ends the steering of connections, in the network namespace of the calling thread, wherever they are steered. Others
/// are passed over. Returns how many were steered.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub fn stop(flows: &[Flow]) -> Result<usize> {
    let answers: Vec<Flow> = flows.iter().map(Flow::reversed).collect();
    let mut most = 0;
    for steering in Steering::list()? {
        // Each may arrive by several devices.
        most = steering.stop(flows)?.max(most);
        steering.stop(&answers)?;
    }
    Ok(most)
}

/// The devices by which connections arrive.
fn arrivals(flows: &[Flow]) -> Result<HashMap<String, Vec<Flow>>> {
    let tunnels = Tunnel::list()?;
    with_route(|route| {
        let mut links: HashMap<IpAddr, Option<u32>> = HashMap::new();
        let lo = index(route, "lo")?;
        let mut arrivals: HashMap<String, Vec<Flow>> = HashMap::new();
        for flow in flows.iter().map(Flow::on_the_wire) {
            let local = flow.local.ip();
            let own = match links.get(&local) {
                Some(own) => *own,
                None => {
                    let found = system("ip address", route.link_with(local))?.filter(|link| *link != lo);
                    *links.entry(local).or_insert(found)
                }
            };
            let link = match own {
                Some(link) => link,
                None => {
                    for tunnel in &tunnels {
                        arrivals.entry(tunnel.device()).or_default().push(flow);
                    }
                    system("ip route get", route.way(Packet::to(flow.remote.ip())))?.link
                }
            };
            arrivals.entry(name(route, link)?).or_default().push(flow);
        }
        Ok(arrivals)
    })
}

fn name(route: &Rtnetlink, link: u32) -> Result<String> {
    route.name(link).map_err(|error| Error::system("if_indextoname", error))
}

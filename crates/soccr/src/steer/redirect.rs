//! Connections are steered, each from where its packets arrive.

use std::collections::HashMap;
use std::net::IpAddr;

use soccr_netlink::{Family, Packet, Rtnetlink, Socket};

use super::steering::reversed;
use super::{Foreign, NextHop, Numbers, Steering, Times, Tunnel, foreign, index, system};
use crate::connection::Flow;
use crate::conntrack;
use crate::error::{Error, Result};

/// Steers connections, and has them delivered, again and again.
///
/// It keeps its sockets: the kernel takes its time to close one of Netfilter, and lets nobody change a table meanwhile (it waits
/// until what was deleted before is free). Connections would be silent for as long.
#[derive(Debug)]
pub struct Steerer {
    netfilter: Socket,
    route: Rtnetlink,
}

impl Steerer {
    /// In the network namespace of the calling thread, from whatever thread it is used later.
    ///
    /// # Errors
    /// The errors of opening netlink sockets.
    pub fn new() -> Result<Self> {
        let open = || Ok(Self { netfilter: Socket::open(Family::Netfilter)?, route: Rtnetlink::here()? });
        open().map_err(|error: std::io::Error| Error::system("netlink socket", error).at("steer"))
    }

    /// Steers connections to a host from now on, whatever was steered where before. Each arrives by the device that has its
    /// local address, or, where none has, by that of the route to the peer, or by a [`Tunnel`].
    ///
    /// # Errors
    /// Refused: the next hop has another address family than a connection; a connection is behind NAT, and nothing is steered then.
    /// `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` or `ENOENT` where the kernel lacks `CONFIG_NFT_FWD_NETDEV`.
    pub fn redirect(&mut self, flows: &[Flow], to: &NextHop) -> Result<()> {
        self.begin(flows, to).map_err(|error| error.at("steer"))
    }

    /// Sends on what the new host answers, too, where the network between it and the peers forbids foreign sources: it
    /// [answers through this host](super::Foreign::answer_through), by the device of `from`. To be called after
    /// [`redirect`](Self::redirect), which ends it, as [`stop`](Self::stop) does.
    ///
    /// # Errors
    /// The errors of [`redirect`](Self::redirect). Refused: no router and no neighbour answers on the way to a peer.
    pub fn redirect_answers(&mut self, flows: &[Flow], from: &NextHop) -> Result<()> {
        self.begin_answers(flows, from).map_err(|error| error.at("steer"))
    }

    /// Ends the steering of connections, wherever they are steered. Others are passed over. Returns how many were steered.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn stop(&mut self, flows: &[Flow]) -> Result<usize> {
        stop_by(&mut self.netfilter, flows).map_err(|error| error.at("steer"))
    }

    /// [`Foreign::deliver_from`], on the other side.
    ///
    /// # Errors
    /// The same.
    pub fn deliver(&mut self, address: IpAddr, numbers: Numbers, from: Option<&NextHop>) -> Result<Foreign> {
        Foreign::deliver_by(&mut self.netfilter, &mut self.route, address, numbers, from)
            .map_err(|error| error.at("steer"))
    }

    fn begin(&mut self, flows: &[Flow], to: &NextHop) -> Result<()> {
        self.check_translation(flows)?;
        let others = Steering::list_by(&mut self.netfilter)?;
        let mut used = Vec::new();
        for (device, flows) in arrivals(&mut self.route, flows)? {
            let steering = self.open(&device, to.device())?;
            steering.steer_by(&mut self.netfilter, &flows, to.address(), true)?;
            used.push(steering);
        }
        let answers = reversed(flows);
        for other in others {
            if !used.contains(&other) {
                other.forget_by(&mut self.netfilter, &[flows, &answers].concat())?;
            } else if used.len() > 1 {
                other.forget_by(&mut self.netfilter, &answers)?;
            }
        }
        Ok(())
    }

    /// Packets are steered before they are translated: they would be looked for by addresses that they do not have yet.
    fn check_translation(&mut self, flows: &[Flow]) -> Result<()> {
        match system("conntrack", conntrack::translated(&mut self.netfilter, flows))?.first() {
            Some((flow, wire)) => Err(Error::refused(
                format!(
                    "{} to {}: a connection behind NAT, {} to {} on the wire, cannot be steered",
                    flow.local, flow.remote, wire.local, wire.remote
                ),
                "let the address itself move, to a host with the same NAT",
            )),
            None => Ok(()),
        }
    }

    fn begin_answers(&mut self, flows: &[Flow], from: &NextHop) -> Result<()> {
        let mut ways: HashMap<NextHop, Vec<Flow>> = HashMap::new();
        let mut hops = HashMap::new();
        // Where this host has to answer through another one itself, these answers have to, too.
        let foreign = foreign::list(&mut self.route)?;
        for flow in flows.iter().map(Flow::on_the_wire) {
            let ends = (flow.local.ip(), flow.remote.ip());
            let hop = match hops.get(&ends) {
                Some(hop) => hop,
                None => {
                    let delivered = foreign.iter().find(|foreign| foreign.address() == ends.0);
                    let hop =
                        match delivered.map(|foreign| foreign.answers_by(&mut self.route)).transpose()? {
                            Some(Some(hop)) => hop,
                            _ => NextHop::towards_by(&mut self.route, ends.1)?,
                        };
                    hops.entry(ends).or_insert(hop)
                }
            };
            ways.entry(hop.clone()).or_default().push(flow.reversed());
        }
        for (hop, answers) in ways {
            let steering = self.open(from.device(), hop.device())?;
            steering.steer_by(&mut self.netfilter, &answers, hop.address(), false)?;
        }
        Ok(())
    }

    fn open(&mut self, ingress: &str, egress: &str) -> Result<Steering> {
        Steering::open_by(&mut self.netfilter, &self.route, ingress, egress, Times::default())
    }
}

/// [`Steerer::redirect`] in the network namespace of the calling thread, once.
///
/// # Errors
/// The errors of [`Steerer`].
pub fn redirect(flows: &[Flow], to: &NextHop) -> Result<()> {
    Steerer::new()?.redirect(flows, to)
}

/// [`Steerer::redirect_answers`] in the network namespace of the calling thread, once.
///
/// # Errors
/// The errors of [`Steerer`].
pub fn redirect_answers(flows: &[Flow], from: &NextHop) -> Result<()> {
    Steerer::new()?.redirect_answers(flows, from)
}

/// [`Steerer::stop`] in the network namespace of the calling thread, once.
///
/// # Errors
/// The errors of [`Steerer`].
pub fn stop(flows: &[Flow]) -> Result<usize> {
    Steerer::new()?.stop(flows)
}

pub(super) fn stop_by(socket: &mut Socket, flows: &[Flow]) -> Result<usize> {
    let all = [flows, &reversed(flows)].concat();
    let mut most = Ok(0);
    for steering in Steering::list_by(socket)? {
        // One failure must not keep the others from ending.
        let counted = steering.count_by(socket, flows);
        let ended = steering.forget_by(socket, &all).and(counted);
        // Each may arrive by several devices.
        most = most.and_then(|most| ended.map(|count| count.max(most)));
    }
    most
}

/// The devices by which connections arrive.
fn arrivals(route: &mut Rtnetlink, flows: &[Flow]) -> Result<HashMap<String, Vec<Flow>>> {
    let tunnels = Tunnel::list_by(route)?;
    let lo = index(route, "lo")?;
    let mut links: HashMap<IpAddr, Option<u32>> = HashMap::new();
    let mut arrivals: HashMap<u32, Vec<Flow>> = HashMap::new();
    let mut through_tunnels = Vec::new();
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
                through_tunnels.push(flow);
                system("ip route get", route.way(Packet::to(flow.remote.ip())))?.link
            }
        };
        arrivals.entry(link).or_default().push(flow);
    }
    let name = |link| route.name(link).map_err(|error| Error::system("if_indextoname", error));
    let mut named: HashMap<String, Vec<Flow>> =
        arrivals.into_iter().map(|(link, flows)| Ok((name(link)?, flows))).collect::<Result<_>>()?;
    for tunnel in tunnels.iter().filter(|_| !through_tunnels.is_empty()) {
        named.insert(tunnel.device(), through_tunnels.clone());
    }
    Ok(named)
}

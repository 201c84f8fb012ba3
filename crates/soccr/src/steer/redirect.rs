//! Connections are steered, each from where its packets arrive.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};

use soccr_netlink::{Family, Packet, Rtnetlink, Socket};

use super::steering::{distinct, reversed};
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

    /// Steers connections to a host from now on, whatever was steered where before. What they answer comes directly, or is
    /// [sent on](Self::redirect_answers).
    ///
    /// Each is steered from wherever its packets can be expected: from the device that has its local address, from that of the route to the
    /// peer, and, where the address is another host's, from those by which packets for it [come](super::Foreign::deliver_from), and from
    /// each [`Tunnel`].
    ///
    /// # Errors
    /// Refused: the next hop has another address family than a connection; a connection is behind NAT, and nothing is steered then.
    /// `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` or `ENOENT` where the kernel lacks `CONFIG_NFT_FWD_NETDEV`.
    pub fn redirect(&mut self, flows: &[Flow], to: &NextHop) -> Result<()> {
        self.begin(flows, to, true).map_err(|error| error.at("steer"))
    }

    /// [`redirect`](Self::redirect), where the connections have moved on without this host: it leaves alone what is arranged for their answers.
    ///
    /// # Errors
    /// The errors of [`redirect`](Self::redirect).
    pub fn redirect_only(&mut self, flows: &[Flow], to: &NextHop) -> Result<()> {
        self.begin(flows, to, false).map_err(|error| error.at("steer"))
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

    fn begin(&mut self, flows: &[Flow], to: &NextHop, ends_answers: bool) -> Result<()> {
        self.check_translation(flows)?;
        let all = distinct(flows);
        let others = Steering::list_by(&mut self.netfilter)?;
        let mut used = Vec::new();
        for (device, flows) in self.arrivals(&all)? {
            let steering = self.open(&device, to.device())?;
            steering.steer_by(&mut self.netfilter, &flows, to.address(), ends_answers)?;
            used.push((steering, flows));
        }
        for other in others {
            // Those that are not steered from there any more.
            let mut stale = match used.iter().find(|(used, _)| *used == other) {
                Some((_, here)) if here.len() == all.len() => continue,
                Some((_, here)) => {
                    let here: HashSet<&Flow> = here.iter().collect();
                    all.iter().filter(|flow| !here.contains(flow)).copied().collect()
                }
                None => all.clone(),
            };
            if ends_answers {
                stale.extend(reversed(&stale));
            }
            other.forget_by(&mut self.netfilter, &stale)?;
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
        for flow in distinct(flows) {
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

    /// The devices by which connections may arrive. Nothing tells for sure: routes say where answers leave. To steer from one device too many
    /// costs little, and from one too few costs the connection.
    fn arrivals(&mut self, flows: &[Flow]) -> Result<HashMap<String, Vec<Flow>>> {
        let lo = index(&self.route, "lo")?;
        let tunnels = Tunnel::list_by(&mut self.route)?;
        let tunnels: Vec<u32> =
            tunnels.iter().filter_map(|tunnel| self.route.index(&tunnel.device()).ok()).collect();
        let mut others = system("ip link", self.route.links())?;
        others.retain(|link| *link != lo && !tunnels.contains(link));
        let mut places: HashMap<IpAddr, Place> = HashMap::new();
        let mut ways: HashMap<(IpAddr, IpAddr), Option<u32>> = HashMap::new();
        let mut arrivals: HashMap<u32, Vec<Flow>> = HashMap::new();
        for flow in flows {
            let (local, remote) = (flow.local.ip(), flow.remote.ip());
            let place = match places.get(&local) {
                Some(place) => place,
                None => {
                    let found = self.place(local, lo, &tunnels)?;
                    places.entry(local).or_insert(found)
                }
            };
            // Most hosts have one device. To ask for the way to each of thousands of peers would take longer than to steer them.
            let is_clear = others.iter().all(|link| place.devices.contains(link));
            let way = match (flow.remote, ways.get(&(local, remote))) {
                _ if is_clear && !place.devices.is_empty() => None,
                (SocketAddr::V6(remote), _) if remote.scope_id() != 0 => Some(remote.scope_id()),
                (_, Some(way)) => *way,
                (_, None) => {
                    let from = Some(local).filter(|_| place.is_here);
                    let way = match self.route.way(Packet { from, ..Packet::to(remote) }) {
                        Err(error) if !place.devices.is_empty() && is_unreachable(&error) => None,
                        way => Some(system("ip route get", way)?.link),
                    };
                    *ways.entry((local, remote)).or_insert(way)
                }
            };
            for device in place.devices.iter().copied().chain(way.filter(|way| !place.devices.contains(way)))
            {
                arrivals.entry(device).or_default().push(*flow);
            }
        }
        let name = |link| self.route.name(link).map_err(|error| Error::system("if_indextoname", error));
        arrivals.into_iter().map(|(link, flows)| Ok((name(link)?, flows))).collect()
    }

    fn place(&mut self, local: IpAddr, lo: u32, tunnels: &[u32]) -> Result<Place> {
        let holder = system("ip address", self.route.link_with(local))?;
        let mut devices: BTreeSet<u32> = holder.into_iter().filter(|link| *link != lo).collect();
        if devices.is_empty() {
            for foreign in foreign::list(&mut self.route)?.iter().filter(|foreign| foreign.address() == local)
            {
                devices.extend(foreign.arrivals(&mut self.netfilter)?);
            }
            devices.extend(tunnels);
            // By one that is gone nothing arrives.
            devices.retain(|device| self.route.name(*device).is_ok());
        }
        Ok(Place { is_here: holder.is_some(), devices })
    }

    fn open(&mut self, ingress: &str, egress: &str) -> Result<Steering> {
        Steering::open_by(&mut self.netfilter, &self.route, ingress, egress, Times::default())
    }
}

/// Where a local address is.
struct Place {
    /// On this host.
    is_here: bool,
    /// The devices by which its packets may arrive, whoever sends them.
    devices: BTreeSet<u32>,
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

/// Routes name no device for such a peer.
fn is_unreachable(error: &io::Error) -> bool {
    let unreachable = [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL];
    error.raw_os_error().is_some_and(|errno| unreachable.contains(&errno))
}

//! Steering: packets follow a connection to its new host, while the address stays where it is.
//!
//! The old host A keeps the address. It sends the packets of exactly the connections that have left on to the new host B,
//! before its own routing or firewall sees them ([`redirect`], [`Steering`]). B delivers them to exactly those sockets
//! ([`Foreign`]), and answers the peer directly:
//!
//! ```text
//!                    ┌── A  192.0.2.1 ──┐
//!  peer ── router ───┤                  │ A steers what is for the connection
//!                    └── B  192.0.2.2 ◄─┘
//! ```
//!
//! No router takes part, no address moves, `ip_forward` stays off, and no process has to run: nftables and policy routing
//! do the work in the kernel. So everything here stays when its maker ends, is listed, and is removed by name.
//!
//! # Order
//! A move loses no packet where the steps follow each other like this:
//!
//! 1. B calls [`Foreign::deliver`], locks the connection and restores it.
//! 2. A calls [`redirect`]: from now on the lock of B holds what arrives.
//! 3. A lets go of the connection and sends B what its own lock has held.
//!
//! On the way home A calls [`stop`] in the place of step 2, or has it done by a [`Homecoming`]. Here `flow` is to leave:
//!
//! ```no_run
//! # fn example(flow: soccr::Flow) -> soccr::Result<()> {
//! use soccr::steer::{NextHop, redirect, stop};
//!
//! let b = NextHop::new("192.0.2.2".parse().unwrap())?; // asks for its Ethernet address, too
//! redirect(&[flow], &b)?;
//! // … and when it is back
//! stop(&[flow])?;
//! # Ok(())
//! # }
//! ```
//!
//! # Limits
//! A keeps forwarding until the address moves; where A dies, the connections wait until another host has the address.
//! Of a fragmented IP packet only the first fragment is steered. Each steered packet has a TTL that is one less.
//!
//! # References
//! nft(8) (`fwd`, `socket transparent`), ip-rule(8), ip(7) (`IP_TRANSPARENT`).

mod adoption;
mod foreign;
mod homecoming;
mod steering;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use soccr_netlink::{Neighbour, Packet, Rtnetlink};

use crate::connection::Flow;
use crate::error::{Error, Result};

pub use adoption::adopt_address;
pub use foreign::{Foreign, Numbers, is_foreign};
pub(crate) use foreign::{admit, admit_bound_anyhow, forget_transparency};
pub use homecoming::Homecoming;
pub use steering::{Steered, Steering, Times};

/// The host to which packets are steered: an address on a network that both hosts share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    address: IpAddr,
    device: String,
}

impl NextHop {
    /// The host with this address, by the device that the routes name, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Refused: the address is one of this host, or is reached through a router, or nobody there answers (ARP, neighbour
    /// discovery; that takes three seconds to find out).
    pub fn new(address: IpAddr) -> Result<Self> {
        let find = |route: &mut Rtnetlink| {
            let way = route.way(Packet::to(address)).map_err(|error| Error::system("ip route get", error))?;
            if way.local {
                return Err(Error::refused(
                    format!("{address} as the next hop: it is an address of this host"),
                    "name an address of the host to which the connections go",
                ));
            }
            if way.gateway {
                return Err(Error::refused(
                    format!("{address} as the next hop: it is behind a router"),
                    "name an address on a network that both hosts share, or make a tunnel between them",
                ));
            }
            let device = route.name(way.link).map_err(|error| Error::system("if_indextoname", error))?;
            Ok(Self { address, device })
        };
        with_route(|route| {
            let found = find(route)?;
            found.resolve(route)?;
            Ok(found)
        })
    }

    /// The host with this address at the other end of a device, a tunnel maybe.
    ///
    /// # Errors
    /// Refused: nobody there answers. `ENODEV` where there is no such device.
    pub fn on(address: IpAddr, device: &str) -> Result<Self> {
        let found = Self::known(address, device);
        with_route(|route| found.resolve(route))?;
        Ok(found)
    }

    /// The same without a look whether somebody answers.
    pub fn known(address: IpAddr, device: &str) -> Self {
        Self { address, device: device.to_owned() }
    }

    /// Its address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The device by which packets leave for it.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether its Ethernet address is known, or can be found out. A host that has disappeared does not answer.
    ///
    /// # Errors
    /// `ENODEV` where there is no such device any more.
    pub fn answers(&self) -> Result<bool> {
        with_route(|route| {
            let state = index(route, &self.device)
                .and_then(|link| system("ip neigh", route.neighbour_state(link, self.address)))?;
            Ok(state != Neighbour::Failed)
        })
    }

    fn resolve(&self, route: &mut Rtnetlink) -> Result<()> {
        /// The kernel asks three times, a second apart.
        const LIMIT: Duration = Duration::from_secs(4);
        let link = index(route, &self.device)?;
        let mut state = system("ip neigh", route.look_for_neighbour(link, self.address))?;
        let deadline = Instant::now() + LIMIT;
        // A neighbour that had failed is asked for again.
        let mut asked = false;
        while state != Neighbour::Known {
            if asked && (state == Neighbour::Failed || Instant::now() > deadline) {
                let what = format!("{} on {}: it does not answer", self.address, self.device);
                return Err(Error::refused(what, "is the host up, and its address on this network?"));
            }
            std::thread::sleep(Duration::from_micros(200));
            state = system("ip neigh", route.neighbour_state(link, self.address))?;
            asked |= state == Neighbour::Asked || Instant::now() > deadline;
        }
        Ok(())
    }
}

/// Steers connections to a host from now on, in the network namespace of the calling thread, whatever was steered where
/// before. Each arrives by the device that has its local address, or, where none has, by that of the route to the peer.
///
/// # Errors
/// Refused: the next hop has another address family than a connection. `EPERM` without `CAP_NET_ADMIN`;
/// `EOPNOTSUPP` or `ENOENT` where the kernel lacks `CONFIG_NFT_FWD_NETDEV`.
pub fn redirect(flows: &[Flow], to: &NextHop) -> Result<()> {
    let others = Steering::list()?;
    let arrivals = arrivals(flows)?;
    for (device, flows) in &arrivals {
        let steering = Steering::open(device, to.device(), Times::default())?;
        steering.steer(flows, to.address)?;
        for other in others.iter().filter(|other| **other != steering) {
            other.stop(flows)?;
        }
    }
    Ok(())
}

/// Ends the steering of connections, in the network namespace of the calling thread, wherever they are steered. Others
/// are passed over. Returns how many were steered.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub fn stop(flows: &[Flow]) -> Result<usize> {
    Steering::list()?.iter().map(|steering| steering.stop(flows)).sum()
}

/// The devices by which connections arrive.
fn arrivals(flows: &[Flow]) -> Result<HashMap<String, Vec<Flow>>> {
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
                None => system("ip route get", route.way(Packet::to(flow.remote.ip())))?.link,
            };
            let device = route.name(link).map_err(|error| Error::system("if_indextoname", error))?;
            arrivals.entry(device).or_default().push(flow);
        }
        Ok(arrivals)
    })
}

fn index(route: &Rtnetlink, device: &str) -> Result<u32> {
    let advice = "see `ip link` for the devices of this network";
    route.index(device).map_err(|error| Error::system(format!("device {device}"), error).advise(advice))
}

fn with_route<T>(work: impl FnOnce(&mut Rtnetlink) -> Result<T>) -> Result<T> {
    let route = Rtnetlink::here().map_err(|error| Error::system("routing socket", error));
    route.and_then(|mut route| work(&mut route)).map_err(|error| error.at("steer"))
}

fn system<T>(what: &'static str, result: io::Result<T>) -> Result<T> {
    result.map_err(|error| Error::system(what, error))
}

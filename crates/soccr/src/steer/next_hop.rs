//! The host to which packets are steered.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use soccr_netlink::{Link, Neighbour, Packet, Rtnetlink};

use super::{index, system, with_route};
use crate::error::{Error, Result};

/// The host to which packets are steered: an address on a network that both hosts share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
                return Err(is_here(address));
            }
            if way.gateway.is_some() {
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

    /// The first host on the way to an address: a router, or the host itself.
    ///
    /// # Errors
    /// Refused: nobody there answers. `ENETUNREACH` and the like where there is no way.
    pub fn towards(destination: IpAddr) -> Result<Self> {
        with_route(|route| Self::towards_by(route, destination))
    }

    pub(super) fn towards_by(route: &mut Rtnetlink, destination: IpAddr) -> Result<Self> {
        let way = system("ip route get", route.way(Packet::to(destination)))?;
        let device = route.name(way.link).map_err(|error| Error::system("if_indextoname", error))?;
        let found = Self { address: way.gateway.unwrap_or(destination), device };
        found.resolve(route)?;
        Ok(found)
    }

    /// The host with this address at the other end of a device, a tunnel maybe.
    ///
    /// # Errors
    /// Refused: the address is one of this host, or nobody there answers. `ENODEV` where there is no such device.
    pub fn on(address: IpAddr, device: &str) -> Result<Self> {
        let found = Self::known(address, device);
        with_route(|route| {
            let link = index(route, device)?;
            match route.way(Packet { link: Link::To(link), ..Packet::to(address) }) {
                Ok(way) if way.local => Err(is_here(address)),
                _ => found.resolve(route),
            }
        })?;
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

    /// The address under which it sees this host.
    ///
    /// # Errors
    /// `ENODEV` where there is no such device any more; those of asking for the route.
    pub fn sees(&self) -> Result<Option<IpAddr>> {
        with_route(|route| {
            let link = Link::To(index(route, &self.device)?);
            let way = route.way(Packet { link, ..Packet::to(self.address) });
            system("ip route get", way).map(|way| way.source)
        })
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

fn is_here(address: IpAddr) -> Error {
    Error::refused(
        format!("{address} as the next hop: it is an address of this host"),
        "name an address of the host to which the connections go",
    )
}

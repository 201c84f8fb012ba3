//! Tunnels, where two hosts have no network in common: VXLAN, by the kernel alone.
//!
//! ```text
//! A 192.0.2.1                                   B 203.0.113.2
//!  soccr-04711b  169.254.72.25/30  ── UDP 4789 ──  169.254.72.26/30  soccr-04711b
//!                fe80::5304:711b:0:1               fe80::5304:711b:0:2
//! ```
//!
//! Everything but the addresses of the two hosts follows from a number, which follows from these addresses: both hosts
//! come to the same without a word, whoever sends first. The ends find each other by ARP and neighbour discovery, so that each
//! notices when the other is gone.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsFd;

use soccr_netlink::{Rtnetlink, Vxlan};

use super::{NextHop, Steering, absent, foreign, number_of, present, system, with_route, with_socket};
use crate::error::{Error, Result};
use crate::sys::sockopt;

const PREFIX: &str = "soccr-";

/// A tunnel from this host to another. It belongs to no process.
///
/// In `ip link` it is a device whose name begins with `soccr-`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tunnel {
    /// The address of this host.
    pub local: IpAddr,
    /// The address of the other one.
    pub remote: IpAddr,
    /// The number of the VXLAN, of which both hosts have no other with this port: 24 bits.
    pub id: u32,
    /// The UDP port of both hosts: 4789. Firewalls have to let it pass.
    pub port: u16,
}

impl Tunnel {
    /// A tunnel to a host, from the address that the network namespace of the calling thread has on the way there. It is not made yet.
    ///
    /// # Errors
    /// Refused: the address is one of this host. `ENETUNREACH` and the like where there is no way.
    pub fn to(remote: IpAddr) -> Result<Self> {
        let path = path_to(remote)
            .map_err(|error| Error::system(format!("connect to {remote}"), error).at("steer"))?;
        Self::between(path.local, remote)
    }

    /// The tunnel between an address of this host and one of another. It is not made yet.
    ///
    /// # Errors
    /// Refused: the address is one of this host, or has another family.
    pub fn between(local: IpAddr, remote: IpAddr) -> Result<Self> {
        let refused = |what: &str| {
            let what = format!("a tunnel from {local} to {remote}: {what}");
            Err(Error::refused(what, "name an address of the host to which the connections go").at("steer"))
        };
        if local.is_ipv4() != remote.is_ipv4() {
            return refused("they are of two address families");
        }
        if local == remote || !super::is_foreign(remote)? {
            return refused("both are of this host");
        }
        let id = number_of(&[local.min(remote), local.max(remote)]);
        Ok(Self { local, remote, id, port: 4789 })
    }

    /// The tunnel with these numbers, whatever it is.
    pub fn known(local: IpAddr, remote: IpAddr, id: u32, port: u16) -> Self {
        Self { local, remote, id, port }
    }

    /// The same tunnel, as the other host sees it.
    pub fn reversed(&self) -> Self {
        Self { local: self.remote, remote: self.local, ..*self }
    }

    /// Makes this end of the tunnel, in the network namespace of the calling thread. What is there already stays. Returns whether
    /// nothing was there.
    ///
    /// # Errors
    /// Refused: the local address is none of this host, or others use the number and the port. `EOPNOTSUPP` without `CONFIG_VXLAN`; `EPERM` without
    /// `CAP_NET_ADMIN`.
    pub fn open(&self) -> Result<bool> {
        if super::is_foreign(self.local)? {
            let what = format!("a tunnel from {}, which is no address of this host", self.local);
            return Err(Error::refused(
                what,
                "the hosts have to see each other under their own addresses (no NAT)",
            )
            .at("steer"));
        }
        let path = path_to(self.remote)
            .map_err(|error| Error::system(format!("connect to {}", self.remote), error).at("steer"))?;
        with_route(|route| {
            let made = match route.add_vxlan(&self.device_of(path.mtu)) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    self.check(route)?;
                    false
                }
                made => {
                    let needs = "needs CONFIG_VXLAN; CAP_NET_ADMIN, as root or under `unshare -Urn`";
                    made.map_err(|error| Error::system("ip link add type vxlan", error).advise(needs))?;
                    true
                }
            };
            let ready = self.prepare(route);
            if ready.is_err() && made {
                let _ = route.remove_link(&self.device());
            }
            ready.map(|()| made)
        })
    }

    /// The tunnels of the network namespace of the calling thread.
    ///
    /// # Errors
    /// The errors of listing the links.
    pub fn list() -> Result<Vec<Self>> {
        with_route(Self::list_by)
    }

    pub(super) fn list_by(route: &mut Rtnetlink) -> Result<Vec<Self>> {
        let all = system("ip link", route.vxlans())?.into_iter();
        let all =
            all.map(|Vxlan { name, id, port, local, remote, .. }| (name, Self { local, remote, id, port }));
        Ok(all.filter(|(name, tunnel)| *name == tunnel.device()).map(|(_, tunnel)| tunnel).collect())
    }

    /// Removes this end. Nothing passes any more.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn remove(&self) -> Result<()> {
        with_route(|route| absent("ip link delete", route.remove_link(&self.device())))
    }

    /// Removes this end where no connection is steered or answered through it, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn remove_unused(&self) -> Result<()> {
        with_socket(|socket| {
            with_route(|route| {
                let device = self.device();
                let mut by_it = Vec::new();
                for steering in Steering::list_by(socket)? {
                    if [steering.ingress(), steering.egress()].contains(&device.as_str()) {
                        if !steering.contents_by(socket)?.is_empty() {
                            return Ok(());
                        }
                        by_it.push(steering);
                    }
                }
                let ends = [false, true].map(|ipv6| NextHop::known(self.address(ipv6, false), &device));
                for foreign in foreign::list(route)? {
                    if foreign.depends_on(socket, route, &ends)? {
                        return Ok(());
                    }
                }
                // Their rules have the number of the device, which no other will have.
                for steering in by_it {
                    if !steering.remove_unused_by(socket)? {
                        return Ok(());
                    }
                }
                absent("ip link delete", route.remove_link(&device))
            })
        })
    }

    /// The name of its device.
    pub fn device(&self) -> String {
        format!("{PREFIX}{:06x}", self.id)
    }

    /// The other end, where it answers through the tunnel.
    ///
    /// # Errors
    /// Refused: it does not answer within three seconds.
    pub fn other_end(&self, ipv6: bool) -> Result<NextHop> {
        let advice =
            format!("is the other end made, and does every firewall let UDP port {} pass?", self.port);
        NextHop::on(self.address(ipv6, false), &self.device()).map_err(|error| error.advise(advice))
    }

    /// The largest packet that passes whole.
    ///
    /// # Errors
    /// `ENODEV` where it has not been made.
    pub fn mtu(&self) -> Result<u32> {
        with_route(|route| {
            let mut all = system("ip link", route.vxlans())?.into_iter();
            let found = all.find(|vxlan| vxlan.name == self.device());
            let found = found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV));
            system("ip link", found.map(|vxlan| vxlan.mtu))
        })
    }

    fn device_of(&self, path: u32) -> Vxlan {
        /// UDP, VXLAN, and an Ethernet header.
        const HEADERS: u32 = 8 + 8 + 14;
        let headers = HEADERS + if self.remote.is_ipv4() { 20 } else { 40 };
        let [_, a, b, c] = self.id.to_be_bytes();
        Vxlan {
            name: self.device(),
            // Locally administered.
            mac: [2, 0x53, a, b, c, self.side(true)],
            mtu: path.saturating_sub(headers),
            id: self.id,
            port: self.port,
            local: self.local,
            remote: self.remote,
        }
    }

    /// Whether the device that is there is this one.
    fn check(&self, route: &mut Rtnetlink) -> Result<()> {
        let all = system("ip link", route.vxlans())?;
        let same = |found: &Vxlan| *found == Vxlan { mtu: found.mtu, ..self.device_of(0) };
        if all.iter().any(same) {
            return Ok(());
        }
        let what = format!("the VXLAN {} on port {}, which is another device's", self.id, self.port);
        Err(Error::refused(what, "see `ip -d link`; choose another number or port"))
    }

    /// Sets the device up, with its addresses. Whoever has no IPv6 has no such connections either.
    fn prepare(&self, route: &mut Rtnetlink) -> Result<()> {
        let device = self.device();
        let has_ipv6 = route.no_generated_address(&device).is_ok();
        system("rp_filter", route.accept_any_source(&device))?;
        system("ip link set up", route.up(&device))?;
        let added = route.add_address(&device, self.address(false, true), 30);
        present("ip address add", added)?;
        match route.add_address(&device, self.address(true, true), 64) {
            Err(_) if !has_ipv6 => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => Ok(()),
            added => present("ip address add", added),
        }
    }

    /// The inner address of one of the ends.
    fn address(&self, ipv6: bool, here: bool) -> IpAddr {
        let ([_, a, b, c], side) = (self.id.to_be_bytes(), self.side(here));
        if ipv6 {
            let [high, low] = [[0x53, a], [b, c]].map(u16::from_be_bytes);
            return Ipv6Addr::new(0xfe80, 0, 0, 0, high, low, 0, side.into()).into();
        }
        // Neither the ends of 169.254.0.0/16 (RFC 3927), nor the address at which clouds tell about a machine.
        Ipv4Addr::new(169, 254, 1 + b % 128, (c & !3) | side).into()
    }

    fn side(&self, here: bool) -> u8 {
        if (self.local < self.remote) == here { 1 } else { 2 }
    }
}

/// The way to a host.
struct Path {
    local: IpAddr,
    mtu: u32,
}

fn path_to(remote: IpAddr) -> io::Result<Path> {
    const DISCARD: u16 = 9;
    let any: IpAddr =
        if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Nothing is sent.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((remote, DISCARD))?;
    let (level, option) = if remote.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU)
    };
    Ok(Path { local: socket.local_addr()?.ip(), mtu: sockopt::get(socket.as_fd(), level, option)? })
}

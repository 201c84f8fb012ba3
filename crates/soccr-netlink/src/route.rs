//! Links, addresses, routes, rules and neighbours of a network namespace: `rtnetlink(7)`.

mod look;
mod policy;
mod vxlan;

pub use look::{Link, Neighbour, Packet, Way};
pub use policy::Policy;
pub use vxlan::Vxlan;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::AddressFamily;
use rustix::net::netdevice::{index_to_name, name_to_index};

use crate::{ACK, Batch, CREATE, DUMP, EXCLUSIVE, Family, Message, REQUEST, Socket, attributes};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;

const ARPHRD_ETHER: u16 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFLA_OPERSTATE: u16 = 16;
const IF_OPER_UP: u8 = 6;
const IFF_UP: u32 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

const REPLACE: u16 = 0x100;

/// A connection to the kernel that reads and changes the network of one namespace.
///
/// It may be used from any thread, whatever namespace that is in.
#[derive(Debug)]
pub struct Rtnetlink {
    socket: Socket,
}

impl Rtnetlink {
    /// For the namespace of the calling thread.
    ///
    /// # Errors
    /// The errors of opening a netlink socket.
    pub fn here() -> io::Result<Self> {
        Ok(Self { socket: Socket::open(Family::Route)? })
    }

    /// Gives it another descriptor, such as one with a higher number.
    pub fn with_descriptor(self, change: impl FnOnce(OwnedFd) -> OwnedFd) -> Self {
        Self { socket: self.socket.with_descriptor(change) }
    }

    /// The index of a link, which is also the scope id of link-local addresses on it.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn index(&self, link: &str) -> io::Result<u32> {
        name_to_index(self.socket.as_fd(), link).map_err(Into::into)
    }

    /// The name of a link.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn name(&self, index: u32) -> io::Result<String> {
        index_to_name(self.socket.as_fd(), index).map_err(Into::into)
    }

    /// The indices of all links.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn links(&mut self) -> io::Result<Vec<u32>> {
        let mut batch = Batch::new();
        batch.message(RTM_GETLINK, REQUEST | DUMP, |message| message.bytes(&link_header(0, 0)));
        self.socket.dump_all(&batch, |links, link| {
            let index = link.get(4..).and_then(|bytes| bytes.first_chunk());
            links.extend(index.map(|bytes| u32::from_ne_bytes(*bytes)));
        })
    }

    /// Whether the link and its other end are up, so that packets pass. The kernel notices a change with a delay.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn is_operational(&mut self, link: &str) -> io::Result<bool> {
        let index = self.index(link)?;
        let mut batch = Batch::new();
        batch.message(RTM_GETLINK, REQUEST | ACK, |message| message.bytes(&link_header(index, 0)));
        let mut operational = false;
        self.socket.dump(&batch, |_, link| {
            let mut attributes = attributes(link.get(16..).unwrap_or_default());
            operational = attributes.any(|attribute| attribute == (IFLA_OPERSTATE, &[IF_OPER_UP]));
        })?;
        Ok(operational)
    }

    /// The Ethernet address of a link, where it is one that has some.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn ethernet_address(&mut self, link: u32) -> io::Result<Option<[u8; 6]>> {
        let mut batch = Batch::new();
        batch.message(RTM_GETLINK, REQUEST | ACK, |message| message.bytes(&link_header(link, 0)));
        let mut address = None;
        self.socket.dump(&batch, |_, link| {
            let is_ethernet = link.get(2..4) == Some(&ARPHRD_ETHER.to_ne_bytes());
            let value =
                attributes(link.get(16..).unwrap_or_default()).find(|attribute| attribute.0 == IFLA_ADDRESS);
            address = value.filter(|_| is_ethernet).and_then(|(_, value)| value.try_into().ok());
        })?;
        Ok(address)
    }

    /// Sets a link up.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn up(&mut self, link: &str) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_NEWLINK, 0, |message| message.bytes(&link_header(index, IFF_UP)))
    }

    /// Sets a link up, with packets of at most `mtu` bytes.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link, `EINVAL` for an MTU outside 68–65535.
    pub fn set_mtu(&mut self, link: &str, mtu: u32) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_NEWLINK, 0, |message| {
            message.bytes(&link_header(index, IFF_UP));
            message.u32(IFLA_MTU, mtu);
        })
    }

    /// Sets a link down. Its IPv6 addresses and its routes are gone then.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn down(&mut self, link: &str) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_NEWLINK, 0, |message| message.bytes(&link_header(index, 0)))
    }

    /// Gives a link an address, usable at once (no duplicate address detection) where the link is up.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link, `EEXIST` where it has the address.
    pub fn add_address(&mut self, link: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
        let index = self.index(link)?;
        self.address(RTM_NEWADDR, CREATE | EXCLUSIVE, link, address, prefix, IFA_F_NODAD)?;
        let usable = if address.is_ipv6() { self.wait_until_local(address, index) } else { Ok(()) };
        if usable.is_err() {
            let _ = self.remove_address(link, address, prefix);
        }
        usable
    }

    /// Without the local route, packets to an IPv6 address leave the host.
    fn wait_until_local(&mut self, address: IpAddr, index: u32) -> io::Result<()> {
        /// The kernel makes the route in a thread of its own, sooner than this unless the link is down.
        const LIMIT: Duration = Duration::from_secs(5);
        let start = Instant::now();
        while !self.is_local(address, index)? && start.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Gives a link an IPv6 address that is tentative until duplicate address detection has ended.
    ///
    /// # Errors
    /// The errors of [`add_address`](Self::add_address).
    pub fn add_tentative_address(&mut self, link: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.address(RTM_NEWADDR, CREATE | EXCLUSIVE, link, address, prefix, 0)
    }

    /// Takes an address from a link.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link, `EADDRNOTAVAIL` where it has no such address.
    pub fn remove_address(&mut self, link: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.address(RTM_DELADDR, 0, link, address, prefix, 0)
    }

    /// Sends packets for `destination/prefix` out of a link, to the `gateway` or straight to their destination.
    /// Replaces what the namespace had for that destination.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link, `ENETDOWN` where it is down, `EHOSTUNREACH` for an unreachable gateway.
    pub fn route(
        &mut self,
        destination: IpAddr,
        prefix: u8,
        link: &str,
        gateway: Option<IpAddr>,
    ) -> io::Result<()> {
        let index = self.index(link)?;
        self.routes(&[(destination, prefix)], index, gateway)
    }

    /// Replaces the routes of several destinations in one system call; see [`route`](Self::route).
    ///
    /// # Errors
    /// The first one.
    pub fn routes(
        &mut self,
        destinations: &[(IpAddr, u8)],
        index: u32,
        gateway: Option<IpAddr>,
    ) -> io::Result<()> {
        let scope = if gateway.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
        let mut batch = Batch::new();
        for &(destination, prefix) in destinations {
            let header = [
                family(destination),
                prefix,
                0,
                0,
                RT_TABLE_MAIN,
                RTPROT_STATIC,
                scope,
                RTN_UNICAST,
                0,
                0,
                0,
                0,
            ];
            batch.message(RTM_NEWROUTE, REQUEST | ACK | CREATE | REPLACE, |message| {
                message.bytes(&header);
                message.attribute(RTA_DST, &octets(destination));
                message.u32(RTA_OIF, index);
                if let Some(gateway) = gateway {
                    message.attribute(RTA_GATEWAY, &octets(gateway));
                }
            });
        }
        self.socket.transact(&batch)
    }

    /// Names the Ethernet address of a neighbour for good, so that no ARP or neighbour discovery is needed.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn neighbour(&mut self, link: &str, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let mut header = vec![family(address), 0, 0, 0];
        header.extend(self.index(link)?.to_ne_bytes());
        header.extend(NUD_PERMANENT.to_ne_bytes());
        header.extend([0, 0]);
        self.change(RTM_NEWNEIGH, CREATE | REPLACE, |message| {
            message.bytes(&header);
            message.attribute(NDA_DST, &octets(address));
            message.attribute(NDA_LLADDR, &mac);
        })
    }

    fn address(
        &mut self,
        kind: u16,
        flags: u16,
        link: &str,
        address: IpAddr,
        prefix: u8,
        of_address: u32,
    ) -> io::Result<()> {
        // With scope `link`, the kernel never chooses the address as source of packets to other networks.
        let scope = if matches!(address, IpAddr::V4(v4) if v4.is_link_local()) { RT_SCOPE_LINK } else { 0 };
        let mut header = vec![family(address), prefix, 0, scope];
        header.extend(self.index(link)?.to_ne_bytes());
        self.change(kind, flags, |message| {
            message.bytes(&header);
            message.attribute(IFA_LOCAL, &octets(address));
            message.attribute(IFA_ADDRESS, &octets(address));
            message.u32(IFA_FLAGS, of_address);
        })
    }

    /// Sends one request and waits for its acknowledgement.
    ///
    /// # Errors
    /// The one that the kernel reports.
    pub fn change(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Message<'_>)) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.message(kind, REQUEST | ACK | flags, body);
        self.socket.transact(&batch)
    }
}

impl AsFd for Rtnetlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The fixed header of messages about links (`struct ifinfomsg`) that changes the up flag to what `flags` says.
pub fn link_header(index: u32, flags: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    header
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    family.as_raw() as u8
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address_of(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}

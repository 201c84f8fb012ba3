//! Links, addresses, routes and neighbours of a namespace, by `rtnetlink(7)`.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use rustix::net::netdevice::name_to_index;
use soccr_netlink::{ACK, Batch, CREATE, EXCLUSIVE, Family, Message, REQUEST, Socket, attributes};

use crate::{Namespace, wait_until};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_OPERSTATE: u16 = 16;
const IF_OPER_UP: u8 = 6;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_GSO_MAX_SEGS: u16 = 40;

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
const RTN_LOCAL: u8 = 2;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

const IFF_UP: u32 = 1;
const REPLACE: u16 = 0x100;

/// One end of a veth pair that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct VethEnd<'a> {
    /// Where the end goes.
    pub namespace: &'a Namespace,
    /// Its name there, at most 15 bytes.
    pub name: &'a str,
    /// Its Ethernet address.
    pub mac: [u8; 6],
}

/// A connection to the kernel that changes the network of one namespace.
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
    /// Those of opening a netlink socket.
    pub fn here() -> io::Result<Self> {
        Ok(Self { socket: Socket::open(Family::Route)? })
    }

    /// The index of a link, which is also the scope id of link-local addresses on it.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn index(&self, link: &str) -> io::Result<u32> {
        name_to_index(self.socket.as_fd(), link).map_err(Into::into)
    }

    /// Makes a veth pair and sets both ends up. They get no address of their own, not even a link-local one.
    ///
    /// # Errors
    /// `EEXIST` where a name is taken, `EINVAL` for an MTU outside 68–65535.
    pub fn veth(&mut self, ends: [VethEnd<'_>; 2], mtu: u32) -> io::Result<()> {
        let describe = |message: &mut Message<'_>, end: &VethEnd<'_>| {
            message.string(IFLA_IFNAME, end.name);
            message.attribute(IFLA_ADDRESS, &end.mac);
            message.u32(IFLA_MTU, mtu);
            message.u32(IFLA_NET_NS_FD, end.namespace.as_fd().as_raw_fd() as u32);
        };
        self.change(RTM_NEWLINK, CREATE | EXCLUSIVE, |message| {
            message.bytes(&link_header(0, 0));
            describe(message, &ends[0]);
            message.nested(IFLA_LINKINFO, |info| {
                info.attribute(IFLA_INFO_KIND, b"veth");
                info.nested(IFLA_INFO_DATA, |data| {
                    data.nested(VETH_INFO_PEER, |peer| {
                        peer.bytes(&link_header(0, 0));
                        describe(peer, &ends[1]);
                    });
                });
            });
        })?;
        for end in ends {
            let mut there = end.namespace.rtnetlink()?;
            there.no_generated_address(end.name)?;
            there.up(end.name)?;
        }
        // The first end had no carrier when it was set up, and loses packets until the kernel has noticed the other.
        for end in ends {
            let mut there = end.namespace.rtnetlink()?;
            let mut outcome = Ok(true);
            wait_until("the veth pair has a carrier", || {
                outcome = there.is_operational(end.name);
                !matches!(outcome, Ok(false))
            });
            outcome?;
        }
        Ok(())
    }

    /// Whether the link is up and its other end, too: packets pass. The kernel takes its time to notice after a change.
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

    /// Sets a link up.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn up(&mut self, link: &str) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_NEWLINK, 0, |message| message.bytes(&link_header(index, IFF_UP)))
    }

    /// Sets a link up, with packets of so many bytes at most.
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

    /// Gives a link an address, usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// `ENODEV` where there is no such link, `EEXIST` where it has the address.
    pub fn add_address(&mut self, link: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.address(RTM_NEWADDR, CREATE | EXCLUSIVE, link, address, prefix, IFA_F_NODAD)?;
        if address.is_ipv6() {
            // Its route is made later, by a thread of the kernel: until then packets to it leave the host.
            let index = self.index(link)?;
            let mut outcome = Ok(true);
            wait_until("the address has its route", || {
                outcome = self.is_local(address, index);
                !matches!(outcome, Ok(false))
            });
            outcome?;
        }
        Ok(())
    }

    /// Whether packets to this address are for this host.
    fn is_local(&mut self, address: IpAddr, index: u32) -> io::Result<bool> {
        const TYPE: usize = 7;
        let mut batch = Batch::new();
        batch.message(RTM_GETROUTE, REQUEST | ACK, |message| {
            message.bytes(&[family(address), 128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            message.attribute(RTA_DST, &octets(address));
            message.u32(RTA_OIF, index);
        });
        let mut local = false;
        match self.socket.dump(&batch, |_, route| local = route.get(TYPE) == Some(&RTN_LOCAL)) {
            Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => Ok(false),
            outcome => outcome.map(|()| local),
        }
    }

    /// Gives a link an IPv6 address that is tentative until duplicate address detection has ended.
    ///
    /// # Errors
    /// Those of [`add_address`](Self::add_address).
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

    /// Replaces the routes of several destinations in one system call.
    pub(crate) fn routes(
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

    /// Makes the kernel hand single segments to a link, never larger ones for the device to cut.
    pub(crate) fn single_segments(&mut self, link: &str) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_NEWLINK, 0, |message| {
            message.bytes(&link_header(index, IFF_UP));
            message.u32(IFLA_GSO_MAX_SEGS, 1);
        })
    }

    /// Keeps the link free of a generated link-local address, whose duplicate detection would run for a second.
    fn no_generated_address(&mut self, link: &str) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_NEWLINK, 0, |message| {
            message.bytes(&link_header(index, 0));
            message.nested(IFLA_AF_SPEC, |families| {
                families.nested(libc::AF_INET6 as u16, |inet6| {
                    inet6.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
                });
            });
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
        let mut header = vec![family(address), prefix, 0, 0];
        header.extend(self.index(link)?.to_ne_bytes());
        self.change(kind, flags, |message| {
            message.bytes(&header);
            message.attribute(IFA_LOCAL, &octets(address));
            message.attribute(IFA_ADDRESS, &octets(address));
            message.u32(IFA_FLAGS, of_address);
        })
    }

    fn change(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Message<'_>)) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.message(kind, REQUEST | ACK | flags, body);
        self.socket.transact(&batch)
    }
}

impl Namespace {
    /// A connection to the kernel that changes this network.
    ///
    /// # Errors
    /// Those of opening a netlink socket.
    pub fn rtnetlink(&self) -> io::Result<Rtnetlink> {
        self.run(Rtnetlink::here)
    }
}

/// `struct ifinfomsg` that changes the up flag to what `flags` says.
fn link_header(index: u32, flags: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    header
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    family as u8
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

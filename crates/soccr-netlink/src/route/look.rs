//! What the kernel would do with a packet: the route that it would take, and whether the neighbour answers.

use std::io;
use std::net::IpAddr;

use super::{NDA_DST, RTA_DST, RTA_GATEWAY, RTA_OIF, RTM_NEWNEIGH, Rtnetlink, address_of, family, octets};
use crate::{Batch, CREATE, DUMP, REQUEST, attributes};

/// A packet whose route is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its destination.
    pub to: IpAddr,
    /// Its source, where the route depends on it.
    pub from: Option<IpAddr>,
    /// By which link it comes or goes.
    pub link: Link,
    /// Its mark, or 0.
    pub mark: u32,
}

impl Packet {
    /// Any packet that this host sends to an address.
    pub fn to(to: IpAddr) -> Self {
        Self { to: to.to_canonical(), from: None, link: Link::Any, mark: 0 }
    }
}

/// What is known of a packet's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// This host sends it, by whatever link the routes name.
    Any,
    /// It arrives by the link with this index.
    From(u32),
    /// This host sends it from a socket that is bound to the link with this index.
    To(u32),
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// It is an address of this host.
    pub local: bool,
    /// The index of the link by which they leave.
    pub link: u32,
    /// The router to which they go first, where there is one. It may have an address of another family (RFC 5549).
    pub gateway: Option<IpAddr>,
    /// The address of this host from which they come, unless a socket has another one.
    pub source: Option<IpAddr>,
}

/// What is known about the Ethernet address of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    /// Nobody has asked yet.
    Unknown,
    /// It has been asked for and has not answered yet.
    Asked,
    /// It does not answer.
    Failed,
    /// It is known, or the link needs none.
    Known,
}

impl Rtnetlink {
    /// Where a packet would go (`ip route get`).
    ///
    /// # Errors
    /// `ENETUNREACH` and the like where there is no way.
    pub fn way(&mut self, packet: Packet) -> io::Result<Way> {
        let Packet { to, from, link, mark } = packet;
        let mut batch = Batch::new();
        batch.message(GET_ROUTE, REQUEST, |m| {
            let bits = |address| 8 * octets(address).len() as u8;
            let mut header = [0; 12];
            header[..3].copy_from_slice(&[family(to), bits(to), from.map_or(0, bits)]);
            m.bytes(&header);
            m.attribute(RTA_DST, &octets(to));
            if let Some(from) = from {
                m.attribute(RTA_SRC, &octets(from));
            }
            match link {
                Link::Any => {}
                Link::From(index) => m.u32(RTA_IIF, index),
                Link::To(index) => m.u32(RTA_OIF, index),
            }
            if mark != 0 {
                m.u32(RTA_MARK, mark);
            }
        });
        self.socket.get(&batch, |_, payload| {
            let mut way = Way { local: false, link: 0, gateway: None, source: None };
            let Some((header, rest)) = payload.split_at_checked(12) else { return way };
            way.local = header[7] == TYPE_LOCAL;
            for (kind, value) in attributes(rest) {
                match kind {
                    RTA_OIF => way.link = value.try_into().map_or(0, u32::from_ne_bytes),
                    RTA_PREFSRC => way.source = address_of(value),
                    RTA_GATEWAY => way.gateway = address_of(value),
                    // Behind the address family.
                    RTA_VIA => way.gateway = value.get(2..).and_then(address_of),
                    _ => {}
                }
            }
            way
        })
    }

    /// Whether packets to an address of this link are for this host.
    pub(super) fn is_local(&mut self, address: IpAddr, link: u32) -> io::Result<bool> {
        match self.way(Packet { link: Link::To(link), ..Packet::to(address) }) {
            Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => Ok(false),
            way => way.map(|way| way.local),
        }
    }

    /// The link that has an address of this host.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn link_with(&mut self, address: IpAddr) -> io::Result<Option<u32>> {
        let mut batch = Batch::new();
        batch.message(GET_ADDRESS, REQUEST | DUMP, |m| m.bytes(&[family(address), 0, 0, 0, 0, 0, 0, 0]));
        let links = self.socket.dump_all(&batch, |links, payload| {
            let Some((header, rest)) = payload.split_at_checked(8) else { return };
            // On a point-to-point link IFA_ADDRESS is the address of the peer.
            let own = [IFA_LOCAL, IFA_ADDRESS]
                .iter()
                .find_map(|wanted| attributes(rest).find(|attribute| attribute.0 == *wanted));
            if own.is_some_and(|(_, own)| own == octets(address)) {
                links.extend(header[4..8].try_into().map(u32::from_ne_bytes));
            }
        })?;
        Ok(links.first().copied())
    }

    /// What is known about a neighbour; asks for it where nothing is (ARP, neighbour discovery).
    ///
    /// # Errors
    /// `ENODEV` where there is no such link; `EPERM`.
    pub fn look_for_neighbour(&mut self, link: u32, address: IpAddr) -> io::Result<Neighbour> {
        let known = self.neighbour_state(link, address)?;
        if matches!(known, Neighbour::Unknown | Neighbour::Failed) {
            self.change(RTM_NEWNEIGH, CREATE, |m| {
                m.bytes(&neighbour_header(link, address, NTF_USE));
                m.attribute(NDA_DST, &octets(address));
            })?;
        }
        Ok(known)
    }

    /// What is known about a neighbour.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn neighbour_state(&mut self, link: u32, address: IpAddr) -> io::Result<Neighbour> {
        let mut batch = Batch::new();
        batch.message(GET_NEIGHBOUR, REQUEST | DUMP, |m| m.bytes(&neighbour_header(link, address, 0)));
        let known = self.socket.dump_all(&batch, |known, payload| {
            let Some((header, rest)) = payload.split_at_checked(12) else { return };
            let of_link = header[4..8] == link.to_ne_bytes();
            let is_wanted = attributes(rest).any(|(kind, value)| kind == NDA_DST && value == octets(address));
            if of_link && is_wanted {
                known.push(match u16::from_ne_bytes([header[8], header[9]]) {
                    0 => Neighbour::Unknown,
                    NUD_INCOMPLETE => Neighbour::Asked,
                    NUD_FAILED => Neighbour::Failed,
                    _ => Neighbour::Known,
                });
            }
        })?;
        Ok(known.first().copied().unwrap_or(Neighbour::Unknown))
    }
}

/// `struct ndmsg`.
fn neighbour_header(link: u32, address: IpAddr, flags: u8) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = family(address);
    header[4..8].copy_from_slice(&link.to_ne_bytes());
    header[10] = flags;
    header
}

// linux/rtnetlink.h, linux/if_addr.h, linux/neighbour.h
const GET_ADDRESS: u16 = 22;
const GET_ROUTE: u16 = 26;
const GET_NEIGHBOUR: u16 = 30;
const RTA_SRC: u16 = 2;
const RTA_IIF: u16 = 3;
const RTA_PREFSRC: u16 = 7;
const RTA_MARK: u16 = 16;
const RTA_VIA: u16 = 18;
const TYPE_LOCAL: u8 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const NTF_USE: u8 = 0x01;
const NUD_INCOMPLETE: u16 = 0x01;
const NUD_FAILED: u16 = 0x20;

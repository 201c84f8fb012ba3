//! Tunnels to single hosts: VXLAN (RFC 7348), by the kernel alone.

use std::io;
use std::net::IpAddr;

use rustix::net::AddressFamily;

use super::{IFLA_ADDRESS, IFLA_MTU, RTM_GETLINK, RTM_NEWLINK, Rtnetlink, address_of, link_header, octets};
use crate::{Batch, CREATE, DUMP, EXCLUSIVE, Message, REQUEST, attributes};

/// A device whose frames go to one other host, in UDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The name of the device.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet that it takes.
    pub mtu: u32,
    /// The number of the network: 24 bits.
    pub id: u32,
    /// The UDP port of both ends.
    pub port: u16,
    /// The address of this host.
    pub local: IpAddr,
    /// The address of the other host.
    pub remote: IpAddr,
}

impl Rtnetlink {
    /// Makes a tunnel, which is down.
    ///
    /// # Errors
    /// `EEXIST` where there is a device of this name, or a tunnel with this number and port; `EOPNOTSUPP` without
    /// `CONFIG_VXLAN`; `EPERM`.
    pub fn add_vxlan(&mut self, vxlan: &Vxlan) -> io::Result<()> {
        self.change(RTM_NEWLINK, CREATE | EXCLUSIVE, |m| {
            m.bytes(&link_header(0, 0));
            m.string(IFLA_IFNAME, &vxlan.name);
            m.attribute(IFLA_ADDRESS, &vxlan.mac);
            m.u32(IFLA_MTU, vxlan.mtu);
            m.nested(IFLA_LINKINFO, |info| {
                info.attribute(IFLA_INFO_KIND, KIND);
                info.nested(IFLA_INFO_DATA, |data| {
                    data.u32(VXLAN_ID, vxlan.id);
                    data.attribute(VXLAN_PORT, &vxlan.port.to_be_bytes());
                    data.attribute(VXLAN_LEARNING, &[0]);
                    for (kinds, address) in [(LOCAL, vxlan.local), (REMOTE, vxlan.remote)] {
                        data.attribute(kinds[usize::from(address.is_ipv6())], &octets(address));
                    }
                });
            });
        })
    }

    /// The tunnels to single hosts.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn vxlans(&mut self) -> io::Result<Vec<Vxlan>> {
        let mut batch = Batch::new();
        batch.message(RTM_GETLINK, REQUEST | DUMP, |m| m.bytes(&link_header(0, 0)));
        self.socket.dump_all(&batch, |found, link| found.extend(parse(link)))
    }

    /// Removes a link, and with it its addresses, routes and neighbours.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link; `EOPNOTSUPP` for a real one.
    pub fn remove_link(&mut self, link: &str) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_DELLINK, 0, |m| m.bytes(&link_header(index, 0)))
    }

    /// Keeps the kernel from giving a link a link-local address, and from the neighbour discovery that comes with it.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn no_generated_address(&mut self, link: &str) -> io::Result<()> {
        self.set_for_family(link, AddressFamily::INET6, |inet6| {
            inet6.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        })
    }

    /// Makes a link accept packets whose source is reachable by any link (`rp_filter=2`).
    ///
    /// # Errors
    /// `ENODEV` where there is no such link.
    pub fn accept_any_source(&mut self, link: &str) -> io::Result<()> {
        const LOOSE: u32 = 2;
        self.set_for_family(link, AddressFamily::INET, |inet| {
            inet.nested(IFLA_INET_CONF, |settings| settings.u32(DEVCONF_RP_FILTER, LOOSE));
        })
    }

    fn set_for_family(
        &mut self,
        link: &str,
        family: AddressFamily,
        settings: impl FnOnce(&mut Message<'_>),
    ) -> io::Result<()> {
        let index = self.index(link)?;
        self.change(RTM_NEWLINK, 0, |m| {
            // The up flag stays as it is.
            let mut header = link_header(index, 0);
            header[12..].fill(0);
            m.bytes(&header);
            m.nested(IFLA_AF_SPEC, |families| families.nested(family.as_raw(), settings));
        })
    }
}

fn parse(link: &[u8]) -> Option<Vxlan> {
    let find = |bytes, wanted| attributes(bytes).find(|attribute| attribute.0 == wanted).map(|found| found.1);
    let all = link.get(16..)?;
    let info = find(all, IFLA_LINKINFO)?;
    if find(info, IFLA_INFO_KIND)?.strip_suffix(&[0]) != Some(KIND) {
        return None;
    }
    let data = find(info, IFLA_INFO_DATA)?;
    let number = |bytes: &[u8]| Some(u32::from_ne_bytes(bytes.try_into().ok()?));
    let address = |kinds: [u16; 2]| kinds.iter().find_map(|kind| address_of(find(data, *kind)?));
    let name = find(all, IFLA_IFNAME)?;
    Some(Vxlan {
        name: String::from_utf8(name.strip_suffix(&[0])?.to_vec()).ok()?,
        mac: find(all, IFLA_ADDRESS)?.try_into().ok()?,
        mtu: number(find(all, IFLA_MTU)?)?,
        id: number(find(data, VXLAN_ID)?)?,
        port: u16::from_be_bytes(find(data, VXLAN_PORT)?.try_into().ok()?),
        local: address(LOCAL)?,
        remote: address(REMOTE)?,
    })
}

const KIND: &[u8] = b"vxlan";

// linux/if_link.h, linux/ip.h, linux/rtnetlink.h
const RTM_DELLINK: u16 = 17;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const DEVCONF_RP_FILTER: u16 = 8;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const VXLAN_ID: u16 = 1;
const VXLAN_LEARNING: u16 = 7;
const VXLAN_PORT: u16 = 15;
/// For IPv4 and for IPv6.
const REMOTE: [u16; 2] = [2, 16];
const LOCAL: [u16; 2] = [4, 17];

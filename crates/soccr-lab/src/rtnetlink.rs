//! Veth pairs, bridges and settings of links that only tests need, by `rtnetlink(7)`.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use soccr_netlink::{CREATE, EXCLUSIVE, Message, Rtnetlink, link_header};

use crate::{Namespace, wait_until};

const RTM_NEWLINK: u16 = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_GSO_MAX_SEGS: u16 = 40;
const IFF_UP: u32 = 1;

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

/// Makes a veth pair and sets both ends up. They get no address of their own, not even a link-local one.
///
/// # Errors
/// `EEXIST` where a name is taken, `EINVAL` for an MTU outside 68–65535.
pub fn veth(control: &mut Rtnetlink, ends: [VethEnd<'_>; 2], mtu: u32) -> io::Result<()> {
    let describe = |message: &mut Message<'_>, end: &VethEnd<'_>| {
        message.string(IFLA_IFNAME, end.name);
        message.attribute(IFLA_ADDRESS, &end.mac);
        message.u32(IFLA_MTU, mtu);
        message.u32(IFLA_NET_NS_FD, end.namespace.as_fd().as_raw_fd() as u32);
    };
    control.change(RTM_NEWLINK, CREATE | EXCLUSIVE, |message| {
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

/// Makes a bridge and sets it up.
pub(crate) fn bridge(control: &mut Rtnetlink, name: &str) -> io::Result<()> {
    control.change(RTM_NEWLINK, CREATE | EXCLUSIVE, |message| {
        message.bytes(&link_header(0, 0));
        message.string(IFLA_IFNAME, name);
        message.nested(IFLA_LINKINFO, |info| info.attribute(IFLA_INFO_KIND, b"bridge"));
    })?;
    control.no_generated_address(name)?;
    control.up(name)
}

/// Makes a link a port of a bridge.
pub(crate) fn enslave(control: &mut Rtnetlink, link: &str, bridge: &str) -> io::Result<()> {
    let (index, bridge) = (control.index(link)?, control.index(bridge)?);
    control.change(RTM_NEWLINK, 0, |message| {
        message.bytes(&link_header(index, IFF_UP));
        message.u32(IFLA_MASTER, bridge);
    })
}

/// Makes the kernel hand single segments to a link, never larger ones for the device to cut.
pub(crate) fn single_segments(control: &mut Rtnetlink, link: &str) -> io::Result<()> {
    let index = control.index(link)?;
    control.change(RTM_NEWLINK, 0, |message| {
        message.bytes(&link_header(index, IFF_UP));
        message.u32(IFLA_GSO_MAX_SEGS, 1);
    })
}

impl Namespace {
    /// A connection to the kernel that changes this network.
    ///
    /// # Errors
    /// The errors of opening a netlink socket.
    pub fn rtnetlink(&self) -> io::Result<Rtnetlink> {
        self.run(Rtnetlink::here)
    }
}

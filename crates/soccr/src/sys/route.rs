//! Where the kernel would send a packet: asked before one is sent that must not leave this host.
//!
//! # References
//! `rtnetlink(7)`, `linux/rtnetlink.h`: `RTM_GETROUTE`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use soccr_netlink::{Link, Packet, Rtnetlink, Way};

use super::descriptor;
use super::{LOOPBACK, MARK};

/// Asks for routes in the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Routes(Rtnetlink);

impl Routes {
    pub(crate) fn open() -> io::Result<Self> {
        Rtnetlink::here().map(Self)
    }

    /// The same, for whoever keeps it.
    pub(crate) fn kept(self) -> Self {
        Self(self.0.with_descriptor(descriptor::high))
    }

    /// Whether a packet with our mark, sent to this address from a socket that is bound to this interface (0: to none),
    /// is for this host.
    ///
    /// # Errors
    /// The errors of netlink.
    pub(crate) fn end_here(&mut self, to: SocketAddr, interface: u32) -> io::Result<bool> {
        let link = match (interface, to) {
            (0, SocketAddr::V6(to)) if to.scope_id() != 0 => Link::To(to.scope_id()),
            (0, _) => Link::Any,
            (interface, _) => Link::To(interface),
        };
        is_local(self.0.way(Packet { link, mark: MARK, ..Packet::to(to.ip()) }))
    }

    /// The interface by which packets with our mark leave for this address.
    ///
    /// # Errors
    /// The errors of netlink; `ENETUNREACH` and the like where there is no way.
    pub(crate) fn interface_to(&mut self, to: IpAddr) -> io::Result<u32> {
        self.0.way(Packet { mark: MARK, ..Packet::to(to) }).map(|way| way.link)
    }

    /// Whether a packet with our mark that arrives from `lo` stays on this host: because it is for it, or because nothing
    /// from there is forwarded.
    pub(crate) fn stay_here_from_lo(&mut self, from: IpAddr, to: IpAddr) -> io::Result<bool> {
        let from = Some(from.to_canonical());
        match self.0.way(Packet { from, link: Link::From(LOOPBACK), mark: MARK, ..Packet::to(to) }) {
            // So says IPv4, and only where forwarding is off. A rule of somebody else may still find the socket.
            Err(error) if error.raw_os_error() == Some(libc::EHOSTUNREACH) => Ok(true),
            way => is_local(way),
        }
    }
}

fn is_local(way: io::Result<Way>) -> io::Result<bool> {
    /// The kernel would send such a packet nowhere.
    const REFUSALS: [i32; 6] =
        [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL, libc::EXDEV, libc::ENODEV];
    match way {
        Err(error) if error.raw_os_error().is_some_and(|errno| REFUSALS.contains(&errno)) => Ok(false),
        way => way.map(|way| way.local),
    }
}

impl AsFd for Routes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

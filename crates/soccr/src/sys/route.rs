//! Where the kernel would send a packet: asked before one is sent that must not leave this host.
//!
//! # References
//! `rtnetlink(7)`, `linux/rtnetlink.h`: `RTM_GETROUTE`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use soccr_netlink::{Batch, Family, REQUEST, Socket};

use super::descriptor;
use super::raw::{LOOPBACK, MARK};

/// Asks for routes in the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Routes(Socket);

impl Routes {
    pub(crate) fn open() -> io::Result<Self> {
        Socket::open(Family::Route).map(Self)
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
        let scope = match to {
            SocketAddr::V6(to) => to.scope_id(),
            SocketAddr::V4(_) => 0,
        };
        let interface = if interface == 0 { scope } else { interface };
        no_route(self.ask(to.ip(), None, OUTGOING_INTERFACE, interface))
    }

    /// Whether a packet with our mark that arrives from `lo` stays on this host: because it is for it, or because nothing
    /// from there is forwarded.
    pub(crate) fn stay_here_from_lo(&mut self, from: IpAddr, to: IpAddr) -> io::Result<bool> {
        match self.ask(to, Some(from), INCOMING_INTERFACE, LOOPBACK) {
            // So says IPv4, and only where forwarding is off. A rule of somebody else may still find the socket.
            Err(error) if error.raw_os_error() == Some(libc::EHOSTUNREACH) => Ok(true),
            answer => no_route(answer),
        }
    }

    fn ask(&mut self, to: IpAddr, from: Option<IpAddr>, direction: u16, interface: u32) -> io::Result<bool> {
        let mut batch = Batch::new();
        batch.message(GET_ROUTE, REQUEST, |m| {
            let family = if to.to_canonical().is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let bits = if family == libc::AF_INET { 32 } else { 128 };
            let mut header = [0; HEADER];
            header[..3].copy_from_slice(&[family as u8, bits, if from.is_some() { bits } else { 0 }]);
            m.bytes(&header);
            for (kind, address) in [(DESTINATION, Some(to)), (SOURCE, from)] {
                match address.map(|address| address.to_canonical()) {
                    Some(IpAddr::V4(address)) => m.attribute(kind, &address.octets()),
                    Some(IpAddr::V6(address)) => m.attribute(kind, &address.octets()),
                    None => {}
                }
            }
            if interface != 0 {
                m.u32(direction, interface);
            }
            m.u32(FIREWALL_MARK, MARK);
        });
        self.0.get(&batch, |_, route| route.get(TYPE) == Some(&LOCAL))
    }
}

/// The kernel would send such a packet nowhere.
fn no_route(answer: io::Result<bool>) -> io::Result<bool> {
    const REFUSALS: [i32; 6] =
        [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES, libc::EINVAL, libc::EXDEV, libc::ENODEV];
    match answer {
        Err(error) if error.raw_os_error().is_some_and(|errno| REFUSALS.contains(&errno)) => Ok(false),
        answer => answer,
    }
}

impl AsFd for Routes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const GET_ROUTE: u16 = 26;
/// `struct rtmsg`, and where it has its `rtm_type`.
const HEADER: usize = 12;
const TYPE: usize = 7;
const LOCAL: u8 = 2;
const DESTINATION: u16 = 1;
const SOURCE: u16 = 2;
const INCOMING_INTERFACE: u16 = 3;
const OUTGOING_INTERFACE: u16 = 4;
const FIREWALL_MARK: u16 = 16;

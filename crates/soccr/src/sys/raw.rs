//! Raw sockets: packets as if the peer had sent them, and ours to the peer.
//!
//! # References
//! `raw(7)`, `packet(7)`; RFC 3542 §3 (raw sockets of IPv6).

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, Protocol, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with,
};

use crate::error::{Error, Result};
use crate::sys::{descriptor, namespace, sockopt};

/// The firewall mark (`SO_MARK`) of every packet sent here: a lock lets it pass.
pub(crate) const MARK: u32 = 0xc114;

/// How an [`Injector`] hands its packets to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// Routed like our own: to a local address over `lo`, to the peer over its route.
    Ipv4,
    /// The same for IPv6.
    Ipv6,
    /// Received from `lo`, past the rules for outgoing packets: for local addresses only.
    Loopback,
}

impl Via {
    /// The way for packets with this address.
    pub(crate) fn routed(address: IpAddr) -> Self {
        if address.to_canonical().is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }
}

/// A raw socket in one network namespace, marked with [`MARK`].
#[derive(Debug)]
pub(crate) struct Injector {
    fd: OwnedFd,
    via: Via,
}

/// The last injector of each kind, and the cookie of its network namespace: opening one costs as much as the rest of a
/// restore. They belong to the call that restores, or to the thread that restores many connections, and end with it:
/// the program around it never finds a descriptor that it has not opened.
#[derive(Debug, Default)]
pub(crate) struct Injectors {
    last: [Option<(u64, Injector)>; 3],
}

impl Injectors {
    /// The injector for the namespace of `socket`.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW` and `CAP_NET_ADMIN`, and without `CAP_SYS_ADMIN` where the socket is in
    /// another namespace than the thread.
    pub(crate) fn beside(&mut self, socket: BorrowedFd<'_>, via: Via) -> Result<&Injector> {
        let failed = |error| Error::system("raw socket", error);
        let cookie = namespace::cookie(socket).map_err(failed)?;
        let slot = &mut self.last[via as usize];
        let injector = match slot.take() {
            Some((last, injector)) if last == cookie => injector,
            _ => namespace::open_beside(socket, || Injector::open(via)).map_err(failed)?,
        };
        Ok(&slot.insert((cookie, injector)).1)
    }
}

impl Injector {
    /// Opens a raw socket in the namespace of the calling thread.
    pub(crate) fn open(via: Via) -> io::Result<Self> {
        let (family, kind, protocol) = match via {
            Via::Ipv4 => (AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW)),
            Via::Ipv6 => (AddressFamily::INET6, SocketType::RAW, Some(ipproto::RAW)),
            Via::Loopback => (AddressFamily::PACKET, SocketType::DGRAM, None::<Protocol>),
        };
        let fd = socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?;
        sockopt::set(fd.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &MARK)?;
        Ok(Self { fd, via })
    }

    /// The same socket, for whoever keeps it.
    pub(crate) fn kept(self) -> Self {
        Self { fd: descriptor::high(self.fd), via: self.via }
    }

    /// Sends a whole packet, IP header included, towards `destination`, whose scope counts and whose port does not.
    ///
    /// A packet to a local address has been received, as a rule, when this returns; under load it may be
    /// a moment later.
    ///
    /// # Errors
    /// `EPERM` where a firewall drops it on its way out, `EMSGSIZE` where it is longer than the route allows
    /// (65535 bytes to a local address).
    pub(crate) fn send(&self, packet: &[u8], destination: SocketAddr) -> Result<()> {
        let flags = SendFlags::NOSIGNAL;
        let sent = match (self.via, destination.ip().to_canonical(), destination) {
            (Via::Ipv4, IpAddr::V4(v4), _) => sendto(&self.fd, packet, flags, &SocketAddrV4::new(v4, 0)),
            (Via::Ipv6, _, SocketAddr::V6(v6)) => {
                let address = SocketAddrV6::new(*v6.ip(), 0, 0, v6.scope_id());
                sendto(&self.fd, packet, flags, &address)
            }
            (Via::Loopback, address, _) => sendto(&self.fd, packet, flags, &Loopback(address)),
            _ => Err(rustix::io::Errno::AFNOSUPPORT),
        };
        match sent {
            Ok(_) => Ok(()),
            Err(errno @ rustix::io::Errno::PERM) => Err(Error::system("raw sendto", errno)
                .advise("a firewall rule drops outgoing packets with mark 0xC114: let them pass on `lo`")),
            Err(errno) => Err(Error::system("raw sendto", errno)),
        }
    }
}

impl AsFd for Injector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The device `lo`, for packets with this address.
struct Loopback(IpAddr);

// SAFETY: the closure gets a pointer to a `sockaddr_ll` and its size.
unsafe impl SocketAddrArg for Loopback {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        /// The index of `lo` in every network namespace.
        const LOOPBACK_INDEX: i32 = 1;
        let protocol = if self.0.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (protocol as u16).to_be(),
            sll_ifindex: LOOPBACK_INDEX,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        f((&raw const address).cast(), size_of::<libc::sockaddr_ll>() as SocketAddrLen)
    }
}

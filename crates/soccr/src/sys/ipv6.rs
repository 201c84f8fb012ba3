//! IPv6 packets with any source, whose header the kernel writes.
//!
//! A packet that brings its own header (`IPV6_HDRINCL`) gets a route of its own. The socket that takes it in keeps that
//! route until the next packet arrives, and the route keeps the device: where the peer is gone, the link could not be
//! removed for as long as the socket lives.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with};

use super::message::{self, Item};
use crate::sys::sockopt;

/// A discard address (RFC 6666), which nobody has.
pub(crate) const NOBODY: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1);

const HEADER: usize = 40;

/// Opens a raw socket for TCP, which hears nothing.
pub(crate) fn open() -> io::Result<OwnedFd> {
    const IPV6_FREEBIND: i32 = 78;
    let fd = socket_with(AddressFamily::INET6, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    let set = |name, value: i32| sockopt::set(fd.as_fd(), libc::IPPROTO_IPV6, name, &value);
    set(IPV6_FREEBIND, 1)?;
    // What is too long is an error, not cut into fragments.
    set(libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)?;
    bind(&fd, &SocketAddrV6::new(NOBODY, 0, 0, 0))?;
    Ok(fd)
}

/// Sends a packet: source, traffic class and hop limit are those of its header.
pub(crate) fn send(fd: BorrowedFd<'_>, packet: &[u8], destination: SocketAddrV6) -> Result<(), Errno> {
    let (header, segment) = packet.split_at_checked(HEADER).ok_or(Errno::INVAL)?;
    let source = header[8..24].try_into().map_err(|_| Errno::INVAL)?;
    let information = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: source }, ipi6_ifindex: 0 };
    let class = (header[0] & 15) << 4 | header[1] >> 4;
    let control = Control {
        source: Item::new(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, information),
        class: Item::new(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class.into()),
        hops: Item::new(libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, header[7].into()),
    };
    let name = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: destination.ip().octets() },
        sin6_scope_id: destination.scope_id(),
    };
    message::send(fd, segment, name, control)
}

#[repr(C)]
struct Control {
    source: Item<libc::in6_pktinfo>,
    class: Item<i32>,
    hops: Item<i32>,
}

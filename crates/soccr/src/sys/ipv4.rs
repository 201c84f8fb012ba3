//! IPv4 packets that are routed by their source, too. A packet that brings its own header (`IP_HDRINCL`) is routed as if it
//! had none.

use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::message::{self, Item};

/// Sends a packet of any source.
pub(crate) fn send(fd: BorrowedFd<'_>, packet: &[u8], destination: Ipv4Addr) -> Result<(), Errno> {
    let source = *packet.get(12..).and_then(<[u8]>::first_chunk).ok_or(Errno::INVAL)?;
    let address = |octets| libc::in_addr { s_addr: u32::from_ne_bytes(octets) };
    let information =
        libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: address(source), ipi_addr: address([0; 4]) };
    let name = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: address(destination.octets()),
        sin_zero: [0; 8],
    };
    message::send(fd, packet, name, Item::new(libc::IPPROTO_IP, libc::IP_PKTINFO, information))
}

//! Connection tracking: a firewall that lets only established connections pass shall know that this one is.
//!
//! # References
//! `linux/netfilter/nfnetlink_conntrack.h`.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use soccr_netlink::{ACK, Batch, CREATE, Family, Message, REQUEST, Socket};

use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::sys::namespace;

/// Enters a connection as established, in the network namespace of its socket.
///
/// Its windows are not tracked: they are unknown until both ends have sent. Packets keep the entry alive; without
/// them it is gone after two minutes.
///
/// # Errors
/// `EEXIST` where it is known already; the kernel tracks no connections (`CONFIG_NF_CT_NETLINK`).
pub(crate) fn enter(socket: BorrowedFd<'_>, flow: Flow) -> Result<()> {
    enter_for(socket, flow, 120)
}

/// Enters a connection as established where connections are tracked, for as long as the kernel keeps idle ones there. To be
/// called in the network namespace of the socket.
///
/// # Errors
/// Those of [`enter`], but for `EEXIST`.
pub(crate) fn enter_where_tracked(socket: BorrowedFd<'_>, flow: Flow) -> Result<()> {
    const IDLE: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
    let Some(seconds) = std::fs::read_to_string(IDLE).ok().and_then(|text| text.trim().parse().ok()) else {
        return Ok(());
    };
    match enter_for(socket, flow, seconds) {
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

fn enter_for(socket: BorrowedFd<'_>, flow: Flow, seconds: u32) -> Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW, REQUEST | ACK | CREATE, |m| {
        let family = if flow.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        m.bytes(&[family as u8, 0, 0, 0]);
        m.nested(TUPLE_ORIGINAL, |t| tuple(t, flow.remote, flow.local));
        m.nested(TUPLE_REPLY, |t| tuple(t, flow.local, flow.remote));
        m.be32(STATUS, SEEN_REPLY | ASSURED | CONFIRMED);
        m.be32(TIMEOUT, seconds);
        m.nested(PROTOCOL_INFO, |info| {
            info.nested(INFO_TCP, |tcp| {
                tcp.attribute(TCP_STATE, &[ESTABLISHED]);
                tcp.attribute(TCP_FLAGS_ORIGINAL, &[BE_LIBERAL, BE_LIBERAL]);
                tcp.attribute(TCP_FLAGS_REPLY, &[BE_LIBERAL, BE_LIBERAL]);
            });
        });
    });
    namespace::open_beside(socket, || Socket::open(Family::Netfilter))
        .and_then(|mut netlink| netlink.transact(&batch))
        .map_err(|error| Error::system("conntrack", error))
}

fn tuple(t: &mut Message<'_>, source: SocketAddr, destination: SocketAddr) {
    t.nested(TUPLE_IP, |ip| match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ip.attribute(IPV4_SOURCE, &source.octets());
            ip.attribute(IPV4_DESTINATION, &destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ip.attribute(IPV6_SOURCE, &source.octets());
            ip.attribute(IPV6_DESTINATION, &destination.octets());
        }
        _ => {}
    });
    t.nested(TUPLE_PROTOCOL, |protocol| {
        protocol.attribute(PROTOCOL_NUMBER, &[libc::IPPROTO_TCP as u8]);
        protocol.attribute(PORT_SOURCE, &source.port().to_be_bytes());
        protocol.attribute(PORT_DESTINATION, &destination.port().to_be_bytes());
    });
}

const NEW: u16 = 1 << 8;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const TIMEOUT: u16 = 7;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IPV4_SOURCE: u16 = 1;
const IPV4_DESTINATION: u16 = 2;
const IPV6_SOURCE: u16 = 3;
const IPV6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const PORT_SOURCE: u16 = 2;
const PORT_DESTINATION: u16 = 3;
const INFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TCP_FLAGS_ORIGINAL: u16 = 4;
const TCP_FLAGS_REPLY: u16 = 5;

// linux/netfilter/nf_conntrack_common.h, linux/netfilter/nf_conntrack_tcp.h
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;
const CONFIRMED: u32 = 1 << 3;
const ESTABLISHED: u8 = 3;
const BE_LIBERAL: u8 = 0x08;

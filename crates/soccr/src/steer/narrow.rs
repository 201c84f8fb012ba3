//! Peers learn that a tunnel takes smaller packets.

use std::net::{IpAddr, SocketAddr};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, SendFlags, SocketType, ipproto, sendto, socket};

use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::segment::{Segment, checksum, flags};

/// Tells the peer of a connection that packets to this host may have `mtu` bytes at most, from the network namespace of the calling thread:
/// it sends smaller segments then. Without that, full ones would be cut in two for a [`Tunnel`](super::Tunnel).
///
/// The peer believes it where `rcv_nxt` is the next sequence number that is expected from it. After ten minutes without another
/// such message Linux tries larger packets again.
///
/// # Errors
/// `EPERM` without `CAP_NET_RAW`, or where a firewall drops the message.
///
/// # References
/// RFC 1191 §4 ("fragmentation needed"), RFC 8201 §4 ("packet too big").
pub fn narrow(flow: &Flow, rcv_nxt: u32, mtu: u32) -> Result<()> {
    let Flow { local, remote } = flow.on_the_wire();
    let mut quoted = Vec::new();
    Segment {
        source: remote,
        destination: local,
        seq: rcv_nxt,
        ack: 0,
        flags: flags::ACK,
        window: 0,
        timestamps: None,
        urgent: 0,
        payload: &[],
    }
    .write(&mut quoted);
    let message = match local.ip() {
        IpAddr::V4(_) => {
            let [high, low] = (mtu.min(u16::MAX.into()) as u16).to_be_bytes();
            let mut message =
                [&[DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED, 0, 0, 0, 0, high, low], &quoted[..]]
                    .concat();
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            message
        }
        // The kernel writes the checksum.
        IpAddr::V6(_) => [&[PACKET_TOO_BIG, 0, 0, 0], &mtu.to_be_bytes()[..], &quoted].concat(),
    };
    let (family, protocol) = if local.is_ipv4() {
        (AddressFamily::INET, ipproto::ICMP)
    } else {
        (AddressFamily::INET6, ipproto::ICMPV6)
    };
    let failed = |errno| Error::system("ICMP to the peer", errno).at("steer");
    let socket = socket(family, SocketType::RAW, Some::<Protocol>(protocol)).map_err(failed)?;
    let sent = sendto(&socket, &message, SendFlags::NOSIGNAL, &SocketAddr::new(remote.ip(), 0));
    sent.map(drop).map_err(|errno| match errno {
        Errno::PERM => failed(errno).advise(
            "a firewall of this host drops it: let ICMP errors out (`ct state related accept`), or full packets of \
             the peer are cut in two for the tunnel",
        ),
        _ => failed(errno),
    })
}

const DESTINATION_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const PACKET_TOO_BIG: u8 = 2;

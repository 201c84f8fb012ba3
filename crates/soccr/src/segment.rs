//! IPv4 and IPv6 packets with one TCP segment in each: built, [read](Parsed), and made ready to
//! be [sent once more](Run). Pure: no I/O.
//!
//! # References
//! RFC 791 (IPv4), RFC 8200 (IPv6), RFC 9293 §3.1 (TCP), RFC 7323 §3 (timestamps), RFC 1071 (checksums).

mod parsed;
mod run;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(crate) use parsed::{Checksum, Parsed};
pub(crate) use run::Run;

/// The bits of the TCP header.
pub(crate) mod flags {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const URG: u8 = 0x20;
    pub(crate) const CWR: u8 = 0x80;
}

/// The longest packet that the length field of IPv4 can state; also the limit of a raw socket on `lo`.
pub(crate) const PACKET_LIMIT: usize = 65535;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const TCP: u8 = 6;
/// What plays the peer's never leaves the host, and a socket may want that no router has forwarded it (`IP_MINTTL`, RFC 5082).
const HOP_LIMIT: u8 = u8::MAX;
/// Of packets that leave the host, where nothing else is known.
pub(crate) const ORDINARY_HOP_LIMIT: u8 = 64;

/// A segment to be built.
///
/// The fields are those of RFC 9293 §3.1. IPv4-mapped addresses make an IPv4 packet.
#[derive(Clone, Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    /// The window field as it is sent: already shifted right by the window scale.
    pub(crate) window: u16,
    /// TSval and TSecr.
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) urgent: u16,
    pub(crate) payload: &'a [u8],
}

impl Segment<'_> {
    /// Writes the packet over what `packet` held, and keeps its memory.
    ///
    /// The two addresses must be of one family and the packet fit into [`PACKET_LIMIT`].
    pub(crate) fn write(&self, packet: &mut Vec<u8>) {
        self.write_with(&[], packet);
    }

    /// Like [`write`](Self::write), with further TCP options: whole words, 40 bytes with those of its own.
    pub(crate) fn write_with(&self, further: &[u8], packet: &mut Vec<u8>) {
        packet.clear();
        let options = further.len() + if self.timestamps.is_some() { 12 } else { 0 };
        let ip = match (self.source.ip().to_canonical(), self.destination.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                packet.extend_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, HOP_LIMIT, TCP, 0, 0]);
                packet.extend_from_slice(&source.octets());
                packet.extend_from_slice(&destination.octets());
                IPV4_HEADER
            }
            (source, destination) => {
                packet.extend_from_slice(&[0x60, 0, 0, 0, 0, 0, TCP, HOP_LIMIT]);
                packet.extend_from_slice(&sixteen(source));
                packet.extend_from_slice(&sixteen(destination));
                IPV6_HEADER
            }
        };
        packet.extend_from_slice(&self.source.port().to_be_bytes());
        packet.extend_from_slice(&self.destination.port().to_be_bytes());
        packet.extend_from_slice(&self.seq.to_be_bytes());
        packet.extend_from_slice(&self.ack.to_be_bytes());
        packet.extend_from_slice(&[((TCP_HEADER + options) as u8 / 4) << 4, self.flags]);
        packet.extend_from_slice(&self.window.to_be_bytes());
        packet.extend_from_slice(&[0, 0]);
        packet.extend_from_slice(&self.urgent.to_be_bytes());
        if let Some((value, echo)) = self.timestamps {
            packet.extend_from_slice(&[1, 1, 8, 10]);
            packet.extend_from_slice(&value.to_be_bytes());
            packet.extend_from_slice(&echo.to_be_bytes());
        }
        packet.extend_from_slice(further);
        packet.extend_from_slice(self.payload);
        finish(packet, ip);
    }
}

/// Sets type of service and hop limit of a packet, where they are known. Neither is in the checksum of TCP, and the kernel
/// computes that of an IPv4 header.
pub(crate) fn set_service(packet: &mut [u8], class: Option<u8>, hops: Option<u8>) {
    let is_ipv4 = packet[0] >> 4 == 4;
    match class {
        Some(class) if is_ipv4 => packet[1] = class,
        Some(class) => (packet[0], packet[1]) = (0x60 | class >> 4, class << 4),
        None => {}
    }
    if let Some(hops) = hops {
        packet[if is_ipv4 { 8 } else { 7 }] = hops;
    }
}

/// Writes lengths and checksums into a packet whose IP header takes `ip` bytes.
fn finish(packet: &mut [u8], ip: usize) {
    let total = packet.len();
    let (source, destination): (IpAddr, IpAddr) = if ip == IPV4_HEADER {
        packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
        packet[10..12].fill(0);
        let header = checksum(&packet[..ip]);
        packet[10..12].copy_from_slice(&header.to_be_bytes());
        (address::<4>(packet, 12).into(), address::<4>(packet, 16).into())
    } else {
        packet[4..6].copy_from_slice(&((total - ip) as u16).to_be_bytes());
        (address::<16>(packet, 8).into(), address::<16>(packet, 24).into())
    };
    packet[ip + 16..ip + 18].fill(0);
    let checksum = !fold(pseudo_header(source, destination, total - ip) + sum(&packet[ip..]));
    packet[ip + 16..ip + 18].copy_from_slice(&checksum.to_be_bytes());
}

fn address<const N: usize>(packet: &[u8], at: usize) -> [u8; N] {
    let mut octets = [0; N];
    octets.copy_from_slice(&packet[at..at + N]);
    octets
}

fn pseudo_header(source: IpAddr, destination: IpAddr, length: usize) -> u64 {
    let addresses = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => sum(&source.octets()) + sum(&destination.octets()),
        _ => sum(&sixteen(source)) + sum(&sixteen(destination)),
    };
    addresses + u64::from(TCP) + length as u64
}

fn sixteen(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::to_ipv6_mapped(&v4).octets(),
        IpAddr::V6(v6) => Ipv6Addr::octets(&v6),
    }
}

/// The Internet checksum of bytes that have zero in its place.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// The sum of the bytes as 16-bit words in network byte order, in ones' complement.
fn sum(bytes: &[u8]) -> u64 {
    // The order of bytes within words does not matter until the end (RFC 1071 §2): so four at a time.
    let words = bytes.chunks_exact(4);
    let mut rest = [0; 4];
    rest[..words.remainder().len()].copy_from_slice(words.remainder());
    let word = |bytes: &[u8]| u64::from(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    let sum = words.fold(word(&rest), |sum, bytes| sum + word(bytes));
    u16::from_be(fold(sum)).into()
}

/// The sum in 16 bits with the carries added: never zero but for a sum of zero.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests;

//! What a packet from the wire holds.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use super::{IPV4_HEADER, IPV6_HEADER, PACKET_LIMIT, TCP, TCP_HEADER, flags, fold, pseudo_header, sum};

/// The state of a captured segment's checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// It covers the segment.
    Full,
    /// It covers the pseudo-header only: the segment was made on this machine, or put together by it
    /// from several that it had checked, and the rest was left to a network card.
    Partial,
    /// The segment was damaged on its way.
    Wrong,
}

/// Where everything is in a packet from the wire, whatever the packet holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    /// The TCP header in the packet.
    pub(crate) header: Range<usize>,
    /// The data behind it, as far as captured.
    pub(crate) payload: Range<usize>,
    /// How many bytes of the packet have not been captured, at least.
    pub(crate) missing: usize,
}

impl Parsed {
    /// Reads a captured packet that begins with its IP header.
    ///
    /// `None` for everything but a TCP segment in one piece: other protocols, fragments, and headers that
    /// contradict the length of the packet.
    pub(crate) fn new(packet: &[u8]) -> Option<Self> {
        let (source, destination, tcp, stated): (IpAddr, IpAddr, usize, usize) = match packet.first()? >> 4 {
            4 => {
                let header = usize::from(packet[0] & 0xf) * 4;
                let fragment = be16(packet, 6)? & 0x3fff;
                if header < IPV4_HEADER || fragment != 0 || *packet.get(9)? != TCP {
                    return None;
                }
                let address = |at: usize| packet.get(at..)?.first_chunk::<4>().copied().map(IpAddr::from);
                (address(12)?, address(16)?, header, be16(packet, 2)?.into())
            }
            6 => {
                let address = |at: usize| packet.get(at..)?.first_chunk::<16>().copied().map(IpAddr::from);
                let length = usize::from(be16(packet, 4)?);
                let stated = if length == 0 { 0 } else { length + IPV6_HEADER };
                (address(8)?, address(24)?, behind_extensions(packet)?, stated)
            }
            _ => return None,
        };
        // A stated length of zero is that of a packet over 64 KiB (BIG TCP): what has been captured is known.
        let missing = match stated {
            0 => usize::from(packet.len() <= PACKET_LIMIT),
            _ => stated.saturating_sub(packet.len()),
        };
        let end = if stated == 0 { packet.len() } else { stated.min(packet.len()) };
        let fixed = packet.get(tcp..end)?.get(..TCP_HEADER)?;
        let length = usize::from(fixed[12] >> 4) * 4;
        if length < TCP_HEADER || tcp + length > end {
            return None;
        }
        Some(Self {
            source: SocketAddr::new(source, be16(fixed, 0)?),
            destination: SocketAddr::new(destination, be16(fixed, 2)?),
            seq: be32(fixed, 4)?,
            ack: be32(fixed, 8)?,
            flags: fixed[13],
            header: tcp..tcp + length,
            payload: tcp + length..end,
            missing,
        })
    }

    /// Whether the packet, from which this was read, has come undamaged.
    pub(crate) fn checksum(&self, packet: &[u8]) -> Checksum {
        let segment = &packet[self.header.start..self.payload.end];
        let pseudo = pseudo_header(self.source.ip(), self.destination.ip(), segment.len() + self.missing);
        let stated = u16::from_be_bytes([segment[16], segment[17]]);
        if stated == fold(pseudo) {
            return Checksum::Partial;
        }
        if self.missing == 0 && fold(pseudo + sum(segment)) == 0xffff {
            return Checksum::Full;
        }
        Checksum::Wrong
    }

    /// A segment that only acknowledges: no data, nothing that counts in the sequence space.
    pub(crate) fn is_pure_ack(&self) -> bool {
        self.payload.is_empty() && self.flags & (flags::SYN | flags::FIN | flags::RST) == 0
    }
}

/// The offset of the TCP header in an IPv6 packet.
fn behind_extensions(packet: &[u8]) -> Option<usize> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const DESTINATION: u8 = 60;
    let mut next = *packet.get(6)?;
    let mut at = IPV6_HEADER;
    loop {
        match next {
            TCP => return Some(at),
            HOP_BY_HOP | ROUTING | DESTINATION => {
                next = *packet.get(at)?;
                at += (usize::from(*packet.get(at + 1)?) + 1) * 8;
            }
            _ => return None,
        }
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|word| u16::from_be_bytes(*word))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_be_bytes(*word))
}

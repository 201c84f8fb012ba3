//! The headers of a TCP segment, read from an Ethernet frame: pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::BitOr;

/// A TCP segment as it was on the wire (RFC 9293 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The sender.
    pub source: SocketAddr,
    /// The receiver.
    pub destination: SocketAddr,
    /// The control bits.
    pub flags: Flags,
    /// The sequence number.
    pub seq: u32,
    /// The acknowledgement number; meaningless without [`Flags::ACK`].
    pub ack: u32,
    /// The window field, not scaled.
    pub window: u16,
    /// Bytes behind the TCP header.
    pub payload_len: usize,
}

/// A set of TCP control bits.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(pub u8);

impl Flags {
    /// No more data from the sender.
    pub const FIN: Self = Self(1);
    /// Synchronize sequence numbers.
    pub const SYN: Self = Self(2);
    /// Reset the connection.
    pub const RST: Self = Self(4);
    /// Push.
    pub const PSH: Self = Self(8);
    /// The acknowledgement number counts.
    pub const ACK: Self = Self(16);
    /// The urgent pointer counts.
    pub const URG: Self = Self(32);

    /// Whether all of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
        let set = names.iter().enumerate().filter(|(bit, _)| self.0 >> bit & 1 != 0).map(|(_, name)| *name);
        f.write_str(&set.collect::<Vec<_>>().join("|"))
    }
}

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const IPV6_HEADER: usize = 40;
const TCP: u8 = 6;

impl Segment {
    /// Reads an Ethernet frame, of which the headers suffice. `None` where it carries no TCP, is a later fragment, or is
    /// cut off within the headers.
    pub(crate) fn of_frame(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..)?;
        let (source, destination, length, tcp): (IpAddr, IpAddr, _, _) = match be16(frame, 12)? {
            IPV4 => {
                let header = usize::from(ip.first()? & 15) * 4;
                let first_fragment = be16(ip, 6)? & 0x1fff == 0;
                (*ip.get(9)? == TCP && first_fragment).then_some(())?;
                let address = |at: usize| Some(Ipv4Addr::from(*ip.get(at..)?.first_chunk::<4>()?).into());
                let length = usize::from(be16(ip, 2)?).checked_sub(header)?;
                (address(12)?, address(16)?, length, ip.get(header..)?)
            }
            IPV6 => {
                (*ip.get(6)? == TCP).then_some(())?;
                let address = |at: usize| Some(Ipv6Addr::from(*ip.get(at..)?.first_chunk::<16>()?).into());
                (address(8)?, address(24)?, be16(ip, 4)?.into(), ip.get(IPV6_HEADER..)?)
            }
            _ => return None,
        };
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            source: (source, be16(tcp, 0)?).into(),
            destination: (destination, be16(tcp, 2)?).into(),
            flags: Flags(*tcp.get(13)?),
            seq: be32(tcp, 4)?,
            ack: be32(tcp, 8)?,
            window: be16(tcp, 14)?,
            payload_len: length.checked_sub(header)?,
        })
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A FIN|ACK with three bytes and a timestamp option, behind an IPv4 header without options.
    fn frame() -> Vec<u8> {
        let mut frame = vec![0; ETHERNET];
        frame[12..].copy_from_slice(&IPV4.to_be_bytes());
        frame.extend([0x45, 0, 0, 55, 0, 0, 0x40, 0, 64, TCP, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1]);
        frame.extend([0, 80, 0xc0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0x80, 17, 0x10, 0x20, 0, 0, 0, 0]);
        frame.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        frame.extend(b"abc");
        frame
    }

    #[test]
    fn a_frame_is_read() {
        let expected = Segment {
            source: "192.0.2.1:80".parse().unwrap(),
            destination: "198.51.100.1:49153".parse().unwrap(),
            flags: Flags::FIN | Flags::ACK,
            seq: 0x0102_0304,
            ack: 0x0506_0708,
            window: 0x1020,
            payload_len: 3,
        };
        assert_eq!(Segment::of_frame(&frame()), Some(expected));
        assert_eq!(format!("{:?}", expected.flags), "FIN|ACK");
    }

    #[test]
    fn what_is_no_segment_is_none() {
        let frame = frame();
        // All but the payload, the options and the urgent pointer are needed.
        for length in 0..ETHERNET + 20 + 16 {
            assert_eq!(Segment::of_frame(&frame[..length]), None, "{length}");
        }
        for (at, value) in [(12, 0x86), (14 + 9, 17), (14 + 7, 1), (14 + 3, 30)] {
            let mut other = frame.clone();
            other[at] = value;
            assert_eq!(Segment::of_frame(&other), None, "{at}");
        }
    }
}

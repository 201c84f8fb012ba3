//! IPv4 and IPv6 packets with one TCP segment in each: built, read, their checksums renewed. Pure: no I/O.
//!
//! # References
//! RFC 791 (IPv4), RFC 8200 (IPv6), RFC 9293 §3.1 (TCP), RFC 7323 §3 (timestamps), RFC 1071 (checksums).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

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
const HOP_LIMIT: u8 = 64;

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
        packet.clear();
        let options = if self.timestamps.is_some() { 12 } else { 0 };
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
        packet.extend_from_slice(self.payload);
        finish(packet, ip);
    }
}

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
    pub(crate) checksum: Checksum,
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
        let whole = if stated == 0 { None } else { Some(stated - tcp) };
        let mut parsed = Self {
            source: SocketAddr::new(source, be16(fixed, 0)?),
            destination: SocketAddr::new(destination, be16(fixed, 2)?),
            seq: be32(fixed, 4)?,
            ack: be32(fixed, 8)?,
            flags: fixed[13],
            checksum: Checksum::Wrong,
            header: tcp..tcp + length,
            payload: tcp + length..end,
            missing,
        };
        parsed.checksum = parsed.check(packet, whole);
        Some(parsed)
    }

    /// A segment that only acknowledges: no data, nothing that counts in the sequence space.
    pub(crate) fn is_pure_ack(&self) -> bool {
        self.payload.is_empty() && self.flags & (flags::SYN | flags::FIN | flags::RST) == 0
    }

    /// The packet as packets of at most `limit` bytes each with complete checksums, in their order, from
    /// [`source`](Self::source) to [`destination`](Self::destination): set other addresses of the same
    /// family first, where the connection has moved.
    ///
    /// Type of service, hop limit and TCP options stay; IP options and extension headers go: TCP does not
    /// look at them. Each packet is written into `scratch` and lent to `each`.
    pub(crate) fn rewrite<E>(
        &self,
        packet: &[u8],
        limit: usize,
        scratch: &mut Vec<u8>,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let ip = if packet[0] >> 4 == 4 { IPV4_HEADER } else { IPV6_HEADER };
        let room = limit.saturating_sub(ip + self.header.len()).max(1);
        let payload = &packet[self.payload.clone()];
        let mut offset = 0;
        loop {
            let piece = &payload[offset..payload.len().min(offset + room)];
            let next = offset + piece.len();
            scratch.clear();
            scratch.extend_from_slice(&packet[..ip]);
            scratch.extend_from_slice(&packet[self.header.clone()]);
            scratch.extend_from_slice(piece);
            match (self.source.ip().to_canonical(), self.destination.ip().to_canonical()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    scratch[0] = 0x45;
                    scratch[12..16].copy_from_slice(&source.octets());
                    scratch[16..20].copy_from_slice(&destination.octets());
                }
                (source, destination) => {
                    scratch[6] = TCP;
                    scratch[8..24].copy_from_slice(&sixteen(source));
                    scratch[24..40].copy_from_slice(&sixteen(destination));
                }
            }
            scratch[ip..ip + 2].copy_from_slice(&self.source.port().to_be_bytes());
            scratch[ip + 2..ip + 4].copy_from_slice(&self.destination.port().to_be_bytes());
            let seq = self.seq.wrapping_add(offset as u32);
            scratch[ip + 4..ip + 8].copy_from_slice(&seq.to_be_bytes());
            if next < payload.len() || self.missing > 0 {
                scratch[ip + 13] &= !(flags::FIN | flags::PSH);
            }
            if offset > 0 {
                scratch[ip + 13] &= !flags::CWR;
            }
            finish(scratch, ip);
            each(scratch)?;
            offset = next;
            if offset == payload.len() {
                return Ok(());
            }
        }
    }

    fn check(&self, packet: &[u8], whole: Option<usize>) -> Checksum {
        let segment = &packet[self.header.start..self.payload.end];
        let length = whole.unwrap_or(segment.len());
        let pseudo = pseudo_header(self.source.ip(), self.destination.ip(), length);
        let stated = u16::from_be_bytes([segment[16], segment[17]]);
        if stated == fold(pseudo) {
            return Checksum::Partial;
        }
        if self.missing == 0 && fold(pseudo + sum(segment)) == 0xffff {
            return Checksum::Full;
        }
        Checksum::Wrong
    }
}

/// Writes lengths and checksums into a packet whose IP header takes `ip` bytes.
fn finish(packet: &mut [u8], ip: usize) {
    let total = packet.len();
    let (source, destination): (IpAddr, IpAddr) = if ip == IPV4_HEADER {
        packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
        packet[10..12].fill(0);
        let header = !fold(sum(&packet[..ip]));
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

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|word| u16::from_be_bytes(*word))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_be_bytes(*word))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use etherparse::{IpNumber, NetSlice, SlicedPacket, TcpOptionElement, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    const V4: [&str; 2] = ["192.0.2.1:4000", "198.51.100.7:80"];
    const V6: [&str; 2] = ["[2001:db8::1]:4000", "[2001:db8:5::7]:80"];
    const MAPPED: [&str; 2] = ["[::ffff:192.0.2.1]:4000", "[::ffff:198.51.100.7]:80"];

    fn segment<'a>([source, destination]: [&str; 2], payload: &'a [u8]) -> Segment<'a> {
        Segment {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            seq: 0xfffffff0,
            ack: 0x01020304,
            flags: flags::ACK | flags::PSH,
            window: 501,
            timestamps: Some((0xdeadbeef, 7)),
            urgent: 0,
            payload,
        }
    }

    fn packet(segment: &Segment<'_>) -> Vec<u8> {
        let mut packet = vec![0xaa; 9];
        segment.write(&mut packet);
        packet
    }

    /// What an independent reader makes of a packet: checks both checksums and gives flags, seq, payload.
    fn read(packet: &[u8]) -> (u8, u32, Vec<u8>) {
        let sliced = SlicedPacket::from_ip(packet).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
        let header = tcp.to_header();
        let expected = match sliced.net.unwrap() {
            NetSlice::Ipv4(v4) => {
                let ip = v4.header().to_header();
                assert_eq!((ip.protocol, ip.header_checksum), (IpNumber::TCP, ip.calc_header_checksum()));
                assert_eq!(usize::from(ip.total_len), packet.len());
                header.calc_checksum_ipv4(&ip, tcp.payload())
            }
            NetSlice::Ipv6(v6) => {
                let ip = v6.header().to_header();
                assert_eq!(usize::from(ip.payload_length) + 40, packet.len());
                header.calc_checksum_ipv6(&ip, tcp.payload())
            }
            _ => panic!("no IP"),
        };
        assert_eq!(header.checksum, expected.unwrap());
        (
            packet[packet.len() - tcp.payload().len() - header.header_len() + 13],
            tcp.sequence_number(),
            tcp.payload().into(),
        )
    }

    fn rewritten(packet: &[u8], limit: usize) -> Vec<Vec<u8>> {
        let (mut scratch, mut pieces) = (Vec::new(), Vec::new());
        let parsed = Parsed::new(packet).unwrap();
        let collect = |piece: &[u8]| {
            pieces.push(piece.to_vec());
            Ok::<_, Infallible>(())
        };
        parsed.rewrite(packet, limit, &mut scratch, collect).unwrap();
        pieces
    }

    #[test]
    fn every_field_reads_back() {
        for addresses in [V4, V6, MAPPED] {
            let mut segment = segment(addresses, b"hello");
            segment.flags |= flags::URG;
            segment.urgent = 5;
            let packet = packet(&segment);
            assert_eq!(packet[0] >> 4, if addresses == V6 { 6 } else { 4 });
            assert_eq!(read(&packet), (segment.flags, segment.seq, b"hello".to_vec()));

            let sliced = SlicedPacket::from_ip(&packet).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
            assert_eq!((tcp.source_port(), tcp.destination_port()), (4000, 80));
            assert_eq!((tcp.acknowledgment_number(), tcp.window_size()), (segment.ack, 501));
            assert_eq!(tcp.urgent_pointer(), 5);
            let options: Vec<_> = tcp.options_iterator().map(Result::unwrap).collect();
            assert_eq!(options.last(), Some(&TcpOptionElement::Timestamp(0xdeadbeef, 7)));

            let parsed = Parsed::new(&packet).unwrap();
            assert_eq!(parsed.source.ip(), segment.source.ip().to_canonical());
            assert_eq!(parsed.destination.ip(), segment.destination.ip().to_canonical());
            assert_eq!((parsed.source.port(), parsed.destination.port()), (4000, 80));
            assert_eq!((parsed.seq, parsed.ack, parsed.flags), (segment.seq, segment.ack, segment.flags));
            assert_eq!((parsed.checksum, parsed.missing), (Checksum::Full, 0));
            assert_eq!(&packet[parsed.payload.clone()], b"hello");
            assert!(!parsed.is_pure_ack());
        }
    }

    #[test]
    fn a_checksum_left_to_the_network_card_is_completed() {
        for addresses in [V4, V6] {
            let whole = packet(&segment(addresses, &[7; 4000]));
            let parsed = Parsed::new(&whole).unwrap();
            let mut partial = whole.clone();
            let at = parsed.header.start + 16;
            let pseudo =
                pseudo_header(parsed.source.ip(), parsed.destination.ip(), whole.len() - parsed.header.start);
            partial[at..at + 2].copy_from_slice(&fold(pseudo).to_be_bytes());
            assert_eq!(Parsed::new(&partial).unwrap().checksum, Checksum::Partial);
            assert_eq!(rewritten(&partial, PACKET_LIMIT), [whole]);
        }
    }

    #[test]
    fn damage_is_seen() {
        let mut packet = packet(&segment(V4, b"hello"));
        *packet.last_mut().unwrap() ^= 1;
        assert_eq!(Parsed::new(&packet).unwrap().checksum, Checksum::Wrong);
    }

    #[test]
    fn a_long_segment_becomes_several() {
        for addresses in [V4, V6] {
            let payload: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
            let mut long = segment(addresses, &payload);
            long.flags |= flags::FIN | flags::CWR;
            let pieces = rewritten(&packet(&long), 1500);
            let mut next = long.seq;
            let mut joined = Vec::new();
            for (index, piece) in pieces.iter().enumerate() {
                assert!(piece.len() <= 1500);
                let (flags, seq, data) = read(piece);
                assert_eq!(seq, next);
                assert_eq!(flags & flags::FIN != 0, index + 1 == pieces.len());
                assert_eq!(flags & flags::CWR != 0, index == 0);
                next = next.wrapping_add(data.len() as u32);
                joined.extend(data);
            }
            assert_eq!(joined, payload);
        }
    }

    #[test]
    fn what_was_cut_off_is_not_acknowledged_as_finished() {
        let mut long = segment(V4, &[1; 1000]);
        long.flags |= flags::FIN;
        let whole = packet(&long);
        let cut = &whole[..900];
        assert_eq!(Parsed::new(cut).unwrap().missing, whole.len() - 900);
        let (flags, _, data) = read(&rewritten(cut, PACKET_LIMIT)[0]);
        assert_eq!((flags & flags::FIN, data.len()), (0, 900 - 52));
    }

    #[test]
    fn ip_options_and_extension_headers_go() {
        let mut v4 = packet(&segment(V4, b"abc"));
        v4[0] = 0x46;
        v4.splice(20..20, [1, 1, 1, 0]);
        let total = v4.len() as u16;
        v4[2..4].copy_from_slice(&total.to_be_bytes());
        assert_eq!(rewritten(&v4, PACKET_LIMIT), [packet(&segment(V4, b"abc"))]);

        let mut v6 = packet(&segment(V6, b"abc"));
        v6[6] = 0;
        v6.splice(40..40, [TCP, 0, 1, 4, 0, 0, 0, 0]);
        v6[5] += 8;
        assert_eq!(rewritten(&v6, PACKET_LIMIT), [packet(&segment(V6, b"abc"))]);
    }

    #[test]
    fn a_packet_over_64_kib_is_split() {
        let mut big = packet(&segment(V6, &[3; 1000]));
        big.resize(100_000, 3);
        big[4..6].fill(0);
        let pieces = rewritten(&big, PACKET_LIMIT);
        assert_eq!(pieces.iter().map(|piece| read(piece).2.len()).sum::<usize>(), 100_000 - 72);
    }

    #[test]
    fn fragments_and_other_protocols_are_no_segments() {
        let whole = packet(&segment(V4, b"hello"));
        for (at, value) in [(6, 0x20), (7, 1), (9, 17), (0, 0x44), (0, 0x75)] {
            let mut packet = whole.clone();
            packet[at] = value;
            assert_eq!(Parsed::new(&packet), None, "{at} {value}");
        }
    }

    proptest! {
        #[test]
        fn any_segment_is_read_as_it_was_built(
            v6: bool,
            seq: u32,
            ack: u32,
            flags: u8,
            timestamps: Option<(u32, u32)>,
            payload in prop::collection::vec(any::<u8>(), 0..3000),
            limit in 200usize..4000,
        ) {
            let mut segment = segment(if v6 { V6 } else { V4 }, &payload);
            (segment.seq, segment.ack, segment.flags, segment.timestamps) = (seq, ack, flags, timestamps);
            let packet = packet(&segment);
            prop_assert_eq!(read(&packet), (flags, seq, payload.clone()));
            prop_assert_eq!(Parsed::new(&packet).unwrap().checksum, Checksum::Full);
            let pieces = rewritten(&packet, limit);
            let joined: Vec<u8> = pieces.iter().flat_map(|piece| read(piece).2).collect();
            prop_assert_eq!(joined, payload);
        }

        #[test]
        fn any_bytes_are_survived(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            version in prop::sample::select(&[0x45u8, 0x46, 0x4f, 0x60][..]),
            limit in 0usize..200,
        ) {
            if let Some(first) = bytes.first_mut() {
                *first = version;
            }
            if let Some(protocol) = bytes.get_mut(if version == 0x60 { 6 } else { 9 }) {
                *protocol = TCP;
            }
            if let Some(parsed) = Parsed::new(&bytes) {
                let keep_going = |_: &[u8]| Ok::<_, Infallible>(());
                parsed.rewrite(&bytes, limit, &mut Vec::new(), keep_going).unwrap();
            }
        }
    }
}

//! A packet that is to be sent once more, and that grows meanwhile by the segments that continue it, as a host joins those
//! that arrive (generic receive offload): a long packet costs little more than a short one.

use std::net::{IpAddr, SocketAddr};

use super::{IPV4_HEADER, IPV6_HEADER, Parsed, TCP, finish, flags, sixteen};
use crate::connection::after;

/// One segment, or several that follow each other.
///
/// Type of service, hop limit and TCP options are those of the first; IP options and extension headers are gone: TCP
/// does not look at them.
#[derive(Debug)]
pub(crate) struct Run {
    packet: Vec<u8>,
    parsed: Parsed,
    /// Lengths and checksums in the packet are right.
    sealed: bool,
}

impl Run {
    /// Begins with this packet.
    pub(crate) fn new(packet: &[u8], mut parsed: Parsed) -> Self {
        let ip = if packet[0] >> 4 == 4 { IPV4_HEADER } else { IPV6_HEADER };
        let mut run = Vec::with_capacity(ip + parsed.payload.end - parsed.header.start);
        run.extend_from_slice(&packet[..ip]);
        run.extend_from_slice(&packet[parsed.header.start..parsed.payload.end]);
        if ip == IPV4_HEADER {
            run[0] = 0x45;
        } else {
            run[6] = TCP;
        }
        if parsed.missing > 0 {
            parsed.flags &= !(flags::FIN | flags::PSH);
            // With what is missing the peer says again where its urgent byte is. A kernel that knows of the byte and has not got
            // it would read one from the header of a packet that follows (`tcp_urg`).
            let is_missing = usize::from(urgent(&run[ip..])) > run.len() - ip - parsed.header.len();
            parsed.flags &= if is_missing { !flags::URG } else { 0xff };
            run[ip + 13] = parsed.flags;
        }
        parsed.header = ip..ip + parsed.header.len();
        parsed.payload = parsed.header.end..run.len();
        Self { packet: run, parsed, sealed: false }
    }

    /// Appends a packet, unless its data does not follow, or its headers say something new, or the run would become
    /// longer than `limit`. Returns whether it did.
    pub(crate) fn join(&mut self, packet: &[u8], next: &Parsed, limit: usize) -> bool {
        let joins = self.packet.len() + next.payload.len() <= limit && self.is_before(packet, next);
        if joins {
            self.packet.extend_from_slice(&packet[next.payload.clone()]);
            let run = &mut self.parsed;
            run.flags |= next.flags;
            self.packet[run.header.start + 13] = run.flags;
            run.payload.end = self.packet.len();
            self.sealed = false;
        }
        joins
    }

    /// Whether the data of a packet follows, and nothing in its headers is new but a FIN.
    pub(crate) fn is_before(&self, packet: &[u8], next: &Parsed) -> bool {
        end(&self.parsed) == next.seq && say_the_same([(&self.packet, &self.parsed), (packet, next)])
    }

    /// Whether this data was sent after that of a packet which comes only now, and nothing else in the two is new.
    pub(crate) fn has_overtaken(&self, packet: &[u8], late: &Parsed) -> bool {
        // What is sent again bears a new timestamp. Before others with old ones it would make them invalid (RFC 7323 §5).
        let is_sent_again =
            after(clock(&packet[late.header.clone()]), clock(&self.packet[self.parsed.header.clone()]));
        !is_sent_again
            && !after(end(late), self.parsed.seq)
            && say_the_same([(packet, late), (&self.packet, &self.parsed)])
    }

    /// Whether the data of `next` follows that of this one, and is all that is new in it.
    pub(crate) fn is_continued_by(&self, next: &Self) -> bool {
        next.parsed.flags & flags::FIN == 0 && self.is_before(&next.packet, &next.parsed)
    }

    /// The packets are the same, but for what has been joined to this one since.
    pub(crate) fn begins_like(&self, other: &Self) -> bool {
        let [ours, others] = [self, other].map(|run| &run.packet[run.parsed.header.clone()]);
        let is_new = !(flags::PSH | flags::FIN);
        self.parsed.seq == other.parsed.seq
            && (self.parsed.flags ^ other.parsed.flags) & is_new == 0
            && clock(ours) == clock(others)
            && headers_agree([ours, others])
            && self.data().starts_with(other.data())
    }

    /// What is known of it.
    pub(crate) fn parsed(&self) -> &Parsed {
        &self.parsed
    }

    /// Its data.
    pub(crate) fn data(&self) -> &[u8] {
        &self.packet[self.parsed.payload.clone()]
    }

    /// The bytes of memory that the packet takes.
    pub(crate) fn memory(&self) -> usize {
        self.packet.capacity()
    }

    /// Lets it come from and go to these addresses, of the same family.
    pub(crate) fn readdress(&mut self, source: SocketAddr, destination: SocketAddr) {
        if (self.parsed.source, self.parsed.destination) == (source, destination) {
            return;
        }
        (self.parsed.source, self.parsed.destination) = (source, destination);
        let tcp = self.parsed.header.start;
        match (source.ip().to_canonical(), destination.ip().to_canonical()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.packet[12..16].copy_from_slice(&source.octets());
                self.packet[16..20].copy_from_slice(&destination.octets());
            }
            (source, destination) => {
                self.packet[8..24].copy_from_slice(&sixteen(source));
                self.packet[24..40].copy_from_slice(&sixteen(destination));
            }
        }
        self.packet[tcp..tcp + 2].copy_from_slice(&source.port().to_be_bytes());
        self.packet[tcp + 2..tcp + 4].copy_from_slice(&destination.port().to_be_bytes());
        self.sealed = false;
    }

    /// Computes lengths and checksums, for a packet of at most 65535 bytes.
    pub(crate) fn seal(&mut self) {
        if !self.sealed {
            finish(&mut self.packet, self.parsed.header.start);
            self.sealed = true;
        }
    }

    /// The packet itself, once it is [sealed](Self::seal).
    pub(crate) fn into_packet(mut self) -> Vec<u8> {
        self.seal();
        self.packet
    }

    /// Lends it to `each`, as packets of at most `limit` bytes in their order.
    pub(crate) fn pieces<E>(
        &mut self,
        limit: usize,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.packet.len() <= limit {
            self.seal();
            return each(&self.packet);
        }
        let Parsed { header, payload, seq, flags, .. } = &self.parsed;
        let ip = header.start;
        let (headers, payload) = self.packet.split_at(payload.start);
        let room = limit.saturating_sub(headers.len()).max(1);
        let urgent = urgent(&headers[ip..]);
        let mut piece = Vec::with_capacity(headers.len() + room);
        for (index, data) in payload.chunks(room).enumerate() {
            let offset = index * room;
            let is_last = offset + data.len() == payload.len();
            let mut kept = *flags;
            kept &= if is_last { 0xff } else { !(flags::FIN | flags::PSH) };
            kept &= if index == 0 { 0xff } else { !flags::CWR };
            let urgent = usize::from(urgent).saturating_sub(offset) as u16;
            kept &= if urgent > 0 || index == 0 { 0xff } else { !flags::URG };
            piece.clear();
            piece.extend_from_slice(headers);
            piece.extend_from_slice(data);
            piece[ip + 4..ip + 8].copy_from_slice(&seq.wrapping_add(offset as u32).to_be_bytes());
            piece[ip + 13] = kept;
            piece[ip + 18..ip + 20].copy_from_slice(&urgent.to_be_bytes());
            finish(&mut piece, ip);
            each(&piece)?;
        }
        Ok(())
    }

    /// Its headers and its last byte: the least that says how far it reaches.
    pub(crate) fn end(&self) -> Self {
        let mut parsed = self.parsed.clone();
        let mut packet = self.packet[..parsed.payload.start].to_vec();
        packet.extend(self.packet[parsed.payload.clone()].last());
        parsed.seq = parsed.seq.wrapping_add(parsed.payload.len().saturating_sub(1) as u32);
        parsed.payload.end = packet.len();
        parsed.flags = flags::ACK | parsed.flags & flags::FIN;
        packet[parsed.header.start + 4..][..4].copy_from_slice(&parsed.seq.to_be_bytes());
        packet[parsed.header.start + 13] = parsed.flags;
        Self { packet, parsed, sealed: false }
    }
}

/// The pointer of a TCP header to urgent data: from the sequence number to behind the byte.
fn urgent(header: &[u8]) -> u16 {
    u16::from_be_bytes([header[18], header[19]])
}

/// The sequence number behind the data.
fn end(segment: &Parsed) -> u32 {
    segment.seq.wrapping_add(segment.payload.len() as u32)
}

/// Two whole segments with data, of which the second may end the connection, differ in nothing but what has to.
fn say_the_same([(first, a), (second, b)]: [(&[u8], &Parsed); 2]) -> bool {
    a.flags & !flags::PSH == flags::ACK
        && b.flags & !(flags::PSH | flags::FIN) == flags::ACK
        && [a, b].iter().all(|segment| !segment.payload.is_empty() && segment.missing == 0)
        && headers_agree([&first[a.header.clone()], &second[b.header.clone()]])
        && service(first) == service(second)
}

/// The kinds of the options, where timestamps are all that there is: two fillers, kind, length.
const TIMESTAMPS: [u8; 4] = [1, 1, 8, 10];

/// The time of the sender, or zero.
fn clock(header: &[u8]) -> u32 {
    match header[20..].split_at_checked(4) {
        Some((kind, [a, b, c, d, ..])) if kind == TIMESTAMPS => u32::from_be_bytes([*a, *b, *c, *d]),
        _ => 0,
    }
}

/// The TCP headers differ in nothing but what has to: sequence number, flags and checksum. Of the timestamps those of the
/// first segment count: an acknowledgement echoes the earliest that it acknowledges (RFC 7323 §4.3).
fn headers_agree(headers: [&[u8]; 2]) -> bool {
    let fixed = headers.map(|header| {
        let options = match header[20..].split_at_checked(4) {
            Some((kind, [_, _, _, _, _, _, _, _])) if kind == TIMESTAMPS => kind,
            _ => &header[20..],
        };
        (&header[..4], &header[8..13], &header[14..16], &header[18..20], options)
    });
    fixed[0] == fixed[1]
}

/// Version and type of service, with the marks of ECN: each counts.
fn service(packet: &[u8]) -> [u8; 2] {
    match packet[0] >> 4 {
        4 => [4, packet[1]],
        _ => [packet[0], packet[1] & 0xf0],
    }
}

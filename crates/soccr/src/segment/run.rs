//! Segments that follow each other, joined as a host joins those that arrive (generic receive offload): one long
//! packet costs little more than a short one.

use super::{Parsed, flags};

/// A packet that grows by the segments that continue it.
#[derive(Debug, Default)]
pub(crate) struct Run {
    bytes: Vec<u8>,
    parsed: Option<Parsed>,
}

impl Run {
    /// Begins with this packet, whatever it is.
    pub(crate) fn start(&mut self, packet: &[u8], parsed: Parsed) {
        self.bytes.clear();
        self.bytes.extend_from_slice(&packet[..parsed.payload.end]);
        self.parsed = Some(parsed);
    }

    /// Appends a packet, unless its data does not follow, or its headers say something new, or the run would become
    /// longer than `limit`. Returns whether it did.
    pub(crate) fn join(&mut self, packet: &[u8], next: &Parsed, limit: usize) -> bool {
        let Some(run) = &mut self.parsed else { return false };
        let follows = run.seq.wrapping_add(run.payload.len() as u32) == next.seq
            && run.flags & !flags::PSH == flags::ACK
            && next.flags & !(flags::PSH | flags::FIN) == flags::ACK
            && !run.payload.is_empty()
            && !next.payload.is_empty()
            && [run.missing, next.missing] == [0, 0]
            && self.bytes.len() + next.payload.len() <= limit
            && headers_agree([&self.bytes[run.header.clone()], &packet[next.header.clone()]])
            && service(&self.bytes) == service(packet);
        if follows {
            self.bytes.extend_from_slice(&packet[next.payload.clone()]);
            self.bytes[run.header.start + 13] |= next.flags;
            run.flags |= next.flags;
            run.payload.end = self.bytes.len();
        }
        follows
    }

    /// What has come together; afterwards the run is empty.
    pub(crate) fn take(&mut self) -> Option<(Parsed, &[u8])> {
        self.parsed.take().map(|parsed| (parsed, &self.bytes[..]))
    }
}

/// The TCP headers differ in nothing but what has to: sequence number, flags and checksum.
fn headers_agree(headers: [&[u8]; 2]) -> bool {
    let fixed = headers.map(|header| (&header[..4], &header[8..13], &header[14..16], &header[18..]));
    fixed[0] == fixed[1]
}

/// Version and type of service, with the marks of ECN: each counts.
fn service(packet: &[u8]) -> [u8; 2] {
    match packet[0] >> 4 {
        4 => [4, packet[1]],
        _ => [packet[0], packet[1] & 0xf0],
    }
}

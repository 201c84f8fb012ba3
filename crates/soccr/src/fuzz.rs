//! The readers of bytes that come from others, for the targets in `fuzz/`: only there they can be called from outside
//! (`--cfg fuzzing`).

use std::io::Cursor;

use crate::bpf::{Btf, Kind};
use crate::connection::Flow;
use crate::diag;
use crate::lock;
use crate::segment::{Segment, flags};

/// A description of types, with names that are looked for.
pub fn btf(bytes: &[u8]) {
    let Ok(mut types) = Btf::open(Cursor::new(bytes)) else { return };
    for (kind, name) in [(Kind::Struct, "tcp_sock"), (Kind::Function, "bpf_sk_assign_tcp_reqsk")] {
        if let Ok(found) = types.find(kind, name) {
            let _ = types.member(&found, "snd_cwnd");
        }
    }
}

/// What `sock_diag` says about a socket.
pub fn sock_diag(bytes: &[u8]) {
    diag::fuzz(bytes);
}

/// What a log group says about a packet.
pub fn nflog(bytes: &[u8]) {
    lock::fuzz_message(bytes);
}

/// Segments of one stream, cut, sent again and out of order as the input says, are held: what comes out is that stream's, byte
/// for byte, and all of what went in.
pub fn held(bytes: &[u8]) {
    const STREAM: usize = 4096;
    let stream: Vec<u8> = (0..STREAM).map(|at| (at * 7 + (at >> 8) * 13) as u8).collect();
    let flow = Flow { local: "192.0.2.1:80".parse().unwrap(), remote: "192.0.2.2:4000".parse().unwrap() };
    let (mut sent, mut packets) = (vec![false; STREAM], Vec::new());
    // Near the end of the sequence space, so that it wraps.
    let first = u32::MAX - STREAM as u32 / 2;
    for choice in bytes.chunks_exact(4).take(64) {
        let start = usize::from(u16::from_le_bytes([choice[0], choice[1]])) % STREAM;
        let end = (start + usize::from(choice[2]) * 4).min(STREAM);
        sent[start..end].fill(true);
        let mut packet = Vec::new();
        let segment = Segment {
            source: flow.remote,
            destination: flow.local,
            seq: first.wrapping_add(start as u32),
            ack: u32::from(choice[3] >> 4 & 1),
            flags: flags::ACK | if choice[3] & 1 == 1 { flags::PSH } else { 0 },
            window: 100,
            timestamps: (choice[3] & 2 == 0).then_some((u32::from(choice[3] >> 2 & 3), 1)),
            urgent: 0,
            payload: &stream[start..end],
        };
        segment.write(&mut packet);
        packets.push(packet);
    }
    for (seq, data) in lock::fuzz_held(flow, &packets) {
        let start = seq.wrapping_sub(first) as usize;
        assert!(data == stream[start..start + data.len()], "other bytes at {start}");
        sent[start..start + data.len()].fill(false);
    }
    assert!(!sent.contains(&true), "bytes are missing");
}

//! What passes on a link, as a test must see it.

use std::io;
use std::time::SystemTime;

use libc::{
    BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_LDX,
    BPF_MSH, BPF_RET,
};

use crate::sys::{Frame, Ring};
use crate::{Flags, Namespace, Segment};

/// Room for the headers of IPv6 and TCP with all options, and those of the slot.
const SLOT: usize = 256;
const SLOTS: usize = 1 << 16;

/// Records the TCP segments on a link, whichever way they go; on `lo`, each once.
///
/// It sees packets as the link does: before the filters of its namespace for what arrives, behind them for what leaves.
#[derive(Debug)]
pub struct Sniffer {
    ring: Ring,
}

impl Sniffer {
    /// Records all segments on the link from now on: 65,536 of them until they are fetched.
    ///
    /// # Errors
    /// `ENODEV` where there is no such link; `EPERM` without `CAP_NET_RAW`.
    pub fn on(namespace: &Namespace, link: &str) -> io::Result<Self> {
        Self::flagged(namespace, link, Flags::default())
    }

    /// Records segments that have at least one of `flags`: of a long transfer, only what matters.
    ///
    /// # Errors
    /// The errors of [`on`](Self::on).
    pub fn flagged(namespace: &Namespace, link: &str, flags: Flags) -> io::Result<Self> {
        let index = namespace.rtnetlink()?.index(link)?;
        let kind = Frame::Headers { outgoing: link != "lo" };
        let ring = namespace.run(|| Ring::open(index, kind, SLOT, SLOTS, &filter(flags)))?;
        Ok(Self { ring })
    }

    /// Fetches what has passed since the last call, in order, without waiting.
    ///
    /// # Errors
    /// Where more passed than there was room for, so that the record has gaps.
    pub fn segments(&mut self) -> io::Result<Vec<Segment>> {
        Ok(self.timed_segments()?.into_iter().map(|(_, segment)| segment).collect())
    }

    /// The same, with the times at which the kernel saw them.
    ///
    /// # Errors
    /// The errors of [`segments`](Self::segments).
    pub fn timed_segments(&mut self) -> io::Result<Vec<(SystemTime, Segment)>> {
        let mut segments = Vec::new();
        while let Some(segment) =
            self.ring.next(|frame, time| Segment::of_frame(frame).map(|segment| (time, segment)))
        {
            segments.extend(segment);
        }
        match self.ring.overflow()? {
            0 => Ok(segments),
            lost => Err(io::Error::other(format!("{lost} packets passed unseen: fetch them more often"))),
        }
    }
}

/// The program that accepts TCP segments with at least one of `flags`, or all of them where there are none.
fn filter(flags: Flags) -> [libc::sock_filter; 14] {
    let (jump, mask) = if flags == Flags::default() { (BPF_JGE, 0) } else { (BPF_JSET, flags.0.into()) };
    let load = |size: u32, mode: u32, at: u32| instruction(BPF_LD | size | mode, 0, 0, at);
    let check = |how: u32, value: u32, jt: u8, jf: u8| instruction(BPF_JMP | how | BPF_K, jt, jf, value);
    [
        load(BPF_H, BPF_ABS, 12),
        check(BPF_JEQ, 0x0800, 0, 5),
        load(BPF_B, BPF_ABS, 14 + 9),
        check(BPF_JEQ, 6, 0, 9),
        instruction(BPF_LDX | BPF_B | BPF_MSH, 0, 0, 14),
        load(BPF_B, BPF_IND, 14 + 13),
        check(BPF_JA, 4, 0, 0),
        check(BPF_JEQ, 0x86dd, 0, 5),
        load(BPF_B, BPF_ABS, 14 + 6),
        check(BPF_JEQ, 6, 0, 3),
        load(BPF_B, BPF_ABS, 14 + 40 + 13),
        check(jump, mask, 0, 1),
        instruction(BPF_RET | BPF_K, 0, 0, u32::MAX),
        instruction(BPF_RET | BPF_K, 0, 0, 0),
    ]
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

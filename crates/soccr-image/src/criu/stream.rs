//! A `tcp-stream` image: sequence numbers, windows and queues of one connection.

use std::time::Duration;

use soccr::connection::{Options, QUEUE_LIMIT, Window, WindowScale};

use super::container;
use super::protobuf::fields;
use crate::error::{Error, Result};

/// Bits of `opt_mask`: those of `tcpi_options` (`TCPI_OPT_…`).
mod bit {
    pub(super) const TIMESTAMPS: u32 = 1;
    pub(super) const SACK: u32 = 2;
    pub(super) const WINDOW_SCALE: u32 = 4;
    pub(super) const ECN: u32 = 8;
    pub(super) const ECN_SEEN: u32 = 16;
    pub(super) const SYN_DATA: u32 = 32;
    pub(super) const MICROSECONDS: u32 = 64;
    /// Our C library keeps in the bits that the kernel does not use whether the connection was reset, behind a FIN or not;
    /// else the round-trip time: in units of 8 µs, 0 is unknown.
    pub(super) const RESET: u32 = 0x100;
    pub(super) const RESET_BEHIND_FIN: u32 = 0x200;
    pub(super) const SRTT_SHIFT: u32 = 9;
    pub(super) const SRTT_UNIT: u32 = 8;
}

/// What a `tcp-stream` image says of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The next sequence number expected from the peer (`rcv_nxt`), its FIN counted.
    pub inq_seq: u32,
    /// The sequence number behind the last byte written (`write_seq`), our FIN counted.
    pub outq_seq: u32,
    /// Bytes at the end of the send queue that have never been sent.
    pub unsq_len: u32,
    /// Options negotiated by the handshake.
    pub options: Options,
    /// The smoothed round-trip time, where our C library was part of CRIU; else zero.
    pub rtt: Duration,
    /// The peer has reset the connection, and the application has not been told. Known only from our C library.
    pub reset: bool,
    /// The peer's FIN had come before.
    pub reset_behind_fin: bool,
    /// The windows, where CRIU has saved them.
    pub window: Option<Window>,
    /// `TCP_CORK`, where the image is of an old CRIU that kept it here.
    pub cork: Option<bool>,
    /// `TCP_NODELAY`, likewise.
    pub nodelay: Option<bool>,
    /// Received and not yet read by the application.
    pub receive_queue: Vec<u8>,
    /// Written by the application and not yet acknowledged.
    pub send_queue: Vec<u8>,
}

impl Stream {
    /// Reads a `tcp-stream` image.
    ///
    /// # Errors
    /// [`Foreign`](crate::ErrorKind::Foreign) where it is another file; a message that is malformed, lacks what CRIU always
    /// writes, or contradicts the bytes behind it.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let magics = [container::COMMON, container::TCP_STREAM];
        let mut queues = container::open(bytes, &magics, "tcp-stream image")?;
        let mut numbers = [None; 18];
        for field in fields(container::entry(&mut queues)?) {
            let field = field?;
            if let Some(slot) = numbers.get_mut(field.number as usize) {
                *slot = Some(field.u32()?);
            }
        }
        let number =
            |at: usize| numbers[at].ok_or_else(|| Error::damaged(format!("a stream without field {at}")));
        let (inq_len, outq_len, mask) = (number(1)?, number(3)?, number(5)?);
        if inq_len > QUEUE_LIMIT || outq_len > QUEUE_LIMIT {
            return Err(Error::damaged("a queue is over 64 MiB"));
        }
        if queues.len() as u64 != u64::from(inq_len) + u64::from(outq_len) {
            return Err(Error::damaged("the queues are not as long as the image says"));
        }
        let (receive_queue, send_queue) = queues.split_at(inq_len as usize);
        let small = |at: usize| {
            u8::try_from(numbers[at].unwrap_or(0)).map_err(|_| Error::damaged("a window scale is over 14"))
        };
        let has = |bit: u32| mask & bit != 0;
        let reset = has(bit::RESET);
        let srtt = (mask >> bit::SRTT_SHIFT) * bit::SRTT_UNIT;
        let window_scale = WindowScale { snd: small(6)?, rcv: small(8)? };
        let window = match (numbers[13], numbers[14], numbers[15], numbers[16], numbers[17]) {
            (Some(snd_wl1), Some(snd_wnd), Some(max_window), Some(rcv_wnd), Some(rcv_wup)) => {
                Some(Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup })
            }
            _ => None,
        };
        Ok(Self {
            inq_seq: number(2)?,
            outq_seq: number(4)?,
            unsq_len: numbers[12].unwrap_or(0),
            options: Options {
                // CRIU hands the number to the kernel, which has 16 bits for it.
                mss_clamp: number(7)? as u16,
                window_scale: has(bit::WINDOW_SCALE).then_some(window_scale),
                sack: has(bit::SACK),
                timestamps: has(bit::TIMESTAMPS).then_some(numbers[9].unwrap_or(0)),
                microseconds: has(bit::MICROSECONDS),
                ecn: has(bit::ECN),
                ecn_seen: has(bit::ECN_SEEN),
                syn_data: has(bit::SYN_DATA),
            },
            rtt: if reset { Duration::ZERO } else { Duration::from_micros(srtt.into()) },
            reset,
            reset_behind_fin: reset && has(bit::RESET_BEHIND_FIN),
            window,
            cork: numbers[10].map(|cork| cork != 0),
            nodelay: numbers[11].map(|nodelay| nodelay != 0),
            receive_queue: receive_queue.to_vec(),
            send_queue: send_queue.to_vec(),
        })
    }
}

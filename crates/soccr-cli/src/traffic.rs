//! What the kernel tells about the traffic of a connection: `struct tcp_info`.

use std::time::Duration;

use serde::Serialize;

/// The fields of `struct tcp_info` by which people choose connections.
#[derive(Debug, Serialize)]
pub(crate) struct Traffic {
    rtt_us: u32,
    cwnd: u32,
    mss: u32,
    /// Segments that were sent again, in the whole life of the connection.
    retransmissions: u32,
    bytes_acked: u64,
    bytes_received: u64,
    /// Time since data were last sent or received.
    idle_ms: u32,
    #[serde(skip)]
    under_way: bool,
}

impl Traffic {
    /// `None` where the kernel's structure is shorter. The offsets are those of `linux/tcp.h`.
    pub(crate) fn read(info: &[u8]) -> Option<Self> {
        let word = |at: usize| info.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
        let long = |at: usize| info.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
        let (unacknowledged, last_sent, last_received, unsent) =
            (word(24)?, word(44)?, word(52)?, word(144)?);
        Some(Self {
            rtt_us: word(68)?,
            cwnd: word(80)?,
            mss: word(16)?,
            retransmissions: word(100)?,
            bytes_acked: long(120)?,
            bytes_received: long(128)?,
            idle_ms: last_sent.min(last_received),
            under_way: unacknowledged != 0 || unsent != 0,
        })
    }

    pub(crate) fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.into())
    }

    pub(crate) fn cwnd(&self) -> u32 {
        self.cwnd
    }

    pub(crate) fn retransmissions(&self) -> u32 {
        self.retransmissions
    }

    /// For how long no data have been sent or received.
    pub(crate) fn idle(&self) -> Duration {
        Duration::from_millis(self.idle_ms.into())
    }

    /// Whether no data moved for this time, and none wait for the peer.
    pub(crate) fn is_idle(&self, time: Duration) -> bool {
        !self.under_way && self.idle() >= time
    }
}

//! What the kernel tells about a connection: `TCP_INFO` and the lengths of its queues.

use std::io;
use std::os::fd::AsFd;

use crate::sys::{Length, length, option};

/// The state of a connection (RFC 9293 §3.3.2), numbered as the kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are those of the RFC")]
pub enum State {
    Established = 1,
    SynSent = 2,
    SynReceived = 3,
    FinWait1 = 4,
    FinWait2 = 5,
    TimeWait = 6,
    Close = 7,
    CloseWait = 8,
    LastAck = 9,
    Listen = 10,
    Closing = 11,
}

impl State {
    /// The states that [`Case::make`](crate::Case::make) can bring a connection into.
    pub const MAKEABLE: [Self; 8] = [
        Self::Established,
        Self::SynSent,
        Self::FinWait1,
        Self::FinWait2,
        Self::CloseWait,
        Self::LastAck,
        Self::Closing,
        Self::Close,
    ];

    fn of_kernel(number: u8) -> io::Result<Self> {
        let other = [Self::SynReceived, Self::TimeWait, Self::Listen];
        let mut all = Self::MAKEABLE.into_iter().chain(other);
        all.find(|state| *state as u8 == number)
            .ok_or_else(|| io::Error::other("a state that RFC 9293 does not know"))
    }
}

/// A connection at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// Its state.
    pub state: State,
    /// Bytes received and not read (`SIOCINQ`).
    pub unread: usize,
    /// Bytes written and not acknowledged, our FIN counted (`SIOCOUTQ`).
    pub unacknowledged: usize,
    /// Bytes written and not sent, our FIN counted (`SIOCOUTQNSD`).
    pub unsent: usize,
    /// Bytes per segment we send.
    pub snd_mss: u32,
    /// The congestion window, in segments.
    pub snd_cwnd: u32,
    /// Bytes the peer allows beyond those it has acknowledged.
    pub snd_wnd: u32,
    /// Segments sent again, over all.
    pub total_retrans: u32,
    /// Segments received, over all.
    pub segments_in: u32,
}

/// `struct tcp_info` up to `tcpi_snd_wnd` (Linux 5.4).
const LENGTH: usize = 232;

impl TcpInfo {
    /// Asks the kernel.
    ///
    /// # Errors
    /// Where the socket is none of TCP; where the kernel is older than 5.4.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        // First the lengths: with nothing under way, the window that TCP_INFO tells later is the one behind it.
        let [unread, unacknowledged, unsent] =
            [Length::Unread, Length::Unacknowledged, Length::Unsent].map(|kind| length(&socket, kind));
        let mut info = [0; LENGTH];
        if option(&socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)? < LENGTH {
            return Err(io::Error::other("TCP_INFO without tcpi_snd_wnd: the kernel is older than 5.4"));
        }
        let number = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        Ok(Self {
            state: State::of_kernel(info[0])?,
            unread: unread?,
            unacknowledged: unacknowledged?,
            unsent: unsent?,
            snd_mss: number(16),
            snd_cwnd: number(80),
            snd_wnd: number(228),
            total_retrans: number(100),
            segments_in: number(140),
        })
    }
}

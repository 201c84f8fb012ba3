//! The states of a connection, by their names and the kernel's numbers.

/// The states of a connection that a socket can be in (RFC 9293 §3.3.2), numbered as the kernel does.
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
    /// The state of a kernel number (`tcpi_state`, `TCP_ESTABLISHED` … `TCP_CLOSING`).
    pub fn from_kernel(number: u8) -> Option<Self> {
        use State::*;
        let all = [
            Established,
            SynSent,
            SynReceived,
            FinWait1,
            FinWait2,
            TimeWait,
            Close,
            CloseWait,
            LastAck,
            Listen,
            Closing,
        ];
        all.into_iter().find(|state| *state as u8 == number)
    }

    /// The name that RFC 9293 and `ss(8)` users know.
    pub fn name(self) -> &'static str {
        match self {
            Self::Established => "ESTABLISHED",
            Self::SynSent => "SYN_SENT",
            Self::SynReceived => "SYN_RECV",
            Self::FinWait1 => "FIN_WAIT1",
            Self::FinWait2 => "FIN_WAIT2",
            Self::TimeWait => "TIME_WAIT",
            Self::Close => "CLOSE",
            Self::CloseWait => "CLOSE_WAIT",
            Self::LastAck => "LAST_ACK",
            Self::Listen => "LISTEN",
            Self::Closing => "CLOSING",
        }
    }

    /// We have queued a FIN: nothing more can be written.
    pub fn fin_queued(self) -> bool {
        matches!(self, Self::FinWait1 | Self::FinWait2 | Self::Closing | Self::LastAck | Self::Close)
    }

    /// The peer has acknowledged our FIN.
    pub fn fin_acknowledged(self) -> bool {
        matches!(self, Self::FinWait2 | Self::Close)
    }

    /// We have received the peer's FIN: nothing more will arrive.
    pub fn fin_received(self) -> bool {
        matches!(self, Self::CloseWait | Self::LastAck | Self::Closing | Self::Close)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

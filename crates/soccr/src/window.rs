//! The windows of the two directions.

/// The windows, as `TCP_REPAIR_WINDOW` reads and writes them (`struct tcp_repair_window`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// The segment that last updated the send window.
    pub snd_wl1: u32,
    /// Bytes the peer allows beyond `snd_una`.
    pub snd_wnd: u32,
    /// The largest window the peer has ever announced.
    pub max_window: u32,
    /// Bytes we allowed beyond `rcv_wup`.
    pub rcv_wnd: u32,
    /// `rcv_nxt` at the last window announced.
    pub rcv_wup: u32,
}

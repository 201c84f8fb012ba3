//! Where a connection stands, and whether it has moved while it was read.

use std::os::fd::BorrowedFd;

use crate::connection::{Urgent, after};
use crate::error::Result;
use crate::queue;
use crate::state::State;
use crate::sys::tcp::{self, TcpInfo};

/// Where a connection stood when it was saved: whatever moves it, moves this. See [`Paused::detach_at`](crate::Paused::detach_at).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    state: u8,
    /// What every segment that is received, acknowledged or sent moves, and every write.
    received: u64,
    acknowledged: u64,
    /// Segments, but for those that were sent again.
    sent: u32,
    unacknowledged: u32,
    unsent: u32,
    /// What every read moves.
    unread: (u32, Option<Urgent>),
    /// In bytes what was sent and not acknowledged, and what is unsent: segments can be joined while others come to them.
    queued: u32,
}

impl Position {
    fn of(info: &TcpInfo) -> Self {
        Self {
            state: info.state,
            received: info.bytes_received,
            acknowledged: info.bytes_acked,
            sent: new_segments(info),
            unacknowledged: info.unacked,
            unsent: info.notsent_bytes,
            unread: (0, None),
            queued: 0,
        }
    }

    /// That of a connection of which the kernel tells this, with these unread bytes.
    pub(super) fn at(fd: BorrowedFd<'_>, info: &TcpInfo, unread: (u32, Option<Urgent>)) -> Result<Self> {
        Ok(Self { unread, queued: queued(fd, info)?, ..Self::of(info) })
    }

    pub(super) fn queued(&self) -> u32 {
        self.queued
    }

    pub(super) fn has_same_traffic(&self, now: &TcpInfo) -> bool {
        let now = Self { unread: self.unread, queued: self.queued, ..Self::of(now) };
        // What only counts as sent, see `Sent`, has not moved.
        let as_sent = Self { unacknowledged: now.unacknowledged, unsent: now.unsent, ..*self };
        now == *self || (now.unsent < self.unsent && now == as_sent)
    }

    /// Nothing was received or acknowledged since, and nothing new was sent: the kernel takes no acknowledgement of that for a restored
    /// connection that has not sent it.
    ///
    /// What the peer has not acknowledged may have been sent again, in other segments where the path has become narrower. What is unsent
    /// may count as sent, see `Sent`; or a timer has tried to send some, and could not.
    fn has_kept_to(&self, now: &TcpInfo) -> bool {
        let has_sent = now.notsent_bytes < self.unsent && after(new_segments(now), self.sent);
        let moved_by_peer = (now.state, now.bytes_received, now.bytes_acked);
        moved_by_peer == (self.state, self.received, self.acknowledged) && !has_sent
    }

    /// It has moved nothing but what it sends again. To be asked where nobody can write: in repair mode.
    pub(crate) fn has_kept_traffic(&self, fd: BorrowedFd<'_>) -> Result<bool> {
        tcp::info(fd).map(|info| self.has_kept_to(&info))
    }

    /// Nor was anything written or read. To be asked in repair mode, without kernel TLS.
    pub(crate) fn is_kept(&self, fd: BorrowedFd<'_>) -> Result<bool> {
        let now = tcp::info(fd)?;
        Ok(self.has_kept_to(&now)
            && queue::receive_queue_extent(fd)? == self.unread
            && queued(fd, &now)? == self.queued)
    }
}

fn queued(fd: BorrowedFd<'_>, info: &TcpInfo) -> Result<u32> {
    match info.unacked {
        // The kernel has emptied the queue, but not its length.
        0 if info.state == State::Close as u8 => Ok(0),
        0 => Ok(info.notsent_bytes),
        _ => tcp::unacknowledged(fd),
    }
}

/// How far a connection had sent when it was first looked at. Its pacing timer may run out while the send queue is selected to be
/// read: the kernel then counts all that is unsent as sent, and sends nothing.
pub(super) struct Sent {
    /// Without those that were sent again.
    segments: u32,
    snd_nxt: u32,
}

impl Sent {
    /// Corrects what the kernel says to be unsent, where it has sent nothing new since.
    pub(super) fn correct(sent: &mut Option<Self>, info: &mut TcpInfo, write_seq: u32) {
        let segments = new_segments(info);
        match sent {
            Some(sent) if sent.segments == segments => {
                info.notsent_bytes = write_seq.wrapping_sub(sent.snd_nxt)
            }
            _ => *sent = Some(Self { segments, snd_nxt: write_seq.wrapping_sub(info.notsent_bytes) }),
        }
    }
}

fn new_segments(info: &TcpInfo) -> u32 {
    info.data_segs_out.wrapping_sub(info.total_retrans)
}

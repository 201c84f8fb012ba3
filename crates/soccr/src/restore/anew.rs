//! A connection in SYN_SENT has its addresses only: it connects once more, by the same SYN.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use super::bind::bind_alone;
use super::derived;
use crate::buffers;
use crate::connection::{Buffers, Flow};
use crate::error::Result;
use crate::report::Report;
use crate::resume::start_handshake;
use crate::sys::tcp::{self, Queue, Repair};

/// What is left of a connection in SYN_SENT: its addresses. A fresh socket in repair mode leaves it, and connects anew.
pub(crate) fn connect_anew(
    fd: BorrowedFd<'_>,
    flow: Flow,
    write_seq: u32,
    buffers: Option<Buffers>,
) -> Result<()> {
    restore_buffers(fd, buffers)?;
    match bind_anew(fd, flow.local, write_seq) {
        // A socket that got its port by bind(2) still has that, and maybe no address: connect(2) chooses it again.
        Err(error) if error.errno() == Some(libc::EINVAL) => leave_repair_at(fd, write_seq)?,
        bound => bound?,
    }
    start_handshake(fd, flow.remote)?;
    derived::check_local(fd, flow.local)
}

/// Brings the sizes of the buffers back, ahead of the SYN: it announces a window scale by them.
pub(super) fn restore_buffers(fd: BorrowedFd<'_>, saved: Option<Buffers>) -> Result<Report> {
    let mut report = Report::default();
    if let Some(saved) = saved {
        let restored = buffers::write(fd, buffers::read(fd)?.buffers, saved)?;
        report.buffers(saved, restored);
        report.buffer_locks(saved, restored);
    }
    Ok(report)
}

/// Readies a fresh socket for the same SYN once more. A peer that has answered the first one refuses the connection for
/// good, if it gets another sequence number that lies in its window: that of a new SYN does for the first 4 ms.
pub(crate) fn bind_anew(fd: BorrowedFd<'_>, local: SocketAddr, write_seq: u32) -> Result<()> {
    // In repair mode no other socket is in the way: the old one may still hold the port.
    tcp::set_repair(fd, Repair::On)?;
    bind_alone(fd, local, false)?;
    derived::check_local(fd, local)?;
    leave_repair_at(fd, write_seq)
}

fn leave_repair_at(fd: BorrowedFd<'_>, write_seq: u32) -> Result<()> {
    tcp::set_queue_seq(fd, Queue::Send, write_seq.wrapping_sub(1))?;
    tcp::set_repair(fd, Repair::OffNoProbe)
}

//! The sizes of the two socket buffers, and who may tune them.

use std::os::fd::BorrowedFd;

use crate::connection::Buffers;
use crate::error::{Error, Result};
use crate::sys::{sockopt, tcp};

/// Why a buffer is smaller than it was.
pub(crate) const LIMITED: &str = "limited by net.core.wmem_max and rmem_max: raise them, or run with CAP_NET_ADMIN in the initial user namespace";

/// Why the kernel tunes other buffers than it did.
pub(crate) const LOCKED: &str =
    "needs Linux 5.14: an older kernel tunes no buffer whose size was set, and every other one";

/// `SOCK_SNDBUF_LOCK`: the application has chosen the size of the send buffer.
const SEND_LOCK: u32 = 1;
/// `SOCK_RCVBUF_LOCK`: the application has chosen the size of the receive buffer.
pub(crate) const RECEIVE_LOCK: u32 = 2;

/// One of the two buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Buffer {
    Send,
    Receive,
}

impl Buffer {
    fn option(self) -> (i32, &'static str) {
        match self {
            Self::Send => (libc::SO_SNDBUF, "SO_SNDBUF"),
            Self::Receive => (libc::SO_RCVBUF, "SO_RCVBUF"),
        }
    }

    fn force_option(self) -> (i32, &'static str) {
        match self {
            Self::Send => (libc::SO_SNDBUFFORCE, "SO_SNDBUFFORCE"),
            Self::Receive => (libc::SO_RCVBUFFORCE, "SO_RCVBUFFORCE"),
        }
    }

    fn size(self, fd: BorrowedFd<'_>) -> Result<u32> {
        let (name, text) = self.option();
        tcp::get_int(fd, libc::SOL_SOCKET, name, text).map(|value| value as u32)
    }

    /// Sets the size, as `getsockopt` reports it. Without privilege in the initial user namespace the limit is
    /// `net.core.wmem_max` or `rmem_max`. Locks the buffer against tuning.
    fn set_size(self, fd: BorrowedFd<'_>, bytes: u32) -> Result<()> {
        // The kernel doubles what it is given.
        let set = |(name, text)| tcp::set_int(fd, libc::SOL_SOCKET, name, text, (bytes / 2) as i32);
        match set(self.force_option()) {
            Err(error) if error.errno() == Some(libc::EPERM) => set(self.option()),
            other => other,
        }
    }
}

/// What a socket may use and uses (`SO_MEMINFO`, Linux 4.12): in bytes, overhead included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) buffers: Buffers,
    /// What the receive queue takes.
    pub(crate) receive_queue: u32,
    /// What options take: packet filters and keys of TCP MD5 and TCP-AO do.
    pub(crate) options: u32,
    /// What the kernel has reserved for the queues of TCP, used or not.
    pub(crate) reserved: u32,
}

pub(crate) fn read(fd: BorrowedFd<'_>) -> Result<Memory> {
    let [receive_queue, receive, _, send, free, send_queue, options, _, _] = sizes(fd)?;
    let reserved = receive_queue.wrapping_add(send_queue).wrapping_add(free);
    let buffers = Buffers { send, receive, lock: locks(fd)? };
    Ok(Memory { buffers, receive_queue, options, reserved })
}

/// Which buffers are locked against tuning (`SO_BUF_LOCK`).
pub(crate) fn locks(fd: BorrowedFd<'_>) -> Result<u32> {
    match tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_BUF_LOCK, "SO_BUF_LOCK") {
        // Linux 5.14; older kernels do not tell, and then tuning stays on.
        Err(error) if error.errno() == Some(libc::ENOPROTOOPT) => Ok(0),
        bits => bits.map(|bits| bits as u32),
    }
}

/// `SK_MEMINFO_RMEM_ALLOC` … `SK_MEMINFO_DROPS`.
fn sizes(fd: BorrowedFd<'_>) -> Result<[u32; 9]> {
    sockopt::get(fd, libc::SOL_SOCKET, libc::SO_MEMINFO).map_err(|error| Error::system("SO_MEMINFO", error))
}

/// Whether there is anything in the receive queue, in the send queue, and among the options: all of it takes memory, and so does what
/// is in the error queue or out of order.
pub(crate) fn in_use(fd: BorrowedFd<'_>) -> Result<(bool, bool, bool)> {
    let [receive_queue, _, _, _, _, send_queue, options, ..] = sizes(fd)?;
    Ok((receive_queue > 0, send_queue > 0, options > 0))
}

/// Sizes, then the locks: setting a size locks it. Returns what has come of it, also of the locks on kernels that do not tell them.
pub(crate) fn write(fd: BorrowedFd<'_>, current: Buffers, wanted: Buffers) -> Result<Buffers> {
    if wanted == current {
        return Ok(current);
    }
    let mut locked = current.lock;
    if wanted.send != current.send {
        Buffer::Send.set_size(fd, wanted.send)?;
        locked |= SEND_LOCK;
    }
    if wanted.receive != current.receive {
        Buffer::Receive.set_size(fd, wanted.receive)?;
        locked |= RECEIVE_LOCK;
    }
    let lock = if lock(fd, wanted.lock)? { wanted.lock } else { locked };
    let [_, receive, _, send, ..] = sizes(fd)?;
    Ok(Buffers { send, receive, lock })
}

/// Doubles a buffer that is too small for the queue it once held: packed otherwise, the bytes take more memory.
/// Leaves it open to tuning.
pub(crate) fn grow(fd: BorrowedFd<'_>, buffer: Buffer) -> Result<()> {
    let before = buffer.size(fd)?;
    buffer.set_size(fd, before.saturating_mul(2).min(i32::MAX as u32))?;
    lock(fd, 0)?;
    if buffer.size(fd)? > before {
        return Ok(());
    }
    let (limit, text) = match buffer {
        Buffer::Send => ("net.core.wmem_max", "SO_SNDBUF"),
        Buffer::Receive => ("net.core.rmem_max", "SO_RCVBUF"),
    };
    Err(Error::system(text, rustix::io::Errno::NOBUFS).advise(format!(
        "the queue does not fit into {before} bytes of buffer: raise {limit}, \
         or run with CAP_NET_ADMIN in the initial user namespace"
    )))
}

/// Returns whether the kernel can (Linux 5.14).
fn lock(fd: BorrowedFd<'_>, bits: u32) -> Result<bool> {
    match tcp::set_int(fd, libc::SOL_SOCKET, libc::SO_BUF_LOCK, "SO_BUF_LOCK", bits as i32) {
        Err(error) if error.errno() == Some(libc::ENOPROTOOPT) => Ok(false),
        other => other.map(|()| true),
    }
}

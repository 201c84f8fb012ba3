//! Classic packet filters attached to a socket, as the bytes of their instructions.
//!
//! # References
//! `socket(7)`: `SO_ATTACH_FILTER`; `SO_GET_FILTER` (Linux 3.8).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::sockopt;

/// `struct sock_filter`: a code, two jumps and an operand.
const INSTRUCTION: usize = 8;

/// Reads the filter; empty where there is none. An eBPF program cannot be read: `EACCES`.
pub(crate) fn get(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let instructions = length(fd, &mut [])?;
    let mut filter = vec![0; instructions * INSTRUCTION];
    if instructions > 0 && length(fd, &mut filter)? != instructions {
        return Err(io::ErrorKind::Interrupted.into());
    }
    Ok(filter)
}

/// Reads into `filter`; returns how many instructions there are. The kernel counts in instructions, not in bytes.
fn length(fd: BorrowedFd<'_>, filter: &mut [u8]) -> io::Result<usize> {
    let mut length = (filter.len() / INSTRUCTION) as libc::socklen_t;
    // SAFETY: the kernel writes nothing for a length of zero, else exactly `length` instructions of eight
    // bytes each, or it fails; `filter` has room for them.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            filter.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result == 0 { Ok(length as usize) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a filter.
pub(crate) fn attach(fd: BorrowedFd<'_>, filter: &[u8]) -> io::Result<()> {
    let instructions = filter.len() / INSTRUCTION;
    if instructions * INSTRUCTION != filter.len() || instructions > usize::from(u16::MAX) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let program = libc::sock_fprog { len: instructions as u16, filter: filter.as_ptr().cast_mut().cast() };
    // SAFETY: `program` is what the option takes, and `filter` holds as many instructions as it says. The kernel
    // only copies them, whatever their alignment.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the filter off.
pub(crate) fn detach(fd: BorrowedFd<'_>) -> io::Result<()> {
    sockopt::set(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0)
}

//! Descriptors that stay open between calls, out of the way of a host that may need the low numbers for itself.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::process::{Resource, getrlimit};

/// Programs with fewer descriptors than this never meet one of ours.
const HIGH: u64 = 1000;

/// The same descriptor with a high number, where the limit allows one; closed on exec.
pub(crate) fn high(fd: OwnedFd) -> OwnedFd {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), HIGH.min(limit / 2) as i32).unwrap_or(fd)
}

/// The same descriptor with a higher number than `other`, where the limit allows one; closed on exec. The kernel releases the descriptors
/// of a process that dies from the highest number down.
pub(crate) fn above(fd: OwnedFd, other: BorrowedFd<'_>) -> OwnedFd {
    rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), other.as_raw_fd() + 1).unwrap_or(fd)
}

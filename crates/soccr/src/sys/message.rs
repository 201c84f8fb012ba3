//! `sendmsg(2)` with control messages.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// A control message. A `repr(C)` structure of several is found by `CMSG_NXTHDR`: each is aligned as its header is.
#[repr(C)]
pub(super) struct Item<T> {
    header: libc::cmsghdr,
    value: T,
    /// What aligns the next one is written, too: the values here end in the middle of 8 bytes.
    #[cfg(target_pointer_width = "64")]
    padding: u32,
}

impl<T> Item<T> {
    pub(super) fn new(level: i32, kind: i32, value: T) -> Self {
        #[cfg(target_pointer_width = "64")]
        const {
            assert!(size_of::<Self>() == size_of::<libc::cmsghdr>() + size_of::<T>() + size_of::<u32>())
        };
        // SAFETY: numbers, for which zero is a value.
        let mut header: libc::cmsghdr = unsafe { zeroed() };
        header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<T>()) as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        Self {
            header,
            value,
            #[cfg(target_pointer_width = "64")]
            padding: 0,
        }
    }
}

/// Sends `data` to a socket address, with control messages: [items](Item).
pub(super) fn send<Name, Control>(
    fd: BorrowedFd<'_>,
    data: &[u8],
    mut name: Name,
    mut control: Control,
) -> Result<(), Errno> {
    let mut piece = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = size_of::<Name>() as libc::socklen_t;
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: all that the message points to outlives the call, and the kernel only reads it.
    if unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) } < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}

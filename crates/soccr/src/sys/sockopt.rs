//! `getsockopt(2)`, `setsockopt(2)` and integer ioctls, for types whose every bit pattern is a value.

use std::io;
use std::mem::{MaybeUninit, size_of, size_of_val};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::{Opcode, Updater, ioctl};

/// A type without padding and without invalid bit patterns, as socket options are.
///
/// # Safety
/// Every sequence of `size_of::<Self>()` bytes must be a value of it, and it must have no padding.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers, and arrays of them, have neither padding nor invalid values.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u32; N] {}

/// Reads an option whose length is known.
pub(crate) fn get<T: Plain>(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `value`, which has that size.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length) };
    check(result)?;
    // SAFETY: all bytes are initialised, by the kernel or as zero, and `T` is plain.
    Ok(unsafe { value.assume_init() })
}

/// The value that `bytes` begin with; `None` where they are too few.
pub(crate) fn read_from<T: Plain>(bytes: &[u8]) -> Option<T> {
    let bytes = bytes.get(..size_of::<T>())?;
    // SAFETY: there are as many bytes as `T` has, any of which are a value of it, and their alignment does not matter.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Reads an option of any length; returns how many bytes the kernel filled in.
pub(crate) fn get_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `value`, which has that size.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length) };
    check(result)?;
    Ok((length as usize).min(value.len()))
}

/// Writes an option.
pub(crate) fn set<T: Plain>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let length = size_of_val(value) as libc::socklen_t;
    // SAFETY: `value` is readable for `length` bytes.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const *value).cast(), length) })
}

/// Writes an option of any length.
pub(crate) fn set_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: `value` is readable for `length` bytes.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), length) })
}

/// Asks an ioctl that answers with one `int`. It is set before: valgrind knows few of them, and would tell a program in C that what
/// they have written is uninitialised.
pub(crate) fn ioctl_int<const OPCODE: Opcode>(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let mut answer = 0;
    // SAFETY: this module's callers name only ioctls that write one `int`.
    let question = unsafe { Updater::<OPCODE, i32>::new(&mut answer) };
    // SAFETY: as above.
    unsafe { ioctl(fd, question) }?;
    Ok(answer)
}

/// The signal that a socket sends to its owner (`F_GETSIG`); 0 stands for SIGIO.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> io::Result<i32> {
    const F_GETSIG: i32 = 11;
    // SAFETY: the call takes no argument.
    let signal = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) };
    if signal >= 0 { Ok(signal) } else { Err(io::Error::last_os_error()) }
}

/// The one funnel from −1 to errno.
fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

//! The only unsafe code of the crate: system calls that `rustix` does not wrap.
#![allow(unsafe_code)]

#[cfg(all(feature = "harness", target_arch = "x86_64"))]
mod family;
mod ring;
#[cfg(feature = "harness")]
mod steps;
#[cfg(feature = "harness")]
mod supervisor;

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::thread::UnshareFlags;

#[cfg(all(feature = "harness", target_arch = "x86_64"))]
pub use family::{End, Entry, Verdict, run_family};
pub(crate) use ring::{Frame, Ring};
#[cfg(feature = "harness")]
pub use steps::{Call, let_fail, run_and_kill, run_and_watch};
#[cfg(feature = "harness")]
pub use supervisor::Supervisor;

/// The namespaces that [`unshare`] makes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unshare {
    Network,
    UserAndNetwork,
}

/// Gives the calling thread namespaces of its own (`unshare(2)`).
pub(crate) fn unshare(flags: Unshare) -> io::Result<()> {
    let flags = match flags {
        Unshare::Network => UnshareFlags::NEWNET,
        Unshare::UserAndNetwork => UnshareFlags::NEWUSER | UnshareFlags::NEWNET,
    };
    // SAFETY: the flags do not hold CLONE_FILES, so every thread goes on seeing the same descriptors.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Runs `make` with the user and the group that files, and so sockets, made by this thread belong to (`setfsuid(2)`). Where
/// that is not allowed they stay the caller's.
pub fn as_owner<T>(owner: u32, make: impl FnOnce() -> T) -> T {
    // SAFETY: the calls take numbers and touch no memory of ours.
    let before = unsafe { (libc::setfsgid(owner), libc::setfsuid(owner)) };
    let made = make();
    // SAFETY: as above.
    unsafe { (libc::setfsuid(before.1 as u32), libc::setfsgid(before.0 as u32)) };
    made
}

/// How many BPF programs look at what comes from `lo`, in the network namespace of the calling thread (`BPF_PROG_QUERY`).
pub fn programs_on_lo() -> io::Result<u32> {
    const QUERY: libc::c_long = 16;
    const TCX_INGRESS: u32 = 46;
    // target, attach type, two words of flags, the address of a list, its length, and more that stays zero.
    let mut attribute = [0u32; 16];
    attribute[..2].copy_from_slice(&[1, TCX_INGRESS]);
    // SAFETY: the kernel reads and writes at most the given number of bytes, the size of `attribute`.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, QUERY, attribute.as_mut_ptr(), size_of_val(&attribute)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attribute[6]) }
}

/// Sets a socket option whose value is plain bytes, never a structure with pointers (`setsockopt(2)`).
///
/// # Errors
/// The errors of `setsockopt(2)`.
pub fn set_option(socket: impl AsFd, level: c_int, name: c_int, value: &[u8]) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads value.len() bytes from value.
    check(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as u32) })
}

/// Reads a socket option into `value`; returns how many bytes the kernel has (`getsockopt(2)`).
///
/// # Errors
/// The errors of `getsockopt(2)`.
pub fn option(socket: impl AsFd, level: c_int, name: c_int, value: &mut [u8]) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most length bytes to value, and the length to length.
    check(unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &mut length) })?;
    Ok(length as usize)
}

/// Lets only packets pass to the socket that the classic BPF program accepts (`SO_ATTACH_FILTER`).
pub fn attach_filter(socket: impl AsFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let fprog = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let (fd, size) = (socket.as_fd().as_raw_fd(), size_of_val(&fprog) as u32);
    // SAFETY: the kernel copies one sock_fprog and the len instructions it points to, and changes neither.
    check(unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const fprog).cast(), size)
    })
}

/// Lets all packets pass again (`SO_DETACH_FILTER`).
pub fn detach_filter(socket: impl AsFd) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &[0; size_of::<c_int>()])
}

/// Lets a connection end without a packet once it is closed (`TCP_REPAIR`).
pub(crate) fn silence(socket: impl AsFd) -> io::Result<()> {
    const TCP_REPAIR: c_int = 19;
    set_option(socket, libc::IPPROTO_TCP, TCP_REPAIR, &1_i32.to_ne_bytes())
}

/// A length that the kernel gives by `ioctl(2)`, see `tcp(7)`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Length {
    /// `SIOCINQ`: received and not read.
    Unread,
    /// `SIOCOUTQ`: written and not acknowledged.
    Unacknowledged,
    /// `SIOCOUTQNSD`: written and not sent.
    Unsent,
}

/// Asks for a length.
pub(crate) fn length(socket: impl AsFd, length: Length) -> io::Result<usize> {
    let request = match length {
        Length::Unread => libc::FIONREAD,
        Length::Unacknowledged => libc::TIOCOUTQ,
        Length::Unsent => SIOCOUTQNSD,
    };
    let mut answer: c_int = 0;
    // SAFETY: each of the three requests writes one int.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut answer) })?;
    Ok(answer as usize)
}

const SIOCOUTQNSD: libc::Ioctl = 0x894b;

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

//! The system calls that the tests need and no library wraps safely: the only `unsafe` here.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

/// Memory for a queue, as a program gives it that is not written in Rust.
pub struct Memory(pub Vec<u8>);

impl AsMut<[MaybeUninit<u8>]> for Memory {
    fn as_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: the same memory; the library writes bytes alone, none that is not initialized.
        unsafe { &mut *(&raw mut self.0[..] as *mut [MaybeUninit<u8>]) }
    }
}

/// Asks for the signals of a socket, and ignores them.
pub fn ask_for_signals(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    const F_SETSIG: i32 = 10;
    // SAFETY: the calls take numbers and touch no memory of ours.
    let results = unsafe {
        libc::signal(libc::SIGURG, libc::SIG_IGN);
        [
            libc::fcntl(fd, F_SETSIG, libc::SIGURG),
            libc::fcntl(fd, libc::F_SETOWN, libc::getpid()),
            libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC),
        ]
    };
    if results.contains(&-1) { Err(io::Error::last_os_error()) } else { Ok(()) }
}

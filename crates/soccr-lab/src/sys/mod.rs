//! The only unsafe code of the crate: system calls that `rustix` does not wrap.
#![allow(unsafe_code)]

use std::io;

use rustix::thread::UnshareFlags;

/// Gives the calling thread namespaces of its own (`unshare(2)`).
pub(crate) fn unshare(flags: Unshare) -> io::Result<()> {
    let flags = match flags {
        Unshare::Network => UnshareFlags::NEWNET,
        Unshare::UserAndNetwork => UnshareFlags::NEWUSER | UnshareFlags::NEWNET,
    };
    // SAFETY: the flags do not hold CLONE_FILES, so every thread goes on seeing the same descriptors.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// The namespaces that [`unshare`] makes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unshare {
    Network,
    UserAndNetwork,
}

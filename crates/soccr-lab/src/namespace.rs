//! A network namespace as a value.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{fs, io, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::Rtnetlink;
use crate::sys::{Unshare, unshare};

/// A network namespace. It lives as long as this value, a thread inside, or a socket made inside.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    /// Makes a fresh namespace with `lo` up. The calling thread stays where it is.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN` (call [`enter`](crate::enter) first), `ENOSPC` beyond `user.max_net_namespaces`.
    pub fn new() -> io::Result<Self> {
        let make = || {
            unshare(Unshare::Network)?;
            Rtnetlink::here()?.up("lo")?;
            Self::current()
        };
        thread::scope(|scope| scope.spawn(make).join()).expect("no step panics")
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// The errors of opening `/proc/thread-self/ns/net`.
    pub fn current() -> io::Result<Self> {
        Ok(Self { fd: File::open("/proc/thread-self/ns/net")?.into() })
    }

    /// Moves the calling thread in for good (`setns(2)`). Threads that it starts begin there too.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn enter(&self) -> io::Result<()> {
        move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network)).map_err(Into::into)
    }

    /// Runs `inside` in this namespace on the calling thread, which is back afterwards, also after a panic. Sockets
    /// that are opened inside belong to the namespace for ever.
    ///
    /// # Panics
    /// Where the kernel refuses the change, as it does to a process that has not [entered](crate::enter).
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> T {
        let _back = Back(Self::current().expect("/proc is mounted"));
        self.enter().expect("setns");
        inside()
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Moves the thread back when dropped.
struct Back(Namespace);

impl Drop for Back {
    fn drop(&mut self) {
        // A thread that goes on in the wrong network would falsify whatever runs on it next.
        self.0.enter().expect("setns back");
    }
}

/// Writes a setting of the calling thread's network: `sysctl("net/ipv4/tcp_ecn", "1")`.
///
/// # Errors
/// `ENOENT` where the kernel does not know it, `EACCES` or `EROFS` where `/proc/sys` cannot be written.
pub fn sysctl(name: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

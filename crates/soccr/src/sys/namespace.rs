//! The network namespace of a socket, and work done inside it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys::signals::without_signals;
use crate::sys::sockopt;

/// A number that no two network namespaces share while the machine runs (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// Zero on older kernels, where all sockets are taken to live in the caller's namespace.
pub(crate) fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    match sockopt::get(socket, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(0),
        other => other,
    }
}

/// The namespace of a socket, whichever namespace the caller is in (`SIOCGSKNS`).
pub(crate) fn of_socket(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: this ioctl takes no argument.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Runs `work` in another network namespace, on a thread that lives as long as the work.
pub(crate) fn run_in<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let inside = || {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
            work()
        };
        let named = std::thread::Builder::new().name("soccr-netns".into());
        let thread = without_signals(|| named.spawn_scoped(scope, inside))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The calling thread is in the namespace of `socket`.
pub(crate) fn is_here(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(cookie(UnixDatagram::unbound()?.as_fd())? == cookie(socket)?)
}

/// Runs `work` in the namespace of `socket`.
pub(crate) fn run_beside<T: Send>(
    socket: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    if is_here(socket)? { work() } else { run_in(of_socket(socket)?.as_fd(), work) }
}

/// Opens something in the namespace of `socket`: on this thread, where it is in that namespace.
pub(crate) fn open_beside<T: AsFd + Send>(
    socket: BorrowedFd<'_>,
    open: impl Fn() -> io::Result<T> + Send + Sync,
) -> io::Result<T> {
    open_in(cookie(socket)?, socket, open)
}

/// The same where the [`cookie`] of that namespace is known.
pub(crate) fn open_in<T: AsFd + Send>(
    namespace: u64,
    socket: BorrowedFd<'_>,
    open: impl Fn() -> io::Result<T> + Send + Sync,
) -> io::Result<T> {
    let opened = open();
    let here = match &opened {
        Ok(opened) => cookie(opened.as_fd())?,
        // The caller may have rights in the namespace of `socket` alone.
        Err(_) => cookie(UnixDatagram::unbound()?.as_fd())?,
    };
    if here == namespace {
        return opened;
    }
    run_in(of_socket(socket)?.as_fd(), open)
}

/// What was seen a moment ago in one network namespace, for the whole process. Only a hint: whoever finds it locked goes on
/// without, also behind a fork.
#[derive(Debug)]
pub(crate) struct Recently<T = ()> {
    seen: Mutex<Option<(u64, Instant, T)>>,
    lasts: Duration,
}

impl<T: Copy> Recently<T> {
    pub(crate) const fn within(lasts: Duration) -> Self {
        Self { seen: Mutex::new(None), lasts }
    }

    /// It is seen now in the namespace of this socket.
    pub(crate) fn note_at(&self, socket: BorrowedFd<'_>, what: T) {
        if let (Ok(mut seen), Ok(namespace)) = (self.seen.try_lock(), cookie(socket)) {
            // Old kernels tell no namespace from another.
            *seen = (namespace != 0).then(|| (namespace, Instant::now(), what));
        }
    }

    /// What was seen a moment ago in the namespace of this socket.
    pub(crate) fn at(&self, socket: BorrowedFd<'_>) -> Option<T> {
        let (namespace, when, what) = self.seen.try_lock().ok().and_then(|seen| *seen)?;
        let is_fresh = when.elapsed() < self.lasts && cookie(socket).is_ok_and(|here| here == namespace);
        is_fresh.then_some(what)
    }
}

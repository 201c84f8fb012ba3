//! Network namespaces: of this process, of a socket, by path.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::sys;
use crate::error::{Context, Error, ErrorKind, Result};

/// The network namespace of this process.
const HERE: &str = "/proc/thread-self/ns/net";

/// Moves this process into a network namespace and, if necessary, into the user namespace that owns it. The process must not have
/// started a thread.
///
/// # Errors
/// Those of opening the path, and `EPERM` without `CAP_SYS_ADMIN` in the user namespace that owns it.
pub fn enter(path: &Path) -> Result<()> {
    move_into(open_namespace(path)?.as_fd())
}

/// Moves this process into the network namespace of a socket. The process must not have started a thread.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` there, and those of [`enter`].
pub fn enter_of(socket: BorrowedFd<'_>) -> Result<()> {
    move_into(of_socket(socket)?.as_fd()).context("its network namespace")
}

fn of_socket(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    sys::namespace_of_socket(socket).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => Error::new(
            ErrorKind::NoPermission,
            "SIOCGSKNS: EPERM — needs CAP_NET_ADMIN in its network namespace",
        ),
        _ => Error::of(ErrorKind::System, "SIOCGSKNS", error),
    })
}

/// Identifies a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u64, u64);

impl Identity {
    /// That of the calling thread.
    ///
    /// # Errors
    /// Those of opening `/proc/thread-self/ns/net`.
    pub fn here() -> Result<Self> {
        Self::of(open_namespace(Path::new(HERE))?.as_fd())
    }

    /// That of the namespace of a socket.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN` there.
    pub fn of_socket(socket: BorrowedFd<'_>) -> Result<Self> {
        Self::of(of_socket(socket)?.as_fd())
    }

    fn of(namespace: BorrowedFd<'_>) -> Result<Self> {
        let stat = fstat(namespace).context("fstat")?;
        Ok(Self(stat.st_dev, stat.st_ino))
    }
}

/// Asks a question in the network namespace of a socket, by a child process: this process stays where it is. It must not have started
/// a thread.
///
/// # Errors
/// Those of [`enter_of`] and of `fork(2)`.
pub fn ask_beside(socket: BorrowedFd<'_>, question: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>> {
    let (mut ours, mut theirs) = UnixStream::pair().context("socketpair")?;
    let Some(child) = sys::fork().context("fork")? else {
        drop(ours);
        let answer = enter_of(socket).map(|()| question()).map_err(|error| error.to_string());
        let (tag, bytes) = answer.map_or_else(|error| (1, error.into_bytes()), |answer| (0, answer));
        let _ = theirs.write_all(&[tag]).and_then(|()| theirs.write_all(&bytes));
        std::process::exit(0)
    };
    drop(theirs);
    let mut answer = Vec::new();
    let read = ours.read_to_end(&mut answer);
    let _ = waitpid(Some(child), WaitOptions::empty());
    read.context("read")?;
    match answer.split_first() {
        Some((0, answer)) => Ok(answer.to_vec()),
        Some((_, error)) => Err(Error::system(String::from_utf8_lossy(error).into_owned())),
        None => Err(Error::system("the process that asks in its network namespace has ended")),
    }
}

/// Must run before the process starts a thread: other threads would stay behind, and setns(2) into a user namespace would fail.
fn move_into(namespace: BorrowedFd<'_>) -> Result<()> {
    if Identity::here()? == Identity::of(namespace)? {
        return Ok(());
    }
    let enter = || move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network));
    match enter() {
        // The owner of a user namespace may do there what root may.
        Err(Errno::PERM) => sys::owner_of_namespace(namespace)
            .and_then(|owner| Ok(move_into_link_name_space(owner.as_fd(), Some(LinkNameSpaceType::User))?))
            .and_then(|()| Ok(enter()?))
            .context("setns — needs CAP_SYS_ADMIN in the user namespace that owns it"),
        other => other.context("setns"),
    }
}

fn open_namespace(path: &Path) -> Result<OwnedFd> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|error| match error {
        Errno::ACCESS => Error::new(
            ErrorKind::NoPermission,
            format!(
                "{}: EACCES — needs CAP_SYS_PTRACE over its process: run as root, outside of user namespaces",
                path.display()
            ),
        ),
        _ => Error::of(ErrorKind::System, path.display().to_string(), error),
    })
}

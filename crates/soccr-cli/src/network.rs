//! Network namespaces: of this process, of a socket, by name.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys;

/// Moves this process into the network namespace that the command line names: a path, or the number of a process.
pub(crate) fn enter(name: Option<&str>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    let path = match name.bytes().all(|byte| byte.is_ascii_digit()) {
        true => format!("/proc/{name}/ns/net"),
        false => name.to_owned(),
    };
    let namespace = open_namespace(&path)?;
    move_into(namespace.as_fd()).with_context(|| format!("network namespace {name}"))
}

/// Moves this process into the network namespace of a socket.
pub(crate) fn enter_of(socket: BorrowedFd<'_>) -> Result<()> {
    move_into(of_socket(socket)?.as_fd()).context("its network namespace")
}

fn of_socket(socket: BorrowedFd<'_>) -> Result<OwnedFd> {
    sys::namespace_of_socket(socket).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => anyhow!("SIOCGSKNS: EPERM — needs CAP_NET_ADMIN in its network namespace"),
        _ => anyhow!(error).context("SIOCGSKNS"),
    })
}

/// What tells a network namespace from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64, u64);

impl Identity {
    pub(crate) fn of_socket(socket: BorrowedFd<'_>) -> Result<Self> {
        Self::of(of_socket(socket)?.as_fd())
    }

    fn of(namespace: BorrowedFd<'_>) -> Result<Self> {
        let stat = fstat(namespace).context("fstat")?;
        Ok(Self(stat.st_dev, stat.st_ino))
    }
}

/// Must run before the process starts a thread: others would stay behind, and keep it out of a user namespace.
fn move_into(namespace: BorrowedFd<'_>) -> Result<()> {
    let here = open_namespace("/proc/thread-self/ns/net")?;
    if Identity::of(here.as_fd())? == Identity::of(namespace)? {
        return Ok(());
    }
    let enter = || move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network));
    match enter() {
        // Whoever owns its user namespace may do there what root may.
        Err(Errno::PERM) => sys::owner_of_namespace(namespace)
            .and_then(|owner| Ok(move_into_link_name_space(owner.as_fd(), Some(LinkNameSpaceType::User))?))
            .and_then(|()| Ok(enter()?))
            .context("setns — needs CAP_SYS_ADMIN in the user namespace that owns it"),
        other => other.context("setns"),
    }
}

fn open_namespace(path: &str) -> Result<OwnedFd> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| anyhow!(error).context(path.to_owned()))
}

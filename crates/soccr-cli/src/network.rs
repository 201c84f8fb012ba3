//! Network namespaces: of this process, of a socket, by name.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use soccr_image::stream::Place;

use crate::{exit, process, sys};

/// The network namespace of this process.
const HERE: &str = "/proc/thread-self/ns/net";

/// Moves this process into the network namespace that the command line names: a path, or the number of a process.
pub(crate) fn enter(name: Option<&str>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    let path = match name.bytes().all(|byte| byte.is_ascii_digit()) {
        true => {
            process::look_into(process::parse_pid(name).map_err(|error| anyhow!("pid {name}: {error}"))?)?;
            format!("/proc/{name}/ns/net")
        }
        // As ip-netns(8) names them.
        false if !name.contains('/') => format!("/run/netns/{name}"),
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

/// Where this process is; `None` where the kernel does not tell.
pub(crate) fn place() -> Option<Place> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let boot = u128::from_str_radix(&boot.trim().replace('-', ""), 16).ok()?;
    let Identity(device, inode) = Identity::here().ok()?;
    Some(Place { host: boot.to_be_bytes(), namespace: [device, inode] })
}

/// What tells a network namespace from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64, u64);

impl Identity {
    /// That of the calling thread.
    pub(crate) fn here() -> Result<Self> {
        Self::of(open_namespace(HERE)?.as_fd())
    }

    pub(crate) fn of_socket(socket: BorrowedFd<'_>) -> Result<Self> {
        Self::of(of_socket(socket)?.as_fd())
    }

    fn of(namespace: BorrowedFd<'_>) -> Result<Self> {
        let stat = fstat(namespace).context("fstat")?;
        Ok(Self(stat.st_dev, stat.st_ino))
    }
}

/// What the answer to a question is in the network namespace of a socket. This process stays where it is, and must not have started a
/// thread.
pub(crate) fn ask_beside(socket: BorrowedFd<'_>, question: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>> {
    let (mut ours, mut theirs) = UnixStream::pair().context("socketpair")?;
    let Some(child) = sys::fork().context("fork")? else {
        drop(ours);
        let answer = enter_of(socket).map(|()| question()).map_err(|error| exit::line(&error));
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
        Some((_, error)) => bail!("{}", String::from_utf8_lossy(error)),
        None => bail!("the process that asks in its network namespace has ended"),
    }
}

/// Whether packets to this address stay on this host: the kernel would send them from the same address.
pub(crate) fn is_local(address: SocketAddr) -> bool {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(address)?;
        socket.local_addr()
    };
    let canonical = address.ip().to_canonical();
    canonical.is_loopback() || source().is_ok_and(|source| source.ip().to_canonical() == canonical)
}

/// Must run before the process starts a thread: others would stay behind, and keep it out of a user namespace.
fn move_into(namespace: BorrowedFd<'_>) -> Result<()> {
    if Identity::here()? == Identity::of(namespace)? {
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

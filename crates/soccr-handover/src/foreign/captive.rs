//! A socket of another process, in the hands of this one.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{ipproto, sockopt};
use soccr::Flow;
use soccr::connection::State;
use soccr::diag::Diag;

use super::namespace::{self, Identity};
use super::process::{self, Process};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::seat::Seat;

/// A socket of another process: a duplicate of its descriptor.
#[derive(Debug)]
pub struct Captive {
    name: String,
    inode: u64,
    socket: OwnedFd,
    peer: Option<SocketAddr>,
    process: String,
}

impl AsFd for Captive {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Captive {
    /// Duplicates a descriptor of a process, a TCP socket.
    pub fn new(process: &Process, fd: RawFd) -> Result<Self> {
        let captive = Self::of(process, fd, process.descriptor(fd))?;
        match captive.is_tcp()? {
            true => Ok(captive),
            false => Err(Error::system(format!("{}: it is no TCP socket", captive.name))),
        }
    }

    /// Duplicates a descriptor of a process, if it is an end of a connection: one that is not established yet, and one that has ended
    /// but for unread bytes, included.
    pub fn find(process: &Process, fd: RawFd) -> Result<Option<Self>> {
        let Some(socket) = process.descriptor_if_open(fd).transpose() else { return Ok(None) };
        let captive = Self::of(process, fd, socket)?;
        Ok(if captive.is_connection()? { Some(captive) } else { None })
    }

    /// Says who the peer is, [if the kernel has forgotten it](Self::has_forgotten_peer). Otherwise what the kernel says counts.
    pub fn with_peer(self, peer: SocketAddr) -> Self {
        Self { peer: Some(peer), ..self }
    }

    /// Whether the kernel has forgotten the peer: in state CLOSE.
    ///
    /// # Errors
    /// The state cannot be read.
    pub fn has_forgotten_peer(&self) -> Result<bool> {
        Ok(soccr::diag::state(&self.socket).with_context(|| self.name.clone())? == State::Close)
    }

    fn of(process: &Process, fd: RawFd, socket: Result<OwnedFd>) -> Result<Self> {
        let name = format!("pid {} fd {fd}", process.pid());
        let socket = socket.with_context(|| name.clone())?;
        let inode = process::inode(&socket).with_context(|| name.clone())?;
        Ok(Self { name, inode, socket, peer: None, process: process.pid().to_string() })
    }

    fn is_tcp(&self) -> Result<bool> {
        let mptcp = 262;
        match sockopt::socket_protocol(&self.socket) {
            Ok(Some(protocol)) => Ok(protocol == ipproto::TCP || protocol.as_raw().get() == mptcp),
            Ok(None) | Err(Errno::NOTSOCK) => Ok(false),
            Err(error) => Err(self.failed("SO_PROTOCOL", error)),
        }
    }

    fn is_connection(&self) -> Result<bool> {
        let listens = || sockopt::socket_acceptconn(&self.socket);
        if !self.is_tcp()? || listens().map_err(|error| self.failed("SO_ACCEPTCONN", error))? {
            return Ok(false);
        }
        match rustix::net::getpeername(&self.socket) {
            Ok(_) => Ok(true),
            Err(Errno::NOTCONN) => self.is_connecting_or_unread(),
            Err(error) => Err(self.failed("getpeername", error)),
        }
    }

    /// Of two kinds of connections the kernel does not tell the peer: those that are not established yet, and those that were reset, or
    /// closed by both ends, and have unread bytes.
    fn is_connecting_or_unread(&self) -> Result<bool> {
        match soccr::diag::state(&self.socket).with_context(|| self.name.clone())? {
            State::Close => ioctl_fionread(&self.socket)
                .map(|unread| unread > 0)
                .map_err(|error| self.failed("FIONREAD", error)),
            _ => Ok(true),
        }
    }

    fn failed(&self, call: &str, error: Errno) -> Error {
        Error::of(ErrorKind::System, format!("{}: {call}", self.name), error)
    }

    /// What people call it: `pid 4711 fd 5`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its inode, by which `/proc/PID/fd` and `sock_diag(7)` name it.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Its own address.
    pub fn local(&self) -> Result<SocketAddr> {
        self.local_address().with_context(|| self.name.clone())
    }

    /// Its addresses; to be called in its network namespace, or before this process starts a thread.
    ///
    /// # Errors
    /// The socket is not connected, or the kernel has forgotten its peer.
    pub fn flow(&self) -> Result<Flow> {
        self.known_flow()?.ok_or_else(|| {
            let what = "it is not connected (where it was reset, or both ends have closed, its peer is forgotten: \
                        `soccr save --forgotten-peer` names that)";
            Error::system(format!("{}: {what}", self.name))
        })
    }

    /// The same; nothing where it is not connected, or its peer is forgotten.
    pub fn known_flow(&self) -> Result<Option<Flow>> {
        self.addresses().with_context(|| self.name.clone())
    }

    /// The connection in it; to be called in its network namespace.
    ///
    /// # Errors
    /// Those of [`flow`](Self::flow).
    pub fn into_seat(self) -> Result<Seat> {
        let flow = self.flow()?;
        Ok(Seat::new(self.socket, flow).of_process(&self.process))
    }

    fn addresses(&self) -> Result<Option<Flow>> {
        let local = self.local_address()?;
        let connected = || rustix::net::getpeername(&self.socket).ok().flatten()?.try_into().ok();
        let remote = match connected() {
            None => match soccr::diag::state(&self.socket)? {
                State::Close => self.peer,
                // It may be connected since.
                State::SynSent => self.peer_of_handshake(local)?.or_else(connected),
                _ => connected(),
            },
            known => known,
        };
        Ok(remote.map(|remote| Flow { local, remote }))
    }

    fn local_address(&self) -> Result<SocketAddr> {
        let local = rustix::net::getsockname(&self.socket).context("getsockname")?;
        SocketAddr::try_from(local).map_err(|_| Error::system("it is no TCP socket"))
    }

    /// In SYN_SENT only sock_diag tells the peer, in the network namespace of the socket.
    fn peer_of_handshake(&self, local: SocketAddr) -> Result<Option<SocketAddr>> {
        let cookie = sockopt::socket_cookie(&self.socket).context("SO_COOKIE")?;
        let ask = || Ok(Diag::open()?.peer_of_handshake(local, cookie)?);
        if Identity::here()? == Identity::of_socket(self.as_fd())? {
            return ask();
        }
        let answer = namespace::ask_beside(self.as_fd(), || match ask() {
            Ok(peer) => peer.map(|peer| peer.to_string()).unwrap_or_default().into_bytes(),
            Err(_) => Vec::new(),
        })?;
        Ok(String::from_utf8_lossy(&answer).parse().ok())
    }
}

//! A socket of another process, in the hands of this one.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::net::{ipproto, sockopt};
use soccr::Flow;
use soccr::diag::Diag;

use super::process::{self, Process};
use crate::error::{Context, Error, Result};
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
        let captive = Self::duplicate(process, fd)?;
        match captive.is_tcp() {
            true => Ok(captive),
            false => Err(Error::system(format!("{}: it is no TCP socket", captive.name))),
        }
    }

    /// Duplicates a descriptor of a process, if it is an end of a connection.
    pub fn find(process: &Process, fd: RawFd) -> Result<Option<Self>> {
        let captive = Self::duplicate(process, fd)?;
        let is_connection = captive.is_tcp()
            && sockopt::socket_acceptconn(&captive.socket) == Ok(false)
            && rustix::net::getpeername(&captive.socket).is_ok();
        Ok(Some(captive).filter(|_| is_connection))
    }

    /// Says who the peer is, if the kernel has forgotten it.
    pub fn with_peer(self, peer: Option<SocketAddr>) -> Self {
        Self { peer, ..self }
    }

    fn duplicate(process: &Process, fd: RawFd) -> Result<Self> {
        let name = format!("pid {} fd {fd}", process.pid());
        let socket = process.descriptor(fd).with_context(|| name.clone())?;
        let inode = process::inode(&socket)?;
        Ok(Self { name, inode, socket, peer: None, process: process.pid().to_string() })
    }

    fn is_tcp(&self) -> bool {
        let mptcp = 262;
        sockopt::socket_protocol(&self.socket).is_ok_and(|protocol| {
            protocol.is_some_and(|protocol| protocol == ipproto::TCP || protocol.as_raw().get() == mptcp)
        })
    }

    /// What people call it: `pid 4711 fd 5`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its inode, by which `/proc/PID/fd` and `sock_diag(7)` name it.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Its addresses; to be called in its network namespace.
    ///
    /// # Errors
    /// The socket is not connected, or the kernel has forgotten its peer.
    pub fn flow(&self) -> Result<Flow> {
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

    fn addresses(&self) -> Result<Flow> {
        let Ok(local) = rustix::net::getsockname(&self.socket).and_then(SocketAddr::try_from) else {
            return Err(Error::system("it is no TCP socket"));
        };
        let known = rustix::net::getpeername(&self.socket).ok().flatten();
        if let Some(remote) = known.and_then(|address| address.try_into().ok()).or(self.peer) {
            return Ok(Flow { local, remote });
        }
        // In SYN_SENT only sock_diag tells the peer.
        let mut remote = None;
        Diag::open()?.visit(|socket| {
            if u64::from(socket.inode) == self.inode && socket.remote.port() != 0 {
                remote = Some(socket.remote);
            }
        })?;
        match remote {
            Some(remote) => Ok(Flow { local, remote }),
            None => {
                let what = "it is not connected (where both ends have closed, and its peer is forgotten, name that by --forgotten-peer)";
                Err(Error::system(what))
            }
        }
    }
}

//! A connection in the hands of this command, though its process still has it.
//!
//! Between two looks at it, it lives on as before, and only the lock keeps it silent: if this command is killed, the lock
//! and the stop of the process end by themselves, and nothing has happened. Repair mode would stay.

use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};

use anyhow::{Context, Result, bail};
use soccr::Connection;
use soccr::connection::{ControlBlock, Flow, Options};
use soccr::diag::Diag;

use crate::process::{self, Process};

/// A duplicate of a socket of another process.
#[derive(Debug)]
pub(crate) struct Captive {
    /// What people call it: `pid 4711 fd 5`.
    pub(crate) name: String,
    pub(crate) inode: u64,
    socket: OwnedFd,
    peer: Option<SocketAddr>,
}

impl Captive {
    /// Duplicates a descriptor of a process. `peer` is its peer's address, where the kernel has forgotten it.
    pub(crate) fn new(process: &Process, fd: RawFd, peer: Option<SocketAddr>) -> Result<Self> {
        let name = format!("pid {} fd {fd}", process.pid);
        let socket = process.descriptor(fd).with_context(|| name.clone())?;
        let inode = process::inode(&socket)?;
        Ok(Self { name, inode, socket, peer })
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Its addresses; to be called in its network namespace.
    pub(crate) fn flow(&self) -> Result<Flow> {
        self.addresses().with_context(|| self.name.clone())
    }

    fn addresses(&self) -> Result<Flow> {
        let Ok(local) = rustix::net::getsockname(&self.socket).and_then(SocketAddr::try_from) else {
            bail!("it is no TCP socket");
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
            None => bail!(
                "it is not connected (where both ends have closed, and its peer is forgotten, name that by --peer)"
            ),
        }
    }

    /// Reads the connection. It goes on; only a lock around this call keeps that off the wire.
    pub(crate) fn save(&self) -> Result<Connection> {
        let save = || {
            let paused = self.paused()?;
            let connection = paused.save()?;
            paused.resume()?;
            Ok::<_, soccr::Error>(connection)
        };
        save().with_context(|| self.name.clone())
    }

    /// Reads the connection again and takes it away from the process, provided that it is still what it was.
    pub(crate) fn let_go(&self, saved: &ControlBlock) -> Result<Connection> {
        let let_go = || {
            let paused = self.paused()?;
            let connection = paused.save()?;
            if without_clock(&connection.control) != without_clock(saved) {
                bail!("it changed while it was locked: another process uses it");
            }
            paused.detach()?;
            Ok(connection)
        };
        let_go().with_context(|| self.name.clone())
    }

    fn paused(&self) -> soccr::Result<soccr::Paused<'_>> {
        let paused = soccr::pause(&self.socket)?;
        Ok(match self.peer {
            Some(peer) => paused.with_peer(peer),
            None => paused,
        })
    }
}

/// The clock of the timestamps runs, whatever happens.
fn without_clock(control: &ControlBlock) -> ControlBlock {
    ControlBlock { options: Options { timestamps: None, ..control.options.clone() }, ..control.clone() }
}

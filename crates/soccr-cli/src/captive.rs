//! A connection in the hands of this command, though its process still has it.
//!
//! Between two looks at it, it lives on as before, and only the lock keeps it silent: if this command is killed, the lock
//! and the stop of the process end by themselves, and nothing has happened. Repair mode would stay.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::net::{ipproto, sockopt};
use soccr::Connection;
use soccr::connection::{ControlBlock, Flow, State};
use soccr::diag::Diag;
use soccr::settings::Value;

use crate::process::{self, Process};
use crate::sys;
use crate::traffic::Traffic;

/// A duplicate of a socket of another process.
#[derive(Debug)]
pub(crate) struct Captive {
    /// What people call it: `pid 4711 fd 5`.
    pub(crate) name: String,
    pub(crate) inode: u64,
    socket: OwnedFd,
    peer: Option<SocketAddr>,
    /// It may leave only where it has been idle for so long.
    idle: Option<Duration>,
}

impl Captive {
    /// Duplicates a descriptor of a process, a TCP socket.
    pub(crate) fn new(process: &Process, fd: RawFd) -> Result<Self> {
        let captive = Self::duplicate(process, fd)?;
        match captive.is_tcp() {
            true => Ok(captive),
            false => bail!("{}: it is no TCP socket", captive.name),
        }
    }

    /// Duplicates a descriptor of a process, where it is an end of a connection.
    pub(crate) fn find(process: &Process, fd: RawFd) -> Result<Option<Self>> {
        let captive = Self::duplicate(process, fd)?;
        let is_connection = captive.is_tcp()
            && sockopt::socket_acceptconn(&captive.socket) == Ok(false)
            && rustix::net::getpeername(&captive.socket).is_ok();
        Ok(Some(captive).filter(|_| is_connection))
    }

    /// Tells the address of the peer, where the kernel has forgotten it.
    pub(crate) fn with_peer(self, peer: Option<SocketAddr>) -> Self {
        Self { peer, ..self }
    }

    /// Lets it leave only if it has been idle for so long by then.
    pub(crate) fn when_idle(self, time: Duration) -> Self {
        Self { idle: Some(time), ..self }
    }

    /// No data have been sent or received for so long, and none wait in its queues.
    pub(crate) fn is_idle(&self, time: Duration) -> Result<bool> {
        let look = || -> Result<bool> {
            let info = sys::tcp_info(self.socket.as_fd()).context("TCP_INFO")?;
            let unread = rustix::io::ioctl_fionread(&self.socket).context("FIONREAD")?;
            Ok(unread == 0 && Traffic::read(&info).is_some_and(|traffic| traffic.is_idle(time)))
        };
        look().with_context(|| self.name.clone())
    }

    fn duplicate(process: &Process, fd: RawFd) -> Result<Self> {
        let name = format!("pid {} fd {fd}", process.pid);
        let socket = process.descriptor(fd).with_context(|| name.clone())?;
        let inode = process::inode(&socket)?;
        Ok(Self { name, inode, socket, peer: None, idle: None })
    }

    fn is_tcp(&self) -> bool {
        let mptcp = 262;
        sockopt::socket_protocol(&self.socket).is_ok_and(|protocol| {
            protocol.is_some_and(|protocol| protocol == ipproto::TCP || protocol.as_raw().get() == mptcp)
        })
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

    /// Reads the connection, into memory that may have been used before. It goes on; only a lock around this call keeps that
    /// off the wire.
    pub(crate) fn save_into(&self, connection: &mut Connection) -> Result<()> {
        if let Some(time) = self.idle
            && !self.is_idle(time)?
        {
            bail!("{}: it is in use again (--idle)", self.name);
        }
        let mut save = || {
            let paused = self.paused()?;
            paused.save_into(connection)?;
            paused.resume()
        };
        save().with_context(|| self.name.clone())
    }

    /// Reads the connection again and takes it away from the process, provided that it is still what it was.
    pub(crate) fn let_go(&self, saved: &ControlBlock) -> Result<Connection> {
        let let_go = || {
            let paused = self.paused()?;
            let connection = paused.save()?;
            if position(&connection.control) != position(saved) {
                bail!("it changed while it was locked: another process uses it");
            }
            paused.detach()?;
            Ok(connection)
        };
        let_go().with_context(|| self.name.clone())
    }

    /// Gives the process its connection back, in the socket that it had it in: nobody has got it elsewhere.
    pub(crate) fn take_back(&self, connection: &Connection) -> Result<()> {
        self.restore(connection).with_context(|| self.name.clone())
    }

    fn restore(&self, connection: &Connection) -> Result<()> {
        let mut steps = soccr::pause(&self.socket)?.restore(&connection.control, connection.buffers)?;
        match rustix::net::bind(&self.socket, &connection.local) {
            // A socket that was bound to its port by name still has it. Every other has given it back, though getsockname(2) may
            // go on telling it.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(error).context("bind"),
        }
        rustix::net::connect(&self.socket, &connection.remote).context("connect")?;
        steps.connected(Some(connection.flow()))?;
        steps.receive_queue(&connection.receive_queue, connection.urgent)?;
        steps.send_queue(&connection.send_queue)?;
        steps.finish()?.resume()?;
        let reuse = connection.settings.get("SO_REUSEADDR") == Some(&Value::Number(1));
        sockopt::set_socket_reuseaddr(&self.socket, reuse).context("SO_REUSEADDR")
    }

    fn paused(&self) -> soccr::Result<soccr::Paused<'_>> {
        let paused = soccr::pause(&self.socket)?;
        Ok(match self.peer {
            Some(peer) => paused.with_peer(peer),
            None => paused,
        })
    }
}

/// What only traffic and the application change. The windows move by themselves, and the clock runs.
fn position(control: &ControlBlock) -> (State, [u32; 5], bool) {
    let ControlBlock { state, rcv_nxt, inq_len, write_seq, outq_len, unsq_len, fin_unsent, .. } = *control;
    (state, [rcv_nxt, inq_len, write_seq, outq_len, unsq_len], fin_unsent)
}

//! A socket, and the connection in it that may leave and come back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use soccr::connection::{ControlBlock, State};
use soccr::settings::{Settings, Value};
use soccr::{Connection, Flow};

use crate::error::{Error, ErrorKind, Result};

/// A socket, and the connection in it.
///
/// Between two looks at it the connection lives on as before, and only a lock keeps it silent: where this process dies, the lock
/// ends by itself, and repair mode would not. One with kernel TLS can only be looked at once, and stays in repair mode.
#[derive(Debug)]
pub struct Seat {
    socket: OwnedFd,
    flow: Flow,
    /// No other descriptor leads to the socket.
    is_own: bool,
    /// The connection is in a new socket, of which those who used the old one know nothing.
    is_adrift: bool,
    /// A connection with kernel TLS that has been read: its socket is in repair mode.
    value: Option<Box<Connection>>,
    /// What the socket has of its process.
    process: Settings,
}

impl AsFd for Seat {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Seat {
    /// A socket whose connection has these addresses.
    pub fn new(socket: OwnedFd, flow: Flow) -> Self {
        Self { socket, flow, is_own: false, is_adrift: false, value: None, process: Settings::default() }
    }

    /// The same, where no other descriptor leads to the socket: closing it frees its addresses. So a connection with kernel TLS, whose
    /// socket cannot be disconnected, leaves and comes back like any other; see [`soccr::tls`].
    pub fn own(socket: OwnedFd, flow: Flow) -> Self {
        Self { is_own: true, ..Self::new(socket, flow) }
    }

    /// Notes whose socket it is: see [`Settings::note_process`].
    #[cfg(feature = "foreign")]
    pub(crate) fn of_process(mut self, process: &str) -> Self {
        self.process.note_process(process);
        self
    }

    /// The addresses of the connection.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Whether the connection has come back into a new socket, while the process that it was taken from has lost it. That can only
    /// be with kernel TLS, after it was [let go](Self::let_go).
    pub fn is_adrift(&self) -> bool {
        self.is_adrift
    }

    /// Whether the kernel encrypts or decrypts: then nobody may write to the socket while it [settles](Self::settle).
    ///
    /// # Errors
    /// That of the socket option.
    pub fn has_kernel_tls(&self) -> Result<bool> {
        Ok(soccr::tls::is_on(&self.socket)?)
    }

    /// Gives the socket back.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Prepares a connection with kernel TLS for a lock, while nobody writes to it: see [`soccr::tls::settle`]. Others need none.
    ///
    /// # Errors
    /// Those of settling.
    pub fn settle(&self, limit: Duration) -> Result<()> {
        Ok(soccr::tls::settle(&self.socket, limit)?)
    }

    /// Reads the connection, into memory that may have been used before. It goes on: only a lock around this call keeps that off the
    /// wire. One with kernel TLS is silent from here on, until it [comes back](Self::come_back) or [is let go](Self::let_go).
    ///
    /// # Errors
    /// Those of [`soccr::pause`] and of saving.
    pub fn save_into(&mut self, connection: &mut Connection) -> Result<()> {
        let encrypts = self.has_kernel_tls()?;
        let paused = self.pause()?;
        let paused = match (encrypts, self.is_own) {
            (false, _) => paused,
            // Reading may take what has arrived out of the socket.
            (true, true) => paused.with_tls(),
            (true, false) => paused.with_tls_in_place(),
        };
        paused.save_into(connection)?;
        for (name, value) in self.process.iter() {
            connection.settings.set(name, value.clone());
        }
        if !encrypts {
            return Ok(paused.resume()?);
        }
        // It cannot be read a second time.
        paused.detach()?;
        self.value = Some(Box::new(connection.clone()));
        Ok(())
    }

    /// A connection with kernel TLS that was read and not let go lives on: in a new socket, or in the old one where others use it.
    /// Connections without have lived on.
    ///
    /// # Errors
    /// Those of restoring and resuming. The connection is in no socket then, or frozen in the old one.
    pub fn come_back(&mut self) -> Result<()> {
        let Some(value) = self.value.take() else { return Ok(()) };
        if self.is_own {
            self.close()?;
            return self.take_back(&value);
        }
        soccr::Paused::take_over(self.socket.as_fd())?.resume()?;
        self.set_reuse(&value)
    }

    /// Closes the socket, which is silent in repair mode, and frees its addresses: at once, though a child that is just being forked
    /// may have it as well.
    fn close(&mut self) -> Result<()> {
        // Where the kernel cannot, the last descriptor frees them.
        let _ = soccr::tls::discard(&self.socket, self.flow);
        let family = if self.flow.local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        self.socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|errno| Error::of(ErrorKind::System, "socket", errno))?;
        Ok(())
    }

    /// Reads the connection again, and takes it out of the socket, provided that it is still what it was. What stays with the socket,
    /// such as its options, is not read twice.
    ///
    /// # Errors
    /// [`Changed`](ErrorKind::Changed) where it is not, and those of saving. The connection goes on.
    pub fn let_go(&mut self, saved: &ControlBlock) -> Result<Connection> {
        match (&self.value, self.is_own) {
            (None, _) => {}
            (Some(_), true) => self.close()?,
            (Some(_), false) => soccr::tls::discard(&self.socket, self.flow)?,
        }
        if let Some(value) = self.value.take() {
            return Ok(*value);
        }
        let paused = self.pause()?;
        let connection = paused.save_plain()?;
        if position(&connection.control) != position(saved) {
            let what = "it changed while it was locked: another process uses it";
            return Err(Error::new(ErrorKind::Changed, what));
        }
        paused.detach()?;
        Ok(connection)
    }

    /// Puts the connection back into the socket that it came from: nobody has it elsewhere. One with kernel TLS gets a new socket, and
    /// where others have used the old one it [is adrift](Self::is_adrift).
    ///
    /// # Errors
    /// Those of restoring. The connection is in no socket then.
    pub fn take_back(&mut self, connection: &Connection) -> Result<()> {
        if connection.tls.is_some() {
            self.socket = connection.restore()?.resume()?.into();
            self.is_adrift |= !self.is_own;
            self.is_own = true;
            return Ok(());
        }
        let socket = self.socket.as_fd();
        let system = |what: &'static str| move |errno: Errno| Error::of(ErrorKind::System, what, errno);
        let paused = soccr::pause(&socket)?;
        let mut steps = paused.restore(&connection.control, connection.buffers)?;
        match rustix::net::bind(socket, &connection.local) {
            // One that was bound to its port by name still has it. Every other has given it back, though getsockname(2) may go
            // on telling it.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(system("bind")(errno)),
        }
        rustix::net::connect(socket, &connection.remote).map_err(system("connect"))?;
        steps.connected(Some(connection.flow()))?;
        steps.receive_queue(&connection.receive_queue, connection.urgent)?;
        steps.send_queue(&connection.send_queue)?;
        steps.finish()?.resume()?;
        self.set_reuse(connection)
    }

    /// Repair mode has overwritten it.
    fn set_reuse(&self, connection: &Connection) -> Result<()> {
        let reuse = connection.settings.get("SO_REUSEADDR") == Some(&Value::Number(1));
        sockopt::set_socket_reuseaddr(&self.socket, reuse)
            .map_err(|errno| Error::of(ErrorKind::System, "SO_REUSEADDR", errno))
    }

    fn pause(&self) -> Result<soccr::Paused<'_>> {
        // In CLOSE the kernel has forgotten the peer.
        Ok(soccr::pause(&self.socket)?.with_peer(self.flow.remote))
    }
}

/// What only traffic and the application change. The windows move by themselves, and the clock runs.
fn position(control: &ControlBlock) -> (State, [u32; 5], bool) {
    let ControlBlock { state, rcv_nxt, inq_len, write_seq, outq_len, unsq_len, fin_unsent, .. } = *control;
    (state, [rcv_nxt, inq_len, write_seq, outq_len, unsq_len], fin_unsent)
}

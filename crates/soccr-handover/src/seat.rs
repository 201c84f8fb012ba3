//! A socket, and the connection in it that may leave and come back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use soccr::settings::{Settings, Value};
use soccr::{Connection, Flow, Position};

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
    /// What was read, until the connection is known to be here or elsewhere.
    value: Option<Box<Connection>>,
    /// Where it stood then; nothing where the socket has been in repair mode since, with kernel TLS.
    position: Option<Position>,
    /// It was let go, and is in no socket of ours.
    has_left: bool,
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
        Self {
            socket,
            flow,
            is_own: false,
            is_adrift: false,
            value: None,
            position: None,
            has_left: false,
            process: Settings::default(),
        }
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

    /// Reads the connection. It goes on: only a lock around this call keeps that off the wire. One with kernel TLS is silent from here
    /// on, until it [comes back](Self::come_back) or [is let go](Self::let_go).
    ///
    /// # Errors
    /// Those of [`soccr::pause`] and of saving.
    pub fn save(&mut self) -> Result<&Connection> {
        let encrypts = self.has_kernel_tls()?;
        let mut connection = Box::new(Connection::empty());
        let paused = self.pause()?;
        let paused = match (encrypts, self.is_own) {
            (false, _) => paused,
            // Reading may take what has arrived out of the socket.
            (true, true) => paused.with_tls(),
            (true, false) => paused.with_tls_in_place(),
        };
        paused.save_into(&mut connection)?;
        for (name, value) in self.process.iter() {
            connection.settings.set(name, value.clone());
        }
        self.position = if encrypts {
            // It cannot be read a second time.
            paused.detach()?;
            None
        } else {
            let position = paused.position();
            paused.resume_silently()?;
            position
        };
        Ok(self.value.insert(connection))
    }

    /// What [was read](Self::save), until the connection [comes back](Self::come_back) or [is given up](Self::give_up).
    pub fn connection(&self) -> Option<&Connection> {
        self.value.as_deref()
    }

    /// It was [let go](Self::let_go), and nothing else is known yet.
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    /// Nobody else has the connection: it lives on here. One that was [let go](Self::let_go) goes back into the socket that it came from.
    /// One with kernel TLS that was read comes back to life: in a new socket, or in the old one where others use it and it was not let go;
    /// where others use it and it was, it [is adrift](Self::is_adrift).
    ///
    /// # Errors
    /// Those of restoring and resuming. The connection is in no socket then, or frozen in the old one.
    pub fn come_back(&mut self) -> Result<()> {
        let (value, position, has_left) = (self.value.take(), self.position.take(), self.has_left);
        self.has_left = false;
        let Some(value) = value else { return Ok(()) };
        match (has_left, position) {
            (true, _) => self.put_back(&value),
            (false, Some(_)) => Ok(()),
            (false, None) if self.is_own => {
                self.close()?;
                self.put_back(&value)
            }
            (false, None) => {
                soccr::Paused::take_over(self.socket.as_fd())?.resume()?;
                self.set_reuse(&value)
            }
        }
    }

    /// Somebody else has the connection, or nobody: what is known of it here is thrown away.
    pub fn give_up(&mut self) {
        (self.value, self.position, self.has_left) = (None, None, false);
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

    /// Takes the connection that [was read](Self::save) out of the socket, provided that it is still what it was.
    ///
    /// # Errors
    /// [`Changed`](ErrorKind::Changed) where it is not, and those of [`soccr::Paused::detach_at`]. The connection goes on.
    pub fn let_go(&mut self) -> Result<()> {
        match (self.position, self.is_own) {
            _ if self.value.is_none() => return Err(Error::new(ErrorKind::Changed, "it has not been read")),
            (Some(position), _) => self.pause()?.detach_at(position).map_err(|error| match error.kind() {
                soccr::ErrorKind::Changed => {
                    Error::new(ErrorKind::Changed, "it changed while it was locked: another process uses it")
                }
                _ => error.into(),
            })?,
            (None, true) => self.close()?,
            (None, false) => soccr::tls::discard(&self.socket, self.flow)?,
        }
        self.has_left = true;
        Ok(())
    }

    fn put_back(&mut self, connection: &Connection) -> Result<()> {
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

//! A socket, and the connection that may leave it and come back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use soccr::connection::State;
use soccr::settings::{Settings, Value};
use soccr::{Connection, Flow, Position};

use crate::error::{Error, ErrorKind, Result};

/// A socket, and the connection in it.
///
/// The socket is in repair mode only for an instant at a time; in between, a lock alone keeps the connection silent. If this process
/// dies, the lock ends by itself, which repair mode would not. A connection with kernel TLS can be read only once, and stays in
/// repair mode from then on.
#[derive(Debug)]
pub struct Seat {
    socket: OwnedFd,
    flow: Flow,
    /// Whether no other descriptor leads to the socket.
    is_own: bool,
    /// Whether the connection is in a new socket, which the users of the old one do not have.
    is_adrift: bool,
    /// The connection as it was read, until it is known to be here or elsewhere.
    value: Option<Box<Connection>>,
    /// How far it was then. `None` if the socket has been in repair mode since, with kernel TLS.
    position: Option<Position>,
    /// Whether it was let go, and is in no socket of ours.
    has_left: bool,
    /// What the socket owes to its process.
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

    /// The same, if no other descriptor leads to the socket: closing it frees its addresses. So a connection with kernel TLS, whose
    /// socket cannot be disconnected, leaves and comes back like any other; see [`soccr::tls`].
    pub fn own(socket: OwnedFd, flow: Flow) -> Self {
        Self { is_own: true, ..Self::new(socket, flow) }
    }

    /// Notes which process the socket belongs to: see [`Settings::note_process`].
    #[cfg(feature = "foreign")]
    pub(crate) fn of_process(mut self, process: &str) -> Self {
        self.process.note_process(process);
        self
    }

    /// The addresses of the connection.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Whether the connection has come back into a new socket, so that the process that it was taken from has lost it. This happens only
    /// with kernel TLS, after the connection was [let go](Self::let_go).
    pub fn is_adrift(&self) -> bool {
        self.is_adrift
    }

    /// Whether the kernel encrypts or decrypts. If so, nobody may write to the socket while it [settles](Self::settle).
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

    /// Reads the connection, which goes on: only a lock around this call keeps it quiet. A connection with kernel TLS is silent from
    /// here on, until it [comes back](Self::come_back) or [is let go](Self::let_go).
    ///
    /// # Errors
    /// Those of [`soccr::pause`] and of saving. [`Lost`](ErrorKind::Lost) where kernel TLS had been read by then: the socket does not have all
    /// of it any more.
    pub fn save(&mut self) -> Result<&Connection> {
        let mut connection = Box::new(Connection::empty());
        let paused = self.pause()?;
        // With kernel TLS, reading may take what has arrived out of the socket.
        let paused = if self.is_own { paused.with_tls() } else { paused.with_tls_in_place() };
        if let Err(error) = paused.save_into(&mut connection) {
            drop(paused);
            // From this guard only what has been taken cannot go on.
            let is_lost =
                soccr::Paused::take_over(self.socket.as_fd()).map(soccr::Paused::leave_paused).is_ok();
            return Err(if is_lost { Error::of(ErrorKind::Lost, "", error) } else { error.into() });
        }
        for (name, value) in self.process.iter() {
            connection.settings.set(name, value.clone());
        }
        self.position = if connection.tls.is_some() {
            // It cannot be read a second time.
            paused.detach()?;
            None
        } else {
            let position = paused.position();
            if let Err(error) = paused.resume_silently() {
                // In repair mode it would be of no use to its process. An error here: it is not.
                let _ = soccr::Paused::take_over(self.socket.as_fd()).and_then(soccr::Paused::resume);
                self.set_reuse(&connection)?;
                return Err(error.into());
            }
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

    /// Nobody else has the connection: it lives on here. If it was [let go](Self::let_go), it goes back into its old socket.
    ///
    /// With kernel TLS, a connection that was read comes back in a new socket, unless others use the old one. If they do, it stays in the
    /// old one, or, if it was let go, [is adrift](Self::is_adrift).
    ///
    /// # Errors
    /// Those of restoring and resuming. Then the connection is in no socket, or frozen in the old one.
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

    /// Somebody else has the connection, or nobody has: throws away what is known of it here.
    pub fn give_up(&mut self) {
        (self.value, self.position, self.has_left) = (None, None, false);
    }

    /// Closes the socket silently, in repair mode, and frees its addresses at once, even if a child that is just being forked has a
    /// duplicate.
    fn close(&mut self) -> Result<()> {
        // If the kernel cannot do that, closing the last descriptor frees them.
        let _ = soccr::tls::discard(&self.socket, self.flow);
        let family = if self.flow.local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        self.socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|errno| Error::of(ErrorKind::System, "socket", errno))?;
        Ok(())
    }

    /// Takes the connection that [was read](Self::save) out of the socket, provided that it has not changed.
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
        if connection.control.state == State::SynSent {
            connection.settings.set_again(socket, connection.local);
            paused.connect_anew(connection.flow(), connection.control.write_seq, connection.buffers)?;
            return self.set_reuse(connection);
        }
        let mut steps = paused
            .restore(&connection.control, connection.buffers)?
            .again(&connection.settings, connection.local);
        // To be disconnected has cost the socket this as well.
        if let Some(path) = connection.path {
            steps = steps.path(path)?;
        }
        if let Some(Value::Number(bytes)) = connection.settings.get("TCP_WINDOW_CLAMP") {
            steps = steps.window_clamp(*bytes as u32);
        }
        match rustix::net::bind(socket, &connection.local) {
            // A socket that was bound to its port by bind(2) still has it. Any other has given it back, though getsockname(2) may still
            // return it.
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
        // In state CLOSE the kernel has forgotten the peer.
        Ok(soccr::pause(&self.socket)?.with_peer(self.flow.remote))
    }
}

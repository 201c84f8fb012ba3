//! A socket, and the connection in it that may leave and come back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt;
use soccr::connection::{ControlBlock, State};
use soccr::settings::Value;
use soccr::{Connection, Flow};

use crate::error::{Error, ErrorKind, Result};

/// A socket, and the connection in it.
///
/// Between two looks at it the connection lives on as before, and only a lock keeps it silent: where this process dies, the lock
/// ends by itself, and repair mode would not.
#[derive(Debug)]
pub struct Seat {
    socket: OwnedFd,
    flow: Flow,
}

impl AsFd for Seat {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Seat {
    /// A socket whose connection has these addresses.
    pub fn new(socket: OwnedFd, flow: Flow) -> Self {
        Self { socket, flow }
    }

    /// The addresses of the connection.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Gives the socket back.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Reads the connection, into memory that may have been used before. It goes on: only a lock around this call keeps that off the
    /// wire.
    ///
    /// # Errors
    /// Those of [`soccr::pause`] and of saving.
    pub fn save_into(&self, connection: &mut Connection) -> Result<()> {
        let paused = self.pause()?;
        paused.save_into(connection)?;
        Ok(paused.resume()?)
    }

    /// Reads the connection again, and takes it out of the socket, provided that it is still what it was.
    ///
    /// # Errors
    /// [`Changed`](ErrorKind::Changed) where it is not, and those of saving. The connection goes on.
    pub fn let_go(&self, saved: &ControlBlock) -> Result<Connection> {
        let paused = self.pause()?;
        let connection = paused.save()?;
        if position(&connection.control) != position(saved) {
            let what = "it changed while it was locked: another process uses it";
            return Err(Error::new(ErrorKind::Changed, what));
        }
        paused.detach()?;
        Ok(connection)
    }

    /// Puts the connection back into the socket that it came from: nobody has it elsewhere.
    ///
    /// # Errors
    /// Those of restoring. The connection is in no socket then.
    pub fn take_back(&self, connection: &Connection) -> Result<()> {
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
        let reuse = connection.settings.get("SO_REUSEADDR") == Some(&Value::Number(1));
        sockopt::set_socket_reuseaddr(socket, reuse).map_err(system("SO_REUSEADDR"))
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

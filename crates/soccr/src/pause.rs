//! [`pause`] a socket: repair mode on, behind a guard that turns it off again.

use std::cell::{Cell, RefCell};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use crate::buffers;
use crate::connection::{Bare, Buffers, Connection, ControlBlock, Flow};
use crate::error::{Error, Result};
use crate::queue;
use crate::restore::{self, Restore};
use crate::save::{self, Position};
use crate::sys::raw::Injectors;
use crate::sys::tcp::{self, Repair};
use crate::tls::{self, Arrived};

/// Turns the repair mode of a TCP socket on (`TCP_REPAIR`), so that its connection can be saved.
///
/// The socket itself does not stop: segments that arrive are still taken in and acknowledged. Keep the traffic away
/// with a [`Lock`](crate::Lock) *before* this call, or make sure that nobody sends. Nor may the application use the
/// socket meanwhile: what it writes in repair mode does not reach the peer.
///
/// # Errors
/// - Refused: a listener, an MPTCP socket, or a socket that is paused already (by another guard or process; see
///   [`Paused::take_over`]).
/// - `EPERM` without `CAP_NET_ADMIN` in the user namespace that owns the socket's network namespace.
///
/// # Examples
/// ```no_run
/// # fn main() -> soccr::Result<()> {
/// # let stream = std::net::TcpStream::connect("192.0.2.1:80").unwrap();
/// let paused = soccr::pause(&stream)?;
/// let connection = paused.save()?;
/// paused.resume()?; // the connection goes on as if nothing had happened
/// println!("{} has {} unread bytes", connection.remote, connection.receive_queue.len());
/// # Ok(())
/// # }
/// ```
pub fn pause<Fd: AsFd + ?Sized>(socket: &Fd) -> Result<Paused<'_>> {
    Paused::new(socket.as_fd())
}

/// What to do about a socket that is in repair mode already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abandoned {
    Refuse,
    TakeOver,
}

fn pause_fd(fd: BorrowedFd<'_>, abandoned: Abandoned) -> Result<Paused<'_>> {
    let refuse = |what, remedy| Err(Error::refused(what, remedy));
    // Repair mode overwrites it, so it is read before and written back after; and it shows repair mode.
    let reuse_address = tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR")?;
    if reuse_address == tcp::REUSE_IN_REPAIR {
        return match abandoned {
            Abandoned::TakeOver => Ok(Paused::of(fd, false)),
            Abandoned::Refuse => refuse(
                "a socket that is in repair mode already",
                "another guard or process has paused it: resume that one first, or take the socket over (`soccr resume`)",
            ),
        };
    }
    match tcp::set_repair(fd, Repair::On) {
        Ok(()) => {}
        Err(_) if save::is_mptcp(fd) => {
            return refuse(
                "an MPTCP socket",
                "the kernel cannot repair it: open it with IPPROTO_TCP (Go: GODEBUG=multipathtcp=0)",
            );
        }
        Err(error) if error.errno() == Some(libc::EPERM) && save::is_listener(fd) => {
            return refuse(
                "a listening socket",
                "it holds no connection: accept() its queue and save each, then listen anew",
            );
        }
        Err(error) => return Err(error),
    }
    Ok(Paused::of(fd, reuse_address != 0))
}

/// A socket in repair mode. Dropping it resumes the connection.
#[derive(Debug)]
#[must_use = "dropping it resumes the connection at once"]
pub struct Paused<'fd> {
    fd: BorrowedFd<'fd>,
    reuse_address: bool,
    peer: Option<SocketAddr>,
    /// Where the connection stood when it was saved.
    saved: Cell<Option<Position>>,
    /// What only this has any more, since it was read from a socket on which the kernel decrypts.
    arrived: RefCell<Arrived>,
    carries_tls: bool,
    /// Dropping it resumes the connection.
    on_guard: bool,
}

impl<'fd> Paused<'fd> {
    /// Like [`pause`], for a guard that is tied to the descriptor, not to the value that holds it.
    ///
    /// # Errors
    /// The errors of [`pause`].
    pub fn new(socket: BorrowedFd<'fd>) -> Result<Self> {
        pause_fd(socket, Abandoned::Refuse).map_err(|error| error.at("pause"))
    }

    /// Like [`new`](Self::new), and takes charge of a socket that is in repair mode already, as
    /// [`take_over`](Self::take_over) does.
    ///
    /// # Errors
    /// The errors of [`pause`].
    pub fn new_or_take_over(socket: BorrowedFd<'fd>) -> Result<Self> {
        pause_fd(socket, Abandoned::TakeOver).map_err(|error| error.at("pause"))
    }

    fn of(fd: BorrowedFd<'fd>, reuse_address: bool) -> Self {
        Self {
            fd,
            reuse_address,
            peer: None,
            saved: Cell::new(None),
            arrived: RefCell::default(),
            carries_tls: false,
            on_guard: true,
        }
    }

    /// Takes charge of a socket that somebody else has paused and left, such as a process that has died. Its
    /// `SO_REUSEADDR` is gone: repair mode has overwritten it.
    ///
    /// # Errors
    /// Refused where the socket is not in repair mode.
    pub fn take_over(socket: BorrowedFd<'fd>) -> Result<Self> {
        match tcp::in_repair(socket) {
            Ok(true) => Ok(Self::of(socket, false)),
            Ok(false) => {
                Err(Error::refused("a socket that is not in repair mode", "pause it instead").at("pause"))
            }
            Err(error) => Err(error.at("pause")),
        }
    }

    /// Tells the address of the peer, for a connection in CLOSE: the kernel has forgotten it. In any other state what the kernel says
    /// counts.
    pub fn with_peer(mut self, peer: SocketAddr) -> Self {
        self.peer = Some(peer);
        self
    }

    /// Lets [`save`](Self::save) carry kernel TLS, too: see [`tls`](crate::tls) for what that means. Otherwise such a socket is
    /// refused, since it can only be saved for good: where the kernel decrypts, what has arrived is read out of it.
    pub fn with_tls(mut self) -> Self {
        self.carries_tls = true;
        self
    }

    /// Like [`with_tls`](Self::with_tls), and leaves in the socket what has arrived, so that the connection can be resumed. Where
    /// the kernel decrypts, half a record is refused then, as is what else nobody can look at. Only the first guard that looks at it
    /// finds out, so save once.
    pub fn with_tls_in_place(self) -> Self {
        self.arrived.replace(Arrived::in_place());
        self.with_tls()
    }

    /// Reads the whole connection. Nothing is consumed: [`resume`](Self::resume) goes on with the same connection.
    ///
    /// # Errors
    /// - Refused: a socket that was never connected; one with a pending error that has not closed it; one with unread
    ///   notices in its error queue (`SO_ZEROCOPY`, `SO_TIMESTAMPING`), at which nobody can look without taking them; one
    ///   with a kTLS layer without [`with_tls`](Self::with_tls); a connection in CLOSE without [`with_peer`](Self::with_peer).
    /// - The queues kept changing while they were read: the traffic was not locked.
    /// - System: the option that failed.
    pub fn save(&self) -> Result<Connection> {
        let mut connection = Connection::empty();
        self.save_into(&mut connection)?;
        Ok(connection)
    }

    /// Where the connection stood when this guard saved it; nothing before that.
    pub fn position(&self) -> Option<Position> {
        self.saved.get()
    }

    /// Like [`save`](Self::save), into the memory of a connection saved before.
    ///
    /// # Errors
    /// The errors of [`save`](Self::save); the contents of `connection` are unspecified then.
    pub fn save_into(&self, connection: &mut Connection) -> Result<()> {
        self.save_with(&mut Injectors::default(), connection)
    }

    /// The same with a netlink socket that may serve other connections too.
    pub(crate) fn save_with(&self, injectors: &mut Injectors, connection: &mut Connection) -> Result<()> {
        let mut arrived = self.arrived.borrow_mut();
        let arrived = self.carries_tls.then_some(&mut *arrived);
        let position = save::save(injectors, self.fd, self.peer, arrived, connection)
            .map_err(|error| error.at("save"))?;
        save::reuse_address(connection, self.reuse_address);
        self.saved.set(Some(position));
        Ok(())
    }

    /// Reads what the kernel knows of the connection, without addresses and socket options, for callers who keep the
    /// queues in memory of their own: `memory` gives that many bytes, which nobody has written to.
    ///
    /// # Errors
    /// The errors of [`save`](Self::save), and `ENOMEM` where there is no memory.
    pub fn save_bare<M: AsMut<[MaybeUninit<u8>]>>(
        &self,
        memory: impl FnMut(usize) -> Option<M>,
    ) -> Result<Bare<M>> {
        let (position, bare) = save::bare(self.fd, memory).map_err(|error| error.at("save"))?;
        self.saved.set(Some(position));
        Ok(bare)
    }

    /// The sizes of the socket buffers.
    ///
    /// # Errors
    /// System: the option.
    pub fn buffers(&self) -> Result<Buffers> {
        buffers::read(self.fd).map(|memory| memory.buffers).map_err(|error| error.at("save"))
    }

    /// The limit of the receive window, `TCP_WINDOW_CLAMP`.
    ///
    /// # Errors
    /// System: the option.
    pub fn window_clamp(&self) -> Result<u32> {
        tcp::get_int(self.fd, tcp::SOL_TCP, libc::TCP_WINDOW_CLAMP, "TCP_WINDOW_CLAMP")
            .map(|bytes| bytes as u32)
            .map_err(|error| error.at("save"))
    }

    /// The address of our end.
    ///
    /// # Errors
    /// System: `getsockname`.
    pub fn local_address(&self) -> Result<SocketAddr> {
        save::local_address(self.fd).map_err(|error| error.at("save"))
    }

    /// The address of the peer.
    ///
    /// # Errors
    /// Refused: a socket whose peer the kernel has forgotten, without [`with_peer`](Self::with_peer).
    pub fn peer_address(&self) -> Result<SocketAddr> {
        save::remote_address(self.fd, self.peer).map_err(|error| error.at("save"))
    }

    /// Begins to restore a connection onto this socket, if it is fresh: step 1 of [`Restore`], with `SO_REUSEADDR` as
    /// it was before the pause. The guard is given up: whatever happens, the socket stays in repair mode.
    ///
    /// # Errors
    /// The errors of [`Restore::unbound`].
    pub fn restore(self, control: &ControlBlock, buffers: Option<Buffers>) -> Result<Restore<'fd>> {
        let (fd, reuse_address) = (self.fd, self.reuse_address);
        self.leave_paused();
        Restore::onto(fd, control, buffers, reuse_address, true).map_err(|error| error.at("restore"))
    }

    /// Restores a connection in SYN_SENT onto this socket, if it is fresh: it leaves repair mode and starts the
    /// handshake anew, without waiting for it. `buffers` is `None` where they are not known, or as they shall be.
    ///
    /// # Errors
    /// Invalid: see [`Flow::validate`]. System: `bind` or `connect`, or the option.
    pub fn connect_anew(self, flow: Flow, write_seq: u32, buffers: Option<Buffers>) -> Result<()> {
        let (fd, reuse_address) = (self.fd, self.reuse_address);
        self.leave_paused();
        flow.validate()
            .and_then(|()| restore::connect_anew(fd, flow, write_seq, buffers))
            .and_then(|()| tcp::set_reuse_address(fd, reuse_address))
            .map_err(|error| error.at("restore"))
    }

    /// Ends repair mode: the connection goes on here. An ESTABLISHED one sends a window probe, which tells it what it
    /// may have missed.
    ///
    /// # Errors
    /// The option that failed; the guard is gone nevertheless.
    pub fn resume(self) -> Result<()> {
        self.end(Repair::Off)
    }

    /// Like [`resume`](Self::resume), without the window probe: for a connection that a lock keeps silent, of which nothing would
    /// come through.
    ///
    /// # Errors
    /// The option that failed; the guard is gone nevertheless.
    pub fn resume_silently(self) -> Result<()> {
        self.end(Repair::OffNoProbe)
    }

    fn end(self, how: Repair) -> Result<()> {
        let left = self.leave_repair(how).map_err(|error| error.at("resume"));
        self.leave_paused();
        left
    }

    /// Leaves the socket in repair mode, and gives up the guard. Closing the socket is silent then.
    pub fn leave_paused(mut self) {
        self.on_guard = false;
    }

    /// Makes the socket forget its connection without a packet: neither FIN nor RST. The connection lives on in what
    /// was saved; its addresses are free for a [`restore`](Connection::restore) at once, in this process or another.
    ///
    /// Whoever still uses the socket sees an ordinary error (`ECONNABORTED`, then `ENOTCONN`).
    ///
    /// # Errors
    /// - Refused where the connection has changed since it was last saved: its traffic was not locked.
    /// - System: `connect` to `AF_UNSPEC`.
    ///
    /// The connection is resumed then. There is no error once it has been forgotten: nobody may believe that it is
    /// still here.
    pub fn detach(self) -> Result<()> {
        if self.forget_connection().map_err(|error| error.at("detach"))? {
            // Repair mode would turn the owner's later calls into EPERM, which says less. It is all that can still go wrong.
            let _ = tcp::set_repair(self.fd, Repair::OffNoProbe);
        }
        self.leave_paused();
        Ok(())
    }

    /// The same for a connection that an earlier guard has saved, when it stood there: a sixth of the system calls of saving it once more.
    /// In between it may have been [resumed](Self::resume_silently).
    ///
    /// # Errors
    /// Those of [`detach`](Self::detach), also where the application has read something since. Refused: a socket with kernel TLS.
    pub fn detach_at(self, position: Position) -> Result<()> {
        let check = || {
            save::refuse_layer(self.fd)?;
            if position.is_kept(self.fd)? { Ok(()) } else { Err(queue::changed()) }
        };
        check().and_then(|()| self.disconnect()).map_err(|error| error.at("detach"))?;
        let _ = tcp::set_repair(self.fd, Repair::OffNoProbe);
        self.leave_paused();
        Ok(())
    }

    /// False where it can only be closed.
    fn forget_connection(&self) -> Result<bool> {
        // What has been acknowledged since would be in no image, and the peer would never send it again.
        if let Some(saved) = self.saved.get()
            && !saved.has_kept_traffic(self.fd)?
        {
            return Err(queue::changed());
        }
        if tls::has_layer(self.fd)? {
            return Ok(false);
        }
        self.disconnect().map(|()| true)
    }

    fn disconnect(&self) -> Result<()> {
        rustix::net::connect_unspec(self.fd).map_err(|error| Error::system("connect(AF_UNSPEC)", error))
    }

    fn leave_repair(&self, how: Repair) -> Result<()> {
        if self.arrived.borrow().is_taken() {
            let remedy = "close the socket, and restore the connection that was saved: it has them";
            return Err(Error::refused("a connection whose TLS records have been read", remedy));
        }
        tcp::set_repair(self.fd, how)?;
        // It is off then.
        if self.reuse_address { tcp::set_reuse_address(self.fd, true) } else { Ok(()) }
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        if self.on_guard {
            // There is nobody left to tell.
            let _ = self.leave_repair(Repair::Off);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketType, socket};

    use super::*;

    /// A program that hands on thousands of connections lives on.
    #[test]
    fn every_end_gives_back_what_was_read() {
        /// More than the allocator keeps for itself.
        const MUCH: usize = 64 << 20;
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
            pages * rustix::param::page_size()
        };
        let before = resident();
        let ends: [fn(Paused<'_>); 5] = [
            |paused| drop(paused),
            |paused| paused.leave_paused(),
            |paused| paused.detach().unwrap(),
            |paused| drop(paused.resume().unwrap_err()),
            |paused| drop(paused.resume_silently().unwrap_err()),
        ];
        for (number, end) in ends.into_iter().enumerate() {
            let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            let paused = Paused::of(socket.as_fd(), false);
            paused.arrived.borrow_mut().rest = vec![1; MUCH];
            end(paused);
            assert!(resident() < before + MUCH / 2, "end {number}");
        }
    }
}

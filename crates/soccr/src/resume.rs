//! The last step: a restored socket leaves repair mode.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::connection::{ControlBlock, Flow, State};
use crate::error::{Error, Result};
use crate::fin;
use crate::report::Report;
use crate::sys::raw::{Injectors, Via};
use crate::sys::tcp::{self, Repair};

/// A socket in repair mode that holds a restored connection. Dropping it closes it silently, where the socket is its
/// own; one that was borrowed stays in repair mode.
///
/// The kernel's timers run: bytes that were sent and not acknowledged are sent again when their time has come. Who
/// restores long before he resumes keeps the connection [locked](crate::Lock).
#[derive(Debug)]
#[must_use = "dropping it closes the connection, silently: the peer would wait for ever"]
pub struct Restored<Fd = OwnedFd> {
    pub(crate) control: ControlBlock,
    pub(crate) flow: Flow,
    pub(crate) reuse_address: bool,
    pub(crate) report: Report,
    pub(crate) socket: Fd,
}

impl Restored {
    /// Ends repair mode: the connection lives. The peer hears of it, so that both ends learn what they may have
    /// missed: a window probe of the kernel in ESTABLISHED, and an ACK with our window in every state. A connection
    /// in SYN_SENT starts its handshake anew here.
    ///
    /// Packets must be able to flow: release the lock before, or right after.
    ///
    /// # Errors
    /// System: the option that failed. The socket is closed silently.
    pub fn resume(self) -> Result<TcpStream> {
        self.resume_with(&mut Injectors::default())
    }

    /// The same with raw sockets that may serve other connections too.
    pub(crate) fn resume_with(self, injectors: &mut Injectors) -> Result<TcpStream> {
        self.turn_on(injectors).map_err(|error| error.at("resume"))?;
        Ok(TcpStream::from(self.socket))
    }

    /// Gives the socket away in repair mode: silent when closed, and its new owner turns the mode off.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }
}

impl<Fd> Restored<Fd> {
    /// Gives the socket to somebody else, who keeps it open as long as this lives.
    pub fn with_socket<New>(self, change: impl FnOnce(Fd) -> New) -> Restored<New> {
        let Self { control, flow, reuse_address, report, socket } = self;
        Restored { control, flow, reuse_address, report, socket: change(socket) }
    }
}

impl Restored<BorrowedFd<'_>> {
    /// Like [`resume`](Restored::resume) of a socket of its own.
    ///
    /// # Errors
    /// System: the option that failed.
    pub fn resume(self) -> Result<()> {
        self.turn_on(&mut Injectors::default()).map_err(|error| error.at("resume"))
    }
}

impl<Fd: AsFd> Restored<Fd> {
    /// What came back exactly, what approximately, what not and why.
    pub fn report(&self) -> &Report {
        &self.report
    }

    fn turn_on(&self, injectors: &mut Injectors) -> Result<()> {
        let is_resumed = tcp::in_repair(self.socket.as_fd()).is_ok_and(|in_repair| !in_repair);
        if is_resumed && self.control.state != State::SynSent {
            // By somebody else: the connection lives, and is not to be stopped once more.
            return Ok(());
        }
        let mut attempt = || {
            let turned_on = self.turn_repair_off(injectors);
            // In SYN_SENT it is out of that mode already, in which connect(2) sends nothing, and passes for ESTABLISHED.
            if turned_on.is_err() && self.control.state != State::SynSent {
                // Out of repair mode the socket would reset the peer when it is closed.
                let _ = tcp::set_repair(self.socket.as_fd(), Repair::On);
            }
            turned_on
        };
        // This may be all that is left of the connection. A kernel that had no memory has some a moment later.
        attempt().or_else(|_| attempt())
    }

    fn turn_repair_off(&self, injectors: &mut Injectors) -> Result<()> {
        let fd = self.socket.as_fd();
        if self.control.state == State::SynSent {
            return start_handshake(fd, self.flow.remote);
        }
        if self.control.reset {
            // There is nobody to tell.
            return tcp::set_repair(fd, Repair::Off);
        }
        let mut acknowledgement = fin::acknowledgement(fd, self.flow, &self.control)?;
        // Opened now, so that the ACK follows the probe at once. Without CAP_NET_RAW there is none.
        let injector = injectors.outward(fd, Via::routed(self.flow.remote.ip()));
        tcp::set_repair(fd, Repair::Off)?;
        if self.control.state == State::Established {
            // The kernel's probe has opened the window as far as there is room, and believes that the peer knows.
            if let Some(window) = tcp::rcv_wnd(fd)? {
                acknowledgement.window = fin::window_field(&self.control, window);
            }
        }
        if self.reuse_address {
            tcp::set_reuse_address(fd, true)?;
        }
        // Without it the peer would have to wait for its own timer; with a firewall in the way it still does.
        let _ = injector.and_then(|injector| fin::send_to_peer(injector, fd, &acknowledgement));
        if self.control.unsq_len > 0 || self.control.fin_unsent {
            push(fd)?;
        }
        Ok(())
    }
}

impl<Fd: AsFd> AsFd for Restored<Fd> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends what is queued and may be sent, at once: switching Nagle's algorithm off does that.
fn push(fd: BorrowedFd<'_>) -> Result<()> {
    let no_delay = |value| tcp::set_int(fd, tcp::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY", value);
    let before = tcp::get_int(fd, tcp::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY")?;
    no_delay(1)?;
    no_delay(before)
}

/// Begins to connect without waiting for it, whatever the descriptor does otherwise.
pub(crate) fn start_handshake(fd: BorrowedFd<'_>, remote: SocketAddr) -> Result<()> {
    let blocking = set_nonblocking(fd, true)?;
    let started = match rustix::net::connect(fd, &remote) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(Error::system("connect", error)),
    };
    if blocking {
        set_nonblocking(fd, false)?;
    }
    started
}

/// Sets or clears `O_NONBLOCK` alone; true where that changed it.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>, on: bool) -> Result<bool> {
    let before = rustix::fs::fcntl_getfl(fd).map_err(|error| Error::system("fcntl(F_GETFL)", error))?;
    let mut flags = before;
    flags.set(rustix::fs::OFlags::NONBLOCK, on);
    if flags != before {
        rustix::fs::fcntl_setfl(fd, flags).map_err(|error| Error::system("fcntl(F_SETFL)", error))?;
    }
    Ok(flags != before)
}

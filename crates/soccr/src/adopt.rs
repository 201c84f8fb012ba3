//! [`Adopter`]: a live connection enters the accept queue of an unmodified server.
//!
//! The server listens as ever; its next `accept(2)` returns the connection, with bytes to read, as if the client had just
//! connected. Nothing in the server knows of this crate.
//!
//! ```no_run
//! # fn main() -> soccr::Result<()> {
//! # let stream = std::net::TcpStream::connect("192.0.2.1:80").unwrap();
//! let locker = soccr::lock::Locker::new(soccr::lock::Mode::HOLD)?;
//! let mut adopter = soccr::adopt::Adopter::new()?; // in the network namespace of the listener
//!
//! // A socket of ours. It waits until the client has acknowledged everything, and leaves.
//! for outcome in adopter.give(&locker, vec![stream.into()], soccr::adopt::DRAIN) {
//!     match outcome {
//!         Ok(adopted) => print!("{}", adopted.report()),
//!         Err(kept) => eprintln!("{}", kept.error()), // and the connection is in it
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! # How
//! A listener that answers with SYN cookies makes a connection of one ACK. A program on `lo` tells the kernel what the cookie
//! would have told, by `bpf_sk_assign_tcp_reqsk`; the ACK is ours, and says that the peer sent it:
//!
//! ```text
//!  Lock                                       the peer's packets wait, ours are dropped
//!  ACK, seq = copied_seq, ack = write_seq  ─► lo ─► program ─► listener: a connection in its accept queue
//!  unread bytes, FIN                       ─► lo ─► that connection
//!  read back                                  state and sequence numbers, by a second program; options by sock_diag
//!  unlock, announce                           what was held arrives; the peer hears of the new window
//! ```
//!
//! # What comes back
//! Sequence numbers, every unread byte, MSS, window scale, SACK, timestamps and ECN: exactly. The congestion window, the
//! round-trip time and the receive window begin anew. Socket options are those of the listener, as for every
//! connection that it accepts: the [report](Adopted::report) lists what the old socket had.
//!
//! # Needs
//! Linux 6.9; `CAP_BPF`, `CAP_NET_ADMIN` and `CAP_NET_RAW` in the initial user namespace; `net.ipv4.tcp_syncookies` 1 or 2; `lo` up.
//!
//! # Several listeners
//! Where servers share a port (`SO_REUSEPORT`; [`Adopter::listeners`] tells which they are), only the kernel chooses one, by the
//! addresses of the connection: the old server closes its listener before its connections move.
//!
//! # When to use it
//! At boundaries of the application's protocol: a server that knows nothing of the connection's past gets it. Idle HTTP/1.1
//! connections suit; TLS sessions, HTTP/2, logins and selected databases live in the old server and do not come along.

mod attributes;
mod enter;
mod give;
mod obstacle;
mod program;
mod wide;

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::{fmt, iter};

use crate::connection::{Connection, Flow};
use crate::diag::Diag;
use crate::error::{Error, Result};
use crate::fin;
use crate::lock::Lock;
use crate::report::Report;
use crate::segment::flags;
use crate::sys::namespace;
use crate::sys::raw::Ways;
use obstacle::Sysctls;
use program::Programs;

pub use give::{DRAIN, Kept};

/// Gives connections to the listeners of one network namespace. Making one takes some 10 ms: keep it for many.
///
/// Its program is attached to `lo` and touches packets with this library's mark only; the kernel detaches it when the
/// process ends.
#[derive(Debug)]
pub struct Adopter {
    programs: Programs,
    ways: Ways,
    diag: Diag,
    sysctls: Sysctls,
    namespace: u64,
    packet: Vec<u8>,
}

/// A connection that is in a server's accept queue, or was accepted already.
#[derive(Debug)]
pub struct Adopted {
    flow: Flow,
    accepted: bool,
    report: Report,
}

impl Adopted {
    /// Its addresses.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// The server had accepted it by the time it was looked at. Until then the kernel owns it: it stays alive in the
    /// queue, and is closed with the listener. See [`Adopter::is_accepted`].
    pub fn accepted(&self) -> bool {
        self.accepted
    }

    /// What came back exactly, approximately, not at all.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

impl Adopter {
    /// For the listeners in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `EPERM` without the capabilities; refused where the kernel lacks `bpf_sk_assign_tcp_reqsk` (Linux 6.9) or type
    /// information (`CONFIG_DEBUG_INFO_BTF`), or where `net.ipv4.tcp_syncookies` is 0.
    pub fn new() -> Result<Self> {
        Self::start().map_err(|error| error.at("adopt"))
    }

    fn start() -> Result<Self> {
        let raw = |error| Error::system("raw socket", error);
        let programs = Programs::load().map_err(obstacle::explain)?;
        let ways = Ways::open().map_err(raw)?;
        let namespace = namespace::cookie(ways.as_fd()).map_err(raw)?;
        let sysctls = Sysctls::open()?;
        sysctls.check_cookies()?;
        Ok(Self { programs, ways, diag: Diag::open()?, sysctls, namespace, packet: Vec::new() })
    }

    /// Checks, without touching anything, that a connection can be adopted here: its state, and the listener for it.
    ///
    /// # Errors
    /// Refused, with the reason and the remedy: a state other than ESTABLISHED and CLOSE_WAIT, urgent data, TCP MD5, kernel TLS; no
    /// listener, one that speaks MPTCP, one whose queue is full, one that is bound to a device by which the peer does not come;
    /// a sysctl without which an option would be lost. A send queue is no obstacle here, since [`give`](Self::give) drains it.
    pub fn check(&mut self, connection: &Connection) -> Result<()> {
        self.in_namespace()
            .and_then(|()| obstacle::in_connection(connection))
            .and_then(|()| self.sysctls.check(connection))
            .and_then(|()| obstacle::in_listener(&mut self.diag, &mut self.ways, connection.flow()))
            .map(drop)
            .map_err(|error| error.at("adopt"))
    }

    /// Puts connections into the accept queues of their listeners: those of `lock`, in the order of its
    /// [flows](Lock::flows). They have no socket any more ([`Paused::detach`](crate::Paused::detach)) and an empty send queue;
    /// see [`give`](Self::give) for sockets.
    ///
    /// Afterwards, and before [`announce`](Self::announce), release the lock.
    ///
    /// # Errors
    /// One for each connection that was not adopted. Nothing is left of it here: the value is the connection still, and the
    /// lock keeps its peer waiting.
    pub fn adopt(&mut self, lock: &Lock, connections: &[Connection]) -> Vec<Result<Adopted>> {
        let flows = lock.flows().iter().map(Flow::on_the_wire).map(Some).chain(iter::repeat(None));
        let on_the_wire = connections.iter().map(|connection| Some(connection.flow().on_the_wire()));
        let is_locked: Vec<bool> = on_the_wire.zip(flows).map(|(wire, flow)| wire == flow).collect();
        let locked = connections.iter().zip(&is_locked).filter(|(_, is_locked)| **is_locked);
        let locked: Vec<&Connection> = locked.map(|(connection, _)| connection).collect();
        let mut outcomes = match self.in_namespace() {
            Ok(()) => self.adopt_locked(&locked),
            Err(error) => locked.iter().map(|_| Err(again(&error))).collect(),
        }
        .into_iter();
        let each = is_locked.into_iter().map(|is_locked| {
            let outcome = match is_locked {
                true => outcomes.next().expect("there is one for each"),
                false => Err(Error::invalid("the connection is not the one that is locked")),
            };
            outcome.map_err(|error| error.at("adopt"))
        });
        each.collect()
    }

    /// Lets the new socket tell the peer its window, and push what the server has written under the lock. To be called when
    /// the lock is released.
    ///
    /// # Errors
    /// System: the raw socket.
    pub fn announce(&mut self, connection: &Connection) -> Result<()> {
        // Like a keepalive probe: it lies before what is expected, so the answer is one ACK.
        let control = &connection.control;
        let seq = control.rcv_nxt.wrapping_sub(1);
        let segment = fin::from_peer(connection.flow(), control, seq, control.write_seq, flags::ACK, &[]);
        let interface = self.interface_of(connection.flow()).map_err(|error| error.at("adopt"))?;
        self.send(&segment, &[], interface).map_err(|error| error.at("adopt"))
    }

    /// The interface to which an adopted connection is bound, or 0.
    fn interface_of(&mut self, flow: Flow) -> Result<u32> {
        match obstacle::scope(flow) {
            0 if self.programs.is_plain() => Ok(0),
            0 => Ok(self.diag.find(flow.local, flow.remote, |socket| socket.interface)?.unwrap_or(0)),
            scope => Ok(scope),
        }
    }

    /// Whether a server has accepted the connection by now; `None` where it has ended.
    ///
    /// # Errors
    /// The errors of `sock_diag(7)`.
    pub fn is_accepted(&mut self, flow: Flow) -> Result<Option<bool>> {
        let inode = self.diag.find(flow.local, flow.remote, |socket| socket.inode);
        inode.map(|inode| inode.map(|inode| inode != 0)).map_err(|error| error.at("adopt"))
    }

    /// The inode numbers of the listeners for a connection: several, where they share the port (`SO_REUSEPORT`). The kernel
    /// chooses one of them by the addresses of the connection.
    ///
    /// # Errors
    /// The errors of `sock_diag(7)`.
    pub fn listeners(&mut self, flow: Flow) -> Result<Vec<u32>> {
        obstacle::listeners(&mut self.diag, flow).map_err(|error| error.at("adopt"))
    }

    /// Programs that are run by hand see the namespace of the thread.
    fn in_namespace(&self) -> Result<()> {
        let failed = |error| Error::system("SO_NETNS_COOKIE", error);
        let here = UnixDatagram::unbound().map_err(failed)?;
        if namespace::cookie(here.as_fd()).map_err(failed)? == self.namespace {
            return Ok(());
        }
        Err(Error::refused(
            "an adopter of another network namespace",
            "call it on a thread in the namespace where it was made",
        ))
    }
}

/// The same error for another connection.
fn again(error: &Error) -> Error {
    match error.errno() {
        Some(errno) => Error::system(error.what().to_owned(), std::io::Error::from_raw_os_error(errno)),
        None => Error::refused(error.what().to_owned(), ""),
    }
    .advise(error.remedy().to_owned())
}

impl fmt::Display for Adopted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Flow { local, remote } = self.flow;
        let state = if self.accepted { "accepted" } else { "in the accept queue" };
        write!(f, "{local} ← {remote}: {state}")
    }
}

//! Connections in every state, with chosen bytes in their queues.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::sockopt;

use crate::making::{Making, Outcome, deafen, failed, syn_sent};
use crate::sys::detach_filter;
use crate::{Family, Host, State, sysctl};

/// A connection that is wanted.
///
/// ```no_run
/// use soccr_lab::{Case, Family, Pair, State};
///
/// let pair = Pair::new()?;
/// let case = Case { family: Family::V6, state: State::CloseWait, received: 5000, sent: 3000, unsent: 2000 };
/// let made = case.make(&pair.a, &pair.b);
/// // Save and restore made.socket here; then the peer shall hear from it again.
/// made.peer.unblock()?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// The kind of addresses.
    pub family: Family,
    /// The state of our end.
    pub state: State,
    /// Bytes received, acknowledged and not read.
    pub received: usize,
    /// Bytes sent and not acknowledged: up to ten segments, which is the first congestion window (RFC 6928).
    pub sent: usize,
    /// Bytes written and never sent. A FIN behind them is not sent either.
    pub unsent: usize,
}

/// A connection as it was wanted.
///
/// Where something is sent and not acknowledged, the peer is deaf: a filter drops what arrives at its socket, and goes
/// with [`Peer::unblock`]. Where something is unsent and nothing sent, the peer's window is closed instead,
/// and opens as the peer reads.
#[derive(Debug)]
pub struct Made {
    /// Our end, blocking.
    pub socket: TcpStream,
    /// Its address.
    pub local: SocketAddr,
    /// The address of the peer, which a socket in CLOSE does not tell any more.
    pub remote: SocketAddr,
    /// The peer's end.
    pub peer: Peer,
    /// What can be read from our end.
    pub incoming: Vec<u8>,
    /// What can be read from the peer's end, now or once everything has arrived.
    pub outgoing: Vec<u8>,
}

/// The other end of a [`Made`] connection.
#[derive(Debug)]
pub enum Peer {
    /// A connected socket.
    Connected(TcpStream),
    /// A listener that has not heard our SYN.
    Listening(TcpListener),
}

impl Peer {
    /// Lets the peer hear again.
    ///
    /// # Errors
    /// The errors of `setsockopt(2)`.
    pub fn unblock(&self) -> io::Result<()> {
        match detach_filter(self) {
            // There was none.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// The peer's end as a stream. A listener waits for the SYN.
    ///
    /// # Errors
    /// The errors of `accept(2)`.
    pub fn into_stream(self) -> io::Result<TcpStream> {
        match self {
            Self::Connected(stream) => Ok(stream),
            Self::Listening(listener) => Ok(listener.accept()?.0),
        }
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Connected(stream) => stream.as_fd(),
            Self::Listening(listener) => listener.as_fd(),
        }
    }
}

/// What a queue may hold before the buffers need to be larger than the kernel makes them at first.
const SMALL: usize = 16 << 10;
/// The payload of the longest segment.
const SEGMENT: usize = 1460;
/// The receive buffer of a peer that shall close its window soon.
const SMALL_WINDOW: usize = 16 << 10;
/// On a busy machine the retransmission timer may expire meanwhile, and the connection is not as wanted: it is made anew.
const ATTEMPTS: usize = 50;

impl Case {
    /// Whether such a connection can exist: nothing is queued before the handshake, nor behind an acknowledged FIN.
    pub fn is_possible(&self) -> bool {
        match self.state {
            State::SynSent => self.received + self.sent + self.unsent == 0,
            State::FinWait2 | State::Close => self.sent + self.unsent == 0,
            // Older kernels send a last segment with its FIN beyond the congestion window.
            State::FinWait1 | State::Closing | State::LastAck if self.sent > 0 => {
                self.unsent == 0 || self.unsent > SEGMENT
            }
            state => State::MAKEABLE.contains(&state),
        }
    }

    /// Connects `ours` to `peer`, brings our end into the state and fills its queues, as `TCP_INFO` and the lengths
    /// of the queues confirm.
    ///
    /// For more than 16 KiB in a queue, `net.ipv4.tcp_rmem` and `tcp_wmem` of both hosts are raised; for bytes sent and
    /// bytes unsent at once, `tcp_early_retrans` of `ours` is set to zero, because a tail loss probe would send of the
    /// latter.
    ///
    /// # Panics
    /// Where the connection does not come about as wanted.
    pub fn make(&self, ours: &Host, peer: &Host) -> Made {
        assert!(self.is_possible(), "no such connection: {self:?}");
        self.prepare(ours, peer).expect("the sysctls are set");
        let mut outcomes = (0..ATTEMPTS).map(|_| self.attempt(ours, peer));
        let made =
            outcomes.find_map(|outcome| outcome.map_err(|why| eprintln!("{self:?}: {why}; once more")).ok());
        made.unwrap_or_else(|| panic!("{ATTEMPTS} attempts have failed: {self:?}"))
    }

    fn prepare(&self, ours: &Host, peer: &Host) -> io::Result<()> {
        let longest = self.received.max(self.sent + self.unsent);
        if longest > SMALL {
            // The kernel counts its own structures too, and announces half of a receive buffer as window.
            let sizes = format!("4096 {0} {0}", longest * 4);
            for host in [ours, peer] {
                host.run(|| sysctl("net/ipv4/tcp_rmem", &sizes).and(sysctl("net/ipv4/tcp_wmem", &sizes)))?;
            }
        }
        if self.sent > 0 && self.unsent > 0 {
            // On a busy machine the kernel would join several writes into one segment.
            ours.run(|| {
                sysctl("net/ipv4/tcp_early_retrans", "0").and(sysctl("net/ipv4/tcp_autocorking", "0"))
            })?;
        }
        Ok(())
    }

    fn attempt(&self, ours: &Host, peer: &Host) -> Outcome<Made> {
        let heard_as = if self.family == Family::Mapped { Family::V4 } else { self.family };
        let listener = peer.run(|| TcpListener::bind(peer.address(heard_as, 0))).map_err(failed("listen"))?;
        let port = listener.local_addr().map_err(failed("getsockname"))?.port();
        let remote = ours.address_of(peer, self.family, port);
        if self.state == State::SynSent {
            return syn_sent(ours, listener, remote);
        }
        let closed_window = self.unsent > 0 && self.sent == 0;
        if closed_window {
            sockopt::set_socket_recv_buffer_size(&listener, SMALL_WINDOW).map_err(failed("SO_RCVBUF"))?;
        }
        let socket = ours.run(|| TcpStream::connect(remote)).map_err(failed("connect"))?;
        let local = socket.local_addr().map_err(failed("getsockname"))?;
        let (peer, _) = listener.accept().map_err(failed("accept"))?;
        let mut making = Making { socket, peer, incoming: Vec::new(), outgoing: Vec::new() };
        if let Err(why) = self.shape(&mut making, closed_window) {
            // The next attempt is watched for resets.
            making.forget();
            return Err(why);
        }
        let Making { socket, peer, incoming, outgoing } = making;
        Ok(Made { socket, local, remote, peer: Peer::Connected(peer), incoming, outgoing })
    }

    /// Brings a connection into the state and fills its queues.
    fn shape(&self, making: &mut Making, closed_window: bool) -> Outcome<()> {
        making.receive(self.received)?;
        if matches!(self.state, State::CloseWait | State::LastAck | State::Close) {
            making.shutdown_peer()?;
            making.reach("our CLOSE_WAIT", |ours, peer| {
                ours.state == State::CloseWait && peer.state == State::FinWait2
            })?;
        }
        if closed_window {
            making.close_window()?;
        }
        let fin_unacknowledged = matches!(self.state, State::FinWait1 | State::Closing | State::LastAck);
        if self.sent > 0 || (fin_unacknowledged && !closed_window) {
            deafen(&making.peer)?;
        }
        making.send(self.sent, self.unsent > 0)?;
        making.write(self.unsent)?;
        if fin_unacknowledged || matches!(self.state, State::FinWait2 | State::Close) {
            making.socket.shutdown(Shutdown::Write).map_err(failed("shutdown"))?;
        }
        if self.state == State::Closing {
            making.shutdown_peer()?;
        }
        let fin = usize::from(fin_unacknowledged);
        let unsent_fin = if self.unsent > 0 { fin } else { 0 };
        making.reach("the wanted state", |ours, _| {
            (ours.state, ours.unread, ours.unacknowledged, ours.unsent)
                == (self.state, self.received, self.sent + self.unsent + fin, self.unsent + unsent_fin)
        })
    }
}

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
//! Where servers share a port (`SO_REUSEPORT`) the kernel chooses one by the addresses of the connection, and nobody else can
//! ([`Adopter::listeners`] tells which they are): the old server closes its listener before its connections move.
//!
//! # When to use it
//! At boundaries of the application's protocol: a server that knows nothing of the connection's past gets it. Idle HTTP/1.1
//! connections suit; TLS sessions, HTTP/2, logins and selected databases live in the old server and do not come along.

mod attributes;
mod give;
mod obstacle;
mod program;
mod wide;

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};
use std::{fmt, iter};

use crate::connection::{Connection, ControlBlock, Flow, State};
use crate::diag::{self, Diag};
use crate::error::{Error, Result};
use crate::fin::{self, FIRST_ARRIVAL};
use crate::lock::Lock;
use crate::report::Report;
use crate::segment::{Segment, flags};
use crate::sys::LOOPBACK;
use crate::sys::namespace;
use crate::sys::raw::Ways;
use crate::sys::sockopt;
use crate::sys::tcp::{TcpInfo, info_option};
use obstacle::Sysctls;
use program::{Position, Programs};
use wide::Wide;

pub use give::{DRAIN, Kept};

/// How many unread bytes arrive at a time, at most.
const CHUNK: usize = 32_000;
/// And at least, where the server's buffer is nearly full.
const SMALLEST_CHUNK: usize = 1000;

/// A queue for which every listener's buffer has room.
const ALWAYS_FITS: u32 = 16 << 10;

/// How long a server may take to read what does not fit into its buffer.
const READ: Duration = Duration::from_secs(5);

/// How often the first segment is sent.
const ATTEMPTS: usize = 3;

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

/// A first segment is under way.
struct Begun {
    /// From where it comes to the listener, or 0.
    interface: u32,
    /// Until the server has it, whatever the server is doing.
    _wide: Option<Wide>,
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
        let is_locked = |(connection, flow): (&Connection, Option<&Flow>)| {
            flow.map(Flow::on_the_wire) == Some(connection.flow().on_the_wire())
        };
        let flows = lock.flows().iter().map(Some).chain(iter::repeat(None));
        let is_locked: Vec<bool> = connections.iter().zip(flows).map(is_locked).collect();
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

    fn adopt_locked(&mut self, connections: &[&Connection]) -> Vec<Result<Adopted>> {
        // A listener gets a larger buffer for one connection at a time.
        let is_short = |connection: &Connection| connection.control.inq_len <= ALWAYS_FITS;
        let family =
            |connection: &Connection| (connection.flow().is_ipv4(), obstacle::scope(connection.flow()));
        let alike = connections.chunk_by(|a, b| is_short(a) && is_short(b) && family(a) == family(b));
        let batches = alike.flat_map(|alike| alike.chunks(program::MOST));
        batches.flat_map(|batch| self.adopt_batch(batch)).collect()
    }

    /// Several of one address family and scope, for which one look suffices.
    fn adopt_batch(&mut self, batch: &[&Connection]) -> Vec<Result<Adopted>> {
        let flows: Vec<Flow> = batch.iter().map(|connection| connection.flow()).collect();
        let scope = flows.first().map_or(0, |flow| obstacle::scope(*flow));
        let there = match self.sysctls.check_cookies().and_then(|()| self.look(&flows, scope)) {
            Ok(there) => there,
            Err(error) => return batch.iter().map(|_| Err(again(&error))).collect(),
        };
        let begun = batch.iter().zip(there).map(|(connection, there)| self.begin(connection, there));
        let begun: Vec<Result<Begun>> = begun.collect();
        // What cannot be seen here is looked for one by one.
        let there = self.look(&flows, scope).unwrap_or_else(|_| vec![None; batch.len()]);
        let outcomes = batch.iter().zip(begun).zip(there).map(|((connection, begun), there)| {
            let begun = begun?;
            let interface = begun.interface;
            let made = there.filter(|there| interface == scope && there.state != State::Listen);
            let filled = made
                .map_or_else(|| self.make(connection, interface), Ok)
                .and_then(|made| self.feed(connection, interface, made))
                .and_then(|position| self.verify(connection, position));
            filled.map_err(|error| self.undo(connection.flow(), error))
        });
        outcomes.collect()
    }

    /// Checks, and sends the first segment, if it is a listener that is there for it.
    fn begin(&mut self, connection: &Connection, mut there: Option<Position>) -> Result<Begun> {
        let control = &connection.control;
        obstacle::in_connection(connection)?;
        if control.outq_len > 0 {
            return Err(Error::refused(
                "bytes that the peer has not acknowledged",
                "restore the connection and give its socket away: that waits until they are",
            ));
        }
        self.sysctls.check_ecn(connection)?;
        let flow = connection.flow();
        let mut interface = obstacle::scope(flow);
        if there.is_none_or(|there| ![0, interface].contains(&there.interface)) {
            // What is bound to a device takes only what comes from there.
            interface = obstacle::in_listener(&mut self.diag, &mut self.ways, flow)?;
            there = self.look_at(flow, interface)?;
        }
        match there {
            Some(position) if position.state == State::Listen => {}
            Some(_) => {
                return Err(Error::refused(
                    "a connection with these addresses",
                    "close or detach the old socket first",
                ));
            }
            None => return Err(obstacle::no_listener(flow)),
        }
        if interface != 0 {
            self.programs
                .attach(interface)
                .map_err(|error| Error::system("BPF_LINK_CREATE", error).advise("needs Linux 6.6 (tcx)"))?;
        }
        let wide = match control.inq_len {
            0..=ALWAYS_FITS => None,
            _ => {
                let listeners = obstacle::listeners(&mut self.diag, flow)?;
                Some(Wide::new(&listeners, wide::room_for(connection)))
            }
        };
        self.send_first(connection, interface)?;
        Ok(Begun { interface, _wide: wide })
    }

    /// The first segment: the listener's queue has a connection, with as many unread bytes as ride in one segment.
    fn send_first(&mut self, connection: &Connection, interface: u32) -> Result<()> {
        let control = &connection.control;
        let first = &connection.receive_queue[..connection.receive_queue.len().min(CHUNK)];
        let push = if first.is_empty() { 0 } else { flags::PSH };
        let (seq, flags) = (control.copied_seq(), flags::ACK | push);
        let segment = fin::from_peer(connection.flow(), control, seq, control.write_seq, flags, first);
        self.send(&segment, &attributes::option(&control.options), interface)
    }

    /// Waits for the connection, and sends the first segment again where it does not come.
    fn make(&mut self, connection: &Connection, interface: u32) -> Result<Position> {
        let flow = connection.flow();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.send_first(connection, interface)?;
            }
            let made = fin::wait_for(FIRST_ARRIVAL, || {
                Ok(self.look_at(flow, interface)?.filter(|position| position.state != State::Listen))
            })?;
            if let Some(position) = made {
                return Ok(position);
            }
        }
        // Obstacles are looked for only after a failure: among thousands of connections each look costs.
        obstacle::in_listener(&mut self.diag, &mut self.ways, flow)?;
        self.sysctls.check(connection)?;
        Err(Error::refused(
            "the listener did not take the segment that plays the peer's",
            "bring `lo` up, and let packets with the mark 0xC114 pass the firewall",
        ))
    }

    /// The rest of the unread bytes, and the peer's FIN. The kernel takes nothing of a segment that does not fit into its window:
    /// so they become smaller where none is taken, until the server reads.
    fn feed(&mut self, connection: &Connection, interface: u32, made: Position) -> Result<Position> {
        let control = &connection.control;
        let flow = connection.flow();
        let bytes = &connection.receive_queue;
        let start = control.copied_seq();
        let (mut position, mut deadline, mut chunk) = (made, Instant::now() + READ, CHUNK);
        loop {
            let seq = position.rcv_nxt;
            if seq == control.rcv_nxt {
                return Ok(position);
            }
            let arrived = (seq.wrapping_sub(start) as usize).min(bytes.len());
            let rest = &bytes[arrived..];
            let last = if rest.is_empty() { flags::FIN } else { flags::PSH };
            let payload = &rest[..rest.len().min(chunk)];
            let segment = fin::from_peer(flow, control, seq, control.write_seq, flags::ACK | last, payload);
            self.send(&segment, &[], interface)?;
            position = self.expect(flow, interface)?;
            if position.rcv_nxt != seq {
                (deadline, chunk) = (Instant::now() + READ, CHUNK);
                continue;
            }
            if let Some(read) = arrived.checked_sub(1) {
                // A byte once more is answered at once, and the window grows with the answer.
                let seq = seq.wrapping_sub(1);
                let again = &bytes[read..arrived];
                let segment = fin::from_peer(flow, control, seq, control.write_seq, flags::ACK, again);
                self.send(&segment, &[], interface)?;
            }
            if chunk > SMALLEST_CHUNK {
                chunk = (chunk / 2).max(SMALLEST_CHUNK);
            } else if Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            } else {
                return Err(Error::refused(
                    format!(
                        "a server that does not read: {arrived} of {} bytes fit into its buffer",
                        bytes.len()
                    ),
                    "raise SO_RCVBUF of its listener, or net.ipv4.tcp_rmem",
                ));
            }
        }
    }

    /// Compares what the server got with the connection.
    fn verify(&mut self, connection: &Connection, position: Position) -> Result<Adopted> {
        let ControlBlock { write_seq, rcv_nxt, options, .. } = &connection.control;
        let flow = connection.flow();
        let differs =
            |what: &str| Err(Error::refused(format!("an adopted connection with another {what}"), RESTORED));
        if position.rcv_nxt != *rcv_nxt || position.snd_una != *write_seq {
            return differs("sequence number");
        }
        let read =
            |socket: &diag::Socket<'_>| (sockopt::read_from::<TcpInfo>(socket.tcp_info()), socket.inode != 0);
        let Some((Some(info), accepted)) = self.diag.find(flow.local, flow.remote, read)? else {
            return Err(gone());
        };
        let negotiated = [
            (options.timestamps.is_some(), info_option::TIMESTAMPS),
            (options.sack, info_option::SACK),
            (options.window_scale.is_some(), info_option::WINDOW_SCALE),
        ];
        if negotiated.iter().any(|(on, bit)| *on != (info.options & bit != 0)) {
            return differs("set of options");
        }
        let scales = options.window_scale.map_or(0, |scale| scale.snd | scale.rcv << 4);
        if options.window_scale.is_some() && info.window_scales != scales {
            return differs("window scale");
        }
        let mut report = Report::default();
        let anew = "the server's socket learns it anew";
        let path = connection.path.as_ref();
        report.speed(path, options.ecn, &info, Some(anew.into()), Some(anew.into()));
        report.replaced(&connection.settings);
        Ok(Adopted { flow, accepted, report })
    }

    /// Takes what was made out of the server again. The lock keeps the reset of `SOCK_DESTROY` from the peer.
    fn undo(&mut self, flow: Flow, error: Error) -> Error {
        match self.diag.destroy(flow) {
            Ok(()) => error,
            Err(failed) => {
                error.advise(format!("the server has the connection nevertheless, incomplete: {failed}"))
            }
        }
    }

    fn expect(&self, flow: Flow, interface: u32) -> Result<Position> {
        match self.look_at(flow, interface)? {
            Some(position) if position.state != State::Listen => Ok(position),
            _ => Err(gone()),
        }
    }

    fn look_at(&self, flow: Flow, interface: u32) -> Result<Option<Position>> {
        Ok(self.look(&[flow], interface)?.pop().flatten())
    }

    fn look(&self, flows: &[Flow], interface: u32) -> Result<Vec<Option<Position>>> {
        let from = if interface == 0 { LOOPBACK } else { interface };
        self.programs.inspect(flows, from).map_err(|error| Error::system("BPF_PROG_TEST_RUN", error))
    }

    /// Plays the peer's packet; from an interface, if it is not 0.
    fn send(&mut self, segment: &Segment<'_>, options: &[u8], interface: u32) -> Result<()> {
        segment.write_with(options, &mut self.packet);
        let way = self.ways.inward(segment.source, segment.destination, 0)?;
        let way = way.with_priority(interface).map_err(|error| Error::system("SO_PRIORITY", error))?;
        way.send(&self.packet)
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

const RESTORED: &str = "it was taken back; the connection is with the caller";

/// The same error for another connection.
fn again(error: &Error) -> Error {
    match error.errno() {
        Some(errno) => Error::system(error.what().to_owned(), std::io::Error::from_raw_os_error(errno)),
        None => Error::refused(error.what().to_owned(), ""),
    }
    .advise(error.remedy().to_owned())
}

fn gone() -> Error {
    Error::refused("a server that closed the connection while it was adopted", RESTORED)
}

impl fmt::Display for Adopted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Flow { local, remote } = self.flow;
        let state = if self.accepted { "accepted" } else { "in the accept queue" };
        write!(f, "{local} ← {remote}: {state}")
    }
}

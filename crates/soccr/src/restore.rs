//! [`Connection`] → kernel, in numbered steps. [`Connection::restore`] takes them all; [`Restore`] is the staged form
//! for callers who bind and connect by themselves.
//!
//! ```text
//!  1 unbound        repair mode, MSS clamp, sequence numbers
//!  2 (the caller)   bind, connect: in repair mode without a packet
//!  3 connected      negotiated options, timestamp clock
//!  4 receive_queue  what the application has not read
//!  5 send_queue     what the peer has not acknowledged: sent, then unsent
//!  6 finish         FINs, windows; then everything is verified
//! ```

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::buffers;
use crate::connection::{Buffers, Connection, ControlBlock, Flow, State, Urgent, Window, after};
use crate::error::{Error, Result};
use crate::fin;
use crate::pause::set_reuse_address;
use crate::queue;
use crate::save;
use crate::settings::{self, Skipped, Stage, Value};
use crate::sys::sockopt;
use crate::sys::tcp::{self, Queue, Repair, option_kind};

/// The kernel takes no larger `TCP_MAXSEG`, though loopback connections have a larger MSS.
const MAX_SEGMENT_LIMIT: u32 = 32767;

/// Room for a peer that may fill the window it once saw, where ours has closed meanwhile.
const OPEN_WINDOW: u32 = 65535;

impl Connection {
    /// Makes a socket with this connection, in the network namespace of the calling thread, in repair mode: complete
    /// and silent until [`Restored::resume`]. The old socket must be closed or [detached](crate::Paused::detach).
    ///
    /// Everything is [validated](Self::validate) before the first system call; `self` is not changed, and can be
    /// restored again.
    ///
    /// # Errors
    /// - Invalid: values that contradict each other.
    /// - System: the option that the kernel refused. `EADDRNOTAVAIL` where the local address is not configured here,
    ///   or another socket has the same pair of addresses. Nothing has been sent, and nothing is left behind.
    /// - Refused: the socket did not reach the state of the connection, because a firewall or a loopback interface
    ///   that is down swallowed the segment that plays the peer's FIN or ACK.
    pub fn restore(&self) -> Result<Restored> {
        self.validate().and_then(|()| self.restore_socket()).map_err(|error| error.at("restore"))
    }

    fn restore_socket(&self) -> Result<Restored> {
        let family = if self.local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|error| Error::system("socket", error))?;
        let fd = socket.as_fd();
        let mut skipped = Vec::new();
        let mut apply = |stage| self.settings.apply(fd, stage, self.local, &mut skipped);
        if self.control.state == State::SynSent {
            apply(Stage::BeforeBind);
            bind(fd, self.local)?;
            // The same SYN once more. A peer that has answered the first one refuses the connection for good, if it gets
            // another sequence number that lies in its window: that of a new SYN does for the first 4 ms.
            tcp::set_repair(fd, Repair::On)?;
            tcp::set_queue_seq(fd, Queue::Send, self.control.write_seq.wrapping_sub(1))?;
            tcp::set_repair(fd, Repair::OffNoProbe)?;
            [Stage::BeforeConnect, Stage::InRepair, Stage::Injected, Stage::Last].into_iter().for_each(apply);
        } else {
            let mut steps = Restore::start(fd, self.control.clone(), self.buffers)?;
            apply(Stage::BeforeBind);
            bind(fd, self.local)?;
            apply(Stage::BeforeConnect);
            connect(fd, self.remote)?;
            steps.set_options(self.flow())?;
            apply(Stage::InRepair);
            steps.fill_receive_queue(&self.receive_queue, self.urgent)?;
            steps.fill_send_queue(&self.send_queue)?;
            steps.complete()?;
            apply(Stage::Injected);
            apply(Stage::Last);
        }
        if self.nonblocking {
            set_nonblocking(fd, true)?;
        }
        let reuse_address = self.settings.get(settings::REUSEADDR) == Some(&Value::Number(1));
        Ok(Restored { control: self.control.clone(), flow: self.flow(), reuse_address, skipped, socket })
    }
}

/// The staged form of [`Connection::restore`], for callers who bind and connect a socket of their own.
///
/// The calls come in the order of the steps: [`unbound`](Self::unbound), the caller's own `bind(2)` and `connect(2)`
/// (which send nothing in repair mode), [`connected`](Self::connected), [`receive_queue`](Self::receive_queue),
/// [`send_queue`](Self::send_queue), [`finish`](Self::finish). Whatever fails, the socket stays in repair mode, so
/// that closing it is silent.
#[derive(Debug)]
pub struct Restore<'fd> {
    fd: BorrowedFd<'fd>,
    control: ControlBlock,
    buffers: Buffers,
    flow: Option<Flow>,
    reuse_address: bool,
}

impl<'fd> Restore<'fd> {
    /// Step 1, on a fresh socket: checks the control block, turns repair mode on and sets what must be known before
    /// `bind` and `connect`. Without `buffers` the sizes of the socket's buffers stay as they are.
    ///
    /// # Errors
    /// Invalid: values that contradict each other. Refused: SYN_SENT, which no stages are needed for: connect anew.
    /// System: the option.
    pub fn unbound<Fd: AsFd + ?Sized>(
        socket: &'fd Fd,
        control: &ControlBlock,
        buffers: Option<Buffers>,
    ) -> Result<Self> {
        let fd = socket.as_fd();
        // Repair mode overwrites it, so it is read before.
        tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR")
            .and_then(|reuse_address| Self::onto(fd, control, buffers, reuse_address != 0))
            .map_err(|error| error.at("restore"))
    }

    /// Step 1, and SO_REUSEADDR as the owner of the socket has set it.
    pub(crate) fn onto(
        fd: BorrowedFd<'fd>,
        control: &ControlBlock,
        buffers: Option<Buffers>,
        reuse_address: bool,
    ) -> Result<Self> {
        control.validate()?;
        if control.state == State::SynSent {
            return Err(Error::refused("a connection in SYN_SENT", "connect a fresh socket instead"));
        }
        Ok(Self { reuse_address, ..Self::start(fd, control.clone(), buffers)? })
    }

    fn start(fd: BorrowedFd<'fd>, control: ControlBlock, buffers: Option<Buffers>) -> Result<Self> {
        let current = buffers::read(fd)?;
        let buffers = buffers.unwrap_or(current);
        tcp::set_repair(fd, Repair::On)?;
        // Unlocked while the queues are filled: the kernel then makes room by itself where it can.
        buffers::write(fd, current, Buffers { lock: 0, ..buffers })?;
        // connect() derives the MSS from it; without, the connection would stay at 524 bytes.
        tcp::set_max_segment(fd, u32::from(control.options.mss_clamp).min(MAX_SEGMENT_LIMIT))?;
        tcp::set_queue_seq(fd, Queue::Receive, control.copied_seq())?;
        tcp::set_queue_seq(fd, Queue::Send, control.first_unacknowledged())?;
        tcp::select_queue(fd, None)?;
        Ok(Self { fd, control, buffers, flow: None, reuse_address: false })
    }

    /// Step 3, after the caller's `bind` and `connect`: what the two ends had negotiated.
    ///
    /// # Errors
    /// System: the option, or `ENOTCONN` where the socket is not connected.
    pub fn connected(&mut self) -> Result<()> {
        Flow::of(&self.fd).and_then(|flow| self.set_options(flow)).map_err(|error| error.at("restore"))
    }

    /// Steps 2 and 3: binds and connects the socket, and tells it what the two ends had negotiated.
    ///
    /// # Errors
    /// Invalid: see [`Flow::validate`]. System: the call that failed, see [`Connection::restore`].
    pub fn connect(&mut self, flow: Flow) -> Result<()> {
        flow.validate()
            .and_then(|()| bind(self.fd, flow.local))
            .and_then(|()| connect(self.fd, flow.remote))
            .and_then(|()| self.set_options(flow))
            .map_err(|error| error.at("restore"))
    }

    /// Step 4: the bytes that the application has not read, `inq_len` of them.
    ///
    /// # Errors
    /// Invalid: another length, or an urgent mark outside of it. System: the option.
    pub fn receive_queue(&mut self, bytes: &[u8], urgent: Option<Urgent>) -> Result<()> {
        let urgent_inside = urgent.is_none_or(|urgent| urgent.offset < self.control.inq_len);
        check(bytes.len() == self.control.inq_len as usize, "inq_len is not the length of the receive queue")
            .and_then(|()| check(urgent_inside, "the urgent mark lies outside the receive queue"))
            .and_then(|()| self.fill_receive_queue(bytes, urgent))
            .map_err(|error| error.at("restore"))
    }

    /// Step 5: the bytes that the peer has not acknowledged, `outq_len` of them, the last `unsq_len` never sent.
    ///
    /// # Errors
    /// Invalid: another length. System: the option.
    pub fn send_queue(&mut self, bytes: &[u8]) -> Result<()> {
        check(bytes.len() == self.control.outq_len as usize, "outq_len is not the length of the send queue")
            .and_then(|()| self.fill_send_queue(bytes))
            .map_err(|error| error.at("restore"))
    }

    /// Step 6: the FINs of both directions and the windows; then the socket is compared with the control block.
    /// The socket stays in repair mode: [resume](Restored::resume) it when packets may flow, or turn the mode off
    /// (`TCP_REPAIR` = 0) by other means.
    ///
    /// # Errors
    /// Refused: the state was not reached. System: the option.
    pub fn finish(mut self) -> Result<Restored<BorrowedFd<'fd>>> {
        let flow = self.complete().and_then(|()| self.flow()).map_err(|error| error.at("restore"))?;
        let Self { fd, control, reuse_address, .. } = self;
        Ok(Restored { control, flow, reuse_address, skipped: Vec::new(), socket: fd })
    }

    fn set_options(&mut self, flow: Flow) -> Result<()> {
        let options = &self.control.options;
        let mut list = [[0; 2]; 4];
        let mut length = 0;
        let mut add = |kind, value| {
            list[length] = [kind, value];
            length += 1;
        };
        if options.sack {
            add(option_kind::SACK_PERMITTED, 0);
        }
        if let Some(scale) = options.window_scale {
            add(option_kind::WINDOW_SCALE, u32::from(scale.snd) | u32::from(scale.rcv) << 16);
        }
        if options.timestamps.is_some() {
            add(option_kind::TIMESTAMPS, 0);
        }
        add(option_kind::MSS, options.mss_clamp.into());
        tcp::set_repair_options(self.fd, &list[..length])?;
        if let Some(clock) = options.timestamps {
            tcp::set_timestamp(self.fd, clock)?;
        }
        // The application may have had no limit of its own, and the clamp has done its work.
        tcp::set_max_segment(self.fd, 0)?;
        if u32::from(options.mss_clamp) > MAX_SEGMENT_LIMIT && flow.is_ipv4() {
            // Setting no IP options makes the kernel compute the MSS anew, now without the limit.
            sockopt::set_bytes(self.fd, libc::IPPROTO_IP, libc::IP_OPTIONS, &[])
                .map_err(|error| Error::system("IP_OPTIONS", error))?;
        }
        self.flow = Some(flow);
        Ok(())
    }

    fn fill_receive_queue(&mut self, bytes: &[u8], urgent: Option<Urgent>) -> Result<()> {
        let Some(urgent) = urgent else { return queue::fill_receive(self.fd, bytes) };
        let (before, rest) = bytes.split_at(urgent.offset as usize);
        queue::fill_receive(self.fd, before)?;
        self.open_window()?;
        fin::inject_urgent(self.fd, self.flow()?, &self.control, rest[0])?;
        queue::fill_receive(self.fd, &rest[1..])?;
        if urgent.consumed { queue::consume_urgent(self.fd) } else { Ok(()) }
    }

    fn fill_send_queue(&mut self, bytes: &[u8]) -> Result<()> {
        let (sent, unsent) = bytes.split_at(bytes.len() - self.control.unsq_len as usize);
        tcp::select_queue(self.fd, Queue::Send)?;
        queue::fill_send(self.fd, sent)?;
        tcp::select_queue(self.fd, None)?;
        if unsent.is_empty() {
            return Ok(());
        }
        // In repair mode everything written counts as sent. Out of it, a closed window keeps it from being sent.
        self.with_closed_window(|fd| queue::fill_send(fd, unsent))
    }

    fn complete(&mut self) -> Result<()> {
        if self.control.state != State::Established {
            self.restore_fins()?;
        }
        if let Some(window) = self.control.window {
            let window = if self.window_is_closed() { opened(window, self.control.rcv_nxt) } else { window };
            tcp::set_window(self.fd, &window)?;
        }
        tcp::select_queue(self.fd, None)?;
        self.restore_buffers()?;
        self.verify()
    }

    /// The order of the FINs decides the state: ours comes first where the peer's found it sent.
    fn restore_fins(&mut self) -> Result<()> {
        use State::{Close, CloseWait, Closing, FinWait1, FinWait2, LastAck};
        let flow = self.flow()?;
        let state = self.control.state;
        if matches!(state, FinWait1 | FinWait2 | Closing) {
            self.queue_fin()?;
        }
        let seen = self.seen_from_peer()?;
        if state.fin_received() {
            fin::inject_fin(self.fd, flow, &seen)?;
        }
        if matches!(state, LastAck | Close) {
            self.queue_fin()?;
        }
        if state.fin_acknowledged() {
            fin::inject_ack(self.fd, flow, &self.control)?;
        }
        debug_assert!(matches!(state, FinWait1 | FinWait2 | Closing | CloseWait | LastAck | Close));
        Ok(())
    }

    /// Makes room for the segments that are injected, and says what they have to tell. An ACK sets free what has never
    /// been sent, so the peer's window seems closed meanwhile.
    fn seen_from_peer(&self) -> Result<ControlBlock> {
        let mut seen = self.control.clone();
        let window = self.open_window()?;
        if let Some(window) = window.filter(|_| seen.unsq_len > 0 || seen.fin_unsent) {
            let closed = Window { snd_wnd: 0, ..window };
            tcp::set_window(self.fd, &closed)?;
            seen.window = Some(closed);
        }
        Ok(seen)
    }

    /// Our own FIN: sent before or still to be sent.
    fn queue_fin(&mut self) -> Result<()> {
        let shutdown = |fd| {
            rustix::net::shutdown(fd, rustix::net::Shutdown::Write)
                .map_err(|error| Error::system("shutdown", error))
        };
        if self.control.fin_unsent {
            return self.with_closed_window(shutdown);
        }
        tcp::select_queue(self.fd, Queue::Send)?;
        shutdown(self.fd)?;
        tcp::select_queue(self.fd, None)
    }

    /// Runs `write` out of repair mode, while the peer's window seems closed: what it writes is queued, not sent.
    fn with_closed_window(&mut self, write: impl FnOnce(BorrowedFd<'fd>) -> Result<()>) -> Result<()> {
        let Some(window) = self.open_window()? else {
            return Err(Error::refused("unsent bytes", "the kernel lacks TCP_REPAIR_WINDOW (Linux 4.8)"));
        };
        tcp::set_window(self.fd, &Window { snd_wnd: 0, ..window })?;
        // Out of repair mode it may be limited to what TCP_NOTSENT_LOWAT allows.
        let limit = |value: i32| {
            tcp::set_int(self.fd, tcp::SOL_TCP, libc::TCP_NOTSENT_LOWAT, "TCP_NOTSENT_LOWAT", value)
        };
        limit(i32::MAX)?;
        tcp::set_repair(self.fd, Repair::OffNoProbe)?;
        let written = write(self.fd);
        // Out of repair mode the socket would reset the peer when it is closed, so one failure is not the last word.
        tcp::set_repair(self.fd, Repair::On).or_else(|_| tcp::set_repair(self.fd, Repair::On))?;
        limit(0)?;
        tcp::set_window(self.fd, &window)?;
        written
    }

    /// Makes room for the segments that are injected, whatever window was saved. Returns the window for the time being.
    fn open_window(&self) -> Result<Option<Window>> {
        let rcv_nxt = tcp::queue_seq(self.fd, Queue::Receive)?;
        tcp::select_queue(self.fd, None)?;
        let saved = self.control.window.map_or_else(|| tcp::window(self.fd), |window| Ok(Some(window)))?;
        let Some(saved) = saved else { return Ok(None) };
        let window = Window { snd_wl1: rcv_nxt, ..opened(saved, rcv_nxt) };
        tcp::set_window(self.fd, &window)?;
        Ok(Some(window))
    }

    /// Our window has closed, or was taken back: the kernel (≥ 6.17) drops what lies beyond it, its ACK too.
    fn window_is_closed(&self) -> bool {
        self.control.window.is_some_and(|window| {
            let edge = window.rcv_wup.wrapping_add(window.rcv_wnd);
            !after(edge, self.control.rcv_nxt)
        })
    }

    /// The buffers as saved, but never smaller than what lies in them.
    fn restore_buffers(&self) -> Result<()> {
        let current = buffers::read(self.fd)?;
        let mut wanted = self.buffers;
        if self.control.inq_len > 0 {
            // The kernel drops whatever arrives while the queue takes more memory than the buffer may.
            let memory = sockopt::get::<[u32; 9]>(self.fd, libc::SOL_SOCKET, libc::SO_MEMINFO)
                .map_err(|error| Error::system("SO_MEMINFO", error))?;
            let expected = if self.window_is_closed() { 2 * OPEN_WINDOW } else { 0 };
            wanted.receive = wanted.receive.max(memory[0] + expected);
        }
        buffers::write(self.fd, current, wanted)
    }

    fn verify(&self) -> Result<()> {
        let state = save::state(self.fd)?;
        if state != self.control.state {
            return Err(Error::refused(
                format!("the socket came back in {state}, not in {}", self.control.state),
                "a segment that plays the peer's FIN or ACK did not arrive: bring `lo` up, and let packets with the \
                 mark 0xC114 pass the firewall",
            ));
        }
        if save::is_unchanged(self.fd, &self.control)? {
            return Ok(());
        }
        Err(Error::refused(
            "a socket that differs from its connection",
            "a segment of the peer came in between: lock the traffic first",
        ))
    }

    fn flow(&self) -> Result<Flow> {
        self.flow.ok_or_else(|| Error::invalid("the socket was not connected before its queues were filled"))
    }
}

/// A socket in repair mode that holds a restored connection. Dropping it closes it silently, where the socket is its
/// own; one that was borrowed stays in repair mode.
#[derive(Debug)]
#[must_use = "dropping it closes the connection, silently: the peer would wait for ever"]
pub struct Restored<Fd = OwnedFd> {
    control: ControlBlock,
    flow: Flow,
    reuse_address: bool,
    skipped: Vec<Skipped>,
    socket: Fd,
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
        self.turn_on().map_err(|error| error.at("resume"))?;
        Ok(TcpStream::from(self.socket))
    }

    /// The socket options that could not be brought back, and why.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Gives the socket away in repair mode: silent when closed, and its new owner turns the mode off.
    pub fn release(self) -> OwnedFd {
        self.socket
    }
}

impl Restored<BorrowedFd<'_>> {
    /// Like [`resume`](Restored::resume) of a socket of its own.
    ///
    /// # Errors
    /// System: the option that failed.
    pub fn resume(self) -> Result<()> {
        self.turn_on().map_err(|error| error.at("resume"))
    }
}

impl<Fd: AsFd> Restored<Fd> {
    fn turn_on(&self) -> Result<()> {
        let fd = self.socket.as_fd();
        if self.control.state == State::SynSent {
            return start_handshake(fd, self.flow.remote);
        }
        tcp::set_repair(fd, Repair::Off)?;
        if self.reuse_address {
            set_reuse_address(fd, true)?;
        }
        if self.control.unsq_len > 0 || self.control.fin_unsent {
            push(fd)?;
        }
        // Without it the peer would have to wait for its own timer; with a firewall in the way it still does.
        let _ = fin::send_ack(fd, self.flow, &self.control);
        Ok(())
    }
}

impl<Fd: AsFd> AsFd for Restored<Fd> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A window in which the peer may use as much as it was once allowed.
fn opened(window: Window, rcv_nxt: u32) -> Window {
    Window { rcv_wup: rcv_nxt, rcv_wnd: window.rcv_wnd.max(OPEN_WINDOW), ..window }
}

/// Sends what is queued and may be sent, at once: switching Nagle's algorithm off does that.
fn push(fd: BorrowedFd<'_>) -> Result<()> {
    let no_delay = |value| tcp::set_int(fd, tcp::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY", value);
    let before = tcp::get_int(fd, tcp::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY")?;
    no_delay(1)?;
    no_delay(before)
}

fn check(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid(what)) }
}

fn bind(fd: BorrowedFd<'_>, address: SocketAddr) -> Result<()> {
    rustix::net::bind(fd, &address).map_err(|error| Error::system("bind", error))
}

/// What is left of a connection in SYN_SENT: its addresses. A fresh socket in repair mode leaves it, and connects anew.
pub(crate) fn connect_anew(fd: BorrowedFd<'_>, flow: Flow) -> Result<()> {
    bind(fd, flow.local)?;
    tcp::set_repair(fd, Repair::OffNoProbe)?;
    start_handshake(fd, flow.remote)
}

/// In repair mode nothing is sent and the socket is ESTABLISHED at once.
fn connect(fd: BorrowedFd<'_>, address: SocketAddr) -> Result<()> {
    rustix::net::connect(fd, &address).map_err(|error| Error::system("connect", error))
}

/// Begins to connect without waiting for it, whatever the descriptor does otherwise.
fn start_handshake(fd: BorrowedFd<'_>, remote: SocketAddr) -> Result<()> {
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
fn set_nonblocking(fd: BorrowedFd<'_>, on: bool) -> Result<bool> {
    let before = rustix::fs::fcntl_getfl(fd).map_err(|error| Error::system("fcntl(F_GETFL)", error))?;
    let mut flags = before;
    flags.set(rustix::fs::OFlags::NONBLOCK, on);
    if flags != before {
        rustix::fs::fcntl_setfl(fd, flags).map_err(|error| Error::system("fcntl(F_SETFL)", error))?;
    }
    Ok(flags != before)
}

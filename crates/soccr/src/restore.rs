//! [`Connection`] → kernel, in numbered steps. [`Connection::restore`](crate::Connection::restore) takes them all; [`Restore`] is the staged form
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

mod again;
mod anew;
mod bind;
mod derived;
mod port;
mod scope;
mod speed;
mod whole;

use std::os::fd::{AsFd, BorrowedFd};

use crate::buffers;
use crate::connection::{Buffers, ControlBlock, Flow, Path, State, Tracked, Urgent, Window, after};
use crate::conntrack;
use crate::error::{Error, Result};
use crate::fin;
use crate::queue;
use crate::report::Report;
use crate::resume::Restored;
use crate::save;
use crate::sys::raw::Injectors;
use crate::sys::tcp::{self, Queue, Repair, TcpInfo, option_kind};
use again::Again;

pub(crate) use anew::connect_anew;
use port::bind_and_connect;
use speed::Speed;
pub(crate) use whole::open;

/// Room for a peer that may fill the window it once saw, where ours has closed meanwhile.
const OPEN_WINDOW: u32 = 65535;

/// The staged form of [`Connection::restore`](crate::Connection::restore), for callers who bind and connect a socket of their own.
///
/// The calls come in the order of the steps: [`unbound`](Self::unbound), the caller's own `bind(2)` and `connect(2)`
/// (which send nothing in repair mode), [`connected`](Self::connected), [`receive_queue`](Self::receive_queue),
/// [`send_queue`](Self::send_queue), [`finish`](Self::finish). Whatever fails, the socket stays in repair mode, so
/// that closing it is silent.
#[derive(Debug)]
pub struct Restore<'fd> {
    fd: BorrowedFd<'fd>,
    control: ControlBlock,
    /// What is left to be done about the buffers once the queues are filled.
    buffers: Option<Buffers>,
    /// The caller knows the sizes that they had.
    sized: bool,
    flow: Option<Flow>,
    speed: Speed,
    /// The same as the packets of the peer show it.
    wire: Option<Flow>,
    reuse_address: bool,
    /// The buffers that the kernel has locked meanwhile, where it does not tell.
    locked: u32,
    report: Report,
    /// The options of a socket that had the connection before.
    again: Option<Again>,
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
            .and_then(|reuse_address| Self::onto(fd, control, buffers, reuse_address != 0, false))
            .map_err(|error| error.at("restore"))
    }

    /// Step 1, and SO_REUSEADDR as the owner of the socket has set it.
    pub(crate) fn onto(
        fd: BorrowedFd<'fd>,
        control: &ControlBlock,
        buffers: Option<Buffers>,
        reuse_address: bool,
        in_repair: bool,
    ) -> Result<Self> {
        control.validate()?;
        buffers.as_ref().map_or(Ok(()), Buffers::validate)?;
        if control.state == State::SynSent {
            return Err(Error::refused("a connection in SYN_SENT", "connect a fresh socket instead"));
        }
        if !in_repair {
            // Nothing of a live connection is touched; in repair mode its sequence numbers would refuse.
            if rustix::net::getpeername(fd).is_ok() {
                return Err(Error::refused("a socket that has a connection", "restore onto a fresh one"));
            }
            tcp::set_repair(fd, Repair::On)?;
        }
        Ok(Self { reuse_address, ..Self::start(fd, control.clone(), buffers, None)? })
    }

    /// Step 1 in repair mode.
    fn start(
        fd: BorrowedFd<'fd>,
        control: ControlBlock,
        buffers: Option<Buffers>,
        path: Option<Path>,
    ) -> Result<Self> {
        let speed = path.map_or(Ok(Speed::default()), |path| Speed::new(path, &control, fd))?;
        let mut steps = Self {
            fd,
            control,
            buffers: None,
            sized: buffers.is_some(),
            locked: 0,
            flow: None,
            speed,
            wire: None,
            reuse_address: false,
            report: Report::default(),
            again: None,
        };
        steps.set_unbound()?;
        steps.make_room(buffers)?;
        Ok(steps)
    }

    /// What must be known before `bind` and `connect`.
    fn set_unbound(&self) -> Result<()> {
        tcp::set_queue_seq(self.fd, Queue::Receive, self.control.copied_seq()).map_err(
            |error| match error.errno() {
                Some(libc::EPERM) => error.advise("a socket that has a connection: restore onto a fresh one"),
                _ => error,
            },
        )?;
        self.set_send_seq()?;
        derived::limit_segments(self.fd, &self.control.options)
    }

    /// The buffers as they were, unlocked while the queues are filled: the kernel then makes room by itself where it can.
    fn make_room(&mut self, buffers: Option<Buffers>) -> Result<()> {
        let filled = self.control.inq_len > 0 || self.control.outq_len > 0;
        if buffers.is_none() && self.control.inq_len == 0 && (!filled || buffers::locks(self.fd)? == 0) {
            // The kernel makes the room, and nobody has told another size.
            return Ok(());
        }
        let current = buffers::read(self.fd)?.buffers;
        let wanted = buffers.unwrap_or(current);
        let lock = if filled { 0 } else { wanted.lock };
        let now = buffers::write(self.fd, current, Buffers { lock, ..wanted })?;
        if filled {
            (self.buffers, self.locked) = (Some(wanted), now.lock);
        } else {
            self.report.buffers(wanted, now);
            self.report.buffer_locks(wanted, now);
        }
        Ok(())
    }

    /// Step 3, after the caller's `bind` and `connect`: what the two ends had negotiated. `flow` is what the socket is to be,
    /// where the caller knows it.
    ///
    /// # Errors
    /// Refused: a socket with other addresses. System: the option, or `ENOTCONN` where the socket is not connected.
    pub fn connected(&mut self, flow: Option<Flow>) -> Result<()> {
        flow.map_or_else(|| Flow::of(&self.fd), Ok)
            .and_then(|flow| self.set_connected(flow))
            .map_err(|error| error.at("restore"))
    }

    /// Steps 2 and 3: binds and connects the socket, and tells it what the two ends had negotiated.
    ///
    /// # Errors
    /// Invalid: see [`Flow::validate`]. System: the call that failed, see [`Connection::restore`](crate::Connection::restore).
    pub fn connect(&mut self, flow: Flow) -> Result<()> {
        self.occupy(flow)?;
        self.set_connected(flow).map_err(|error| error.at("restore"))
    }

    /// Step 2: binds and connects the socket. That shows whether the connection has a place here, and nobody hears of it.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect).
    pub fn occupy(&self, flow: Flow) -> Result<()> {
        flow.validate()
            .and_then(|()| bind_and_connect(self.fd, flow, false, || ()))
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
            .and_then(|()| self.fill_receive_queue(&mut Injectors::default(), bytes, urgent))
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
        let completed = self
            .complete(&mut Injectors::default())
            .and_then(|info| self.set_again().and_then(|()| self.restore_speed(info)));
        let flow = completed.and_then(|()| self.flow()).map_err(|error| error.at("restore"))?;
        let Self { fd, control, reuse_address, report, .. } = self;
        Ok(Restored { control, flow, reuse_address, report, socket: fd })
    }

    fn set_connected(&mut self, flow: Flow) -> Result<()> {
        let mut injectors = Injectors::default();
        self.set_options(flow)?;
        self.admit(&mut injectors, None)?;
        self.set_again_in_repair();
        if !self.seed(&mut injectors, flow)? {
            self.set_again_in_repair();
        }
        Ok(())
    }

    fn set_options(&mut self, flow: Flow) -> Result<()> {
        derived::check_flow(self.fd, flow)?;
        let options = &self.control.options;
        let mut list = [[0; 2]; 4];
        let mut length = 0;
        let mut add = |kind, value| {
            list[length] = [kind, value];
            length += 1;
        };
        if options.sack && !self.has_sent() {
            add(option_kind::SACK_PERMITTED, 0);
        }
        // Always: connect() has chosen a shift count by the local sysctl, which the peer would know nothing of.
        let scale = options.window_scale.unwrap_or_default();
        add(option_kind::WINDOW_SCALE, u32::from(scale.snd) | u32::from(scale.rcv) << 16);
        if options.timestamps.is_some() {
            add(option_kind::TIMESTAMPS, 0);
        }
        add(option_kind::MSS, options.mss_clamp.into());
        tcp::set_repair_options(self.fd, &list[..length])?;
        if let Some(clock) = options.clock() {
            tcp::set_timestamp(self.fd, clock)?;
        }
        let max_window = self.control.window.map_or(0, |window| window.max_window);
        if derived::segments_differ(options, max_window) {
            self.open_window_at(self.control.copied_seq())?;
            derived::derive_segment_size(self.fd, flow)?;
        }
        self.flow = Some(flow);
        Ok(())
    }

    fn fill_receive_queue(
        &mut self,
        injectors: &mut Injectors,
        bytes: &[u8],
        urgent: Option<Urgent>,
    ) -> Result<()> {
        let Some(urgent) = urgent else {
            return match self.buffers.filter(|buffers| buffers.lock & buffers::RECEIVE_LOCK != 0) {
                Some(locked) if self.sized && self.window_is_closed() => {
                    queue::fill_receive_buffer(self.fd, bytes, locked.receive)
                }
                _ => queue::fill_receive(self.fd, bytes),
            };
        };
        let (before, rest) = bytes.split_at(urgent.offset as usize);
        queue::fill_receive(self.fd, before)?;
        let seen = self.seen_from_peer()?;
        fin::inject_urgent(injectors, self.fd, self.wire()?, &seen, rest[0])?;
        queue::fill_receive(self.fd, &rest[1..])?;
        if urgent.consumed { queue::consume_urgent(self.fd) } else { Ok(()) }
    }

    fn fill_send_queue(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (sent, unsent) = bytes.split_at(bytes.len() - self.control.unsq_len as usize);
        if self.has_sent() {
            if self.speed.has_path() {
                // A congestion window that has grown by the samples of the RTT lets the kernel probe for a larger MTU with these
                // bytes (net.ipv4.tcp_mtu_probing), in repair mode as well; a closed window does not.
                self.open_window()?;
            }
            tcp::select_queue(self.fd, Queue::Send)?;
            queue::fill_send(self.fd, sent)?;
            if self.control.options.sack {
                // With it a sender probes for a lost tail after two round-trip times: had it been permitted before, it would
                // not stay silent until it is resumed. The kernel no longer takes it once the first of these bytes is repeated.
                tcp::set_repair_options(self.fd, &[[option_kind::SACK_PERMITTED, 0]])?;
            }
        }
        if unsent.is_empty() {
            return Ok(());
        }
        // In repair mode everything written counts as sent. Out of it, a closed window keeps it from being sent.
        self.with_closed_window(|fd| queue::fill_send(fd, unsent))
    }

    fn complete(&mut self, injectors: &mut Injectors) -> Result<TcpInfo> {
        if self.control.state != State::Established {
            self.restore_fins(injectors)?;
        }
        if let Some(window) = self.control.window {
            // As saved, even if it is closed: the kernel tells the peer of a new window only where it is twice what it
            // believes to have told.
            tcp::set_window(self.fd, &window)?;
        }
        self.restore_buffers()?;
        let mut info = self.verify()?;
        if let Some(window) = self.control.window.filter(|_| self.speed.window_clamp.is_none())
            && derived::widen_receive_window(self.fd, &self.control.options, &window, &info)?
        {
            // The slow start of the window has gone further by that.
            info = tcp::info(self.fd)?;
        }
        if self.control.reset {
            fin::inject_reset(injectors, self.fd, self.wire()?, &self.control)?;
        }
        Ok(info)
    }

    /// The order of the FINs decides the state: ours comes first where the peer's found it sent.
    fn restore_fins(&mut self, injectors: &mut Injectors) -> Result<()> {
        use State::{Close, CloseWait, Closing, FinWait1, FinWait2, LastAck};
        let wire = self.wire()?;
        let state = self.control.state;
        if matches!(state, FinWait1 | FinWait2 | Closing) {
            self.queue_fin()?;
        }
        let seen = self.seen_from_peer()?;
        if state.fin_received() {
            fin::inject_fin(injectors, self.fd, wire, &seen)?;
        }
        if matches!(state, LastAck | Close) {
            self.queue_fin()?;
        }
        if state.fin_acknowledged() {
            fin::inject_ack(injectors, self.fd, wire, &self.control)?;
        }
        debug_assert!(matches!(state, FinWait1 | FinWait2 | Closing | CloseWait | LastAck | Close));
        Ok(())
    }

    /// Makes room for the segments that are injected, and says what they have to tell.
    fn seen_from_peer(&self) -> Result<ControlBlock> {
        let window = Some(self.open_window()?);
        Ok(ControlBlock { window, ..self.control.clone() })
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
        self.open_window()?;
        // Out of repair mode it may be limited to what TCP_NOTSENT_LOWAT allows.
        let (level, name, text) = (tcp::SOL_TCP, libc::TCP_NOTSENT_LOWAT, "TCP_NOTSENT_LOWAT");
        let limit = |value| tcp::set_int(self.fd, level, name, text, value);
        let before = tcp::get_int(self.fd, level, name, text)?;
        limit(i32::MAX)?;
        tcp::set_repair(self.fd, Repair::OffNoProbe)?;
        let written = write(self.fd);
        // Out of repair mode the socket would reset the peer when it is closed, so one failure is not the last word.
        tcp::set_repair(self.fd, Repair::On).or_else(|_| tcp::set_repair(self.fd, Repair::On))?;
        limit(before)?;
        written
    }

    /// Makes room for the segments that are injected, whatever window was saved. Returns the window for the time being: that of
    /// the peer seems closed where there is something to send, which an ACK or a timer would set free.
    fn open_window(&self) -> Result<Window> {
        self.open_window_at(tcp::queue_seq(self.fd, Queue::Receive)?)
    }

    /// The same where `rcv_nxt` is known.
    fn open_window_at(&self, rcv_nxt: u32) -> Result<Window> {
        let saved = self.control.window.map_or_else(|| tcp::window(self.fd), Ok)?;
        let holds_back = self.control.outq_len > 0 || self.control.fin_unsent;
        let window = Window {
            snd_wl1: rcv_nxt,
            snd_wnd: if holds_back { 0 } else { saved.snd_wnd },
            rcv_wup: rcv_nxt,
            rcv_wnd: saved.rcv_wnd.max(OPEN_WINDOW),
            ..saved
        };
        tcp::set_window(self.fd, &window)?;
        Ok(window)
    }

    /// The buffers as saved, but never smaller than what lies in them.
    fn restore_buffers(&mut self) -> Result<()> {
        let Some(saved) = self.buffers else { return Ok(()) };
        let mut wanted = saved;
        let memory = buffers::read(self.fd)?;
        if self.control.inq_len > 0 {
            // With room in the buffer the probe that ends repair mode opens a closed window, and the peer discards the
            // probe: where the size is ours to choose, there is none beyond what a segment needs later.
            if !self.sized && self.window_is_closed() {
                wanted.receive = 2 * u32::from(self.control.options.mss_clamp);
            }
            // The kernel drops whatever arrives while the queue takes more memory than the buffer may.
            wanted.receive = wanted.receive.max(memory.receive_queue);
        }
        let current = Buffers { lock: memory.buffers.lock | self.locked, ..memory.buffers };
        let restored = buffers::write(self.fd, current, wanted)?;
        if self.sized {
            self.report.buffers(saved, restored);
        }
        self.report.buffer_locks(saved, restored);
        Ok(())
    }

    /// Less than a segment is left of our window, or it was taken back: the peer waits for another one.
    fn window_is_closed(&self) -> bool {
        let segment = u32::from(self.control.options.mss_clamp);
        self.control.window.is_some_and(|window| {
            after(self.control.rcv_nxt.wrapping_add(segment), window.rcv_wup.wrapping_add(window.rcv_wnd))
        })
    }

    /// Compares the socket with its connection, and returns what the kernel tells of it.
    fn verify(&self) -> Result<TcpInfo> {
        let control = &self.control;
        let info = tcp::info(self.fd)?;
        let state = save::kernel_state(&info)?;
        if state != control.state {
            return Err(Error::refused(
                format!("the socket came back in {state}, not in {}", control.state),
                "a segment that plays the peer's FIN or ACK did not arrive: bring `lo` up, and let packets with the \
                 mark 0xC114 pass the firewall",
            ));
        }
        derived::check_negotiated(control, &info)?;
        let received = control.rcv_nxt.wrapping_sub(control.copied_seq());
        let is_same = info.bytes_received == received.into()
            && (self.sends_nothing()
                || tcp::unacknowledged(self.fd)? == control.write_seq.wrapping_sub(control.snd_una())
                    && info.notsent_bytes == control.unsq_len + u32::from(control.fin_unsent));
        if is_same {
            return Ok(info);
        }
        Err(Error::refused(
            "a socket that differs from its connection",
            "a segment of the peer came in between: lock the traffic first",
        ))
    }

    /// Some bytes of the send queue were sent before.
    fn has_sent(&self) -> bool {
        self.control.outq_len > self.control.unsq_len
    }

    /// Neither bytes nor a FIN of ours are in the send queue.
    fn sends_nothing(&self) -> bool {
        self.control.outq_len == 0 && !self.control.state.fin_queued()
    }

    /// Makes the connection known to firewalls and NAT.
    fn admit(&mut self, injectors: &mut Injectors, tracked: Option<Tracked>) -> Result<()> {
        self.wire = Some(conntrack::admit(injectors, self.fd, self.flow()?, self.control.state, tracked)?);
        Ok(())
    }

    fn wire(&self) -> Result<Flow> {
        self.wire.map_or_else(|| self.flow(), Ok)
    }

    fn flow(&self) -> Result<Flow> {
        self.flow.ok_or_else(|| Error::invalid("the socket was not connected before its queues were filled"))
    }
}

fn check(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid(what)) }
}

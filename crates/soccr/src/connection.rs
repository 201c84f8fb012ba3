//! A connection as a value: plain data, no I/O.
//!
//! Sequence space of the two directions, as the fields of [`ControlBlock`] divide it:
//!
//! ```text
//!  receive   copied_seq ──── inq_len ──── rcv_nxt          (a received FIN counts one, below rcv_nxt)
//!  send      snd_una ── sent ── snd_nxt ── unsq_len ── write_seq   (our own FIN counts one, below write_seq)
//!            └──────────── outq_len ────────────┘
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::settings::Settings;
use crate::tls;

pub use crate::conntrack::Tracked;
pub use crate::flow::Flow;
pub use crate::state::State;
pub use crate::tls::Tls;
pub use crate::window::Window;

/// The longest queue that is carried: 64 MiB.
pub const QUEUE_LIMIT: u32 = 64 << 20;

/// No window is larger: 65,535 bytes, shifted by 14 (RFC 7323 §2.3).
const WINDOW_LIMIT: u32 = 65535 << 14;

/// Three times as many segments as the largest window has of the smallest size. The kernel goes on to count from here, and
/// takes 2³¹ for negative.
pub(crate) const SEGMENTS_LIMIT: u32 = 1 << 26;

/// A live TCP connection as a value: everything that one end of it knows.
///
/// It comes from [`Paused::save`](crate::Paused::save), can be cloned, compared, sent anywhere, and becomes a socket
/// again by [`restore`](Connection::restore), as often as wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The address of our end.
    pub local: SocketAddr,
    /// The address of the peer.
    pub remote: SocketAddr,
    /// State, sequence numbers, options and window.
    pub control: ControlBlock,
    /// Received, acknowledged and not yet read by the application: `control.inq_len` bytes.
    pub receive_queue: Vec<u8>,
    /// Written by the application and not yet acknowledged by the peer: `control.outq_len` bytes.
    pub send_queue: Vec<u8>,
    /// The urgent mark, where one lies in the receive queue.
    pub urgent: Option<Urgent>,
    /// The sizes of the socket buffers.
    pub buffers: Option<Buffers>,
    /// What the connection had learned about its path.
    pub path: Option<Path>,
    /// The socket options that the application had set, and `SHUT_RD` where it had said that it reads no more.
    pub settings: Settings,
    /// The descriptor does not wait (`O_NONBLOCK`).
    pub nonblocking: bool,
    /// What connection tracking knew about it: how its addresses are translated (NAT). `None` where that is nothing that its
    /// addresses do not say.
    pub tracked: Option<Tracked>,
    /// To whom the socket belongs: rules of firewalls and of routing may go by that.
    pub owner: Option<Owner>,
    /// What the kernel encrypts and decrypts, and with which keys (kTLS). Then the queues hold what is on the wire.
    pub tls: Option<Tls>,
}

/// To whom a socket belongs, as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub user: u32,
    /// The group.
    pub group: u32,
}

/// The transmission control block (RFC 9293 §3.3.1), as far as the kernel gives it away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlBlock {
    /// The state of the connection.
    pub state: State,
    /// The next sequence number expected from the peer, its FIN counted where it has been received.
    pub rcv_nxt: u32,
    /// Bytes in the receive queue.
    pub inq_len: u32,
    /// The sequence number behind the last byte written, our FIN counted where it has been queued.
    pub write_seq: u32,
    /// Bytes in the send queue, sent or not; our FIN not counted.
    pub outq_len: u32,
    /// Bytes at the end of the send queue that have never been sent; our FIN not counted.
    pub unsq_len: u32,
    /// Our FIN is queued and has never been sent.
    pub fin_unsent: bool,
    /// The peer has reset the connection, and the application has not been told: once it has read the queue it gets
    /// `ECONNRESET`, or an end of the stream and `EPIPE` where the peer's FIN had come before. The `state` is the one before.
    pub reset: bool,
    /// What the two ends agreed upon when they connected.
    pub options: Options,
    /// The windows; `None` where an image does not tell them, as CRIU's of kernels before Linux 4.8.
    pub window: Option<Window>,
}

/// Options negotiated by the handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The largest segment the peer accepts, in bytes (`TCP_MAXSEG` in repair mode).
    pub mss_clamp: u16,
    /// Shift counts of the two window fields (RFC 7323). `None` where none were agreed upon, which is the same as two zeros: so a
    /// restored socket reports it.
    pub window_scale: Option<WindowScale>,
    /// Selective acknowledgements (RFC 2018).
    pub sack: bool,
    /// The timestamp clock (RFC 7323) as `TCP_TIMESTAMP` sets it: a little ahead of the saved socket's, since a kernel
    /// that paces stamps segments with the time of their departure. Opaque: it counts in units of its own.
    pub timestamps: Option<u32>,
    /// The clock of [`timestamps`](Self::timestamps) counts microseconds, not milliseconds.
    pub microseconds: bool,
    /// Explicit congestion notification (RFC 3168).
    pub ecn: bool,
    /// A packet with an ECN codepoint has been received.
    pub ecn_seen: bool,
    /// Data travelled in the SYN (RFC 7413).
    pub syn_data: bool,
}

impl Options {
    /// The value for `TCP_TIMESTAMP`. Since Linux 6.7 the lowest bit tells the unit of the clock; before, it was part of
    /// the time. A clock must not go back (PAWS), so milliseconds are rounded up.
    pub(crate) fn clock(&self) -> Option<u32> {
        let clock = self.timestamps?;
        Some(if self.microseconds { clock | 1 } else { clock.wrapping_add(clock & 1) })
    }
}

/// Window scale of the two directions: shift counts up to 14.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowScale {
    /// For windows that the peer announces.
    pub snd: u8,
    /// For windows that we announce.
    pub rcv: u8,
}

/// A connection without its addresses and socket options, its queues in memory of the caller: what
/// [`Paused::save_bare`](crate::Paused::save_bare) reads.
#[derive(Debug)]
#[non_exhaustive]
pub struct Bare<M> {
    /// Lengths, sequence numbers, options and windows.
    pub control: ControlBlock,
    /// The urgent mark in the receive queue.
    pub urgent: Option<Urgent>,
    /// What the connection has learned about its path.
    pub path: Path,
    /// Begins with the `inq_len` bytes that the application has not read.
    pub receive_queue: M,
    /// Begins with the `outq_len` bytes that the peer has not acknowledged.
    pub send_queue: M,
}

/// The urgent mark in the receive queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Urgent {
    /// Where the urgent byte lies in the receive queue.
    pub offset: u32,
    /// The application has read the byte already, out of band.
    pub consumed: bool,
}

/// The sizes of the socket buffers, as `getsockopt` reports them: twice what an application asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// `SO_SNDBUF` in bytes.
    pub send: u32,
    /// `SO_RCVBUF` in bytes.
    pub receive: u32,
    /// `SO_BUF_LOCK`: which of the two the application has fixed, so that the kernel does not tune them.
    pub lock: u32,
}

/// What a connection has learned about its path, from `TCP_INFO`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Smoothed round-trip time; zero where none has been measured.
    pub rtt: Duration,
    /// Its mean deviation.
    pub rttvar: Duration,
    /// The retransmission timeout, not doubled by losses in a row.
    pub rto: Duration,
    /// Bytes per segment we send.
    pub snd_mss: u32,
    /// The congestion window, in segments.
    pub snd_cwnd: u32,
    /// The slow start threshold, in segments.
    pub snd_ssthresh: u32,
    /// The receive window that the kernel is willing to grow to for now, in bytes.
    pub rcv_ssthresh: u32,
}

impl Buffers {
    /// Checks the values against what a kernel can have told.
    ///
    /// # Errors
    /// Invalid: the first value that is wrong.
    pub fn validate(&self) -> Result<()> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Error::invalid(what)) };
        check(self.lock <= 3, "SO_BUF_LOCK has unknown bits")?;
        check(self.send <= i32::MAX as u32, "SO_SNDBUF is no int")?;
        check(self.receive <= i32::MAX as u32, "SO_RCVBUF is no int")
    }
}

impl Path {
    /// Checks that what is compared, computed with or written into the kernel is what `TCP_INFO` can tell.
    ///
    /// # Errors
    /// Invalid: the first value that is wrong.
    pub fn validate(&self) -> Result<()> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Error::invalid(what)) };
        for (time, what) in [
            (self.rtt, "rtt is over an hour"),
            (self.rttvar, "rttvar is over an hour"),
            (self.rto, "rto is over an hour"),
        ] {
            check(time <= Duration::from_secs(3600), what)?;
        }
        check(self.snd_mss <= u16::MAX.into(), "snd_mss is larger than a packet")?;
        check(self.snd_cwnd <= SEGMENTS_LIMIT, "snd_cwnd is over 2^26 segments")?;
        // The kernel's value for none.
        check(self.snd_ssthresh <= i32::MAX as u32, "snd_ssthresh is no int")?;
        check(self.rcv_ssthresh <= i32::MAX as u32, "rcv_ssthresh is no int")
    }
}

impl ControlBlock {
    /// The oldest sequence number that the peer has not acknowledged.
    pub fn snd_una(&self) -> u32 {
        let unacknowledged_fin = self.state.fin_queued() && !self.state.fin_acknowledged();
        self.write_seq.wrapping_sub(self.outq_len).wrapping_sub(unacknowledged_fin.into())
    }

    /// The first sequence number of the send queue, before the peer has acknowledged our FIN.
    pub(crate) fn first_unacknowledged(&self) -> u32 {
        self.write_seq.wrapping_sub(self.outq_len).wrapping_sub(self.state.fin_queued().into())
    }

    /// The next sequence number to be sent.
    pub fn snd_nxt(&self) -> u32 {
        self.write_seq.wrapping_sub(self.unsq_len).wrapping_sub(self.fin_unsent.into())
    }

    /// The sequence number of the next byte that the application will read.
    pub fn copied_seq(&self) -> u32 {
        self.rcv_nxt.wrapping_sub(self.inq_len).wrapping_sub(self.state.fin_received().into())
    }

    /// Checks every value against the others: what restoring it does before its first system call.
    ///
    /// # Errors
    /// Invalid: the first value that contradicts another one. Refused: a state that no connected socket is in.
    pub fn validate(&self) -> Result<()> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Error::invalid(what)) };
        let refuse = |remedy| Err(Error::refused(format!("a connection in {}", self.state), remedy));
        match self.state {
            State::Listen => return refuse("a listener is no connection: bind and listen anew"),
            State::SynReceived | State::TimeWait => {
                return refuse("no socket of a process is ever in that state");
            }
            _ => {}
        }
        check(self.inq_len <= QUEUE_LIMIT, "inq_len is over 64 MiB")?;
        check(self.outq_len <= QUEUE_LIMIT, "outq_len is over 64 MiB")?;
        check(self.unsq_len <= self.outq_len, "unsq_len is larger than outq_len")?;
        check(!self.fin_unsent || self.state.fin_queued(), "fin_unsent without a FIN")?;
        check(
            !self.state.fin_acknowledged() || (self.outq_len == 0 && !self.fin_unsent),
            "the peer has acknowledged our FIN, but not the bytes before it",
        )?;
        if self.state.fin_queued() && self.unsq_len > 0 {
            check(self.fin_unsent, "bytes before our FIN are unsent, but the FIN is not")?;
        }
        if self.reset {
            check(matches!(self.state, State::Established | State::CloseWait), "a reset in another state")?;
            check(self.outq_len == 0, "a reset and a send queue")?;
        }
        if self.state == State::SynSent {
            return check(self.inq_len == 0 && self.outq_len == 0, "queues before the handshake");
        }
        check(self.options.mss_clamp > 0, "mss_clamp is zero")?;
        if let Some(scale) = self.options.window_scale {
            check(scale.snd <= 14 && scale.rcv <= 14, "a window scale is over 14")?;
        }
        if let Some(window) = self.window {
            check(window.snd_wnd <= window.max_window, "snd_wnd is larger than max_window")?;
            check(window.max_window <= WINDOW_LIMIT, "max_window is over 1 GiB")?;
            check(window.rcv_wnd <= WINDOW_LIMIT, "rcv_wnd is over 1 GiB")?;
            check(!after(window.rcv_wup, self.rcv_nxt), "rcv_wup is after rcv_nxt")?;
            check(
                !after(window.snd_wl1, self.rcv_nxt.wrapping_add(window.rcv_wnd)),
                "snd_wl1 is beyond the receive window",
            )?;
        }
        Ok(())
    }
}

impl Connection {
    /// A value without a connection, for [`save_into`](crate::Paused::save_into) to fill and fill again:
    /// the memory of its queues is reused. It does not [`validate`](Self::validate).
    pub fn empty() -> Self {
        let unspecified = SocketAddr::from(([0; 4], 0));
        Self {
            local: unspecified,
            remote: unspecified,
            control: ControlBlock {
                state: State::Close,
                rcv_nxt: 0,
                inq_len: 0,
                write_seq: 0,
                outq_len: 0,
                unsq_len: 0,
                fin_unsent: false,
                reset: false,
                options: Options::default(),
                window: None,
            },
            receive_queue: Vec::new(),
            send_queue: Vec::new(),
            urgent: None,
            buffers: None,
            path: None,
            settings: Settings::default(),
            nonblocking: false,
            tracked: None,
            owner: None,
            tls: None,
        }
    }

    /// The addresses of the connection.
    pub fn flow(&self) -> Flow {
        Flow { local: self.local, remote: self.remote }
    }

    /// Its addresses, and those on the wire as well where NAT makes others of them: all about which a host is silent that
    /// locks it.
    pub fn flows(&self) -> impl Iterator<Item = Flow> {
        let flow = self.flow();
        std::iter::once(flow).chain(self.tracked.and_then(|tracked| tracked.translation(flow)))
    }

    /// How many bytes of the two applications it carries: in its queues, and in TLS records that nobody has read.
    ///
    /// # Examples
    /// ```
    /// use soccr::Connection;
    /// use soccr::tls::{Cipher, Record, Tls, Version};
    ///
    /// let mut connection = Connection::empty();
    /// connection.send_queue = b"unsent".to_vec();
    /// let mut tls = Tls::new(Version::Tls13, Cipher::AesGcm128);
    /// tls.unread.push(Record { content_type: 23, bytes: b"unread".to_vec() });
    /// connection.tls = Some(tls);
    /// assert_eq!(connection.queued(), 12);
    /// ```
    pub fn queued(&self) -> usize {
        let records = self.tls.as_ref().map_or(0, Tls::unread_len);
        self.receive_queue.len() + self.send_queue.len() + records
    }

    /// Puts bytes that the application has read back in front of the receive queue: whoever has the restored socket
    /// reads them again, first. They are the last ones that were read, in their order.
    ///
    /// A program that reads ahead of what it has dealt with (half a request, the frames behind the one it answers)
    /// moves without keeping a buffer. The next byte to be read, `copied_seq`, moves back by their number, and so does
    /// nothing else: `rcv_nxt` and the windows are what the peer knows. The urgent mark stays at its byte.
    ///
    /// # Errors
    /// Refused, and nothing changed: more than [`QUEUE_LIMIT`] in the receive queue then; a connection that has not been
    /// established, which nothing can have been read from.
    ///
    /// # Examples
    /// ```
    /// # fn example(stream: &std::net::TcpStream, read_ahead: &[u8]) -> soccr::Result<soccr::Connection> {
    /// let paused = soccr::pause(stream)?;
    /// let mut connection = paused.save()?;
    /// connection.unread(read_ahead)?;
    /// paused.detach()?;
    /// # Ok(connection)
    /// # }
    /// ```
    pub fn unread(&mut self, bytes: &[u8]) -> Result<()> {
        let length = self.receive_queue.len().saturating_add(bytes.len());
        let Some(inq_len) = u32::try_from(length).ok().filter(|length| *length <= QUEUE_LIMIT) else {
            let what = format!("{length} bytes in the receive queue");
            return Err(Error::refused(what, "64 MiB are carried: deal with some before").at("unread"));
        };
        if bytes.is_empty() {
            return Ok(());
        }
        if self.control.state == State::SynSent {
            return Err(Error::refused(
                "bytes read from a connection in SYN_SENT",
                "they are of another connection",
            )
            .at("unread"));
        }
        if let Some(tls) = self.tls.as_mut().filter(|tls| tls.receive.is_some()) {
            tls.unread(bytes);
            return Ok(());
        }
        self.receive_queue.splice(..0, bytes.iter().copied());
        self.control.inq_len = inq_len;
        if let Some(urgent) = &mut self.urgent {
            urgent.offset += bytes.len() as u32;
        }
        Ok(())
    }

    /// Checks every address, length and sequence number against the others: what
    /// [`restore`](Self::restore) does before its first system call.
    ///
    /// # Errors
    /// Names the first value that contradicts another one.
    pub fn validate(&self) -> Result<()> {
        let check = |holds: bool, what: &str| if holds { Ok(()) } else { Err(Error::invalid(what)) };
        self.flow().validate()?;
        self.control.validate()?;
        check(
            self.receive_queue.len() == self.control.inq_len as usize,
            "inq_len is not the length of the receive queue",
        )?;
        check(
            self.send_queue.len() == self.control.outq_len as usize,
            "outq_len is not the length of the send queue",
        )?;
        self.buffers.as_ref().map_or(Ok(()), Buffers::validate)?;
        self.path.as_ref().map_or(Ok(()), Path::validate)?;
        if let Some(tracked) = self.tracked {
            tracked.wire.validate_on_the_wire()?;
            check(
                tracked.wire.is_ipv4() == self.flow().is_ipv4(),
                "it is translated to another address family",
            )?;
        }
        if let Some(tls) = &self.tls {
            tls.validate()?;
            tls::check_state(self.control.state, self.control.reset)?;
            check(tls.unread_len() <= QUEUE_LIMIT as usize, "more than 64 MiB of TLS records")?;
            if tls.receive.is_some() {
                check(
                    self.control.inq_len as usize <= tls::LONGEST_RECORD,
                    "the rest of a TLS record is longer than one",
                )?;
                check(self.control.outq_len == 0, "a send queue that only the kernel's TLS has seen")?;
            }
        }
        if let Some(urgent) = self.urgent {
            check(urgent.offset < self.control.inq_len, "the urgent mark lies outside the receive queue")?;
        }
        Ok(())
    }
}

/// `a` lies after `b` in sequence space.
pub(crate) fn after(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) < 0
}

//! The floor: what the kernel has to be asked, and nothing else. No check, no error, no memory, no second look.
//!
//! ```text
//! save      SO_REUSEADDR, TCP_REPAIR = 1
//!           TCP_INFO, SO_MEMINFO, SO_BUF_LOCK, getsockname, getpeername, F_GETFL
//!           queue RECV: TCP_QUEUE_SEQ, SIOCINQ, recv(MSG_PEEK) where there is something
//!           queue SEND: TCP_QUEUE_SEQ, SIOCOUTQ, SIOCOUTQNSD, recv(MSG_PEEK) where there is something
//!           TCP_MAXSEG, TCP_TIMESTAMP, TCP_REPAIR_WINDOW, queue NONE
//!           each option of OPTIONS once: what an application may have set can only be known by asking (the library
//!           spares three of them that follow from others)
//! restore   socket, TCP_REPAIR = 1, TCP_MAXSEG, TCP_QUEUE_SEQ of both queues, bind, connect
//!           TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_MAXSEG = 0
//!           queue RECV, send in pieces of 68 KiB; queue SEND, send: where there is something
//!           for FINs TCP_REPAIR_WINDOW, then shutdown in queue SEND, one raw segment for the peer's FIN and
//!           one for its ACK, in the order that the state asks for
//!           TCP_REPAIR_WINDOW, queue NONE
//! adopt     one raw segment, made before the clock runs; the kernel's part, a connection in the listener's queue, is in it
//! ```
//!
//! IPv4 only.

use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::*;
use soccr::Connection;
use soccr::connection::{State, Window};

use crate::sys;

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_REPAIR_WINDOW: i32 = 29;
const SIOCINQ: Ioctl = 0x541b;
const SIOCOUTQ: Ioctl = 0x5411;
const SIOCOUTQNSD: Ioctl = 0x894b;
const NONE: u32 = 0;
const RECV: u32 = 1;
const SEND: u32 = 2;
const CHUNK: usize = 68 << 10;

/// Level, number and length of the options that travel with an IPv4 connection: those of the library's table.
#[rustfmt::skip]
const OPTIONS: &[(i32, i32, usize)] = &[
    (SOL_SOCKET, SO_BINDTODEVICE, 16), (SOL_SOCKET, SO_MARK, 4), (SOL_SOCKET, SO_REUSEPORT, 4),
    (SOL_SOCKET, SO_DONTROUTE, 4), (IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 4), (IPPROTO_IP, 51, 4),
    (IPPROTO_IP, IP_FREEBIND, 4), (IPPROTO_IP, IP_TRANSPARENT, 4), (IPPROTO_IP, IP_TOS, 4), (IPPROTO_IP, IP_TTL, 4),
    (IPPROTO_IP, IP_MTU_DISCOVER, 4), (IPPROTO_IP, IP_OPTIONS, 40), (IPPROTO_IP, 50, 4), (IPPROTO_IP, IP_MINTTL, 4),
    (IPPROTO_IP, IP_RECVERR, 4), (IPPROTO_IP, IP_RECVTOS, 4), (IPPROTO_IP, IP_RECVTTL, 4), (IPPROTO_IP, IP_PKTINFO, 4),
    (IPPROTO_TCP, TCP_CONGESTION, 16), (IPPROTO_TCP, TCP_NODELAY, 4), (IPPROTO_TCP, TCP_CORK, 4),
    (IPPROTO_TCP, 44, 4), (IPPROTO_TCP, 45, 4), (IPPROTO_TCP, 46, 4), (IPPROTO_TCP, TCP_KEEPIDLE, 4),
    (IPPROTO_TCP, TCP_KEEPINTVL, 4), (IPPROTO_TCP, TCP_KEEPCNT, 4), (IPPROTO_TCP, TCP_SYNCNT, 4),
    (IPPROTO_TCP, TCP_LINGER2, 4), (IPPROTO_TCP, TCP_WINDOW_CLAMP, 4), (IPPROTO_TCP, TCP_USER_TIMEOUT, 4),
    (IPPROTO_TCP, TCP_NOTSENT_LOWAT, 4), (IPPROTO_TCP, TCP_INQ, 4), (IPPROTO_TCP, 37, 4),
    (IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 4), (SOL_SOCKET, SO_ATTACH_FILTER, 0), (SOL_SOCKET, SO_LOCK_FILTER, 4),
    (SOL_SOCKET, SO_KEEPALIVE, 4), (SOL_SOCKET, SO_LINGER, 8), (SOL_SOCKET, SO_OOBINLINE, 4),
    (SOL_SOCKET, SO_PRIORITY, 4), (SOL_SOCKET, SO_RCVLOWAT, 4), (SOL_SOCKET, SO_RCVTIMEO, 16),
    (SOL_SOCKET, SO_SNDTIMEO, 16), (SOL_SOCKET, SO_MAX_PACING_RATE, 8), (SOL_SOCKET, 74, 4),
    (SOL_SOCKET, SO_ZEROCOPY, 4), (SOL_SOCKET, SO_TIMESTAMP, 4), (SOL_SOCKET, SO_TIMESTAMPNS, 4),
    (SOL_SOCKET, SO_TIMESTAMPING, 8), (SOL_SOCKET, SO_TIMESTAMP_NEW, 4), (SOL_SOCKET, SO_TIMESTAMPNS_NEW, 4),
    (SOL_SOCKET, SO_TIMESTAMPING_NEW, 8), (SOL_SOCKET, SO_TXTIME, 8), (SOL_SOCKET, SO_BUSY_POLL, 4),
    (SOL_SOCKET, SO_PREFER_BUSY_POLL, 4), (SOL_SOCKET, SO_PEEK_OFF, 4), (SOL_SOCKET, SO_SELECT_ERR_QUEUE, 4),
    (SOL_SOCKET, 75, 4), (SOL_SOCKET, 82, 4),
];

/// Pauses and reads a connection. Queues go into `scratch`.
pub(crate) fn save(fd: BorrowedFd<'_>, scratch: &mut [u8]) {
    sys::get_int(fd, SOL_SOCKET, SO_REUSEADDR);
    sys::set(fd, IPPROTO_TCP, TCP_REPAIR, &[1]);
    let mut info = [0; 256];
    sys::get(fd, IPPROTO_TCP, TCP_INFO, &mut info);
    sys::get(fd, SOL_SOCKET, SO_MEMINFO, &mut [0; 36]);
    sys::get_int(fd, SOL_SOCKET, SO_BUF_LOCK);
    std::hint::black_box(sys::names(fd));
    sys::flags(fd);
    queue(fd, RECV);
    sys::get_int(fd, IPPROTO_TCP, TCP_QUEUE_SEQ);
    if sys::ioctl_int(fd, SIOCINQ) > 0 {
        sys::peek(fd, scratch);
    }
    queue(fd, SEND);
    sys::get_int(fd, IPPROTO_TCP, TCP_QUEUE_SEQ);
    // Of a queued FIN there is nothing to read.
    let fin = i32::from(!matches!(info[0], 1 | 2 | 8));
    if sys::ioctl_int(fd, SIOCOUTQ) > fin {
        sys::peek(fd, scratch);
    }
    sys::ioctl_int(fd, SIOCOUTQNSD);
    sys::get_int(fd, IPPROTO_TCP, TCP_MAXSEG);
    sys::get_int(fd, IPPROTO_TCP, TCP_TIMESTAMP);
    sys::get(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &mut [0; 20]);
    queue(fd, NONE);
    let mut value = [0; 40];
    for (level, name, length) in OPTIONS {
        sys::get(fd, *level, *name, &mut value[..*length]);
    }
}

/// Back to normal, without a packet.
pub(crate) fn unpause(fd: BorrowedFd<'_>) {
    sys::set(fd, IPPROTO_TCP, TCP_REPAIR, &[u32::MAX]);
}

/// Lets the socket forget its connection.
pub(crate) fn detach(fd: BorrowedFd<'_>) {
    sys::disconnect(fd);
    unpause(fd);
}

/// Back to normal, with a window probe.
pub(crate) fn resume(fd: BorrowedFd<'_>) {
    sys::set(fd, IPPROTO_TCP, TCP_REPAIR, &[0]);
}

fn queue(fd: BorrowedFd<'_>, number: u32) {
    sys::set(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &[number]);
}

/// What can be made ready before the clock runs.
#[derive(Debug)]
pub(crate) struct Restorer<'a> {
    connection: &'a Connection,
    local: SocketAddrV4,
    remote: SocketAddrV4,
    options: Vec<u32>,
    fin: Vec<u8>,
    ack: Vec<u8>,
    raw: Option<OwnedFd>,
}

impl<'a> Restorer<'a> {
    pub(crate) fn new(connection: &'a Connection) -> Self {
        let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (connection.local, connection.remote) else {
            panic!("IPv4 only");
        };
        let control = &connection.control;
        let mut options = Vec::new();
        if control.options.sack {
            options.extend([4, 0]);
        }
        if let Some(scale) = control.options.window_scale {
            options.extend([3, u32::from(scale.snd) | u32::from(scale.rcv) << 16]);
        }
        if control.options.timestamps.is_some() {
            options.extend([8, 0]);
        }
        options.extend([2, control.options.mss_clamp.into()]);
        let segment = |seq, ack, flags| segment(connection, [remote, local], seq, ack, flags, &[]);
        Self {
            connection,
            local,
            remote,
            options,
            fin: segment(control.rcv_nxt.wrapping_sub(1), first_unacknowledged(connection), 0x11),
            ack: segment(control.rcv_nxt, control.write_seq, 0x10),
            raw: (control.state != State::Established).then(sys::raw_socket),
        }
    }

    /// Makes a socket in repair mode with the connection.
    pub(crate) fn restore(&self) -> OwnedFd {
        let Self { connection, local, remote, .. } = self;
        let control = &connection.control;
        let socket = sys::socket();
        let fd = socket.as_fd();
        if control.state == State::SynSent {
            sys::bind(fd, *local);
            return socket;
        }
        let tcp = |name, value: u32| sys::set(fd, IPPROTO_TCP, name, &[value]);
        let fin = u32::from(control.state.fin_received());
        tcp(TCP_REPAIR, 1);
        tcp(TCP_MAXSEG, u32::from(control.options.mss_clamp).min(32767));
        tcp(TCP_REPAIR_QUEUE, RECV);
        tcp(TCP_QUEUE_SEQ, control.rcv_nxt.wrapping_sub(control.inq_len).wrapping_sub(fin));
        tcp(TCP_REPAIR_QUEUE, SEND);
        tcp(TCP_QUEUE_SEQ, first_unacknowledged(connection));
        sys::bind(fd, *local);
        sys::connect(fd, *remote);
        sys::set(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, &self.options);
        if let Some(clock) = control.options.timestamps {
            tcp(TCP_TIMESTAMP, clock);
        }
        tcp(TCP_MAXSEG, 0);
        if !connection.send_queue.is_empty() {
            sys::send_all(fd, &connection.send_queue, usize::MAX);
        }
        if !connection.receive_queue.is_empty() {
            tcp(TCP_REPAIR_QUEUE, RECV);
            sys::send_all(fd, &connection.receive_queue, CHUNK);
        }
        if control.state != State::Established {
            self.restore_fins(fd);
        }
        if let Some(window) = control.window {
            set_window(fd, window);
        }
        tcp(TCP_REPAIR_QUEUE, NONE);
        socket
    }

    fn restore_fins(&self, fd: BorrowedFd<'_>) {
        use State::{Close, Closing, FinWait1, FinWait2, LastAck};
        let control = &self.connection.control;
        if let Some(window) = control.window {
            let rcv_nxt = control.rcv_nxt.wrapping_sub(control.state.fin_received().into());
            let room = window.rcv_wnd.max(65535);
            set_window(fd, Window { snd_wl1: rcv_nxt, rcv_wup: rcv_nxt, rcv_wnd: room, ..window });
        }
        let shutdown = || {
            queue(fd, SEND);
            sys::shutdown(fd);
        };
        let raw = self.raw.as_ref().expect("opened for such a state").as_fd();
        let inject = |packet| sys::inject(raw, packet, self.local);
        if matches!(control.state, FinWait1 | FinWait2 | Closing) {
            shutdown();
        }
        if control.state.fin_received() {
            inject(&self.fin);
        }
        if matches!(control.state, LastAck | Close) {
            shutdown();
        }
        if control.state.fin_acknowledged() {
            inject(&self.ack);
        }
    }
}

/// The segment that adopts a connection without unread bytes.
pub(crate) fn adopting(connection: &Connection) -> Vec<u8> {
    let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (connection.local, connection.remote) else {
        panic!("IPv4 only");
    };
    let control = &connection.control;
    let options = &control.options;
    let scale = options.window_scale;
    // Kind 254, length, a number; struct bpf_tcp_req_attrs.
    let mut attributes = vec![254, 24, 0xad, 7, 0, 0, 0, 0];
    attributes.extend(options.timestamps.unwrap_or(0).to_ne_bytes());
    attributes.extend(options.mss_clamp.to_ne_bytes());
    attributes.extend(scale.map_or([0; 2], |scale| [scale.rcv, scale.snd]));
    let flags =
        [options.ecn, scale.is_some(), options.sack, options.timestamps.is_some(), options.microseconds];
    attributes.extend(flags.map(u8::from));
    attributes.extend([0; 3]);
    segment(connection, [remote, local], control.rcv_nxt, control.write_seq, 0x10, &attributes)
}

fn first_unacknowledged(connection: &Connection) -> u32 {
    let control = &connection.control;
    control.write_seq.wrapping_sub(control.outq_len).wrapping_sub(control.state.fin_queued().into())
}

fn set_window(fd: BorrowedFd<'_>, window: Window) {
    let Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup } = window;
    sys::set(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &[snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup]);
}

/// An IPv4 packet without data.
fn segment(
    connection: &Connection,
    [from, to]: [SocketAddrV4; 2],
    seq: u32,
    ack: u32,
    flags: u8,
    options: &[u8],
) -> Vec<u8> {
    let scale = connection.control.options.window_scale.map_or(0, |scale| scale.snd);
    let window = connection.control.window.map_or(65535, |window| window.snd_wnd >> scale).min(65535) as u16;
    let length = 20 + options.len() as u8;
    let mut tcp = Vec::with_capacity(length.into());
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(seq.to_be_bytes());
    tcp.extend(ack.to_be_bytes());
    tcp.extend([(length / 4) << 4, flags]);
    tcp.extend(window.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(options);
    let pseudo = [&from.ip().octets()[..], &to.ip().octets(), &[0, 6, 0, length], &tcp].concat();
    let mut sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    tcp[16..18].copy_from_slice(&(!sum as u16).to_be_bytes());
    // The kernel fills in what is zero: identification and checksum.
    let head = [0x45, 0, 0, 20 + length, 0, 0, 0x40, 0, 64, 6, 0, 0];
    [&head[..], &from.ip().octets(), &to.ip().octets(), &tcp].concat()
}

/// What is peeked from now on is the receive queue.
pub(crate) fn select_receive(fd: BorrowedFd<'_>) {
    queue(fd, RECV);
}

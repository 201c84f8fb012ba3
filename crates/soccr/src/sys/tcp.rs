//! The TCP options of `TCP_REPAIR` and what a dump reads, typed; every error names its option.
//!
//! # References
//! `linux/tcp.h`; `tcp(7)`; kernel commits ee9952831cfd (TCP_REPAIR), b1ed4c4fa9a5 (TCP_REPAIR_WINDOW).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::sockopt::{self, Plain};
use crate::error::{Error, Result};
use crate::window::Window;

/// Level of the TCP options.
pub(crate) const SOL_TCP: i32 = libc::IPPROTO_TCP;

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_REPAIR_WINDOW: i32 = 29;

/// Values of `TCP_REPAIR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Repair {
    /// Back to normal, and an ESTABLISHED connection sends a window probe.
    Off = 0,
    /// The socket's queues, sequence numbers and options can be read and written; closing it is silent.
    On = 1,
    /// Back to normal without a probe.
    OffNoProbe = -1,
}

/// What `SO_REUSEADDR` reads while a socket is in repair mode (`SK_FORCE_REUSE`): no application can set it.
pub(crate) const REUSE_IN_REPAIR: i32 = 2;

/// The queues of a socket, numbered as `TCP_REPAIR_QUEUE` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Queue {
    /// What has arrived and has not been read.
    Receive = 1,
    /// What has been written and has not been acknowledged.
    Send = 2,
}

/// One negotiated option (`struct tcp_repair_opt`).
pub(crate) type RepairOption = [u32; 2];

/// Codes of a [`RepairOption`]: the option kinds of the TCP header.
pub(crate) mod option_kind {
    pub(crate) const MSS: u32 = 2;
    pub(crate) const WINDOW_SCALE: u32 = 3;
    pub(crate) const SACK_PERMITTED: u32 = 4;
    pub(crate) const TIMESTAMPS: u32 = 8;
}

/// The beginning of `struct tcp_info`: what kernels have since Linux 4.6.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct TcpInfo {
    pub(crate) state: u8,
    ca_state: u8,
    retransmits: u8,
    probes: u8,
    pub(crate) backoff: u8,
    /// `TCPI_OPT_*`.
    pub(crate) options: u8,
    /// `snd_wscale` in the low four bits, `rcv_wscale` in the high ones.
    pub(crate) window_scales: u8,
    flags: u8,
    /// Microseconds, as all times here.
    pub(crate) rto: u32,
    ato: u32,
    pub(crate) snd_mss: u32,
    rcv_mss: u32,
    /// Segments that were sent and not acknowledged.
    pub(crate) unacked: u32,
    sacked: u32,
    lost: u32,
    retrans: u32,
    fackets: u32,
    last_data_sent: u32,
    last_ack_sent: u32,
    /// Milliseconds.
    pub(crate) last_data_recv: u32,
    last_ack_recv: u32,
    pmtu: u32,
    pub(crate) rcv_ssthresh: u32,
    pub(crate) rtt: u32,
    pub(crate) rttvar: u32,
    pub(crate) snd_ssthresh: u32,
    pub(crate) snd_cwnd: u32,
    advmss: u32,
    reordering: u32,
    rcv_rtt: u32,
    rcv_space: u32,
    /// Segments that were sent again.
    pub(crate) total_retrans: u32,
    /// Bytes per second.
    pub(crate) pacing_rate: u64,
    max_pacing_rate: u64,
    /// How far `snd_una` has come since the socket was connected.
    pub(crate) bytes_acked: u64,
    /// The same of `rcv_nxt`.
    pub(crate) bytes_received: u64,
    segs_out: u32,
    segs_in: u32,
    /// `write_seq − snd_nxt`: a FIN counts.
    pub(crate) notsent_bytes: u32,
    min_rtt: u32,
    data_segs_in: u32,
    /// Segments with data that were sent, those that were sent again as well.
    pub(crate) data_segs_out: u32,
}

// SAFETY: eight bytes, 24 32-bit integers, four of 64 bits, six of 32: no padding, no invalid values.
unsafe impl Plain for TcpInfo {}

/// Bits of [`TcpInfo::options`].
pub(crate) mod info_option {
    pub(crate) const TIMESTAMPS: u8 = 1;
    pub(crate) const SACK: u8 = 2;
    pub(crate) const WINDOW_SCALE: u8 = 4;
    pub(crate) const ECN: u8 = 8;
    pub(crate) const ECN_SEEN: u8 = 16;
    pub(crate) const SYN_DATA: u8 = 32;
    pub(crate) const MICROSECOND_TIMESTAMPS: u8 = 64;
}

fn named<T>(option: &'static str, result: io::Result<T>) -> Result<T> {
    result.map_err(|error| Error::system(option, error))
}

pub(crate) fn set_repair(fd: BorrowedFd<'_>, mode: Repair) -> Result<()> {
    named("TCP_REPAIR", sockopt::set(fd, SOL_TCP, TCP_REPAIR, &(mode as i32)))
}

pub(crate) fn in_repair(fd: BorrowedFd<'_>) -> Result<bool> {
    named("TCP_REPAIR", sockopt::get::<i32>(fd, SOL_TCP, TCP_REPAIR)).map(|mode| mode == Repair::On as i32)
}

/// Selects what sequence numbers, `send` and `recv` are about in repair mode.
pub(crate) fn select_queue(fd: BorrowedFd<'_>, queue: impl Into<Option<Queue>>) -> Result<()> {
    let number = queue.into().map_or(0, |queue| queue as i32);
    named("TCP_REPAIR_QUEUE", sockopt::set(fd, SOL_TCP, TCP_REPAIR_QUEUE, &number))
}

/// `rcv_nxt` or `write_seq`; leaves the queue selected.
pub(crate) fn queue_seq(fd: BorrowedFd<'_>, queue: Queue) -> Result<u32> {
    select_queue(fd, queue)?;
    selected_seq(fd)
}

/// `rcv_nxt` or `write_seq`, of the queue that is selected.
pub(crate) fn selected_seq(fd: BorrowedFd<'_>) -> Result<u32> {
    named("TCP_QUEUE_SEQ", sockopt::get(fd, SOL_TCP, TCP_QUEUE_SEQ))
}

/// Sets `rcv_nxt` or `write_seq` of a socket that is not yet connected; leaves the queue selected.
pub(crate) fn set_queue_seq(fd: BorrowedFd<'_>, queue: Queue, seq: u32) -> Result<()> {
    select_queue(fd, queue)?;
    named("TCP_QUEUE_SEQ", sockopt::set(fd, SOL_TCP, TCP_QUEUE_SEQ, &seq))
}

pub(crate) fn set_repair_options(fd: BorrowedFd<'_>, options: &[RepairOption]) -> Result<()> {
    // The kernel reads an array of pairs; more than this are never needed.
    let mut pairs = [[0; 2]; 4];
    let pairs = &mut pairs[..options.len()];
    pairs.copy_from_slice(options);
    let set = sockopt::set_bytes(fd, SOL_TCP, TCP_REPAIR_OPTIONS, bytes_of(pairs));
    named("TCP_REPAIR_OPTIONS", set).map_err(|error| match error.errno() {
        // In repair mode nobody is asked for a capability.
        Some(libc::EPERM) => error.advise(
            "a segment of the peer came in between: lock the traffic first; or so much time has passed that a timer has \
             repeated a byte: restore it again",
        ),
        _ => error,
    })
}

fn bytes_of(pairs: &[RepairOption]) -> &[u8] {
    // SAFETY: pairs of integers have no padding; the slice covers exactly their memory, for their lifetime.
    unsafe { std::slice::from_raw_parts(pairs.as_ptr().cast(), size_of_val(pairs)) }
}

pub(crate) fn timestamp(fd: BorrowedFd<'_>) -> Result<u32> {
    named("TCP_TIMESTAMP", sockopt::get(fd, SOL_TCP, libc::TCP_TIMESTAMP))
}

pub(crate) fn set_timestamp(fd: BorrowedFd<'_>, value: u32) -> Result<()> {
    named("TCP_TIMESTAMP", sockopt::set(fd, SOL_TCP, libc::TCP_TIMESTAMP, &value))
}

/// The MSS that the peer announced, in repair mode.
pub(crate) fn max_segment(fd: BorrowedFd<'_>) -> Result<u32> {
    named("TCP_MAXSEG", sockopt::get(fd, SOL_TCP, libc::TCP_MAXSEG))
}

pub(crate) fn set_max_segment(fd: BorrowedFd<'_>, bytes: u32) -> Result<()> {
    named("TCP_MAXSEG", sockopt::set(fd, SOL_TCP, libc::TCP_MAXSEG, &bytes))
}

/// Sets an integer option that has no more than a value.
pub(crate) fn set_int(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    text: &'static str,
    value: i32,
) -> Result<()> {
    named(text, sockopt::set(fd, level, name, &value))
}

/// Repair mode sets `SO_REUSEADDR`, and takes the value from before away with it.
pub(crate) fn set_reuse_address(fd: BorrowedFd<'_>, on: bool) -> Result<()> {
    set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, "SO_REUSEADDR", on.into())
}

/// Reads an integer option.
pub(crate) fn get_int(fd: BorrowedFd<'_>, level: i32, name: i32, text: &'static str) -> Result<i32> {
    named(text, sockopt::get(fd, level, name))
}

pub(crate) fn window(fd: BorrowedFd<'_>) -> Result<Window> {
    let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] =
        named("TCP_REPAIR_WINDOW", sockopt::get(fd, SOL_TCP, TCP_REPAIR_WINDOW))?;
    Ok(Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup })
}

pub(crate) fn set_window(fd: BorrowedFd<'_>, window: &Window) -> Result<()> {
    let Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup } = *window;
    let values = [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup];
    named("TCP_REPAIR_WINDOW", sockopt::set(fd, SOL_TCP, TCP_REPAIR_WINDOW, &values))
}

/// The name of the congestion control algorithm, by which it can be chosen.
pub(crate) fn congestion(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let mut name = [0; 16];
    let length = named("TCP_CONGESTION", sockopt::get_bytes(fd, SOL_TCP, libc::TCP_CONGESTION, &mut name))?;
    Ok(chosen(name[..length].split(|byte| *byte == 0).next().unwrap_or_default()).to_vec())
}

/// DCTCP calls itself `dctcp-reno` while a connection has no ECN; by that name nobody can choose it.
pub(crate) fn chosen(algorithm: &[u8]) -> &[u8] {
    if algorithm.starts_with(b"dctcp-reno") { b"dctcp" } else { algorithm }
}

pub(crate) fn info(fd: BorrowedFd<'_>) -> Result<TcpInfo> {
    let mut info = [0; size_of::<TcpInfo>()];
    let length = named("TCP_INFO", sockopt::get_bytes(fd, SOL_TCP, libc::TCP_INFO, &mut info))?;
    sockopt::read_from(&info[..length]).ok_or_else(|| {
        Error::refused("a kernel that tells too little of its connections", "needs Linux 4.12")
    })
}

/// `rcv_wnd`, out of repair mode too; `None` before Linux 6.2.
pub(crate) fn rcv_wnd(fd: BorrowedFd<'_>) -> Result<Option<u32>> {
    const END: usize = 236;
    let mut info = [0; END];
    let length = named("TCP_INFO", sockopt::get_bytes(fd, SOL_TCP, libc::TCP_INFO, &mut info))?;
    Ok((length == END)
        .then(|| u32::from_ne_bytes([info[END - 4], info[END - 3], info[END - 2], info[END - 1]])))
}

/// Bytes that the application can read, up to an urgent mark.
pub(crate) fn unread(fd: BorrowedFd<'_>) -> Result<u32> {
    named("SIOCINQ", sockopt::ioctl_int::<0x541B>(fd)).map(|bytes| bytes as u32)
}

/// Bytes that the application can read, and one more where the peer's FIN is behind them, as `TCP_INQ` tells with a read:
/// the receive queue is selected, and not empty.
pub(crate) fn unread_with_fin(fd: BorrowedFd<'_>) -> Result<u32> {
    let option = |value| set_int(fd, SOL_TCP, libc::TCP_INQ, "TCP_INQ", value);
    let before = get_int(fd, SOL_TCP, libc::TCP_INQ, "TCP_INQ")?;
    option(1)?;
    let hint = peek_inq(fd);
    option(before)?;
    named("recvmsg(TCP_INQ)", hint)
}

fn peek_inq(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let (mut byte, mut control) = ([0_u8], [0_u64; 8]);
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
    // SAFETY: integers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    // SAFETY: the message points to a byte and to aligned memory for control messages, which outlive the call.
    if unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has filled in the control messages, and how long they are.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: it is a header within those messages.
        let (level, kind) = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if (level, kind) == (SOL_TCP, libc::TCP_INQ) {
            // SAFETY: this message holds an int.
            return Ok(unsafe { libc::CMSG_DATA(header).cast::<u32>().read_unaligned() });
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Err(io::ErrorKind::Unsupported.into())
}

/// The application has nothing to read any more but the end of the stream. Nothing is consumed: `TCP_ZEROCOPY_RECEIVE`
/// (Linux 4.18) fails in its own way then.
pub(crate) fn is_at_end(fd: BorrowedFd<'_>) -> Result<bool> {
    const TCP_ZEROCOPY_RECEIVE: i32 = 35;
    match sockopt::get::<[u32; 4]>(fd, SOL_TCP, TCP_ZEROCOPY_RECEIVE) {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
        Err(error) => named("TCP_ZEROCOPY_RECEIVE", Err(error)),
    }
}

/// The next byte that the application can read is an urgent one, consumed or not.
pub(crate) fn at_mark(fd: BorrowedFd<'_>) -> Result<bool> {
    named("SIOCATMARK", sockopt::ioctl_int::<0x8905>(fd)).map(|answer| answer != 0)
}

/// `write_seq − snd_una`: a FIN counts.
pub(crate) fn unacknowledged(fd: BorrowedFd<'_>) -> Result<u32> {
    named("SIOCOUTQ", sockopt::ioctl_int::<0x5411>(fd)).map(|bytes| bytes as u32)
}

/// `write_seq − snd_nxt`: a FIN counts.
pub(crate) fn unsent(fd: BorrowedFd<'_>) -> Result<u32> {
    named("SIOCOUTQNSD", sockopt::ioctl_int::<0x894B>(fd)).map(|bytes| bytes as u32)
}

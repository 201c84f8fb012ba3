//! The options and messages of kernel TLS, and what reads raw bytes past it; every error names its option.
//!
//! # References
//! `linux/tls.h`; `linux/tcp.h` (`struct tcp_zerocopy_receive`); kernel commits 3c4d7559159b (TLS), 7eeba1706eba (receive
//! with a copy buffer).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use zeroize::Zeroizing;

use super::sockopt::{self, Plain};
use super::tcp::SOL_TCP;
use crate::error::{Error, Result};

const SOL_TLS: i32 = 282;
const TLS_TX_ZEROCOPY_RO: i32 = 3;
const TLS_RX_EXPECT_NO_PAD: i32 = 4;
const TLS_TX_MAX_PAYLOAD_LEN: i32 = 5;
const TLS_SET_RECORD_TYPE: i32 = 1;
const TLS_GET_RECORD_TYPE: i32 = 2;
const TCP_ZEROCOPY_RECEIVE: i32 = 35;

/// A direction, numbered as the option that sets its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Direction {
    /// `TLS_TX`
    Transmit = 1,
    /// `TLS_RX`
    Receive = 2,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Transmit => "TLS_TX",
            Self::Receive => "TLS_RX",
        }
    }
}

fn named<T>(option: &'static str, result: io::Result<T>) -> Result<T> {
    result.map_err(|error| Error::system(option, error))
}

/// The name of the protocol on top of TCP; empty where there is none, or the kernel has none (Linux 4.13).
pub(crate) fn upper_layer(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let mut name = [0; 16];
    match sockopt::get_bytes(fd, SOL_TCP, libc::TCP_ULP, &mut name) {
        Ok(length) => Ok(name[..length].split(|byte| *byte == 0).next().unwrap_or_default().to_vec()),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(Vec::new()),
        Err(error) => named("TCP_ULP", Err(error)),
    }
}

/// Puts TLS on top of TCP. The connection must be ESTABLISHED.
pub(crate) fn set_upper_layer(fd: BorrowedFd<'_>) -> Result<()> {
    named("TCP_ULP", sockopt::set_bytes(fd, SOL_TCP, libc::TCP_ULP, b"tls")).map_err(|error| {
        match error.errno() {
            Some(libc::ENOENT | libc::ENOPROTOOPT) => {
                error.advise("the kernel has no TLS here: `modprobe tls` (CONFIG_TLS)")
            }
            _ => error,
        }
    })
}

/// Version and cipher of a direction as numbers; `None` where it has no keys.
pub(crate) fn kind(fd: BorrowedFd<'_>, direction: Direction) -> Result<Option<(u16, u16)>> {
    let mut header = [0; 4];
    match sockopt::get_bytes(fd, SOL_TLS, direction as i32, &mut header) {
        Ok(_) => {
            let [a, b, c, d] = header;
            Ok(Some((u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])))
                .filter(|(_, cipher)| *cipher != 0))
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
        Err(error) => named(direction.name(), Err(error)),
    }
}

/// `struct tls12_crypto_info_*` behind version and cipher, which has this length.
pub(crate) fn secrets(fd: BorrowedFd<'_>, direction: Direction, length: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut whole = Zeroizing::new(vec![0; 4 + length]);
    let read = named(direction.name(), sockopt::get_bytes(fd, SOL_TLS, direction as i32, &mut whole))?;
    if read != whole.len() {
        return Err(Error::refused(
            format!("{} of {read} bytes", direction.name()),
            "the kernel knows another form of it",
        ));
    }
    Ok(Zeroizing::new(whole[4..].to_vec()))
}

/// Gives the kernel the keys of a direction: the rest of the structure behind version and cipher.
pub(crate) fn set_secrets(
    fd: BorrowedFd<'_>,
    direction: Direction,
    (version, cipher): (u16, u16),
    secrets: &[u8],
) -> Result<()> {
    let mut whole = Zeroizing::new(Vec::with_capacity(4 + secrets.len()));
    whole.extend_from_slice(&version.to_ne_bytes());
    whole.extend_from_slice(&cipher.to_ne_bytes());
    whole.extend_from_slice(secrets);
    named(direction.name(), sockopt::set_bytes(fd, SOL_TLS, direction as i32, &whole)).map_err(|error| {
        match error.errno() {
            Some(libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP) => {
                error.advise("this kernel's TLS lacks the cipher (a module of its crypto, or a newer kernel)")
            }
            _ => error,
        }
    })
}

fn flag(fd: BorrowedFd<'_>, name: i32, text: &'static str) -> Result<bool> {
    match sockopt::get::<i32>(fd, SOL_TLS, name) {
        Ok(value) => Ok(value != 0),
        // Older kernels lack it; the option of a direction without keys is none.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EINVAL)) => Ok(false),
        Err(error) => named(text, Err(error)),
    }
}

/// `TLS_TX_ZEROCOPY_RO` (Linux 6.0).
pub(crate) fn zerocopy_sendfile(fd: BorrowedFd<'_>) -> Result<bool> {
    flag(fd, TLS_TX_ZEROCOPY_RO, "TLS_TX_ZEROCOPY_RO")
}

pub(crate) fn set_zerocopy_sendfile(fd: BorrowedFd<'_>) -> Result<()> {
    named("TLS_TX_ZEROCOPY_RO", sockopt::set(fd, SOL_TLS, TLS_TX_ZEROCOPY_RO, &1))
}

/// `TLS_RX_EXPECT_NO_PAD` (Linux 6.0).
pub(crate) fn expects_no_padding(fd: BorrowedFd<'_>) -> Result<bool> {
    flag(fd, TLS_RX_EXPECT_NO_PAD, "TLS_RX_EXPECT_NO_PAD")
}

pub(crate) fn set_expect_no_padding(fd: BorrowedFd<'_>) -> Result<()> {
    named("TLS_RX_EXPECT_NO_PAD", sockopt::set(fd, SOL_TLS, TLS_RX_EXPECT_NO_PAD, &1))
}

/// The application has limited its records (`TLS_TX_MAX_PAYLOAD_LEN`); kernels that lack the option have no limit.
pub(crate) fn limits_records(fd: BorrowedFd<'_>) -> Result<bool> {
    const NONE: u16 = 1 << 14;
    let mut value = [0; 2];
    match sockopt::get_bytes(fd, SOL_TLS, TLS_TX_MAX_PAYLOAD_LEN, &mut value) {
        Ok(_) => Ok(u16::from_ne_bytes(value) != NONE),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
        Err(error) => named("TLS_TX_MAX_PAYLOAD_LEN", Err(error)),
    }
}

/// Room for one control message with a byte, aligned as one.
type Control = [u64; 4];

/// Sends one record of this type, or the part of it that there is room for. An open record is sent before it, and nothing
/// else where there are no bytes.
pub(crate) fn send(fd: BorrowedFd<'_>, content_type: u8, bytes: &[u8]) -> io::Result<usize> {
    let mut control: Control = [0; 4];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: integers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: a computation only.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(1) } as _;
    // SAFETY: the message has aligned memory for one control message with a byte, which the macros stay within.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = SOL_TLS;
        (*header).cmsg_type = TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        libc::CMSG_DATA(header).write(content_type);
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads the bytes and the control message, which outlive the call.
    length(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// Reads decrypted bytes, those of one record type, and returns the type with their number; a type of zero where the socket has
/// said none.
pub(crate) fn receive(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(u8, usize)> {
    receive_with(fd, bytes, 0)
}

/// The same, and leaves them in the socket; the kernel has decrypted them then.
pub(crate) fn peek(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(u8, usize)> {
    receive_with(fd, bytes, libc::MSG_PEEK)
}

fn receive_with(fd: BorrowedFd<'_>, bytes: &mut [u8], flags: i32) -> io::Result<(u8, usize)> {
    let mut control: Control = [0; 4];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: integers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    // SAFETY: the message points to the bytes and to aligned memory for control messages, which outlive the call.
    let read =
        length(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT | flags) })?;
    // SAFETY: the kernel has filled in the control messages, and how long they are.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    if header.is_null() {
        return Ok((0, read));
    }
    // SAFETY: it is a header within those messages.
    let is_type = unsafe { ((*header).cmsg_level, (*header).cmsg_type) == (SOL_TLS, TLS_GET_RECORD_TYPE) };
    // SAFETY: this message holds a byte.
    Ok((if is_type { unsafe { libc::CMSG_DATA(header).read() } } else { 0 }, read))
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `struct tcp_zerocopy_receive`, as far as Linux 5.11 has it.
#[derive(Clone, Copy)]
#[repr(C)]
struct ZerocopyReceive {
    address: u64,
    length: u32,
    recv_skip_hint: u32,
    inq: u32,
    err: i32,
    copybuf_address: u64,
    copybuf_len: i32,
    flags: u32,
    msg_control: u64,
    msg_controllen: u64,
    msg_flags: u32,
    reserved: u32,
}

// SAFETY: integers only, 64 bytes, laid out without padding.
unsafe impl Plain for ZerocopyReceive {}

/// Takes raw bytes out of the receive queue, past the TLS layer, and returns how many. Out of repair mode alone.
pub(crate) fn receive_raw(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<usize> {
    let mut request = ZerocopyReceive {
        address: 0,
        length: 0,
        recv_skip_hint: 0,
        inq: 0,
        err: 0,
        copybuf_address: bytes.as_mut_ptr() as u64,
        copybuf_len: bytes.len().min(i32::MAX as usize) as i32,
        flags: 0,
        msg_control: 0,
        msg_controllen: 0,
        msg_flags: 0,
        reserved: 0,
    };
    let mut length = size_of::<ZerocopyReceive>() as libc::socklen_t;
    // SAFETY: the kernel reads and writes the structure, and writes at most `copybuf_len` bytes to where `bytes` are.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            SOL_TCP,
            TCP_ZEROCOPY_RECEIVE,
            (&raw mut request).cast(),
            &raw mut length,
        )
    };
    let failed = if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    named("TCP_ZEROCOPY_RECEIVE", failed)?;
    Ok(request.copybuf_len.max(0) as usize)
}

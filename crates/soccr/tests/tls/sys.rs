//! Control messages of TLS: the only `unsafe` here.
#![allow(unsafe_code)]

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

const SOL_TLS: i32 = 282;

/// Writes one record of this type.
pub fn send_record(stream: &TcpStream, content_type: u8, bytes: &[u8]) -> io::Result<usize> {
    let mut control = [0_u64; 4];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: integers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: the control messages have room for one with a byte, which the macros stay within.
    unsafe {
        message.msg_controllen = libc::CMSG_SPACE(1) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        ((*header).cmsg_level, (*header).cmsg_type) = (SOL_TLS, 1);
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        libc::CMSG_DATA(header).write(content_type);
    }
    // SAFETY: what the message points to outlives the call.
    length(unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
}

/// Reads bytes of one record type.
pub fn receive_record(stream: &TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let (mut control, mut bytes) = ([0_u64; 4], vec![0; 20_000]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: integers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    // SAFETY: what the message points to outlives the call.
    bytes.truncate(length(unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, 0) })?);
    // SAFETY: the kernel has filled in the control messages, and this one holds a byte.
    let content_type = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() { 0 } else { libc::CMSG_DATA(header).read() }
    };
    Ok((content_type, bytes))
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

//! TCP MD5 keys (RFC 2385): `sock_diag` reports them in one form, `setsockopt` takes them in another.
//!
//! ```text
//!  tcp_diag_md5sig   family u8 · prefix u8 · key length u16 · address 16 bytes · key 80 bytes
//!  tcp_md5sig        sockaddr_storage 128 bytes · flags u8 · prefix u8 · key length u16 · ifindex u32 · key 80 bytes
//! ```
//!
//! # References
//! `linux/tcp.h`: `TCP_MD5SIG_EXT` (Linux 4.14).

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use crate::sys::sockopt;

const TCP_MD5SIG_EXT: i32 = 32;
const TCP_MD5SIG_FLAG_PREFIX: u8 = 1;

const REPORTED: usize = 100;
const WANTED: usize = 216;
const STORAGE: usize = 128;

/// Sets every key of `keys`, one `struct tcp_diag_md5sig` behind another.
pub(super) fn set(fd: BorrowedFd<'_>, keys: &[u8]) -> io::Result<()> {
    let (keys, rest) = keys.as_chunks::<REPORTED>();
    if !rest.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let domain: i32 = sockopt::get(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    for key in keys {
        sockopt::set_bytes(fd, libc::IPPROTO_TCP, TCP_MD5SIG_EXT, &wanted(key, domain))?;
    }
    Ok(())
}

/// Removes every key of `keys`.
pub(super) fn remove(fd: BorrowedFd<'_>, keys: &[u8]) -> io::Result<()> {
    let mut keys = keys.to_vec();
    for key in keys.as_chunks_mut::<REPORTED>().0 {
        // A key without a length is none.
        key[2..4].fill(0);
    }
    set(fd, &keys)
}

/// Has every key for the address `old` count for `new` alone, unless it does already.
pub(super) fn move_to(keys: &mut [u8], old: IpAddr, new: IpAddr) {
    for key in keys.as_chunks_mut::<REPORTED>().0 {
        if covers(key, old) && !covers(key, new) {
            let (family, bytes) = octets(new);
            key[0] = family as u8;
            key[1] = 8 * bytes.len() as u8;
            key[4..20].fill(0);
            key[4..4 + bytes.len()].copy_from_slice(&bytes);
        }
    }
}

/// Whether the address has the prefix of the key.
fn covers(key: &[u8; REPORTED], address: IpAddr) -> bool {
    let (family, bytes) = octets(address);
    let bit = |bytes: &[u8], bit: usize| bytes[bit / 8] >> (7 - bit % 8) & 1;
    let prefix = usize::from(key[1]).min(8 * bytes.len());
    i32::from(key[0]) == family && (0..prefix).all(|at| bit(&bytes, at) == bit(&key[4..20], at))
}

fn octets(address: IpAddr) -> (i32, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (libc::AF_INET, address.octets().into()),
        IpAddr::V6(address) => (libc::AF_INET6, address.octets().into()),
    }
}

/// The key as `TCP_MD5SIG_EXT` takes it on a socket of `domain`.
fn wanted(reported: &[u8; REPORTED], domain: i32) -> [u8; WANTED] {
    let address = &reported[4..20];
    let mut wanted = [0; WANTED];
    wanted[..2].copy_from_slice(&(domain as u16).to_ne_bytes());
    match (domain, i32::from(reported[0])) {
        (libc::AF_INET, _) => wanted[4..8].copy_from_slice(&address[..4]),
        // An IPv6 socket names an IPv4 peer by its mapped address, and counts the prefix in IPv4 bits.
        (_, libc::AF_INET) => {
            wanted[18..20].fill(0xff);
            wanted[20..24].copy_from_slice(&address[..4]);
        }
        _ => wanted[8..24].copy_from_slice(address),
    }
    wanted[STORAGE] = TCP_MD5SIG_FLAG_PREFIX;
    wanted[STORAGE + 1] = reported[1];
    wanted[STORAGE + 2..STORAGE + 4].copy_from_slice(&reported[2..4]);
    wanted[STORAGE + 8..].copy_from_slice(&reported[20..]);
    wanted
}

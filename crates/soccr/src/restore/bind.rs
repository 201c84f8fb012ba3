//! `bind(2)` and `connect(2)` with an address that may not be here: `bind` waits until an IPv6 address that has just come to
//! this host is known to be unique (RFC 4862 §5.4), and no connection is restored where its packets would not come to it.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use soccr_netlink::{Batch, DUMP, Family, REQUEST, Socket, attributes};

use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::steer;
use crate::sys::ipv6::NOBODY;
use crate::sys::namespace::{self, Recently};
use crate::sys::tcp;

/// Detection takes two seconds at most, unless it is told to repeat itself.
const LIMIT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(10);

// linux/rtnetlink.h, linux/if_addr.h
const RTM_GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
/// `struct ifaddrmsg`, whose flags are its third byte.
const HEADER: usize = 8;
const IFA_F_DADFAILED: u8 = 0x08;
const IFA_F_TENTATIVE: u8 = 0x40;

/// Binds an address of another host, too, where its packets are delivered here, or where the socket may be `free` to have any
/// (`IPV6_FREEBIND`).
pub(super) fn bind_freely(fd: BorrowedFd<'_>, address: SocketAddr, free: bool) -> Result<()> {
    // IPv4 finds no route for an address that is not here: see `connect`.
    if address.ip().to_canonical().is_ipv6() && (free || anybody_is_free(fd)) {
        admit_foreign(fd, address)?;
    }
    match bind_own(fd, address) {
        Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) && steer::admit(fd, address)? => {
            rustix::net::bind(fd, &address).map_err(|error| Error::system("bind", error))
        }
        bound => bound,
    }
}

/// The same for a socket that may have SO_REUSEPORT by now: bound with it, its user could listen on the port beside others.
pub(super) fn bind_alone(fd: BorrowedFd<'_>, address: SocketAddr, free: bool) -> Result<()> {
    const NAME: &str = "SO_REUSEPORT";
    let shares = tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, NAME)?;
    let share = |value| tcp::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, NAME, value);
    if shares == 0 {
        return bind_freely(fd, address, free);
    }
    share(0)?;
    bind_freely(fd, address, free).and(share(shares))
}

/// Connects a bound socket. In repair mode nothing is sent, and the socket is ESTABLISHED at once.
pub(super) fn connect(fd: BorrowedFd<'_>, flow: Flow) -> Result<()> {
    let try_it = || rustix::net::connect(fd, &flow.remote).map_err(|errno| Error::system("connect", errno));
    match try_it() {
        Err(error) if error.errno() == Some(libc::ENETUNREACH) => {
            admit_foreign(fd, flow.local)?;
            try_it()
        }
        outcome => outcome,
    }
}

/// Refuses an address that is not here, and whose packets are not delivered here either: the kernel would restore a connection
/// that hears nothing.
fn admit_foreign(fd: BorrowedFd<'_>, address: SocketAddr) -> Result<()> {
    if !steer::is_foreign_beside(fd, address.ip())? || steer::admit(fd, address)? {
        return Ok(());
    }
    let absent = rustix::io::Errno::ADDRNOTAVAIL;
    Err(Error::system("bind", absent).advise(missing(address.ip().to_canonical())))
}

/// Any IPv6 address can be bound in the namespace of a socket (`net.ipv6.ip_nonlocal_bind`), also those of other hosts.
/// Where that was not so a moment ago, nobody asks again.
fn anybody_is_free(fd: BorrowedFd<'_>) -> bool {
    static NOT: Recently = Recently::within(Duration::from_millis(10));
    if NOT.at(fd).is_some() {
        return false;
    }
    let bound = namespace::open_beside(fd, || {
        let socket = socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddr::from((NOBODY, 0)))?;
        Ok(socket)
    });
    match bound.map_err(|error| error.raw_os_error()) {
        Err(Some(libc::EADDRNOTAVAIL)) => {
            NOT.note_at(fd, ());
            false
        }
        // A kernel without IPv6: the bind itself says so.
        Err(Some(libc::EAFNOSUPPORT)) => false,
        // Where that cannot be found out, the route tells.
        _ => true,
    }
}

fn missing(address: IpAddr) -> String {
    let (length, device) = match address {
        IpAddr::V4(_) => (32, "lo"),
        IpAddr::V6(address) => (128, if address.is_unicast_link_local() { "DEVICE" } else { "lo" }),
    };
    format!(
        "the address is not configured here: `ip addr add {address}/{length} dev {device}`; \
         for an address of another host see `soccr::steer`"
    )
}

fn bind_own(fd: BorrowedFd<'_>, address: SocketAddr) -> Result<()> {
    let try_it = || {
        rustix::net::bind(fd, &address).map_err(|errno| match errno {
            rustix::io::Errno::ADDRNOTAVAIL => {
                Error::system("bind", errno).advise(missing(address.ip().to_canonical()))
            }
            _ => Error::system("bind", errno),
        })
    };
    let deadline = Instant::now() + LIMIT;
    loop {
        let error = match (try_it(), address) {
            (Err(error), SocketAddr::V6(_)) if error.errno() == Some(libc::EADDRNOTAVAIL) => error,
            (outcome, _) => return outcome,
        };
        let flags = flags(fd, address).map_err(|error| Error::system("rtnetlink", error))?;
        if flags & IFA_F_DADFAILED != 0 {
            return Err(error
                .advise("duplicate address detection has failed: another host on the link has the address"));
        }
        if flags & IFA_F_TENTATIVE == 0 {
            // Detection may have ended just now.
            return try_it();
        }
        if Instant::now() >= deadline {
            return Err(error.advise(
                "the address is tentative: duplicate address detection goes on, see net.ipv6.conf.*.dad_transmits",
            ));
        }
        std::thread::sleep(PAUSE);
    }
}

/// The flags of an address, in the namespace of the socket; none where no link has it.
fn flags(fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<u8> {
    let mut batch = Batch::new();
    let mut header = [0; HEADER];
    header[0] = libc::AF_INET6 as u8;
    batch.message(RTM_GETADDR, REQUEST | DUMP, |message| message.bytes(&header));
    let answer = |found: &mut Vec<u8>, payload: &[u8]| {
        let Some((header, rest)) = payload.split_first_chunk::<HEADER>() else { return };
        let is_it = |(kind, bytes): (u16, &[u8])| {
            let ip = <[u8; 16]>::try_from(bytes).map(Ipv6Addr::from);
            kind == IFA_ADDRESS && ip.is_ok_and(|ip| ip == address.ip())
        };
        if attributes(rest).any(is_it) {
            found.push(header[2]);
        }
    };
    let found = namespace::open_beside(fd, || Socket::open(Family::Route))?.dump_all(&batch, answer)?;
    Ok(found.into_iter().fold(0, |all, flags| all | flags))
}

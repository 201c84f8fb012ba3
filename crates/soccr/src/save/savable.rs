//! Refuses what cannot be carried without loss, even if it could be read.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, recv};

use crate::connection::State;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{sockopt, tcp};
use crate::{buffers, queue, tls};

pub(crate) fn refuse_layer(fd: BorrowedFd<'_>) -> Result<()> {
    if tls::has_layer(fd)? {
        let what = "a socket with an upper layer protocol (kTLS)";
        return Err(Error::refused(
            what,
            "its keys have no place in the plain structure: save it as a whole (C: libsoccr_write)",
        ));
    }
    Ok(())
}

/// Why a save would refuse this connection, as far as a look tells that changes nothing and takes nothing from the application:
/// what waits in its error queue, keys that nobody can read, bytes that the kernel hides. `None` does not promise that it can be saved.
pub fn refusal<Fd: AsFd + ?Sized>(socket: &Fd) -> Option<Error> {
    let fd = socket.as_fd();
    let look = || {
        check_whole(fd, super::state(fd)?)?;
        refuse_authentication(fd)?;
        tls::refuse_hidden(fd)
    };
    look().err().filter(|error| error.kind() == ErrorKind::Refused)
}

/// Keys of TCP-AO (RFC 5925, Linux 6.7) can be read by nobody, and without them the peer drops every segment.
pub(super) fn refuse_authentication(fd: BorrowedFd<'_>) -> Result<()> {
    const TCP_AO_INFO: i32 = 40;
    /// `struct tcp_ao_info_opt`
    const LENGTH: usize = 48;
    match sockopt::get_bytes(fd, tcp::SOL_TCP, TCP_AO_INFO, &mut [0; LENGTH]) {
        Ok(_) => {
            Err(Error::refused("a socket with TCP-AO", "its keys cannot be read, so they cannot be carried"))
        }
        // No keys, or a kernel without them.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => Ok(()),
        Err(error) => Err(Error::system("TCP_AO_INFO", error)),
    }
}

/// Refuses a state that is not whole. True where the connection is broken, and the
/// application has not been told.
fn check_whole(fd: BorrowedFd<'_>, state: State) -> Result<bool> {
    let refuse = |what, remedy| Err(Error::refused(what, remedy));
    let events = pending(fd)?;
    // SO_ERROR would tell more, and take it from the application. Where nothing is in the error queue, it is an error
    // that has closed the connection: a reset most often; one for another reason comes back as a reset.
    let reset = events.contains(PollFlags::ERR) && state == State::Close && has_no_notices(fd)?;
    if events.contains(PollFlags::ERR) && !reset {
        return refuse(
            "a socket with a pending error or an unread error queue",
            "read SO_ERROR or MSG_ERRQUEUE first",
        );
    }
    if state == State::Close && !events.contains(PollFlags::RDHUP) {
        return refuse("a socket that is not connected", "there is no connection to save");
    }
    Ok(reset)
}

/// Refuses also what only repair mode shows; the answer is that of [`check_whole`].
pub(super) fn check_savable(fd: BorrowedFd<'_>, state: State, decrypts: bool) -> Result<bool> {
    let refuse = |what, remedy| Err(Error::refused(what, remedy));
    let reset = check_whole(fd, state)?;
    if state == State::SynSent && queue::sends_before_handshake(fd)? {
        return refuse(
            "a handshake that carries data (TCP Fast Open)",
            "what it carries may have arrived already: wait until the handshake is over",
        );
    }
    if decrypts {
        return Ok(reset);
    }
    // TCP itself takes nothing from a queue in repair mode, not even no bytes; a BPF map of sockets answers in its place, and
    // then a queue that SIOCINQ calls empty may hold bytes.
    match retry_on_intr(|| recv(fd, &mut [0; 0], RecvFlags::DONTWAIT)) {
        Err(Errno::PERM) => Ok(reset),
        Ok(_) | Err(Errno::AGAIN) => refuse(
            "a socket in a BPF map of sockets (sockmap)",
            "neither its program nor what waits there can be carried: delete it from the map first",
        ),
        Err(error) => Err(Error::system("recv", error)),
    }
}

/// Nothing is in the error queue. Nobody can look into it without taking what is there, but its memory tells: notices of
/// `MSG_ZEROCOPY` are counted among the options, and timestamps with the receive queue.
fn has_no_notices(fd: BorrowedFd<'_>) -> Result<bool> {
    let memory = buffers::read(fd)?;
    let is_off = |name, text| Ok(tcp::get_int(fd, libc::SOL_SOCKET, name, text)? == 0);
    Ok((memory.options == 0 || is_off(libc::SO_ZEROCOPY, "SO_ZEROCOPY")?)
        && (memory.receive_queue == 0 || is_off(libc::SO_TIMESTAMPING, "SO_TIMESTAMPING")?))
}

/// Errors and hang-ups that wait for the application; nothing is consumed, unlike with `SO_ERROR`.
pub(super) fn pending(fd: BorrowedFd<'_>) -> Result<PollFlags> {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    retry_on_intr(|| poll(&mut polled, Some(&now))).map_err(|error| Error::system("poll", error))?;
    Ok(polled[0].revents())
}

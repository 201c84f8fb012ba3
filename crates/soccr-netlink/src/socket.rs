//! The socket that carries a batch to the kernel and its answers back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
    sockopt,
};

use crate::message::{Batch, messages};

/// The netlink families that soccr speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses and routes: `rtnetlink(7)`.
    Route,
    /// Packet filters, and packets that a filter copies to user space.
    Netfilter,
    /// The sockets of a network namespace: `sock_diag(7)`.
    SockDiag,
}

impl Family {
    fn protocol(self) -> Option<Protocol> {
        match self {
            Self::Route => None,
            Self::Netfilter => Some(netlink::NETFILTER),
            Self::SockDiag => Some(netlink::SOCK_DIAG),
        }
    }
}

/// The most that the kernel fills with what is dumped, or with a packet that is copied to us.
const LONGEST: usize = 256 << 10;
/// The most that an answer about one thing takes, such as a route, or an entry of connection tracking.
const ANSWER: usize = 8 << 10;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const NO_ROOM: i32 = Errno::NOBUFS.raw_os_error();
const TOO_LONG: i32 = Errno::MSGSIZE.raw_os_error();
/// Where `struct nfgenmsg` has its `res_id`.
const RESOURCE: std::ops::Range<usize> = 2..4;
/// The flag of a dump during which the dumped table changed (`NLM_F_DUMP_INTR`).
const DUMP_INTERRUPTED: u16 = 0x10;

/// One netlink socket, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    family: Family,
    buffer: Vec<u8>,
    outgoing: Vec<u8>,
    /// The number of the last message that was sent.
    sequence: u32,
    /// Every answer to it has been read.
    answered: bool,
}

impl Socket {
    /// Opens a socket of a netlink family.
    ///
    /// # Errors
    /// `EPROTONOSUPPORT` where the kernel has no such family; `EMFILE`.
    pub fn open(family: Family) -> io::Result<Self> {
        Self::open_at(family, 0)
    }

    /// Opens a socket with a port of the caller's choice; zero leaves the choice to the kernel.
    ///
    /// When a socket is closed, the kernel removes what it owned by its port, a moment after the port is free again. So owners of
    /// such things choose a port that nobody else has had.
    ///
    /// # Errors
    /// `EADDRINUSE` where another socket has the port; those of [`open`](Self::open).
    pub fn open_at(family: Family, port: u32) -> io::Result<Self> {
        let fd =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, family.protocol())?;
        if port != 0 {
            bind(&fd, &SocketAddrNetlink::new(port, 0))?;
        }
        Ok(Self { fd, family, buffer: Vec::new(), outgoing: Vec::new(), sequence: 0, answered: true })
    }

    /// Gives the socket another descriptor, such as one with a higher number.
    pub fn with_descriptor(mut self, change: impl FnOnce(OwnedFd) -> OwnedFd) -> Self {
        self.fd = change(self.fd);
        self
    }

    /// Sends the batch and waits until the kernel has acknowledged every message that asked for it.
    ///
    /// # Errors
    /// The first error that the kernel reports. The socket stays usable: answers that come later are
    /// not taken for those to the next batch. `EMSGSIZE` where an attribute is longer than netlink can tell.
    pub fn transact(&mut self, batch: &Batch) -> io::Result<()> {
        let ours = self.send(batch)?;
        let mut outcome = Ok(());
        let (mut missing, mut flags) = (batch.acknowledged(), RecvFlags::empty());
        while missing > 0 {
            match self.receive(flags) {
                Ok(()) => {}
                // The batch is carried out, and the answers are there: the first of them, if the buffer has overflowed.
                Err(_) if flags.is_empty() => {
                    flags = RecvFlags::DONTWAIT;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Errno::NOBUFS.into()),
                Err(error) => return Err(error),
            }
            for message in messages(&self.buffer) {
                if message.kind == ERROR && ours.include(message.sequence) {
                    // A failed batch answers once for the failing message and may stay silent for the rest.
                    let answer = error_of(message.payload);
                    missing = if answer.is_err() { 0 } else { missing.saturating_sub(1) };
                    outcome = outcome.and(answer);
                }
            }
        }
        self.answered = outcome.is_ok() && flags.is_empty();
        outcome
    }

    /// Sends the batch, which must hold one dump request, and gives every answer's type and payload to `each`.
    ///
    /// # Errors
    /// The error that the kernel reports, in an answer of its own or behind all others. `EINTR` where what is dumped has
    /// changed meanwhile: something may be missing, or there twice.
    pub fn dump(&mut self, batch: &Batch, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let ours = self.send(batch)?;
        let (mut interrupted, mut generation) = (false, None);
        loop {
            self.receive(RecvFlags::empty())?;
            for message in messages(&self.buffer) {
                if !ours.include(message.sequence) {
                    continue;
                }
                interrupted |= message.flags & DUMP_INTERRUPTED != 0;
                self.answered = matches!(message.kind, ERROR | DONE);
                match message.kind {
                    ERROR => return error_of(message.payload),
                    // Kernels before 3.19 send no error code.
                    DONE if message.payload.is_empty() => return complete(interrupted),
                    DONE => return error_of(message.payload).and_then(|()| complete(interrupted)),
                    kind => {
                        if self.family == Family::Netfilter {
                            // The flag does not cover elements of a set, but each part carries the generation of the rules.
                            let now =
                                message.payload.get(RESOURCE).and_then(<[u8]>::first_chunk::<2>).copied();
                            interrupted |= *generation.get_or_insert(now) != now;
                        }
                        each(kind, message.payload);
                    }
                }
            }
        }
    }

    /// Sends the batch, which must hold one request for one thing without [`ACK`](crate::ACK), and gives the answer's type
    /// and payload to `read`.
    ///
    /// # Errors
    /// The error that the kernel answers with.
    pub fn get<T>(&mut self, batch: &Batch, read: impl FnOnce(u16, &[u8]) -> T) -> io::Result<T> {
        let ours = self.send(batch)?;
        loop {
            self.receive(RecvFlags::empty())?;
            if let Some(answer) = messages(&self.buffer).find(|message| ours.include(message.sequence)) {
                self.answered = true;
                return match answer.kind {
                    ERROR => Err(error_of(answer.payload).err().unwrap_or(io::ErrorKind::InvalidData.into())),
                    kind => Ok(read(kind, answer.payload)),
                };
            }
        }
    }

    /// Like [`dump`](Self::dump), for answers that must be complete: `each` adds to the list what one answer holds. If something
    /// changed meanwhile, the dump starts over with an empty list.
    ///
    /// # Errors
    /// The errors of `dump`: `EINTR` where it changes every time.
    pub fn dump_all<T>(
        &mut self,
        batch: &Batch,
        mut each: impl FnMut(&mut Vec<T>, &[u8]),
    ) -> io::Result<Vec<T>> {
        /// A table that changes all the time must not keep us in the loop.
        const ATTEMPTS: usize = 100;
        let mut outcome = Ok(Vec::new());
        for _ in 0..ATTEMPTS {
            let mut all = Vec::new();
            outcome = self.dump(batch, |_, payload| each(&mut all, payload)).map(|()| all);
            if !matches!(&outcome, Err(error) if error.kind() == io::ErrorKind::Interrupted) {
                break;
            }
        }
        outcome
    }

    /// Reads what the kernel has sent unasked, without waiting, and gives every message's type and payload to `each`.
    /// Returns whether there was anything.
    ///
    /// # Errors
    /// `ENOBUFS` where the kernel had to throw messages away since the last call.
    pub fn poll(&mut self, mut each: impl FnMut(u16, &[u8])) -> io::Result<bool> {
        self.buffer.reserve(LONGEST.saturating_sub(self.buffer.len()));
        match self.receive(RecvFlags::DONTWAIT) {
            Ok(()) => {
                messages(&self.buffer).for_each(|message| each(message.kind, message.payload));
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Lets the kernel queue up to `bytes` of messages for us (`SO_RCVBUFFORCE`, else `SO_RCVBUF`).
    ///
    /// # Errors
    /// The errors of `setsockopt(2)`.
    pub fn set_receive_buffer(&self, bytes: usize) -> io::Result<()> {
        sockopt::set_socket_recv_buffer_size_force(&self.fd, bytes)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(&self.fd, bytes))
            .map_err(Into::into)
    }

    /// Lets us send batches of up to `bytes` (`SO_SNDBUFFORCE`, else `SO_SNDBUF`).
    ///
    /// # Errors
    /// The errors of `setsockopt(2)`.
    pub fn set_send_buffer(&self, bytes: usize) -> io::Result<()> {
        sockopt::set_socket_send_buffer_size_force(&self.fd, bytes)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&self.fd, bytes))
            .map_err(Into::into)
    }

    fn send(&mut self, batch: &Batch) -> io::Result<Numbers> {
        if batch.is_too_long() {
            return Err(Errno::MSGSIZE.into());
        }
        if !self.answered {
            self.forget_answers();
        }
        self.answered = false;
        // An answer holds at most the request and one thing. Allocating the room of a dump would take longer than the request;
        // but a socket may have a thousand keys of TCP MD5.
        let is_long = batch.dumps() || self.family == Family::SockDiag;
        let room = if is_long { LONGEST } else { batch.as_bytes().len() + ANSWER };
        self.buffer.reserve(room.saturating_sub(self.buffer.len()));
        let ours = Numbers { base: self.sequence, count: batch.messages() };
        batch.number(ours.base, &mut self.outgoing);
        self.sequence = ours.base.wrapping_add(ours.count);
        let kernel = SocketAddrNetlink::new(0, 0);
        retry_on_intr(|| sendto(&self.fd, &self.outgoing, SendFlags::empty(), &kernel))?;
        Ok(ours)
    }

    /// Drains the socket. After an overflow the kernel reports ENOBUFS once and drops further answers silently, until everything
    /// that it has queued is read.
    fn forget_answers(&mut self) {
        while match self.receive(RecvFlags::DONTWAIT) {
            Ok(()) => true,
            Err(error) => matches!(error.raw_os_error(), Some(NO_ROOM | TOO_LONG)),
        } {}
    }

    /// Receives into the empty buffer.
    ///
    /// # Errors
    /// `EMSGSIZE` where there is no room for all of it, and the rest is lost.
    fn receive(&mut self, flags: RecvFlags) -> io::Result<()> {
        self.buffer.clear();
        let flags = flags | RecvFlags::TRUNC;
        let (_, length) = retry_on_intr(|| recv(&self.fd, spare_capacity(&mut self.buffer), flags))?;
        if length > self.buffer.len() { Err(Errno::MSGSIZE.into()) } else { Ok(()) }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The sequence numbers of a batch, which its answers repeat.
#[derive(Clone, Copy)]
struct Numbers {
    /// The one before the first.
    base: u32,
    count: u32,
}

impl Numbers {
    fn include(self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.base).wrapping_sub(1) < self.count
    }
}

fn complete(interrupted: bool) -> io::Result<()> {
    if interrupted { Err(Errno::INTR.into()) } else { Ok(()) }
}

/// An `NLMSG_ERROR` carries the negated errno, or zero for an acknowledgement.
fn error_of(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ACK, REQUEST};

    /// One message that asks for an acknowledgement.
    fn of(kind: u16) -> Batch {
        let mut batch = Batch::new();
        batch.message(kind, REQUEST | ACK, |m| m.bytes(&[0; 4]));
        batch
    }

    #[test]
    fn more_answers_than_there_is_room_for_do_no_harm() {
        let mut many = Batch::new();
        for _ in 0..45 {
            // An error comes back with the whole request.
            many.message(0xfff, REQUEST | ACK, |m| m.bytes(&[0; 4000]));
        }
        let mut socket = Socket::open(Family::Route).unwrap();
        let error = socket.transact(&of(0xfff)).unwrap_err();
        for _ in 0..3 {
            assert_eq!(socket.transact(&many).unwrap_err().raw_os_error(), error.raw_os_error());
        }
        socket.transact(&of(1)).unwrap();
    }

    #[test]
    fn an_answer_that_is_cut_is_an_error() {
        let mut socket = Socket::open(Family::Route).unwrap();
        socket.send(&of(1)).unwrap();
        socket.buffer = Vec::with_capacity(1);
        let error = socket.receive(RecvFlags::empty()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(TOO_LONG));
        socket.send(&of(0xfff)).unwrap();
        socket.buffer = Vec::with_capacity(1);
        // What is left of another answer is no answer.
        socket.transact(&of(1)).unwrap();
    }

    #[test]
    fn answers_that_nobody_waited_for_are_not_taken_for_others() {
        let (nothing, unknown) = (of(1), of(0xfff));
        let mut socket = Socket::open(Family::Route).unwrap();
        socket.transact(&nothing).unwrap();
        socket.send(&nothing).unwrap();
        socket.transact(&unknown).unwrap_err();
        socket.send(&unknown).unwrap();
        socket.transact(&nothing).unwrap();
        socket.send(&unknown).unwrap();
        socket.dump(&unknown, |_, _| ()).unwrap_err();
    }
}

//! The bytes in the two queues: read without consuming them, written without sending them.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::buffers::{self, Buffer};
use crate::connection::Urgent;
use crate::error::{Error, Result};
use crate::sys::tcp::{self, Queue};
use crate::tls;

/// The kernel keeps each write to the receive queue in one linear buffer; much larger ones can fail to allocate.
const RECEIVE_CHUNK: usize = 68 << 10;

/// Offset to which `SO_PEEK_OFF` is set where the application does not use it.
const NO_PEEK_OFFSET: i32 = -1;

/// The length of the receive queue and the urgent mark in it.
///
/// `SIOCINQ` stops at an urgent mark, unless urgent data is read in line: so it is asked both ways.
pub(crate) fn receive_queue_extent(fd: BorrowedFd<'_>) -> Result<(u32, Option<Urgent>)> {
    let first = tcp::unread(fd)?;
    if first == 0 && !tcp::at_mark(fd)? {
        return Ok((0, None));
    }
    let inline = get_inline(fd)?;
    let lengths = both_lengths(fd, inline, first);
    set_inline(fd, inline)?;
    let (to_mark, whole, unread_mark) = lengths?;
    let urgent = (to_mark < whole).then_some(Urgent { offset: to_mark, consumed: !unread_mark });
    Ok((whole, urgent))
}

/// Unread bytes are there that this kernel shows to nobody who leaves them to the application: behind an urgent mark, before
/// Linux 6.9 (IPv6: 6.12). Such a connection cannot be saved. Nothing is changed by looking.
pub fn hides_unread<Fd: AsFd + ?Sized>(socket: &Fd) -> bool {
    let fd = socket.as_fd();
    // Kernel TLS takes the question for one for the next record, and decrypts that.
    if !tls::has_layer(fd).is_ok_and(|has_layer| !has_layer) {
        return false;
    }
    let peeks_behind = tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, "SO_PEEK_OFF").is_ok();
    let urgent = || recv(fd, &mut [0], RecvFlags::OOB | RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok();
    !peeks_behind && tcp::unread(fd).is_ok_and(|bytes| bytes > 0) && urgent()
}

/// The peer's FIN lies behind the `inq_len` bytes in the queue of a socket that has no connection any more, whose state does
/// not tell.
pub(crate) fn has_ended(fd: BorrowedFd<'_>, inq_len: u32) -> Result<bool> {
    if inq_len == 0 {
        return tcp::is_at_end(fd);
    }
    tcp::select_queue(fd, Queue::Receive)?;
    with_peek_offset(fd, NO_PEEK_OFFSET, || tcp::unread_with_fin(fd)).map(|length| length > inq_len)
}

/// `SIOCINQ` up to the mark and altogether, and whether the urgent byte can still be read out of band; `first` is
/// what it says without further ado.
fn both_lengths(fd: BorrowedFd<'_>, inline: bool, first: u32) -> Result<(u32, u32, bool)> {
    set_inline(fd, !inline)?;
    let second = tcp::unread(fd)?;
    let (to_mark, whole) = if inline { (second, first) } else { (first, second) };
    if to_mark >= whole {
        return Ok((whole, whole, false));
    }
    set_inline(fd, false)?;
    tcp::select_queue(fd, Queue::Receive)?;
    match retry_on_intr(|| recv(fd, &mut [0], RecvFlags::OOB | RecvFlags::PEEK | RecvFlags::DONTWAIT)) {
        Ok(_) => Ok((to_mark, whole, true)),
        Err(Errno::INVAL) => Ok((to_mark, whole, false)),
        Err(error) => Err(Error::system("recv(MSG_OOB)", error)),
    }
}

/// Copies the receive queue, or the send queue, to where `bytes` begins. The queue is selected afterwards.
///
/// # Errors
/// [`changed`] where the queue has another length by now.
pub(crate) fn peek(
    fd: BorrowedFd<'_>,
    queue: Queue,
    bytes: &mut Vec<u8>,
    length: u32,
    marked: bool,
) -> Result<()> {
    bytes.clear();
    reserve(bytes, length as usize)?;
    peek_into(fd, queue, bytes, length, marked)
}

/// The same into memory that nobody has written to, of one byte more than the queue has.
pub(crate) fn peek_uninit(
    fd: BorrowedFd<'_>,
    queue: Queue,
    bytes: &mut [MaybeUninit<u8>],
    length: u32,
    marked: bool,
) -> Result<()> {
    peek_into(fd, queue, &mut Uninit { bytes, filled: 0 }, length, marked)
}

fn peek_into(
    fd: BorrowedFd<'_>,
    queue: Queue,
    room: &mut impl Room,
    length: u32,
    marked: bool,
) -> Result<()> {
    if length == 0 {
        return Ok(());
    }
    tcp::select_queue(fd, queue)?;
    match queue {
        Queue::Receive if marked => peek_across_mark(fd, room, length)?,
        Queue::Receive => with_peek_offset(fd, NO_PEEK_OFFSET, || peek_once(fd, room).map(drop))?,
        Queue::Send => {
            let peeked = peek_unacknowledged(fd, room, length as usize);
            // While this queue is selected, the timer by which a sender paces itself counts all that is unsent as sent.
            tcp::select_queue(fd, None)?;
            peeked?;
        }
    }
    if room.filled() == length as usize { Ok(()) } else { Err(changed()) }
}

/// Memory that fills up from its beginning.
trait Room {
    fn filled(&self) -> usize;

    /// `recv(2)` behind what is there. Returns what the kernel does, which of a send queue is its whole length.
    fn receive(&mut self, fd: BorrowedFd<'_>, flags: RecvFlags) -> rustix::io::Result<usize>;

    /// Puts these bytes, for which there is room, in the place of all that is there.
    fn replace(&mut self, bytes: &[u8]);
}

impl Room for Vec<u8> {
    fn filled(&self) -> usize {
        self.len()
    }

    fn receive(&mut self, fd: BorrowedFd<'_>, flags: RecvFlags) -> rustix::io::Result<usize> {
        recv(fd, rustix::buffer::spare_capacity(self), flags).map(|(_, length)| length)
    }

    fn replace(&mut self, bytes: &[u8]) {
        self.clear();
        self.extend_from_slice(bytes);
    }
}

struct Uninit<'a> {
    bytes: &'a mut [MaybeUninit<u8>],
    filled: usize,
}

impl Room for Uninit<'_> {
    fn filled(&self) -> usize {
        self.filled
    }

    fn receive(&mut self, fd: BorrowedFd<'_>, flags: RecvFlags) -> rustix::io::Result<usize> {
        let ((received, _), length) = recv(fd, &mut self.bytes[self.filled..], flags)?;
        self.filled += received.len();
        Ok(length)
    }

    fn replace(&mut self, bytes: &[u8]) {
        self.filled = bytes.len();
        self.bytes.iter_mut().zip(bytes).for_each(|(place, byte)| {
            place.write(*byte);
        });
    }
}

/// The queues were not the same before and after they were read.
pub(crate) fn changed() -> Error {
    let remedy = "lock its traffic first, and let no process use the socket";
    Error::changed("a connection that changes while it is read", remedy)
}

/// Bytes are in the send queue of a socket in SYN_SENT, of which no length tells.
pub(crate) fn sends_before_handshake(fd: BorrowedFd<'_>) -> Result<bool> {
    tcp::select_queue(fd, Queue::Send)?;
    peek_once(fd, &mut Uninit { bytes: &mut [MaybeUninit::uninit()], filled: 0 }).map(|length| length > 0)
}

/// The send queue without what the peer has acknowledged of its first segment. The kernel keeps that, and shows it, until all
/// of the segment is acknowledged or it is repeated.
fn peek_unacknowledged(fd: BorrowedFd<'_>, room: &mut impl Room, length: usize) -> Result<()> {
    let whole_length = peek_once(fd, room)?;
    if whole_length <= length {
        return Ok(());
    }
    let mut whole = Vec::new();
    reserve(&mut whole, whole_length)?;
    if peek_once(fd, &mut whole)? != whole_length {
        return Err(changed());
    }
    room.replace(&whole[whole_length - length..]);
    Ok(())
}

/// Room for a queue, and for one byte more than expected, so that one that has grown is noticed.
fn reserve(bytes: &mut Vec<u8>, length: usize) -> Result<()> {
    bytes.try_reserve_exact(length + 1).map_err(|_| Error::out_of_memory())
}

fn peek_once(fd: BorrowedFd<'_>, room: &mut impl Room) -> Result<usize> {
    loop {
        match room.receive(fd, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(0),
            Ok(length) => return Ok(length),
            Err(error) => return Err(Error::system("recv(MSG_PEEK)", error)),
        }
    }
}

/// A peek ends at the urgent mark, unless it begins there; `SO_PEEK_OFF` goes on behind it, if urgent data is in line.
fn peek_across_mark(fd: BorrowedFd<'_>, room: &mut impl Room, length: u32) -> Result<()> {
    let inline = get_inline(fd)?;
    set_inline(fd, true)?;
    let read = with_peek_offset(fd, NO_PEEK_OFFSET, || peek_once(fd, room)).and_then(|_| {
        let first = room.filled();
        if first >= length as usize {
            return Ok(());
        }
        with_peek_offset(fd, first as i32, || {
            let mut before = 0;
            while room.filled() != before && room.filled() < length as usize {
                before = room.filled();
                peek_once(fd, room)?;
            }
            Ok(())
        })
    });
    set_inline(fd, inline)?;
    read
}

/// Runs `body` with another `SO_PEEK_OFF` than the application's, which is put back. TCP has had it since Linux 6.9, and over
/// IPv6 since 6.12; before, no application can have set it.
fn with_peek_offset<T>(fd: BorrowedFd<'_>, offset: i32, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let option = |value| tcp::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, "SO_PEEK_OFF", value);
    let before = match tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, "SO_PEEK_OFF") {
        Err(error) if error.errno() == Some(libc::EOPNOTSUPP) && offset == NO_PEEK_OFFSET => offset,
        Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => return Err(beyond_reach()),
        before => before?,
    };
    if before == offset {
        return body();
    }
    option(offset)?;
    let result = body();
    option(before)?;
    result
}

/// Without `SO_PEEK_OFF` nothing reads behind the urgent mark and leaves what is before it.
fn beyond_reach() -> Error {
    Error::refused(
        "urgent data behind other unread bytes",
        "this kernel cannot read it without consuming them: let the application read up to the mark, or use Linux 6.9 \
         (IPv6: 6.12)",
    )
}

fn get_inline(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, "SO_OOBINLINE")? != 0)
}

pub(crate) fn set_inline(fd: BorrowedFd<'_>, on: bool) -> Result<()> {
    tcp::set_int(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, "SO_OOBINLINE", on.into())
}

/// Puts bytes into the receive queue of a socket in repair mode.
pub(crate) fn fill_receive(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    tcp::select_queue(fd, Queue::Receive)?;
    fill(fd, bytes, RECEIVE_CHUNK, Buffer::Receive, "the receive queue")
}

/// The same in pieces, each of which takes a block of memory of its own, until the buffer is as full as it was before. The kernel
/// counts free memory as a window that the peer knows of, but nobody has told the peer.
pub(crate) fn fill_receive_buffer(fd: BorrowedFd<'_>, mut bytes: &[u8], size: u32) -> Result<()> {
    /// More than half of what fits into the smallest block, so that two pieces never share one.
    const PIECE: usize = 193;
    const PIECE_TAKES: usize = 1280;
    // At most, in one piece or in chunks.
    let takes = |length: usize| match length {
        0..4096 => 256 + (length + 320).next_power_of_two(),
        _ => length + length / 16 + 1024,
    };
    while bytes.len() > PIECE {
        let room = size.saturating_sub(buffers::read(fd)?.receive_queue) as usize;
        let (piece, rest) = bytes.split_at(PIECE);
        if room < PIECE_TAKES + takes(rest.len()) {
            break;
        }
        fill_receive(fd, piece)?;
        bytes = rest;
    }
    fill_receive(fd, bytes)
}

/// Where what has arrived for a socket in repair mode ends.
pub(crate) fn rcv_nxt(fd: BorrowedFd<'_>) -> Result<u32> {
    let rcv_nxt = tcp::queue_seq(fd, Queue::Receive);
    tcp::select_queue(fd, None)?;
    rcv_nxt
}

/// Appends to the receive queue of a socket in repair mode, which ends at `seq`. Nothing may arrive meanwhile: the
/// kernel appends behind whatever is there by then. Returns how many of the pieces are in the queue as a whole.
///
/// # Errors
/// [`changed`] where something has arrived nevertheless: then the bytes are not in order.
pub(crate) fn append<'a>(
    fd: BorrowedFd<'_>,
    seq: u32,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<usize> {
    tcp::select_queue(fd, Queue::Receive)?;
    let (mut appended, mut end) = (0, seq);
    for piece in pieces {
        let written = append_some(fd, piece);
        end = end.wrapping_add(written as u32);
        if written < piece.len() {
            break;
        }
        appended += 1;
    }
    if rcv_nxt(fd)? == end { Ok(appended) } else { Err(changed()) }
}

/// Writes what there is room for, and returns how much that is.
fn append_some(fd: BorrowedFd<'_>, bytes: &[u8]) -> usize {
    let mut length = 0;
    while length < bytes.len() {
        match send(fd, &bytes[length..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(written) => length += written,
            Err(Errno::INTR) => {}
            Err(_) => break,
        }
    }
    length
}

/// Puts bytes into the send queue, as sent in repair mode and as unsent else.
pub(crate) fn fill_send(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    fill(fd, bytes, usize::MAX, Buffer::Send, "the send queue")
}

/// Reads the urgent byte out of band, as the application had done.
pub(crate) fn consume_urgent(fd: BorrowedFd<'_>) -> Result<()> {
    retry_on_intr(|| recv(fd, &mut [0], RecvFlags::OOB | RecvFlags::DONTWAIT))
        .map(|_| ())
        .map_err(|error| Error::system("recv(MSG_OOB)", error))
}

fn fill(
    fd: BorrowedFd<'_>,
    mut bytes: &[u8],
    mut chunk: usize,
    buffer: Buffer,
    text: &'static str,
) -> Result<()> {
    while !bytes.is_empty() {
        let piece = &bytes[..bytes.len().min(chunk)];
        match send(fd, piece, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN | Errno::NOBUFS) => buffers::grow(fd, buffer)?,
            Err(Errno::NOMEM) if piece.len() > 4096 => chunk = piece.len() / 2,
            Err(error) => return Err(Error::system(text, error)),
        }
    }
    Ok(())
}

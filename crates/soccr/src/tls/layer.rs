//! The TLS layer of a socket: what it is, whether part of a record waits in it, and how it is put on a restored socket.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::{APPLICATION_DATA, Cipher, Secrets, Summary, Tls, Version};
use crate::buffers::{self, Memory};
use crate::connection::{Flow, State};
use crate::diag::Diag;
use crate::error::{Error, Result};
use crate::sys::tcp::{self, Repair};
use crate::sys::tls::{self, Direction};

/// What helps where a part of a connection with TLS is out of reach.
const SETTLE: &str = "call `soccr::tls::settle` before the lock, while nobody writes";

/// With less, the kernel may take the beginning of a record out of TCP, and nothing shows it (`SO_RCVBUF` in bytes).
const LEAST_RECEIVE_BUFFER: u32 = 65_536;

/// Many records of the largest size, in bytes.
const MORE_ROOM: u32 = 1 << 20;

/// The unit in which the kernel reserves memory for sockets: a page, or a part of one.
const QUANTUM: u32 = 4096;

/// Longer waits would be felt, shorter ones only compute.
const LOOK_AGAIN: Duration = Duration::from_micros(500);

/// Whether the kernel encrypts or decrypts for this socket, or would with keys (`TCP_ULP`).
///
/// # Errors
/// System: the option.
pub fn is_on<Fd: AsFd + ?Sized>(socket: &Fd) -> Result<bool> {
    Ok(tls::upper_layer(socket.as_fd())? == b"tls")
}

/// Some protocol is on top of TCP in the kernel.
pub(crate) fn has_layer(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(!tls::upper_layer(fd)?.is_empty())
}

/// The TLS layer of a socket, nothing yet read from it; `None` where there is no layer.
///
/// # Errors
/// Refused: what cannot be carried, by its name.
pub(crate) fn read(fd: BorrowedFd<'_>) -> Result<Option<Tls>> {
    match &tls::upper_layer(fd)?[..] {
        [] => Ok(None),
        b"tls" => read_tls(fd).map(Some),
        other => {
            let name = String::from_utf8_lossy(other).escape_debug().to_string();
            Err(refused(
                format!("a socket with the upper layer protocol {name}"),
                "only kernel TLS is carried",
            ))
        }
    }
}

fn read_tls(fd: BorrowedFd<'_>) -> Result<Tls> {
    let kinds = [tls::kind(fd, Direction::Transmit)?, tls::kind(fd, Direction::Receive)?];
    let Some(kind) = kinds[0].or(kinds[1]) else {
        return Err(refused("kernel TLS without keys", "save it before or after its handshake"));
    };
    let (Some(version), Some(cipher)) = (Version::from_wire(kind.0), Cipher::from_kernel(kind.1)) else {
        // linux/tls.h: ciphers that are not carried.
        let cipher = match kind.1 {
            55 => "sm4-gcm".to_owned(),
            56 => "sm4-ccm".to_owned(),
            57 => "aria-gcm-128".to_owned(),
            58 => "aria-gcm-256".to_owned(),
            number => format!("cipher {number}"),
        };
        let what = format!("kernel TLS of version {:#06x} with {cipher}", kind.0);
        return Err(refused(
            what,
            "AES-GCM, AES-CCM-128 and ChaCha20-Poly1305 of TLS 1.2 and 1.3 are carried",
        ));
    };
    if kinds.iter().flatten().any(|other| *other != kind) {
        return Err(refused("kernel TLS with two ciphers", "both directions have the same in TLS"));
    }
    if tls::limits_records(fd)? {
        return Err(refused(
            "kernel TLS with records of a limited size",
            "TLS_TX_MAX_PAYLOAD_LEN is not carried",
        ));
    }
    let secrets = |direction: Direction| {
        let there = kinds[usize::from(direction == Direction::Receive)].is_some();
        there.then(|| tls::secrets(fd, direction, cipher.secrets_len()).map(Secrets)).transpose()
    };
    let (transmit, receive) = (secrets(Direction::Transmit)?, secrets(Direction::Receive)?);
    Ok(Tls {
        version,
        cipher,
        zerocopy_sendfile: transmit.is_some() && tls::zerocopy_sendfile(fd)?,
        expect_no_padding: receive.is_some() && tls::expects_no_padding(fd)?,
        transmit,
        receive,
        unread: Vec::new(),
    })
}

/// How many records the kernel has decrypted.
pub(super) fn records_read(fd: BorrowedFd<'_>) -> Result<u64> {
    Ok(read(fd)?.and_then(|tls| tls.receive).map_or(0, |secrets| secrets.record_number()))
}

fn refused(what: impl Into<std::borrow::Cow<'static, str>>, remedy: &'static str) -> Error {
    Error::refused(what, remedy)
}

/// Refuses what would be lost, before anything is read: an offload to a device, a part of a record within the layer, bytes in a
/// send queue that does not show itself. Where what has arrived `is_read`, nothing more can hide.
pub(crate) fn check_settled(fd: BorrowedFd<'_>, flow: Flow, tls: &Tls, is_read: bool) -> Result<()> {
    let summary = Diag::beside(fd)?.describe(fd, flow, |socket| socket.tls())?;
    let Some(summary) = summary else {
        return Err(refused(
            "kernel TLS that sock_diag does not describe",
            "it tells whether a device does the work",
        ));
    };
    if let Some(what) = summary.refusal() {
        return Err(refused(what, "only what the kernel does itself is carried"));
    }
    let memory = buffers::read(fd)?;
    if tls.receive.is_some() {
        refuse_obscured(fd, &memory)?;
        if tcp::unacknowledged(fd)? > fin_queued(fd)? {
            let what = "unacknowledged bytes of a socket on which the kernel decrypts";
            return Err(refused(what, SETTLE));
        }
        if !is_read && !shows_all(fd)? {
            return Err(refused("kernel TLS that may have begun to read a record", SETTLE));
        }
    }
    if tls.transmit.is_some() && holds_bytes(&memory) {
        return Err(refused("a part of a record that TLS has not given to TCP", SETTLE));
    }
    Ok(())
}

/// Where the kernel decrypts, no more must be between TCP and TLS than it shows.
fn refuse_obscured(fd: BorrowedFd<'_>, memory: &Memory) -> Result<()> {
    if memory.buffers.receive < LEAST_RECEIVE_BUFFER {
        let what = format!("kernel TLS with a receive buffer of {} bytes", memory.buffers.receive);
        return Err(refused(
            what,
            "it hides half records: let the application set SO_RCVBUF to 32768 or more",
        ));
    }
    if tcp::at_mark(fd)? {
        return Err(refused("an urgent mark in a TLS connection", "the kernel decrypts nothing behind it"));
    }
    Ok(())
}

/// The same of a socket about which nothing is known yet.
pub(crate) fn refuse_hidden(fd: BorrowedFd<'_>) -> Result<()> {
    if is_on(&fd)? && tls::kind(fd, Direction::Receive)?.is_some() {
        refuse_obscured(fd, &buffers::read(fd)?)?;
    }
    Ok(())
}

/// The FIN counts as one of the bytes that are not acknowledged.
fn fin_queued(fd: BorrowedFd<'_>) -> Result<u32> {
    let state = crate::save::state(fd)?;
    Ok(u32::from(state.fin_queued() && !state.fin_acknowledged()))
}

/// No beginning of a record has been taken out of TCP, as the kernel does where the receive buffer is nearly full. Nothing shows
/// it, but then TCP's queue is empty, and the peer is about to send the rest: it has a retransmission timeout's time.
fn shows_all(fd: BorrowedFd<'_>) -> Result<bool> {
    let info = tcp::info(fd)?;
    let quiet = Duration::from_millis(info.last_data_recv.into());
    Ok(tcp::unread(fd)? > 0
        || quiet >= Duration::from_micros(info.rto.into())
        || crate::save::kernel_state(&info)?.fin_received())
}

/// Bytes lie between the application and TCP.
///
/// No call tells, but the kernel's book-keeping does: it reserves memory for a socket in such units, and what is neither free nor
/// charged to one of TCP's queues is charged to the TLS layer.
fn holds_bytes(memory: &Memory) -> bool {
    !memory.reserved.is_multiple_of(QUANTUM)
}

/// Ends a connection with kernel TLS that was saved and [detached](crate::Paused::detach), though others have descriptors of its
/// socket (`SOCK_DESTROY`). They see an ordinary error (`ECONNABORTED`), and its addresses are free. The connection lives on
/// in what was saved.
///
/// The kernel sends the peer a reset: a lock must hold it back.
///
/// # Errors
/// - System: `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` where the kernel lacks `CONFIG_INET_DIAG_DESTROY`.
/// - Refused: a socket that is not in repair mode, so that its connection may go on.
pub fn discard<Fd: AsFd + ?Sized>(socket: &Fd, flow: Flow) -> Result<()> {
    let fd = socket.as_fd();
    let end = || {
        if !tcp::in_repair(fd)? {
            return Err(refused("a socket that is not in repair mode", "detach it first"));
        }
        Diag::beside(fd)?
            .destroy(flow)
            .map_err(|error| error.advise("without SOCK_DESTROY only the program itself can give it away"))?;
        if crate::save::kernel_state(&tcp::info(fd)?)? != State::Close {
            return Err(refused(
                "a socket that sock_diag does not find",
                "is it in another network namespace?",
            ));
        }
        // Repair mode would turn the owner's later calls into EPERM, which says less.
        tcp::set_repair(fd, Repair::OffNoProbe)
    };
    end().map_err(|error: Error| error.at("discard"))
}

/// Brings a socket with kernel TLS to where [`save`](crate::Paused::save) can read it whole: no record is open
/// (`MSG_MORE`) or half on its way into TCP; and where the kernel decrypts, the peer has acknowledged everything, within
/// `limit`. To be called before the lock, while nobody writes to the socket. Other sockets are left alone.
///
/// # Errors
/// - Refused: TLS that is not carried; a peer that does not acknowledge in time. Nothing has changed for the application.
/// - System: the option.
pub fn settle<Fd: AsFd + ?Sized>(socket: &Fd, limit: Duration) -> Result<()> {
    let fd = socket.as_fd();
    read(fd)
        .and_then(|tls| tls.map_or(Ok(()), |tls| settle_layer(fd, &tls, Instant::now() + limit)))
        .map_err(|error| error.at("settle"))
}

fn settle_layer(fd: BorrowedFd<'_>, tls: &Tls, deadline: Instant) -> Result<()> {
    if tls.transmit.is_none() {
        return wait(fd, tls, deadline);
    }
    let sent = tls::send(fd, APPLICATION_DATA, &[]).or_else(|error| match error.kind() {
        // The record is closed, and half on its way.
        std::io::ErrorKind::WouldBlock => Ok(0),
        _ => Err(error),
    });
    sent.map_err(|error| Error::system("sendmsg", error))?;
    // A larger send buffer, once it is set, sets half records in motion. Without the privilege it could only become smaller.
    let before = buffers::read(fd)?.buffers;
    let larger = (before.send / 2).saturating_add(MORE_ROOM).min(i32::MAX as u32 / 2) as i32;
    match tcp::set_int(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, "SO_SNDBUFFORCE", larger) {
        Err(error) if error.errno() == Some(libc::EPERM) => return wait(fd, tls, deadline),
        grown => grown?,
    }
    let waited = wait(fd, tls, deadline);
    let now = buffers::read(fd)?.buffers;
    buffers::write(fd, now, before)?;
    waited
}

fn wait(fd: BorrowedFd<'_>, tls: &Tls, deadline: Instant) -> Result<()> {
    loop {
        let unacknowledged = tcp::unacknowledged(fd)?;
        let drained = tls.receive.is_none() || (unacknowledged <= fin_queued(fd)? && shows_all(fd)?);
        if drained && (tls.transmit.is_none() || !holds_bytes(&buffers::read(fd)?)) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let what = format!(
                "{unacknowledged} bytes that the peer does not acknowledge, or a record that goes on arriving"
            );
            let remedy = "a socket on which the kernel decrypts cannot be saved like that: let the peer read, or wait longer";
            return Err(refused(what, remedy));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

impl Tls {
    /// Gives the keys of a handshake to the kernel: from here on it encrypts what is written to the socket, and decrypts what is read,
    /// as far as there are keys for that.
    ///
    /// # Errors
    /// - System: the option; the kernel has no TLS, or not this cipher.
    /// - Invalid: `unread` records, which only a restore can bring back.
    pub fn start<Fd: AsFd + ?Sized>(&self, socket: &Fd) -> Result<()> {
        if !self.unread.is_empty() {
            return Err(Error::invalid("records that have been read already").at("start"));
        }
        self.attach(socket.as_fd()).map_err(|error| error.at("start"))
    }

    /// Puts the layer on a socket that is ESTABLISHED and has its queues, and reads it back.
    pub(crate) fn attach(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let kind = (self.version as u16, self.cipher as u16);
        let receive = self.receive.as_ref().map(|secrets| secrets.before(self.fragments().count() as u64));
        tls::set_upper_layer(fd)?;
        if let Some(receive) = &receive {
            tls::set_secrets(fd, Direction::Receive, kind, receive.as_bytes())?;
            if self.expect_no_padding {
                tls::set_expect_no_padding(fd)?;
            }
        }
        // From here on everything that is written is encrypted.
        if let Some(transmit) = &self.transmit {
            tls::set_secrets(fd, Direction::Transmit, kind, transmit.as_bytes())?;
            if self.zerocopy_sendfile {
                tls::set_zerocopy_sendfile(fd)?;
            }
        }
        let wanted = Self { receive, unread: Vec::new(), ..self.without_records() };
        match read(fd)? {
            Some(now) if now == wanted => Ok(()),
            _ => Err(refused("a TLS layer that differs from what was set", "this kernel's TLS is not known")),
        }
    }

    fn without_records(&self) -> Self {
        Self { transmit: self.transmit.clone(), receive: None, unread: Vec::new(), ..*self }
    }
}

impl Summary {
    /// From the numbers that `sock_diag` tells: version, cipher, and who does the work in each direction.
    pub(crate) fn of(version: u16, cipher: u16, transmit: u16, receive: u16) -> Self {
        /// `TLS_CONF_SW`; below it nobody does the work, above it a device.
        const SOFTWARE: u16 = 2;
        Self {
            version: Version::from_wire(version),
            cipher: Cipher::from_kernel(cipher),
            transmit: transmit >= SOFTWARE,
            receive: receive >= SOFTWARE,
            offloaded: transmit > SOFTWARE || receive > SOFTWARE,
        }
    }
}

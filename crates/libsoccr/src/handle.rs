//! `struct libsoccr_sk`: a socket, what is being done with it, and the memory that belongs to it.

use std::io;
use std::mem::replace;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use soccr_core::Connection;
use soccr_core::connection::{ControlBlock, Flow, State};
use soccr_core::{ErrorKind, Paused, Queue, Restore, Restored};

use crate::data::{Data, Extras};
use crate::failure::{Failure, LastError, Result};
use crate::staged::Staged;
use crate::sys::address;
use crate::sys::claim::Claim;
use crate::sys::memory::{Given, Memory};

/// One of something for each queue.
#[derive(Debug, Default)]
pub(crate) struct PerQueue<T> {
    receive: T,
    send: T,
}

impl<T> PerQueue<T> {
    pub(crate) fn of(&mut self, queue: Queue) -> &mut T {
        match queue {
            Queue::Receive => &mut self.receive,
            Queue::Send => &mut self.send,
        }
    }
}

/// One of the two addresses, as `self` chooses it in C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Own,
    Peer,
}

/// What a handle returns is the caller's with `SOCCR_MEM_EXCL`, and else freed together with the handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Caller,
    Handle,
}

/// A queue that a save has read.
#[derive(Debug)]
struct Read {
    bytes: Memory,
    /// The caller may look at it as long as the handle lives.
    lent: bool,
}

/// An open handle.
#[derive(Debug)]
pub(crate) struct Handle {
    /// None before a connection that was read is restored.
    socket: Option<BorrowedFd<'static>>,
    stage: Stage,
    /// The queues that the last save has read, until they are given away.
    read: PerQueue<Option<Read>>,
    /// Older queues, and addresses, that the caller may still look at.
    lent: Vec<Memory>,
    /// Queues to restore.
    pub(crate) given: PerQueue<Option<Given>>,
    own_address: Option<SocketAddr>,
    peer_address: Option<SocketAddr>,
    pub(crate) last_error: Option<LastError>,
    claim: Option<Claim>,
}

#[derive(Debug)]
enum Stage {
    /// Read from an image, and not restored yet.
    Read(Box<Connection>),
    Paused(Paused<'static>),
    Restoring(Box<Staged>),
    Restored(Restored<BorrowedFd<'static>>),
    /// Restored in SYN_SENT: the handshake has begun, and repair mode has ended.
    Connecting,
    /// Half restored: to be closed, in repair mode and therefore silently.
    Failed,
}

impl Stage {
    fn is(&self) -> &'static str {
        match self {
            Self::Read(_) => "the connection comes from an image — libsoccr_open restores it",
            Self::Paused(_) => "the socket is paused",
            Self::Restoring(_) => "the socket is being restored",
            Self::Restored(_) | Self::Connecting => "the socket is restored already",
            Self::Failed => "a restore onto this socket has failed: close it",
        }
    }
}

impl Handle {
    pub(crate) fn pause(socket: BorrowedFd<'static>) -> Result<Self> {
        // Repair mode without a handle here is what a process has left behind that died: there is nobody to disturb.
        let (claim, paused) = Claim::with(socket, || Ok(Paused::new_or_take_over(socket)?.with_tls()))?;
        Ok(Self { socket: Some(socket), claim: Some(claim), ..Self::new(Stage::Paused(paused)) })
    }

    fn new(stage: Stage) -> Self {
        Self {
            socket: None,
            stage,
            read: PerQueue::default(),
            lent: Vec::new(),
            given: PerQueue::default(),
            own_address: None,
            peer_address: None,
            last_error: None,
            claim: None,
        }
    }

    /// A connection from an image, to be [opened](Self::open).
    pub(crate) fn read(image: impl io::Read) -> Result<Self> {
        let connection = soccr_image::read(image)?;
        let (own_address, peer_address) = (Some(connection.local), Some(connection.remote));
        Ok(Self { own_address, peer_address, ..Self::new(Stage::Read(Box::new(connection))) })
    }

    /// Writes everything that there is of the paused connection.
    pub(crate) fn write(&mut self, image: impl io::Write) -> Result<()> {
        self.paused("write")?;
        if let Some(peer) = self.peer_address {
            self.stage = Stage::Paused(self.take_paused()?.with_peer(peer));
        }
        let paused = self.paused("write")?;
        peer_of(paused)?;
        Ok(soccr_image::write(image, &paused.save()?)?)
    }

    /// Restores the connection of an image onto a socket of its own, which `give` makes the caller's. Returns what did
    /// not come back exactly.
    pub(crate) fn open(&mut self, give: impl FnOnce(OwnedFd) -> BorrowedFd<'static>) -> Result<String> {
        let Stage::Read(connection) = &mut self.stage else {
            return Err(Failure::new(format!("open: {}", self.stage.is())));
        };
        let read = (connection.flow(), connection.tracked);
        let flow = Flow {
            local: self.own_address.unwrap_or(connection.local),
            remote: self.peer_address.unwrap_or(connection.remote),
        };
        change_addresses(connection, flow);
        let restored = connection.restore();
        // If it is opened once more, then from what was read.
        (Flow { local: connection.local, remote: connection.remote }, connection.tracked) = read;
        let restored = restored?;
        let (claim, ()) = Claim::with(restored.as_fd(), || Ok(()))?;
        let report = restored.report().to_string();
        let mut socket = None;
        self.stage = Stage::Restored(restored.with_socket(|fd| *socket.insert(give(fd))));
        (self.socket, self.claim) = (socket, Some(claim));
        Ok(report)
    }

    fn is_there(&self) -> bool {
        match (&self.claim, self.socket) {
            (Some(claim), Some(socket)) => claim.holds(socket),
            _ => false,
        }
    }

    pub(crate) fn resume(self) -> Result<()> {
        if self.claim.is_some() && !self.is_there() {
            self.release();
            return Err(Failure::new(
                "resume: the socket was closed, or has got another handle since — this one has only ended",
            ));
        }
        match self.stage {
            Stage::Paused(paused) => paused.resume()?,
            Stage::Restored(restored) => restored.resume()?,
            Stage::Connecting => {}
            Stage::Restoring(_) => {
                return Err(Failure::new(
                    "resume: the connection is not completely restored — it stays in repair mode: close it",
                ));
            }
            Stage::Read(_) | Stage::Failed => {
                return Err(Failure::new(format!("resume: {}", self.stage.is())));
            }
        }
        Ok(())
    }

    pub(crate) fn release(self) {
        if let Stage::Paused(paused) = self.stage {
            paused.leave_paused();
        }
    }

    /// For a caller whose structure has `size` bytes. What does not fit into it is logged.
    pub(crate) fn save(&mut self, size: usize) -> Result<(Data, Option<&'static str>)> {
        for queue in [Queue::Receive, Queue::Send] {
            let lent = self.read.of(queue).take().filter(|read| read.lent);
            self.lent.extend(lent.map(|read| read.bytes));
        }
        let paused = self.paused("save")?;
        let mut bare = paused.save_bare(|length| Memory::new(length).ok())?;
        let mut extras = Extras { path: Some(bare.path), urgent: bare.urgent, buffers: None };
        if Data::has_buffers(size) {
            extras.buffers = Some((paused.buffers()?, paused.window_clamp()?));
        }
        let mut note = None;
        if let Some(urgent) = bare.urgent.filter(|_| !Data::has_urgent(size)) {
            note = Some("save: data_size has no room for the urgent mark: its byte becomes an ordinary one");
            if urgent.consumed {
                // It has been read out of band; in line it would be read once more.
                bare.receive_queue.remove(urgent.offset as usize);
                bare.control.inq_len -= 1;
                note = Some("save: an urgent byte that has been read is left out of the queue");
            }
        }
        let read = |bytes| Some(Read { bytes, lent: false });
        self.read = PerQueue { receive: read(bare.receive_queue), send: read(bare.send_queue) };
        Ok((Data::new(&bare.control, &extras), note))
    }

    /// The bytes of a queue, as the last save has read them: the socket may be closed by now.
    pub(crate) fn queue_bytes(&mut self, queue: Queue, owner: Owner) -> Result<*mut u8> {
        let Some(read) = self.read.of(queue).take() else {
            return Err(Failure::new(
                "save: there are no bytes of this queue, or they were given away — libsoccr_save reads them",
            ));
        };
        if owner == Owner::Caller {
            return Ok(read.bytes.into_raw());
        }
        Ok(self.read.of(queue).insert(Read { lent: true, ..read }).bytes.as_ptr())
    }

    pub(crate) fn address(&mut self, end: End, owner: Owner) -> Result<*mut u8> {
        let given = if end == End::Own { self.own_address } else { self.peer_address };
        if given.is_none() && !self.is_there() {
            return Err(Failure::new("save: the socket was closed — its addresses are asked for before"));
        }
        let address = match (&self.stage, given) {
            (Stage::Paused(paused), None) if end == End::Own => paused.local_address()?,
            (Stage::Paused(paused), None) => peer_of(paused)?,
            (_, Some(given)) => given,
            (stage, None) => return Err(Failure::new(format!("save: {}", stage.is()))),
        };
        let bytes = address::to_c(address)?;
        if owner == Owner::Caller {
            return Ok(bytes.into_raw());
        }
        self.lent.push(bytes);
        Ok(self.lent.last_mut().map_or(std::ptr::null_mut(), Memory::as_ptr))
    }

    pub(crate) fn set_address(&mut self, end: End, address: SocketAddr) {
        *(if end == End::Own { &mut self.own_address } else { &mut self.peer_address }) = Some(address);
    }

    /// The whole restore. After the first stages of the other interface, what is left of it. Returns what is not as it was,
    /// one line each.
    pub(crate) fn restore(
        &mut self,
        control: &ControlBlock,
        extras: &Extras,
        receive: &[u8],
        send: &[u8],
    ) -> Result<String> {
        match self.stage {
            Stage::Restoring(_) => self.restore_rest(receive, send),
            _ => self.restore_whole(control, extras, receive, send),
        }?;
        Ok(match &self.stage {
            Stage::Restored(restored) => restored.report().to_string(),
            _ => String::new(),
        })
    }

    fn restore_whole(
        &mut self,
        control: &ControlBlock,
        extras: &Extras,
        receive: &[u8],
        send: &[u8],
    ) -> Result<()> {
        let (Some(local), Some(remote)) = (self.own_address, self.peer_address) else {
            return Err(Failure::new("restore: libsoccr_set_addr has not told both addresses"));
        };
        let flow = Flow { local, remote };
        flow.validate()?;
        check_length("inq_len", control.inq_len, receive)?;
        check_length("outq_len", control.outq_len, send)?;
        extras.validate(control)?;
        let paused = self.take_fresh()?;
        if control.state == State::SynSent {
            paused.connect_anew(flow, control.write_seq, extras.buffers.map(|(buffers, _)| buffers))?;
            self.stage = Stage::Connecting;
            return Ok(());
        }
        let mut steps = unbound(paused, control, extras)?;
        steps.connect(flow)?;
        steps.receive_queue(receive, extras.urgent)?;
        steps.send_queue(send)?;
        self.stage = Stage::Restored(steps.finish()?);
        Ok(())
    }

    fn restore_rest(&mut self, receive: &[u8], send: &[u8]) -> Result<()> {
        for (queue, bytes) in [(Queue::Receive, receive), (Queue::Send, send)] {
            if self.misses(queue) {
                self.restore_queue(queue, bytes)?;
            }
        }
        // Where the last step was asked for before, the last queue has completed it.
        if matches!(self.stage, Stage::Restored(_)) { Ok(()) } else { self.restore_last() }
    }

    /// Stage 1: the socket is neither bound nor connected.
    pub(crate) fn restore_unbound(&mut self, control: &ControlBlock, extras: &Extras) -> Result<()> {
        if control.state == State::SynSent {
            return Err(Failure::new("restore: a connection in SYN_SENT — connect a fresh socket instead"));
        }
        extras.validate(control)?;
        let steps = unbound(self.take_fresh()?, control, extras)?;
        self.stage = Stage::Restoring(Box::new(Staged::new(steps, control, extras.urgent)));
        Ok(())
    }

    /// Stage 2: it is bound and connected.
    pub(crate) fn restore_connected(&mut self) -> Result<()> {
        self.step(Staged::connect)
    }

    /// Stage 3, before or after the last: a queue.
    pub(crate) fn restore_queue(&mut self, queue: Queue, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() && matches!(self.stage, Stage::Restored(_)) {
            return Ok(());
        }
        if !bytes.is_empty() && matches!(self.stage, Stage::Restoring(_)) && !self.misses(queue) {
            return Err(Failure::new("restore: the queue is filled already, or is empty in this connection"));
        }
        self.step(|staged, flow| staged.fill(queue, bytes, flow))?;
        self.finish_if_full()
    }

    /// The last stage: done as soon as the queues are there.
    pub(crate) fn restore_last(&mut self) -> Result<()> {
        self.step(|staged, flow| {
            staged.connect(flow)?;
            staged.finishing = true;
            Ok(())
        })?;
        self.finish_if_full()
    }

    fn finish_if_full(&mut self) -> Result<()> {
        match &self.stage {
            Stage::Restoring(staged) if staged.finishing && staged.is_full() => self.finish(),
            _ => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<()> {
        if let Stage::Restoring(staged) = replace(&mut self.stage, Stage::Failed) {
            self.stage = Stage::Restored(staged.into_steps().finish()?);
        }
        Ok(())
    }

    /// One step of a restore in stages. A mistake that no system call has seen yet can be mended.
    fn step(&mut self, step: impl FnOnce(&mut Staged, Option<Flow>) -> soccr_core::Result<()>) -> Result<()> {
        let told = self.own_address.zip(self.peer_address).map(|(local, remote)| Flow { local, remote });
        let Stage::Restoring(staged) = &mut self.stage else {
            return Err(Failure::new(format!(
                "restore: {} — libsoccr_set_sk_data_unbound comes first",
                self.stage.is()
            )));
        };
        step(staged, told).map_err(|error| {
            if error.kind() != ErrorKind::Invalid {
                self.stage = Stage::Failed;
            }
            error.into()
        })
    }

    fn misses(&self, queue: Queue) -> bool {
        matches!(&self.stage, Stage::Restoring(staged) if staged.misses(queue))
    }

    fn paused(&self, step: &str) -> Result<&Paused<'static>> {
        match &self.stage {
            Stage::Paused(paused) => Ok(paused),
            other => Err(Failure::new(format!("{step}: {}", other.is()))),
        }
    }

    /// For a restore onto it: a socket that has a connection keeps that.
    fn take_fresh(&mut self) -> Result<Paused<'static>> {
        if self.paused("restore")?.peer_address().is_ok() {
            return Err(Failure::new("restore: the socket has a connection — restore onto a fresh one"));
        }
        self.take_paused()
    }

    /// Whatever comes next, the socket is not to be resumed by accident.
    fn take_paused(&mut self) -> Result<Paused<'static>> {
        match replace(&mut self.stage, Stage::Failed) {
            Stage::Paused(paused) => Ok(paused),
            other => {
                let is = other.is();
                self.stage = other;
                Err(Failure::new(format!("restore: {is}")))
            }
        }
    }
}

/// The peer, which the kernel forgets in CLOSE.
fn peer_of(paused: &Paused<'_>) -> Result<SocketAddr> {
    paused.peer_address().map_err(|error| match error.kind() {
        ErrorKind::Refused => Failure::refused(
            "save: in CLOSE the kernel has forgotten the peer — tell it by libsoccr_set_addr",
        ),
        _ => error.into(),
    })
}

/// Gives a connection other addresses, also in what connection tracking knows of it. Those that NAT has translated stay.
fn change_addresses(connection: &mut Connection, to: Flow) {
    let (from, packets) = (connection.flow().on_the_wire(), to.on_the_wire());
    if let Some(tracked) = &mut connection.tracked {
        let wire = tracked.wire.on_the_wire();
        if wire.local == from.local {
            tracked.wire.local = packets.local;
        }
        if wire.remote == from.remote {
            tracked.wire.remote = packets.remote;
        }
    }
    (connection.local, connection.remote) = (to.local, to.remote);
}

/// Step 1, with all that is known.
fn unbound(paused: Paused<'static>, control: &ControlBlock, extras: &Extras) -> Result<Restore<'static>> {
    let mut steps = paused.restore(control, extras.buffers.map(|(buffers, _)| buffers))?;
    if let Some((_, window_clamp)) = extras.buffers {
        steps = steps.window_clamp(window_clamp);
    }
    match extras.path {
        Some(path) => Ok(steps.path(path)?),
        None => Ok(steps),
    }
}

fn check_length(field: &str, length: u32, bytes: &[u8]) -> Result<()> {
    if bytes.len() == length as usize {
        return Ok(());
    }
    Err(Failure::new(format!(
        "restore: {field} is {length}, but libsoccr_set_queue_bytes has not told the queue"
    )))
}

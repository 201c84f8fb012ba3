//! How connections enter a server: looked at, begun by a segment, filled, compared; undone where that fails.

use std::time::{Duration, Instant};

use super::program::{self, Position};
use super::wide::{self, Listeners, Wide};
use super::{Adopted, Adopter, again, attributes, obstacle};
use crate::connection::{Connection, ControlBlock, Flow, State};
use crate::diag;
use crate::error::{Error, Result};
use crate::fin::{self, FIRST_ARRIVAL};
use crate::report::Report;
use crate::segment::{Segment, flags};
use crate::sys::LOOPBACK;
use crate::sys::sockopt;
use crate::sys::tcp::{TcpInfo, info_option};

/// How many unread bytes arrive at a time, at most.
const CHUNK: usize = 32_000;
/// And at least, where the server's buffer is nearly full.
const SMALLEST_CHUNK: usize = 1000;

/// A queue for which every listener's buffer has room.
const ALWAYS_FITS: u32 = 16 << 10;

/// How long a server may take to read what does not fit into its buffer.
const READ: Duration = Duration::from_secs(5);

/// How often the first segment is sent.
const ATTEMPTS: usize = 3;

/// A first segment is under way.
struct Begun {
    /// From where it comes to the listener, or 0.
    interface: u32,
    /// Until the server has it, whatever the server is doing.
    _wide: Option<Wide>,
}

impl Adopter {
    pub(super) fn adopt_locked(&mut self, connections: &[&Connection]) -> Vec<Result<Adopted>> {
        // A listener gets a larger buffer for one connection at a time.
        let is_short = |connection: &Connection| connection.control.inq_len <= ALWAYS_FITS;
        let family =
            |connection: &Connection| (connection.flow().is_ipv4(), obstacle::scope(connection.flow()));
        let alike = connections.chunk_by(|a, b| is_short(a) && is_short(b) && family(a) == family(b));
        let batches = alike.flat_map(|alike| alike.chunks(program::MOST));
        let mut listeners = Listeners::default();
        batches.flat_map(|batch| self.adopt_batch(&mut listeners, batch)).collect()
    }

    /// Several of one address family and scope, for which one look suffices.
    pub(super) fn adopt_batch(
        &mut self,
        listeners: &mut Listeners,
        batch: &[&Connection],
    ) -> Vec<Result<Adopted>> {
        let flows: Vec<Flow> = batch.iter().map(|connection| connection.flow()).collect();
        let scope = flows.first().map_or(0, |flow| obstacle::scope(*flow));
        let there = match self.sysctls.check_cookies().and_then(|()| self.look(&flows, scope)) {
            Ok(there) => there,
            Err(error) => return batch.iter().map(|_| Err(again(&error))).collect(),
        };
        let begun =
            batch.iter().zip(there).map(|(connection, there)| self.begin(listeners, connection, there));
        let begun: Vec<Result<Begun>> = begun.collect();
        // What cannot be seen here is looked for one by one.
        let there = self.look(&flows, scope).unwrap_or_else(|_| vec![None; batch.len()]);
        let outcomes = batch.iter().zip(begun).zip(there).map(|((connection, begun), there)| {
            let begun = begun?;
            let interface = begun.interface;
            let made = there.filter(|there| interface == scope && there.state != State::Listen);
            let filled = made
                .map_or_else(|| self.make(connection, interface), Ok)
                .and_then(|made| self.feed(connection, interface, made))
                .and_then(|position| self.verify(connection, position));
            filled.map_err(|error| self.undo(connection.flow(), error))
        });
        outcomes.collect()
    }

    /// Checks, and sends the first segment, if it is a listener that is there for it.
    fn begin(
        &mut self,
        listeners: &mut Listeners,
        connection: &Connection,
        mut there: Option<Position>,
    ) -> Result<Begun> {
        let control = &connection.control;
        obstacle::in_connection(connection)?;
        if control.outq_len > 0 {
            return Err(Error::refused(
                "bytes that the peer has not acknowledged",
                "restore the connection and give its socket away: that waits until they are",
            ));
        }
        self.sysctls.check_ecn(connection)?;
        let flow = connection.flow();
        let mut interface = obstacle::scope(flow);
        if there.is_none_or(|there| ![0, interface].contains(&there.interface)) {
            // What is bound to a device takes only what comes from there.
            interface = obstacle::in_listener(&mut self.diag, &mut self.ways, flow)?;
            there = self.look_at(flow, interface)?;
        }
        match there {
            Some(position) if position.state == State::Listen => {}
            Some(_) => {
                return Err(Error::refused(
                    "a connection with these addresses",
                    "close or detach the old socket first",
                ));
            }
            None => return Err(obstacle::no_listener(flow)),
        }
        if interface != 0 {
            self.programs
                .attach(interface)
                .map_err(|error| Error::system("BPF_LINK_CREATE", error).advise("needs Linux 6.6 (tcx)"))?;
        }
        let wide = match control.inq_len {
            0..=ALWAYS_FITS => None,
            _ => {
                let inodes = obstacle::listeners(&mut self.diag, flow)?;
                Some(Wide::new(listeners, &inodes, wide::room_for(connection)))
            }
        };
        self.send_first(connection, interface)?;
        Ok(Begun { interface, _wide: wide })
    }

    /// The first segment: the listener's queue has a connection, with as many unread bytes as ride in one segment.
    fn send_first(&mut self, connection: &Connection, interface: u32) -> Result<()> {
        let control = &connection.control;
        let first = &connection.receive_queue[..connection.receive_queue.len().min(CHUNK)];
        let push = if first.is_empty() { 0 } else { flags::PSH };
        let (seq, flags) = (control.copied_seq(), flags::ACK | push);
        let segment = fin::from_peer(connection.flow(), control, seq, control.write_seq, flags, first);
        self.send(&segment, &attributes::option(&control.options), interface)
    }

    /// Waits for the connection, and sends the first segment again where it does not come.
    fn make(&mut self, connection: &Connection, interface: u32) -> Result<Position> {
        let flow = connection.flow();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.send_first(connection, interface)?;
            }
            let made = fin::wait_for(FIRST_ARRIVAL, || {
                Ok(self.look_at(flow, interface)?.filter(|position| position.state != State::Listen))
            })?;
            if let Some(position) = made {
                return Ok(position);
            }
        }
        // Obstacles are looked for only after a failure: among thousands of connections each look costs.
        obstacle::in_listener(&mut self.diag, &mut self.ways, flow)?;
        self.sysctls.check(connection)?;
        Err(Error::refused(
            "the listener did not take the segment that plays the peer's",
            "bring `lo` up, and let packets with the mark 0xC114 pass the firewall",
        ))
    }

    /// The rest of the unread bytes, and the peer's FIN. The kernel takes nothing of a segment that does not fit into its window:
    /// so they become smaller where none is taken, until the server reads.
    fn feed(&mut self, connection: &Connection, interface: u32, made: Position) -> Result<Position> {
        let control = &connection.control;
        let flow = connection.flow();
        let bytes = &connection.receive_queue;
        let start = control.copied_seq();
        let (mut position, mut deadline, mut chunk) = (made, Instant::now() + READ, CHUNK);
        loop {
            let seq = position.rcv_nxt;
            if seq == control.rcv_nxt {
                return Ok(position);
            }
            let arrived = (seq.wrapping_sub(start) as usize).min(bytes.len());
            let rest = &bytes[arrived..];
            let last = if rest.is_empty() { flags::FIN } else { flags::PSH };
            let payload = &rest[..rest.len().min(chunk)];
            let segment = fin::from_peer(flow, control, seq, control.write_seq, flags::ACK | last, payload);
            self.send(&segment, &[], interface)?;
            position = self.expect(flow, interface)?;
            if position.rcv_nxt != seq {
                (deadline, chunk) = (Instant::now() + READ, CHUNK);
                continue;
            }
            if let Some(read) = arrived.checked_sub(1) {
                // A byte once more is answered at once, and the window grows with the answer.
                let seq = seq.wrapping_sub(1);
                let again = &bytes[read..arrived];
                let segment = fin::from_peer(flow, control, seq, control.write_seq, flags::ACK, again);
                self.send(&segment, &[], interface)?;
            }
            if chunk > SMALLEST_CHUNK {
                chunk = (chunk / 2).max(SMALLEST_CHUNK);
            } else if Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            } else {
                return Err(Error::refused(
                    format!(
                        "a server that does not read: {arrived} of {} bytes fit into its buffer",
                        bytes.len()
                    ),
                    "raise SO_RCVBUF of its listener, or net.ipv4.tcp_rmem",
                ));
            }
        }
    }

    /// Compares what the server got with the connection.
    fn verify(&mut self, connection: &Connection, position: Position) -> Result<Adopted> {
        let ControlBlock { write_seq, rcv_nxt, options, .. } = &connection.control;
        let flow = connection.flow();
        let differs =
            |what: &str| Err(Error::refused(format!("an adopted connection with another {what}"), RESTORED));
        if position.rcv_nxt != *rcv_nxt || position.snd_una != *write_seq {
            return differs("sequence number");
        }
        let read =
            |socket: &diag::Socket<'_>| (sockopt::read_from::<TcpInfo>(socket.tcp_info()), socket.inode != 0);
        let Some((Some(info), accepted)) = self.diag.find(flow.local, flow.remote, read)? else {
            return Err(gone());
        };
        let negotiated = [
            (options.timestamps.is_some(), info_option::TIMESTAMPS),
            (options.sack, info_option::SACK),
            (options.window_scale.is_some(), info_option::WINDOW_SCALE),
        ];
        if negotiated.iter().any(|(on, bit)| *on != (info.options & bit != 0)) {
            return differs("set of options");
        }
        let scales = options.window_scale.map_or(0, |scale| scale.snd | scale.rcv << 4);
        if options.window_scale.is_some() && info.window_scales != scales {
            return differs("window scale");
        }
        let mut report = Report::default();
        let anew = "the server's socket learns it anew";
        let path = connection.path.as_ref();
        report.speed(path, options.ecn, &info, Some(anew.into()), Some(anew.into()));
        report.replaced(&connection.settings);
        Ok(Adopted { flow, accepted, report })
    }

    /// Takes what was made out of the server again. The lock keeps the reset of `SOCK_DESTROY` from the peer.
    fn undo(&mut self, flow: Flow, error: Error) -> Error {
        match self.diag.destroy(flow) {
            Ok(()) => error,
            Err(failed) => {
                error.advise(format!("the server has the connection nevertheless, incomplete: {failed}"))
            }
        }
    }

    fn expect(&self, flow: Flow, interface: u32) -> Result<Position> {
        match self.look_at(flow, interface)? {
            Some(position) if position.state != State::Listen => Ok(position),
            _ => Err(gone()),
        }
    }

    fn look_at(&self, flow: Flow, interface: u32) -> Result<Option<Position>> {
        Ok(self.look(&[flow], interface)?.pop().flatten())
    }

    fn look(&self, flows: &[Flow], interface: u32) -> Result<Vec<Option<Position>>> {
        let from = if interface == 0 { LOOPBACK } else { interface };
        self.programs.inspect(flows, from).map_err(|error| Error::system("BPF_PROG_TEST_RUN", error))
    }

    /// Plays the peer's packet; from an interface, if it is not 0.
    pub(super) fn send(&mut self, segment: &Segment<'_>, options: &[u8], interface: u32) -> Result<()> {
        segment.write_with(options, &mut self.packet);
        let way = self.ways.inward(segment.source, segment.destination, 0)?;
        let way = way.with_priority(interface).map_err(|error| Error::system("SO_PRIORITY", error))?;
        way.send(&self.packet)
    }
}

const RESTORED: &str = "it was taken back; the connection is with the caller";

fn gone() -> Error {
    Error::refused("a server that closed the connection while it was adopted", RESTORED)
}

//! Kernel → [`Connection`], in the order the kernel demands.

mod position;
mod savable;

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{getpeername, getsockname};

use crate::connection::{
    Bare, Connection, ControlBlock, Flow, Options, Owner, Path, SEGMENTS_LIMIT, State, Urgent, Window,
    WindowScale, after,
};
use crate::diag::Diag;
use crate::error::{Error, Result};
use crate::queue::{self, changed};
use crate::settings::{self, Value};
use crate::steer;
use crate::sys::raw::Injectors;
use crate::sys::sockopt;
use crate::sys::tcp::{self, Queue, TcpInfo, info_option};
use crate::tls::{self, Arrived};
use crate::{buffers, conntrack};
pub use position::Position;
use position::Sent;
pub use savable::refusal;
pub(crate) use savable::refuse_layer;
use savable::{check_savable, pending, refuse_authentication};

impl Flow {
    /// The addresses of a connected socket (`getsockname(2)`, `getpeername(2)`).
    ///
    /// # Errors
    /// Refused where the socket is not TCP over IP, or where the kernel does not tell the peer: in SYN_SENT, in CLOSE.
    pub fn of<Fd: AsFd + ?Sized>(socket: &Fd) -> Result<Self> {
        let fd = socket.as_fd();
        Ok(Self { local: local_address(fd)?, remote: remote_address(fd, None)? })
    }
}

/// How often a connection that changes while it is read is read anew, and how long after: packets that had passed the
/// lock may still be on their way through another processor.
const ATTEMPTS: usize = 5;
const PAUSE: Duration = Duration::from_millis(1);

/// Reads everything. Where the kernel decrypts, what has arrived is taken out of the socket, into `arrived`: without
/// that, a socket with kernel TLS is refused.
pub(crate) fn save(
    injectors: &mut Injectors,
    fd: BorrowedFd<'_>,
    peer: Option<SocketAddr>,
    mut arrived: Option<&mut Arrived>,
    connection: &mut Connection,
) -> Result<Position> {
    connection.local = local_address(fd)?;
    let layer = tls::read(fd)?;
    let decrypts = layer.as_ref().is_some_and(|layer| layer.receive.is_some());
    if layer.is_some() && arrived.is_none() {
        let remedy =
            "it can only be saved for good, by who carries its keys: see `soccr::tls` and `Paused::with_tls`";
        return Err(Error::refused("a socket with kernel TLS (kTLS)", remedy));
    }
    let memory = buffers::read(fd)?;
    connection.buffers = Some(memory.buffers);
    connection.settings.read_into(fd, connection.local, memory.options)?;
    steer::forget_transparency(fd, connection.local, &mut connection.settings)?;
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|error| Error::system("fcntl(F_GETFL)", error))?;
    connection.nonblocking = flags.contains(rustix::fs::OFlags::NONBLOCK);
    connection.settings.read_signals(fd, flags)?;
    if let Some(layer) = &layer {
        let flow = Flow { local: connection.local, remote: remote_address(fd, peer)? };
        let is_read = arrived.as_ref().is_some_and(|arrived| arrived.is_read());
        tls::check_settled(fd, flow, layer, is_read)?;
    }
    // Asked for before the state is read, which tells a FIN of the peer.
    let reads_no_more = pending(fd)?.contains(PollFlags::RDHUP);
    // Late, so that little can arrive between this and a detach.
    let (position, mut control, urgent, path, ()) = standing_still(fd, decrypts, |control, marked| {
        if layer.is_some() {
            tls::check_state(control.state, control.reset)?;
        }
        if let (Some(arrived), Some(layer)) = (arrived.as_mut(), layer.as_ref().filter(|_| decrypts)) {
            read_beside(injectors, fd, peer, memory.options, control, connection)?;
            // Last of all that can fail: the socket may not have it any more.
            connection.send_queue.clear();
            return arrived.take_in(fd, layer);
        }
        queue::peek(fd, Queue::Send, &mut connection.send_queue, control.outq_len, false)?;
        queue::peek(fd, Queue::Receive, &mut connection.receive_queue, control.inq_len, marked)
    })?;
    // Again: the number of the next record has moved.
    connection.tls = if layer.is_some() { tls::read(fd)? } else { None };
    if let (Some(tls), Some(arrived)) = (connection.tls.as_mut().filter(|_| decrypts), arrived) {
        tls.unread.clone_from(&arrived.records);
        connection.receive_queue.clone_from(&arrived.rest);
        control.inq_len = arrived.rest.len() as u32;
    }
    if reads_no_more && !control.state.fin_received() && !control.reset {
        connection.settings.note_shutdown();
    }
    if !decrypts {
        read_beside(injectors, fd, peer, memory.options, &control, connection)?;
    }
    connection.urgent = urgent;
    connection.path = Some(path);
    connection.control = control;
    connection.settings.note_notices(memory.options, connection.control.outq_len);
    connection.validate()?;
    Ok(position)
}

/// Reads what does not move with the traffic, but takes other means than options. `options` is the memory that these take.
fn read_beside(
    injectors: &mut Injectors,
    fd: BorrowedFd<'_>,
    peer: Option<SocketAddr>,
    options: u32,
    control: &ControlBlock,
    connection: &mut Connection,
) -> Result<()> {
    connection.remote = remote_address(fd, peer)?;
    connection.owner = rustix::fs::fstat(fd).ok().map(|stat| Owner { user: stat.st_uid, group: stat.st_gid });
    connection.tracked = conntrack::read(injectors, fd, connection.flow())?;
    // Keys of TCP MD5 are among what takes it, and looking for them would take longer than all else.
    if options > 0 && control.state != State::Close {
        connection.settings.read_keys(fd, connection.flow())?;
    }
    Ok(())
}

/// Everything that moves with the traffic, its queues in memory that `memory` gives.
pub(crate) fn bare<M: AsMut<[MaybeUninit<u8>]>>(
    fd: BorrowedFd<'_>,
    mut memory: impl FnMut(usize) -> Option<M>,
) -> Result<(Position, Bare<M>)> {
    let mut peek = |queue, length: u32, marked| {
        let room = memory(length as usize + 1);
        let mut room = room.ok_or_else(Error::out_of_memory)?;
        queue::peek_uninit(fd, queue, room.as_mut(), length, marked)?;
        Ok(room)
    };
    refuse_layer(fd)?;
    let (position, control, urgent, path, (send_queue, receive_queue)) =
        standing_still(fd, false, |control, marked| {
            Ok((peek(Queue::Send, control.outq_len, false)?, peek(Queue::Receive, control.inq_len, marked)?))
        })?;
    Ok((position, Bare { control, urgent, path, receive_queue, send_queue }))
}

/// Reads the control block, and by `read_queues` the queues, whose lengths it tells; and whether a mark is in the
/// receive queue. All of it has stood still meanwhile, at this position.
fn standing_still<T>(
    fd: BorrowedFd<'_>,
    decrypts: bool,
    mut read_queues: impl FnMut(&ControlBlock, bool) -> Result<T>,
) -> Result<(Position, ControlBlock, Option<Urgent>, Path, T)> {
    let mut sent = None;
    let mut read_it = || {
        let mut info = tcp::info(fd)?;
        let (control, urgent) = control_block(fd, &mut info, &mut sent, decrypts)?;
        let queues = read_queues(&control, urgent.is_some())?;
        tcp::select_queue(fd, None)?;
        let end = tcp::info(fd)?;
        let unread = (control.inq_len, urgent);
        let position = Position::at(fd, &info, unread)?;
        // The send queue may show more than its length, so the length is compared, too.
        let is_as_long = [0, control.write_seq.wrapping_sub(control.snd_una())].contains(&position.queued());
        if !position.has_same_traffic(&end) || !is_as_long {
            return Err(changed());
        }
        Ok((position, control, urgent, path(&info), queues))
    };
    let mut read = || {
        read_it().inspect_err(|_| {
            // The error tells more than one of this would.
            let _ = tcp::select_queue(fd, None);
        })
    };
    for _ in 1..ATTEMPTS {
        match read() {
            Err(error) if error.is_change() => std::thread::sleep(PAUSE),
            outcome => return outcome,
        }
    }
    read()
}

/// Reads what `info` does not tell, but for the queues' bytes and the addresses.
fn control_block(
    fd: BorrowedFd<'_>,
    info: &mut TcpInfo,
    sent: &mut Option<Sent>,
    decrypts: bool,
) -> Result<(ControlBlock, Option<Urgent>)> {
    let mut write_seq = tcp::queue_seq(fd, Queue::Send)?;
    let rcv_nxt = tcp::queue_seq(fd, Queue::Receive)?;
    Sent::correct(sent, info, write_seq);
    let mut state = kernel_state(info)?;
    let reset = check_savable(fd, state, decrypts)?;
    // One call instead of four for a connection that rests.
    let (mut receives, mut sends, has_options) = buffers::in_use(fd)?;
    if has_options {
        // Keys are among what takes it.
        refuse_authentication(fd)?;
    }
    if state == State::Close {
        (receives, sends) = (true, true);
    }
    // The TLS layer answers in the place of TCP to whoever looks into the queue.
    let (inq_len, urgent) = if decrypts || !receives { (0, None) } else { queue::receive_queue_extent(fd)? };
    let mut unacknowledged = if sends { tcp::unacknowledged(fd)? } else { 0 };
    let mut unsent = info.notsent_bytes.min(unacknowledged);
    if state == State::Close {
        // The kernel has emptied the send queue, but not its length, whether anybody has read the error yet or not.
        write_seq = write_seq.wrapping_sub(unacknowledged);
        (unacknowledged, unsent) = (0, 0);
    }
    if reset {
        state = if queue::has_ended(fd, inq_len)? { State::CloseWait } else { State::Established };
    }
    // A FIN that is queued counts one in the lengths that the kernel reports.
    let fin = u32::from(state.fin_queued() && unacknowledged > 0);
    let fin_unsent = fin.min(unsent);
    let options = options(fd, info)?;
    let window = Some(up_to_edge(tcp::window(fd)?, rcv_nxt));
    let control = ControlBlock {
        state,
        rcv_nxt,
        inq_len,
        write_seq,
        outq_len: unacknowledged - fin,
        unsq_len: unsent - fin_unsent,
        fin_unsent: fin_unsent != 0,
        reset,
        options,
        window,
    };
    Ok((control, urgent))
}

fn options(fd: BorrowedFd<'_>, info: &TcpInfo) -> Result<Options> {
    let has = |bit| info.options & bit != 0;
    let (snd, rcv) = (info.window_scales & 15, info.window_scales >> 4);
    Ok(Options {
        mss_clamp: tcp::max_segment(fd)?.min(u16::MAX.into()) as u16,
        window_scale: has(info_option::WINDOW_SCALE).then_some(WindowScale { snd, rcv }),
        sack: has(info_option::SACK),
        timestamps: if has(info_option::TIMESTAMPS) { Some(next_timestamp(fd, info)?) } else { None },
        microseconds: has(info_option::MICROSECOND_TIMESTAMPS),
        ecn: has(info_option::ECN),
        ecn_seen: has(info_option::ECN_SEEN),
        syn_data: has(info_option::SYN_DATA),
    })
}

/// The timestamp clock, ahead of every stamp that a segment may carry already: with pacing the kernel stamps them with
/// the time of their departure, and the ACKs in between as well, tens of milliseconds ahead where a burst has just met
/// a low rate. A restored clock behind that would make the peer drop everything until it has caught up (PAWS, RFC 7323
/// §5); one ahead costs a single round-trip time that is measured too long.
fn next_timestamp(fd: BorrowedFd<'_>, info: &TcpInfo) -> Result<u32> {
    const LEAST: u64 = 100_000;
    const MOST: u64 = 1_000_000;
    /// Two bursts of the largest size may wait for their departure.
    const BURSTS: u64 = 2 * 65536;
    let ahead = LEAST + (BURSTS * 1_000_000).checked_div(info.pacing_rate).unwrap_or(0).min(MOST);
    let microseconds = info.options & info_option::MICROSECOND_TIMESTAMPS != 0;
    let ticks = if microseconds { ahead } else { ahead / 1000 };
    // The lowest bit is no time: it tells the unit of the clock.
    Ok(tcp::timestamp(fd)?.wrapping_add(ticks.next_multiple_of(2) as u32))
}

fn path(info: &TcpInfo) -> Path {
    let microseconds = |value: u32| Duration::from_micros(value.into());
    Path {
        rtt: microseconds(info.rtt),
        rttvar: microseconds(info.rttvar),
        // Doubled while nothing comes back, as behind a lock.
        rto: microseconds(info.rto.checked_shr(info.backoff.into()).unwrap_or_default()),
        snd_mss: info.snd_mss,
        snd_cwnd: info.snd_cwnd.min(SEGMENTS_LIMIT),
        snd_ssthresh: info.snd_ssthresh,
        rcv_ssthresh: info.rcv_ssthresh,
    }
}

pub(crate) fn state(fd: BorrowedFd<'_>) -> Result<State> {
    kernel_state(&tcp::info(fd)?)
}

pub(crate) fn kernel_state(info: &TcpInfo) -> Result<State> {
    State::from_kernel(info.state).ok_or_else(|| Error::invalid("tcpi_state is unknown"))
}

pub(crate) fn is_listener(fd: BorrowedFd<'_>) -> bool {
    state(fd).is_ok_and(|state| state == State::Listen)
}

pub(crate) fn is_mptcp(fd: BorrowedFd<'_>) -> bool {
    tcp::get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL, "SO_PROTOCOL")
        .is_ok_and(|protocol| protocol == libc::IPPROTO_MPTCP)
}

pub(crate) fn local_address(fd: BorrowedFd<'_>) -> Result<SocketAddr> {
    let address = getsockname(fd).map_err(|error| Error::system("getsockname", error))?;
    SocketAddr::try_from(address)
        .map_err(|_| Error::refused("a socket that is not IP", "only TCP is carried"))
}

/// `peer` counts only where the kernel has forgotten it.
pub(crate) fn remote_address(fd: BorrowedFd<'_>, peer: Option<SocketAddr>) -> Result<SocketAddr> {
    if let Some(address) = connected_to(fd)? {
        return Ok(address);
    }
    let state = state(fd)?;
    let known = match state {
        State::Close => peer,
        State::SynSent => peer_of_handshake(fd)?,
        _ => None,
    };
    // It may be connected since.
    match known.map_or_else(|| connected_to(fd), |address| Ok(Some(address)))? {
        Some(address) => Ok(address),
        None => Err(Error::refused(
            format!("a connection in {state} without its peer's address"),
            "the kernel has forgotten it: tell it by Paused::with_peer",
        )),
    }
}

fn connected_to(fd: BorrowedFd<'_>) -> Result<Option<SocketAddr>> {
    match getpeername(fd) {
        Ok(Some(address)) => match SocketAddr::try_from(address) {
            Ok(address) => Ok(Some(address)),
            Err(_) => Err(Error::refused("a socket that is not IP", "only TCP is carried")),
        },
        Err(Errno::NOTCONN) | Ok(None) => Ok(None),
        Err(error) => Err(Error::system("getpeername", error)),
    }
}

/// Of a connection in SYN_SENT the kernel knows the peer, but tells it only to others.
fn peer_of_handshake(fd: BorrowedFd<'_>) -> Result<Option<SocketAddr>> {
    let local = local_address(fd)?;
    let cookie = sockopt::get(fd, libc::SOL_SOCKET, libc::SO_COOKIE)
        .map_err(|error| Error::system("SO_COOKIE", error))?;
    Diag::beside(fd)?.peer_of_handshake(local, cookie)
}

/// Repair mode hides the application's SO_REUSEADDR, so the guard that has read it before tells it.
pub(crate) fn reuse_address(connection: &mut Connection, on: bool) {
    if on {
        connection.settings.set(settings::REUSEADDR, Value::Number(1));
    }
}

/// A kernel without memory for more takes its window back. The last segment that told the peer's window may lie beyond it
/// then, where the restore would be refused (`TCP_REPAIR_WINDOW`): the next one, which decides, is at the edge at most.
fn up_to_edge(window: Window, rcv_nxt: u32) -> Window {
    let edge = rcv_nxt.wrapping_add(window.rcv_wnd);
    Window { snd_wl1: if after(window.snd_wl1, edge) { edge } else { window.snd_wl1 }, ..window }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, AsRawFd};

    use crate::connection::Window;
    use crate::sys::bpf::{Map, MapSpec};
    use crate::sys::tcp;

    #[test]
    fn a_window_that_was_taken_back_can_be_restored() {
        for (snd_wl1, rcv_wnd, saved) in [(900, 0, 900), (1000, 0, 1000), (5000, 0, 1000), (5000, 4000, 5000)]
        {
            let window = Window { snd_wl1, rcv_wnd, rcv_wup: 1000, snd_wnd: 1, max_window: 1 };
            assert_eq!(super::up_to_edge(window, 1000), Window { snd_wl1: saved, ..window });
        }
    }

    #[test]
    fn what_changes_while_it_is_read_is_no_image() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ours = listener.accept().unwrap().0;
        if !soccr_lab::may_repair() {
            return soccr_lab::skip("needs CAP_NET_ADMIN");
        }
        let paused = crate::pause(&ours).unwrap();
        let mut reads = 0;
        let read = super::standing_still(ours.as_fd(), false, |control, _| {
            reads += 1;
            peer.write_all(b"late").unwrap();
            while tcp::unread(ours.as_fd())? == control.inq_len {
                std::thread::yield_now();
            }
            Ok(())
        });
        assert!(read.err().is_some_and(|error| error.is_change()));
        assert_eq!(reads, super::ATTEMPTS);
        paused.resume().unwrap();
    }

    #[test]
    fn what_is_in_a_sockmap_is_refused() {
        const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
        let spec = MapSpec {
            map_type: BPF_MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            ..Default::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ours = listener.accept().unwrap().0;
        let map = match Map::create(&spec) {
            Ok(map) => map,
            Err(error) => {
                return soccr_lab::skip(format_args!("{}", soccr_lab::obstacle_to_bpf([5, 8], error)));
            }
        };
        map.update(&[0; 4], &ours.as_raw_fd().to_ne_bytes()).unwrap();
        peer.write_all(b"SIOCINQ says none of this").unwrap();
        let error = crate::pause(&ours).unwrap().save().unwrap_err();
        assert!(error.to_string().contains("sockmap"), "{error}");
        map.delete(&[0; 4]).unwrap();
        let saved = crate::pause(&ours).unwrap().save().unwrap();
        assert_eq!(saved.receive_queue, b"SIOCINQ says none of this");
    }
}

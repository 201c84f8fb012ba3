//! Done by segments, because no socket option can: the peer's FIN, its ACK of ours, an urgent byte. They arrive as segments, as if the
//! peer had sent them; whether they did is read from the socket, never assumed.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::connection::{ControlBlock, Flow, State};
use crate::error::{Error, Result};
use crate::save;
use crate::segment::{self, Segment, flags};
use crate::sys::raw::{Injector, Injectors, Via};
use crate::sys::sockopt;
use crate::sys::tcp::{self, Queue};

/// How long a segment may take through `lo`: far longer than it does, also on a very busy machine.
pub(crate) const ARRIVAL: Duration = Duration::from_secs(1);

/// How long it may take where there is another way to try.
pub(crate) const FIRST_ARRIVAL: Duration = Duration::from_millis(5);

/// The FIN of the peer arrives.
pub(crate) fn inject_fin(
    injectors: &mut Injectors,
    fd: BorrowedFd<'_>,
    flow: Flow,
    control: &ControlBlock,
) -> Result<()> {
    let arrived = || Ok(save::state(fd)?.fin_received());
    // Where nothing locks the connection, the peer may have repeated its own.
    if arrived()? {
        return Ok(());
    }
    let seq = control.rcv_nxt.wrapping_sub(1);
    let segment = from_peer(flow, control, seq, control.first_unacknowledged(), flags::FIN | flags::ACK, &[]);
    inject(injectors, fd, &segment, arrived)
}

/// The peer's acknowledgement of our FIN arrives.
pub(crate) fn inject_ack(
    injectors: &mut Injectors,
    fd: BorrowedFd<'_>,
    flow: Flow,
    control: &ControlBlock,
) -> Result<()> {
    let arrived = || Ok(save::state(fd)?.fin_acknowledged());
    if arrived()? {
        return Ok(());
    }
    let segment = from_peer(flow, control, control.rcv_nxt, control.write_seq, flags::ACK, &[]);
    inject(injectors, fd, &segment, arrived)
}

/// The peer resets the connection.
pub(crate) fn inject_reset(
    injectors: &mut Injectors,
    fd: BorrowedFd<'_>,
    flow: Flow,
    control: &ControlBlock,
) -> Result<()> {
    let flags = flags::RST | flags::ACK;
    let segment = from_peer(flow, control, control.rcv_nxt, control.write_seq, flags, &[]);
    inject(injectors, fd, &segment, || Ok(save::state(fd)? == State::Close))
}

/// An urgent byte of the peer arrives, at the end of what has been received.
pub(crate) fn inject_urgent(
    injectors: &mut Injectors,
    fd: BorrowedFd<'_>,
    flow: Flow,
    control: &ControlBlock,
    byte: u8,
) -> Result<()> {
    let rcv_nxt = tcp::queue_seq(fd, Queue::Receive)?;
    tcp::select_queue(fd, None)?;
    let payload = [byte];
    let flags = flags::URG | flags::PSH | flags::ACK;
    let ack = control.first_unacknowledged();
    let segment = Segment { urgent: 1, ..from_peer(flow, control, rcv_nxt, ack, flags, &payload) };
    let arrived = || {
        let arrived = tcp::queue_seq(fd, Queue::Receive)? != rcv_nxt;
        tcp::select_queue(fd, None)?;
        Ok(arrived)
    };
    inject(injectors, fd, &segment, arrived)
}

/// Our acknowledgement and our window, which the kernel's own probe does not tell the peer. Read from a socket in repair
/// mode: what a lock has held may have moved it on since it was restored.
pub(crate) fn acknowledgement(
    fd: BorrowedFd<'_>,
    flow: Flow,
    control: &ControlBlock,
) -> Result<Segment<'static>> {
    // Nobody can write to it, so that only what was unsent can have been sent since.
    let snd_nxt = match control.unsq_len > 0 || control.fin_unsent {
        true => tcp::queue_seq(fd, Queue::Send)?.wrapping_sub(tcp::unsent(fd)?),
        false => control.write_seq,
    };
    let rcv_nxt = tcp::queue_seq(fd, Queue::Receive)?;
    tcp::select_queue(fd, None)?;
    let window = tcp::window(fd)?;
    let room = window.rcv_wup.wrapping_add(window.rcv_wnd).wrapping_sub(rcv_nxt) as i32;
    let clock = match control.options.timestamps {
        // An echo of zero says nothing, and Linux takes no round-trip time from it.
        Some(_) => Some((tcp::timestamp(fd)?, 0)),
        None => None,
    };
    Ok(Segment {
        source: flow.local,
        destination: flow.remote,
        seq: snd_nxt,
        ack: rcv_nxt,
        flags: flags::ACK,
        window: window_field(control, room.max(0) as u32),
        timestamps: clock,
        urgent: 0,
        payload: &[],
    })
}

/// A window of ours as a segment carries it.
pub(crate) fn window_field(control: &ControlBlock, window: u32) -> u16 {
    let shift = control.options.window_scale.map_or(0, |scale| scale.rcv);
    (window >> shift).min(u16::MAX.into()) as u16
}

/// Sends a segment of ours to the peer.
pub(crate) fn send_to_peer(injector: &Injector, fd: BorrowedFd<'_>, segment: &Segment<'_>) -> Result<()> {
    let mut packet = Vec::with_capacity(128);
    segment.write(&mut packet);
    // A peer may take only what no router has forwarded (RFC 5082).
    let option =
        |level, name| sockopt::get::<i32>(fd, level, name).ok().and_then(|value| u8::try_from(value).ok());
    let (class, hops) = match segment.destination.ip().to_canonical().is_ipv4() {
        true => (option(libc::IPPROTO_IP, libc::IP_TOS), option(libc::IPPROTO_IP, libc::IP_TTL)),
        false => (
            option(libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            option(libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
        ),
    };
    segment::set_service(&mut packet, class, hops.or(Some(segment::ORDINARY_HOP_LIMIT)));
    injector.send_ours(fd, &packet, segment.destination)
}

pub(crate) fn from_peer<'a>(
    flow: Flow,
    control: &ControlBlock,
    seq: u32,
    ack: u32,
    flags: u8,
    payload: &'a [u8],
) -> Segment<'a> {
    // A window that is not the peer's would make the restored socket wait for seconds.
    let window = control.window.map_or(u32::from(u16::MAX), |window| window.snd_wnd);
    let shift = control.options.window_scale.map_or(0, |scale| scale.snd);
    Segment {
        source: flow.remote,
        destination: flow.local,
        seq,
        ack,
        flags,
        window: (window >> shift).min(u16::MAX.into()) as u16,
        // Without them the segment leaves the peer's clock alone.
        timestamps: None,
        urgent: 0,
        payload,
    }
}

/// Tries one injector after the other until the segment has arrived.
pub(crate) fn inject(
    injectors: &mut Injectors,
    fd: BorrowedFd<'_>,
    segment: &Segment<'_>,
    arrived: impl Fn() -> Result<bool>,
) -> Result<()> {
    let ways = [(Via::routed(segment.destination.ip()), FIRST_ARRIVAL), (Via::Loopback, ARRIVAL)];
    let (mut refusal, mut sent) = (None, false);
    for (via, limit) in ways {
        match send(injectors, fd, segment, via) {
            Ok(()) if wait_for(limit, || Ok(arrived()?.then_some(())))?.is_some() => return Ok(()),
            Ok(()) => sent = true,
            Err(error) => refusal = refusal.or(Some(error)),
        }
    }
    if let Some(refusal) = refusal.take_if(|_| !sent) {
        return Err(refusal);
    }
    let reason = refusal.map_or(String::new(), |error| format!(" ({error})"));
    Err(Error::refused(
        format!("a segment that plays the peer's did not arrive{reason}"),
        "bring `lo` up, and let packets with the mark 0xC114 pass the firewall; needs CAP_NET_RAW",
    ))
}

fn send(injectors: &mut Injectors, fd: BorrowedFd<'_>, segment: &Segment<'_>, via: Via) -> Result<()> {
    let mut packet = Vec::with_capacity(128);
    segment.write(&mut packet);
    injectors.inward(fd, via, segment.source, segment.destination)?.send(&packet)
}

/// What `look` finds in the end. On an idle machine the segment has arrived before the call that sent it returns.
pub(crate) fn wait_for<T>(limit: Duration, look: impl Fn() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = Instant::now() + limit;
    loop {
        let found = look()?;
        if found.is_some() || Instant::now() >= deadline {
            return Ok(found);
        }
        std::thread::yield_now();
    }
}

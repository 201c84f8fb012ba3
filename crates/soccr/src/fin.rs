//! What no socket option can do: the peer's FIN, its ACK of ours, an urgent byte. They arrive as segments, as if the
//! peer had sent them; whether they did is read from the socket, never assumed.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::connection::{ControlBlock, Flow};
use crate::error::{Error, Result};
use crate::save;
use crate::segment::{Segment, flags};
use crate::sys::raw::{Injector, Via};
use crate::sys::tcp::{self, Queue};

/// How long a segment may take through `lo`: far longer than it does, unless the machine is very busy.
const ARRIVAL: Duration = Duration::from_millis(100);

/// The FIN of the peer arrives.
pub(crate) fn inject_fin(fd: BorrowedFd<'_>, flow: Flow, control: &ControlBlock) -> Result<()> {
    let before = save::state(fd)?;
    let seq = control.rcv_nxt.wrapping_sub(1);
    let segment = from_peer(flow, control, seq, control.first_unacknowledged(), flags::FIN | flags::ACK, &[]);
    inject(fd, &segment, || Ok(save::state(fd)? != before))
}

/// The peer's acknowledgement of our FIN arrives.
pub(crate) fn inject_ack(fd: BorrowedFd<'_>, flow: Flow, control: &ControlBlock) -> Result<()> {
    let before = save::state(fd)?;
    let segment = from_peer(flow, control, control.rcv_nxt, control.write_seq, flags::ACK, &[]);
    inject(fd, &segment, || Ok(save::state(fd)? != before))
}

/// An urgent byte of the peer arrives, at the end of what has been received.
pub(crate) fn inject_urgent(fd: BorrowedFd<'_>, flow: Flow, control: &ControlBlock, byte: u8) -> Result<()> {
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
    inject(fd, &segment, arrived)
}

/// Tells the peer our acknowledgement and our window, which the kernel's own probe does not.
pub(crate) fn send_ack(fd: BorrowedFd<'_>, flow: Flow, control: &ControlBlock) -> Result<()> {
    let window = control.window.map_or(u32::from(u16::MAX), |window| window.rcv_wnd);
    let shift = control.options.window_scale.map_or(0, |scale| scale.rcv);
    let clock = match control.options.timestamps {
        // An echo of zero says nothing, and Linux takes no round-trip time from it.
        Some(_) => Some((tcp::timestamp(fd)?, 0)),
        None => None,
    };
    let segment = Segment {
        source: flow.local,
        destination: flow.remote,
        seq: control.snd_nxt(),
        ack: control.rcv_nxt,
        flags: flags::ACK,
        window: (window >> shift).min(u16::MAX.into()) as u16,
        timestamps: clock,
        urgent: 0,
        payload: &[],
    };
    send(fd, &segment, Via::routed(flow.remote.ip()))
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
    fd: BorrowedFd<'_>,
    segment: &Segment<'_>,
    arrived: impl Fn() -> Result<bool>,
) -> Result<()> {
    let mut refusal = None;
    for via in [Via::routed(segment.destination.ip()), Via::Loopback] {
        match send(fd, segment, via) {
            Ok(()) if wait_for(&arrived)? => return Ok(()),
            Ok(()) => {}
            Err(error) => refusal = Some(error),
        }
    }
    let reason = refusal.map_or(String::new(), |error| format!(" ({error})"));
    Err(Error::refused(
        format!("a segment that plays the peer's did not arrive{reason}"),
        "bring `lo` up, and let packets with the mark 0xC114 pass the firewall; needs CAP_NET_RAW",
    ))
}

fn send(fd: BorrowedFd<'_>, segment: &Segment<'_>, via: Via) -> Result<()> {
    let mut packet = Vec::with_capacity(128);
    segment.write(&mut packet);
    Injector::for_socket(fd, via)?.send(&packet, segment.destination)
}

/// On an idle machine the segment has arrived before the call that sent it returns.
fn wait_for(arrived: &impl Fn() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + ARRIVAL;
    loop {
        if arrived()? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::yield_now();
    }
}

//! A line with a delay, a rate and losses: this process carries the frames between two namespaces.
//!
//! ```text
//!  namespace a            a namespace of the line's own             namespace b
//!   eth0  ══ veth ══  a ── packet ring ─→ queue ─→ socket ── b  ══ veth ══  eth0
//!                       ←─ socket ←─ queue ←─ packet ring ──
//! ```
//!
//! Packet sockets are allowed wherever network namespaces are, whereas `/dev/net/tun` is often not there or closed.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SendFlags, send, sockopt::socket_error};

use crate::sys::{Frame, Ring};
use crate::{Namespace, Segment, Side, VethEnd, rtnetlink};

/// How a [`Line`] treats what passes, the same in both directions.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// How long a packet travels, one way.
    pub delay: Duration,
    /// Bits per second; `None`: as fast as this machine can.
    pub rate: Option<u64>,
    /// The probability that a packet is lost, from 0 to 1.
    pub loss: f64,
    /// Chooses which packets are lost.
    pub seed: u64,
    /// Bytes under way in one direction. What comes beyond is lost.
    pub queue: usize,
    /// The MTU of the link.
    pub mtu: u32,
}

impl Shape {
    /// A line with this round-trip time: half of it each way.
    pub fn rtt(rtt: Duration) -> Self {
        Self { delay: rtt / 2, ..Self::default() }
    }
}

impl Default for Shape {
    /// No delay, no loss, no rate, 64 MiB, Ethernet's MTU.
    fn default() -> Self {
        Self { delay: Duration::ZERO, rate: None, loss: 0.0, seed: 1, queue: 64 << 20, mtu: 1500 }
    }
}

/// A running line. It ends, and its links vanish, when this value is dropped.
#[derive(Debug)]
pub struct Line {
    directions: [Arc<Direction>; 2],
    threads: Vec<JoinHandle<()>>,
    stop: Arc<OwnedFd>,
    _middle: Namespace,
}

/// Bytes of slots in a ring, where packets wait for the thread.
const RING: usize = 16 << 20;
/// What a slot has beside the packet.
const SLOT_OVERHEAD: usize = 128;
/// How long arrivals may stay in the ring, so that it does not overflow.
const LONGEST_SLEEP: Duration = Duration::from_millis(1);
/// How many packets are taken from the ring before due packets are sent.
const BATCH: usize = 32;

impl Line {
    /// Connects two namespaces: gives each a link, up and without addresses.
    ///
    /// # Errors
    /// The errors of [`veth`](crate::veth); `EPERM` without `CAP_NET_RAW`.
    pub fn new(ends: [VethEnd<'_>; 2], shape: &Shape) -> io::Result<Self> {
        let middle = Namespace::new()?;
        let mut control = middle.rtnetlink()?;
        for (number, (end, name)) in ends.iter().zip(["a", "b"]).enumerate() {
            let inner = VethEnd { namespace: &middle, name, mac: [2, 0, 0, 0, 1, number as u8] };
            rtnetlink::veth(&mut control, [*end, inner], shape.mtu)?;
            rtnetlink::single_segments(&mut end.namespace.rtnetlink()?, end.name)?;
        }
        let indices = [control.index("a")?, control.index("b")?];
        let mut line = Self {
            directions: Default::default(),
            threads: Vec::new(),
            stop: Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?),
            _middle: middle,
        };
        let slot = (shape.mtu as usize + SLOT_OVERHEAD).next_power_of_two();
        for (number, direction) in line.directions.iter().enumerate() {
            let (from, to) = (indices[number], indices[1 - number]);
            let (ring, socket) = line._middle.run(|| {
                Ok::<_, io::Error>((
                    Ring::open(from, Frame::Whole, slot, RING / slot, &[])?,
                    Ring::sender(to)?,
                ))
            })?;
            let mut carrier = Carrier {
                ring,
                socket,
                direction: direction.clone(),
                shape: shape.clone(),
                random: Random(shape.seed.wrapping_add(number as u64)),
                queue: VecDeque::new(),
                queued: 0,
                free: Instant::now(),
                stop: line.stop.clone(),
            };
            let name = ["line a to b", "line b to a"][number].to_owned();
            line.threads.push(thread::Builder::new().name(name).spawn(move || carrier.run())?);
        }
        Ok(line)
    }

    /// Loses the next segment from this side that meets `condition`, once.
    pub fn lose_next(&self, from: Side, condition: impl FnMut(&Segment) -> bool + Send + 'static) {
        *self.direction(from).victim.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Box::new(condition));
    }

    /// How many packets from this side have been lost, for whatever reason.
    pub fn lost(&self, from: Side) -> u64 {
        self.direction(from).lost.load(Ordering::Relaxed)
    }

    fn direction(&self, from: Side) -> &Direction {
        &self.directions[from as usize]
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).expect("an event counter takes a one");
        for thread in self.threads.drain(..) {
            // Only the user's condition can panic in the thread, and has printed its message.
            let _ = thread.join();
        }
    }
}

/// Chooses a segment that is to be lost.
type Condition = Box<dyn FnMut(&Segment) -> bool + Send>;

/// What the owner of the line and the thread of one direction share.
#[derive(Default)]
struct Direction {
    victim: Mutex<Option<Condition>>,
    lost: AtomicU64,
}

impl fmt::Debug for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direction").field("lost", &self.lost).finish_non_exhaustive()
    }
}

/// The thread of one direction.
struct Carrier {
    ring: Ring,
    socket: OwnedFd,
    direction: Arc<Direction>,
    shape: Shape,
    random: Random,
    /// Frames with the time at which they are due, in order.
    queue: VecDeque<(Instant, Vec<u8>)>,
    queued: usize,
    /// When the last bit of what was taken in so far is on the wire.
    free: Instant,
    stop: Arc<OwnedFd>,
}

impl Carrier {
    fn run(&mut self) {
        // The default, 50 µs, would be added to every delay.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        loop {
            let more = self.take_in();
            let now = Instant::now();
            while self.queue.front().is_some_and(|(due, _)| *due <= now) {
                let (_, frame) = self.queue.pop_front().expect("it has a front");
                self.queued -= frame.len();
                // ENETDOWN, ENOBUFS: a wire that is cut, or full, loses the packet too.
                if send(&self.socket, &frame, SendFlags::empty()).is_err() {
                    self.lose(1);
                }
            }
            if self.wait(more) {
                return;
            }
        }
    }

    /// Moves arrived frames into the queue; returns whether there may be more.
    fn take_in(&mut self) -> bool {
        let (time_of_day, now) = (SystemTime::now(), Instant::now());
        for _ in 0..BATCH {
            let Some((frame, arrival)) = self.ring.next(|frame, arrival| (frame.to_vec(), arrival)) else {
                return false;
            };
            let arrival = match time_of_day.duration_since(arrival) {
                Ok(age) => now.checked_sub(age).unwrap_or(now),
                Err(later) => now + later.duration(),
            };
            let full = self.queued + frame.len() > self.shape.queue;
            if full || self.random.next() < self.shape.loss || self.is_victim(&frame) {
                self.lose(1);
                continue;
            }
            let on_the_wire = self.shape.rate.map_or(Duration::ZERO, |rate| {
                Duration::from_secs_f64(Ring::ethernet(&frame).len() as f64 * 8.0 / rate as f64)
            });
            self.free = self.free.max(arrival) + on_the_wire;
            self.queued += frame.len();
            self.queue.push_back((self.free + self.shape.delay, frame));
        }
        true
    }

    /// Whether [`Line::lose_next`] is waiting for this frame.
    fn is_victim(&self, frame: &[u8]) -> bool {
        let mut victim = self.direction.victim.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(condition) = victim.as_mut() else { return false };
        let found = Segment::of_frame(Ring::ethernet(frame)).is_some_and(|segment| condition(&segment));
        if found {
            *victim = None;
        }
        found
    }

    /// Waits until a frame arrives or is due, unless there is `more` to take in; returns whether the line has ended.
    fn wait(&mut self, more: bool) -> bool {
        if let Ok(overflow @ 1..) = self.ring.overflow() {
            self.lose(overflow.into());
        }
        let stop = PollFd::new(&*self.stop, PollFlags::IN);
        let mut fds = [stop, PollFd::new(&self.ring, PollFlags::IN)];
        let (watched, timeout) = match self.queue.front() {
            _ if more => (&mut fds[..], Some(Timespec::default())),
            None => (&mut fds[..], None),
            // Frames that arrive meanwhile are due later, and bring along the time of their arrival: no need to wake.
            Some((due, _)) => {
                let left = due.saturating_duration_since(Instant::now()).min(LONGEST_SLEEP);
                let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
                (&mut fds[..1], Some(timeout))
            }
        };
        // EINTR: the next round finds out what there is to do.
        let _ = poll(watched, timeout.as_ref());
        if fds[1].revents().contains(PollFlags::ERR) {
            // The link went down. Reading the error clears it; it may come up again.
            let _ = socket_error(&self.ring);
        }
        !fds[0].revents().is_empty()
    }

    fn lose(&self, packets: u64) {
        self.direction.lost.fetch_add(packets, Ordering::Relaxed);
    }
}

/// SplitMix64: the same losses for the same seed.
struct Random(u64);

impl Random {
    /// A number from 0 to below 1.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

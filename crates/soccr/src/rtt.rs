//! The round-trip time: without a sample of it, a socket waits for seconds before it repeats a segment that was lost.
//!
//! No option sets it, but the kernel takes a sample from the timestamp that an ACK echoes (RFC 7323 §4), if the segment
//! was put into the send queue in repair mode. So a byte goes ahead of the send queue, and the peer seems to acknowledge
//! it, at a time that makes the difference:
//!
//! ```text
//!  send queue          x                 one byte, queued as sent before everything else
//!  from the peer       ← ACK x, TSecr = TCP_TIMESTAMP − RTT
//!  send queue          empty, and snd_una = what was saved
//! ```
//!
//! One sample gives RTO = RTT + max(2 RTT, the least variance); more of them bring it to what it was.
//!
//! # References
//! RFC 6298 (RTO); kernel `tcp_rtt_estimator()`, `tcp_rtt_tsopt_us()` in `net/ipv4/tcp_input.c`.

use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::time::Duration;

use crate::connection::{ControlBlock, Flow, Path};
use crate::error::Result;
use crate::fin;
use crate::queue;
use crate::segment::{Segment, flags};
use crate::sys::namespace::Recently;
use crate::sys::raw::Injectors;
use crate::sys::tcp::{self, Queue, info_option};

/// What the kernel adds to the RTT at least, unless it is told otherwise.
const LEAST_VARIANCE: u64 = 200_000;

/// No path takes longer; the kernel gives up at twice that.
const LONGEST: Duration = Duration::from_secs(60);

/// Enough to bring the RTO of every such path within a tenth of its goal.
const MOST_SAMPLES: u32 = 24;

/// A clock in microseconds that is not ours for long; its lowest bit says that it counts microseconds.
const CLOCK: u32 = 0x4000_0001;

/// After a failure, a while without trying: each one costs a wait.
const REST: Duration = Duration::from_secs(1);

/// What the estimator shall believe, in microseconds, and how many samples that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed {
    rtt: u64,
    rto: u64,
    samples: u32,
}

/// A segment was swallowed.
static SWALLOWED: Recently = Recently::within(REST);

impl Seed {
    /// How to bring back what a connection had measured, on the fresh socket `fd`; `None` where it had measured nothing, or
    /// will never send again.
    ///
    /// # Errors
    /// Why it cannot be brought back.
    pub(crate) fn new(
        path: &Path,
        control: &ControlBlock,
        fd: BorrowedFd<'_>,
    ) -> std::result::Result<Option<Self>, &'static str> {
        if path.rtt.is_zero() || control.state.fin_acknowledged() || control.reset {
            return Ok(None);
        }
        if control.state.fin_queued() && !control.fin_unsent {
            return Err(
                "our FIN is under way, and would be repeated too early: before the connection is resumed",
            );
        }
        if control.options.timestamps.is_none() {
            return Err("the connection has no timestamps, by which alone it can be told");
        }
        if control.window.is_none() {
            return Err("the windows of the connection are not known");
        }
        if SWALLOWED.at(fd).is_some() {
            return Err("a segment that plays the peer's was swallowed a moment ago");
        }
        Ok(Self::plan(path))
    }

    /// By what the kernel's estimator makes of the same sample again and again.
    fn plan(path: &Path) -> Option<Self> {
        if path.rtt > LONGEST || path.rto > 2 * LONGEST {
            return None;
        }
        let (rtt, mut rto) = (path.rtt.as_micros() as u64, path.rto.as_micros() as u64);
        if rto <= rtt {
            // Nothing that a kernel reports: what it makes of the RTT alone must do.
            rto = rtt + LEAST_VARIANCE.max(2 * rtt);
        }
        let least = LEAST_VARIANCE.min(rto - rtt);
        let mut deviation = 2 * rtt;
        let mut variance = deviation.max(least);
        let mut longest = variance;
        let mut samples = 1;
        while (rtt + variance) * 10 > rto * 11 && samples < MOST_SAMPLES {
            deviation -= deviation / 4;
            longest = longest.max(deviation);
            variance -= variance.saturating_sub(longest) / 4;
            longest = least;
            samples += 1;
        }
        if (rtt + variance) * 11 < rto * 10 {
            samples = 2;
        }
        Some(Self { rtt, rto, samples })
    }

    /// How many bytes go ahead of the send queue.
    pub(crate) fn samples(&self) -> u32 {
        self.samples
    }

    /// Lets the kernel take the samples, while both queues of the connected socket are empty, and its window is open.
    ///
    /// # Errors
    /// An ACK did not arrive. The socket is of no use then: its send queue holds a byte that nobody wrote.
    pub(crate) fn sow(
        &self,
        injectors: &mut Injectors,
        fd: BorrowedFd<'_>,
        flow: Flow,
        control: &ControlBlock,
    ) -> Result<()> {
        let sown = self.take_samples(injectors, fd, flow, control);
        if sown.is_err() {
            SWALLOWED.note_at(fd, ());
        }
        sown
    }

    fn take_samples(
        &self,
        injectors: &mut Injectors,
        fd: BorrowedFd<'_>,
        flow: Flow,
        control: &ControlBlock,
    ) -> Result<()> {
        let clock = control.options.clock().unwrap_or_default();
        let micros = use_microseconds(fd)?;
        let first = control.first_unacknowledged().wrapping_sub(self.samples);
        for number in 1..=self.samples {
            // RTO = RTT + variance: the variance becomes 1.5 RTT + e by a sample that is e longer, the RTT e/8 more.
            let rto = if number == 2 { u64::from(tcp::info(fd)?.rto) } else { self.rto };
            let sample = if rto * 11 < self.rto * 10 {
                self.rtt + (8 * self.rto).saturating_sub(20 * self.rtt) / 9
            } else {
                self.rtt
            };
            tcp::select_queue(fd, Queue::Send)?;
            queue::fill_send(fd, &[0])?;
            tcp::select_queue(fd, None)?;
            let ticks = if micros { sample } else { sample / 1000 };
            let echo = tcp::timestamp(fd)?.wrapping_sub(ticks as u32).max(1);
            let ack = first.wrapping_add(number);
            let segment = Segment {
                // A time of zero is none (`tcp_paws_check()`): it says nothing of the peer's clock.
                timestamps: Some((0, echo)),
                ..fin::from_peer(flow, control, control.copied_seq(), ack, flags::ACK, &[])
            };
            fin::inject(injectors, fd, &segment, || Ok(tcp::unacknowledged(fd)? == 0))?;
        }
        tcp::set_timestamp(fd, clock)
    }
}

/// Makes the clock of the socket count microseconds (Linux 6.7), whatever its own does: a round-trip time in whole
/// milliseconds would be far from that of a short path. False where the kernel cannot.
fn use_microseconds(fd: BorrowedFd<'_>) -> Result<bool> {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    if KNOWN.get() == Some(&false) {
        return Ok(false);
    }
    tcp::set_timestamp(fd, CLOCK)?;
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let can = tcp::info(fd)?.options & info_option::MICROSECOND_TIMESTAMPS != 0;
    Ok(*KNOWN.get_or_init(|| can))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rtt: u64, rto: u64) -> Seed {
        let path =
            Path { rtt: Duration::from_micros(rtt), rto: Duration::from_micros(rto), ..Path::default() };
        Seed::plan(&path).unwrap()
    }

    /// What `tcp_rtt_estimator()` makes of equal samples, a round trip each.
    fn estimated(rtt: u64, samples: u32) -> u64 {
        let (mut deviation, mut variance) = (2 * rtt, LEAST_VARIANCE.max(2 * rtt));
        let mut largest = variance;
        for _ in 1..samples {
            deviation -= deviation / 4;
            largest = largest.max(deviation);
            variance -= variance.saturating_sub(largest) / 4;
            largest = LEAST_VARIANCE;
        }
        rtt + variance
    }

    #[test]
    fn samples_bring_the_timeout_to_what_it_was() {
        for rtt in [1, 900, 20_000, 150_000, 1_000_000, 20_000_000] {
            // From where samples without any variance end, to what the first one says.
            let (least, most) = (rtt + LEAST_VARIANCE, rtt + LEAST_VARIANCE.max(2 * rtt));
            for tenth in 0..=10 {
                let rto = least + (most - least) * tenth / 10;
                let seed = plan(rtt, rto);
                assert_eq!((seed.rtt, seed.rto), (rtt, rto));
                let estimated = estimated(rtt, seed.samples);
                assert!(estimated.abs_diff(rto) * 10 <= rto, "rtt {rtt}: {estimated} instead of {rto}");
            }
        }
    }

    #[test]
    fn a_timeout_that_no_kernel_has_counts_as_unknown() {
        for rtt in [1_000, 50_000, 99_999, 100_001, 3_000_000] {
            for rto in [0, rtt / 2, rtt] {
                assert_eq!(plan(rtt, rto), plan(rtt, rtt + LEAST_VARIANCE.max(2 * rtt)));
            }
        }
        let too_long = LONGEST + Duration::from_micros(1);
        assert_eq!(Seed::plan(&Path { rtt: too_long, ..Path::default() }), None);
        assert_eq!(Seed::plan(&Path { rto: 2 * too_long, ..Path::default() }), None);
    }
}

//! What the peer feels of a move: the longest silence, by the time of the lock, the round-trip time, what becomes of the
//! packets that arrive meanwhile, and the congestion control. Beside it stands the longest silence of the same traffic in as
//! much time without a move: bbr pauses by itself.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use soccr::lock::{Locker, Mode};
use soccr_lab::{Pair, Shape};

use crate::arguments::Arguments;
use crate::plot::{Plot, Scale};
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};
use crate::traffic::{Pattern, Traffic};

const RTTS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(20)];
/// Each with the times of its locks, in milliseconds.
const CONGESTION: [(&str, &[u64]); 2] = [("cubic", &[0, 5, 50, 200]), ("bbr", &[0, 50])];
/// What a move takes beyond its lock, roughly.
const MOVE: Duration = Duration::from_millis(1);
const MODES: [(Mode, &str); 2] = [(Mode::Drop, "drop"), (Mode::HOLD, "hold")];

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    for rtt in RTTS {
        let pair = if rtt.is_zero() { Pair::new() } else { Pair::shaped(&Shape::rtt(rtt)) }?;
        let cases = CONGESTION.iter().flat_map(|(name, locks)| locks.iter().map(move |lock| (*name, *lock)));
        for ((congestion, lock), (pattern, name)) in
            cases.flat_map(|case| Pattern::ALL.map(|pattern| (case, pattern)))
        {
            for (mode, fate) in MODES {
                let what = format!("{name}, RTT {}, lock {lock} ms, {fate}, {congestion}", rtt.as_millis());
                let case = Case { pattern, congestion, mode, rtt, lock: Duration::from_millis(lock) };
                match pair.a.run(|| case.measure(&pair, arguments.full)) {
                    Ok([silences, without]) => {
                        report.add(Row::new("stall", what, &silences).against(&without));
                    }
                    Err(error) => report.note(format!("stall: {what}: {error:#}")),
                }
            }
        }
    }
    match &arguments.plots {
        Some(directory) => plot(directory),
        None => Ok(()),
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    pattern: Pattern,
    congestion: &'static str,
    mode: Mode,
    rtt: Duration,
    lock: Duration,
}

impl Case {
    /// The longest silences, with a move and without.
    fn measure(self, pair: &Pair, full: bool) -> Result<[Samples; 2]> {
        let Self { lock, rtt, .. } = self;
        let locker = Locker::new(self.mode)?;
        let mut traffic = Traffic::start(pair, self.pattern, self.congestion)?;
        let (mut silences, mut without) = (Samples::default(), Samples::default());
        let moves = if full { 100 } else { 30 };
        // The first move finds nothing in any cache.
        traffic.settle(rtt)?;
        traffic.move_once(&locker, Duration::ZERO, rtt)?;
        repeat(Duration::ZERO, moves, |_| {
            traffic.settle(rtt)?;
            without.push(traffic.leave_alone(lock + rtt + MOVE)?);
            traffic.settle(rtt)?;
            silences.push(traffic.move_once(&locker, lock, rtt)?.silence);
            Ok::<_, anyhow::Error>(())
        })?;
        Ok([silences, without])
    }
}

/// Bytes per millisecond through a move with a lock of 50 ms.
fn plot(directory: &Path) -> Result<()> {
    const BEFORE: Duration = Duration::from_millis(100);
    const LOCK: Duration = Duration::from_millis(50);
    const AFTER: Duration = Duration::from_millis(400);
    const BIN: Duration = Duration::from_millis(5);
    let pair = Pair::new()?;
    let mut plot = Plot::new("Throughput through a move: locked for 50 ms at 0", "ms", "MB/s", Scale::Linear);
    for (mode, name) in MODES {
        let notes = pair.a.run(|| {
            let locker = Locker::new(mode)?;
            let mut traffic = Traffic::start(&pair, Pattern::Upload, "cubic")?;
            traffic.settle(Duration::ZERO)?;
            traffic.move_once(&locker, Duration::ZERO, Duration::ZERO)?;
            traffic.settle(Duration::ZERO)?;
            let mut notes = Vec::new();
            traffic.watch(BEFORE, &mut notes)?;
            let moved = Instant::now();
            traffic.move_once(&locker, LOCK, Duration::ZERO)?;
            traffic.watch(AFTER, &mut notes)?;
            Ok::<_, anyhow::Error>((moved, notes))
        })?;
        plot.series(name, rates(&notes.1, notes.0, BIN));
    }
    plot.write(&directory.join("throughput.svg"))
}

/// The rate in each piece of time, in MB/s, over milliseconds since `zero`.
fn rates(notes: &[(Instant, u64)], zero: Instant, bin: Duration) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (notes.first(), notes.last()) else { return Vec::new() };
    let bytes_at = |time: Instant| notes[notes.partition_point(|note| note.0 <= time).saturating_sub(1)].1;
    let mut rates = Vec::new();
    let mut begin = first.0;
    while begin + bin <= last.0 {
        let bytes = bytes_at(begin + bin) - bytes_at(begin);
        let middle = (begin + bin / 2).duration_since(first.0).as_secs_f64() - (zero - first.0).as_secs_f64();
        rates.push((middle * 1e3, bytes as f64 / bin.as_secs_f64() / 1e6));
        begin += bin;
    }
    rates
}

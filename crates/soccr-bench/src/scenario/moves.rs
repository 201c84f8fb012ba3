//! Whole moves of idle connections from one program to another: lock, save, stream, read, restore, unlock, resume.
//!
//! The floor does the same without lock and stream, without writing back the options, and one connection after the
//! other: its system calls are those of [`floor`].

use std::io::{BufReader, BufWriter, PipeReader, PipeWriter};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use soccr::bulk::{self, Saved};
use soccr::lock::{Locker, Mode};
use soccr::{Connection, Restored};
use soccr_image::stream::{Message, Reader, Writer};

use crate::arguments::Arguments;
use crate::floor;
use crate::idle::{Ends, Idle, Move};
use crate::plot::{Plot, Scale};
use crate::report::{Report, Row};
use crate::statistics::{Samples, processor_time, repeat};

const COUNTS: [usize; 5] = [1, 100, 1_000, 10_000, 50_000];

/// The parts of a move. Saving and restoring are streamed, so they overlap.
const PHASES: [&str; 4] = ["lock", "save, stream, restore", "unlock", "resume"];
const BUFFER: usize = 64 << 10;

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let (mut moved, mut bare) = (Vec::new(), Vec::new());
    for count in COUNTS {
        match Idle::new(count) {
            Ok(idle) => {
                let medians = one(idle, count, arguments, report)?;
                let [ours, floor] = medians.map(|time| time.as_secs_f64() * 1e6 / count as f64);
                moved.push((count as f64, ours));
                bare.push((count as f64, floor));
            }
            Err(error) => report.note(format!("{count} connections cannot be made here: {error}")),
        }
    }
    let Some(directory) = &arguments.plots else { return Ok(()) };
    let mut plot = Plot::new(
        "A whole move: cost per connection",
        "connections",
        "µs per connection",
        Scale::Logarithmic,
    );
    plot.series("lock, save, stream, restore, unlock, resume", moved);
    plot.series("bare system calls", bare);
    plot.write(&directory.join("cost-per-connection.svg"))
}

fn one(mut idle: Idle, count: usize, arguments: &Arguments, report: &mut Report) -> Result<[Duration; 2]> {
    let locker = idle.pair.a.run(|| Locker::new(Mode::HOLD))?;
    let budget = Duration::from_millis(if arguments.full { 20_000 } else { 1_500 });
    let mut samples = Samples::default();
    let mut phases: [Samples; PHASES.len()] = Default::default();
    let mut bare = Samples::default();
    let (mut used, mut used_bare) = (Samples::default(), Samples::default());
    repeat(budget, 3, |_| {
        let stopwatch = Stopwatch::start();
        move_all(&mut idle, &locker, &mut phases)?;
        let [time, processor] = stopwatch.stop();
        samples.push(time);
        used.push(processor);
        idle.check().context("after the move")?;
        let [time, processor] = move_bare(&idle, &locker)?;
        bare.push(time);
        used_bare.push(processor);
        idle.check().context("after the bare move")
    })?;
    report.add(Row::new("moves", format!("{count}"), &samples).against(&bare));
    report.add(Row::new("moves", format!("{count}: processor time"), &used).against(&used_bare));
    for (name, samples) in PHASES.iter().zip(&phases) {
        report.add(Row::new("moves", format!("{count}: {name}"), samples));
    }
    Ok([samples.median(), bare.median()])
}

fn move_all(idle: &mut Idle, locker: &Locker, phases: &mut [Samples; PHASES.len()]) -> Result<()> {
    let [locking, moving, unlocking, resuming] = phases;
    let lock = locking.time(|| locker.lock(&idle.flows()?))?;
    moving.time(|| idle.moves.iter().try_for_each(stream))?;
    unlocking.time(|| lock.release())?;
    // The peers do not wait for this any more.
    idle.moves.iter().for_each(|shards| shards.source.run(|ends| ends.streams.clear()));
    idle.turn();
    resuming.time(|| idle.moves.iter().try_for_each(|shards| shards.source.run(resume)))
}

/// Saves into a pipe, and restores from its other end, at the same time.
fn stream(shards: &Move) -> Result<()> {
    let Move { pipe, source, target, .. } = shards;
    thread::scope(|scope| {
        let saving = scope.spawn(|| {
            let pipe = Arc::clone(pipe);
            source.run(move |ends| save(&ends.streams, &pipe.1))
        });
        let pipe = Arc::clone(pipe);
        target.run(move |ends| restore(&mut ends.restored, &pipe.0))?;
        saving.join().expect("it does not panic")
    })
}

fn save(streams: &[TcpStream], pipe: &PipeWriter) -> Result<()> {
    let mut stream = Writer::new(BufWriter::with_capacity(BUFFER, pipe))?;
    bulk::save(streams, |index, saved| {
        let Saved { connection, paused } = saved?;
        paused.detach()?;
        stream.connection(index as u32 + 1, "", connection)?;
        Ok::<_, anyhow::Error>(())
    })?;
    stream.finish()?;
    Ok(())
}

fn restore(restored: &mut Vec<(usize, Restored)>, pipe: &PipeReader) -> Result<()> {
    let mut reader = Reader::new(BufReader::with_capacity(BUFFER, pipe))?;
    let connections = std::iter::from_fn(|| match reader.receive() {
        Ok(Some(Message::Connection { id, connection, .. })) => Some((id as usize - 1, connection)),
        _ => None,
    });
    let mut failure = None;
    bulk::restore(connections, |index, outcome| match outcome {
        Ok(socket) => restored.push((index, socket)),
        Err(error) => failure = Some(error),
    });
    match failure {
        Some(error) => bail!(error),
        None => Ok(()),
    }
}

fn resume(ends: &mut Ends) -> Result<()> {
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    streams.resize_with(ends.restored.len(), || None);
    let mut failure = None;
    bulk::resume(ends.restored.drain(..), |index, outcome| match outcome {
        Ok(stream) => streams[index] = Some(stream),
        Err(error) => failure = Some(error),
    });
    if let Some(error) = failure {
        bail!(error);
    }
    ends.streams = streams.into_iter().collect::<Option<_>>().context("a connection is missing")?;
    Ok(())
}

/// The same by bare system calls: the time and the processor time that these take. It needs the lock nevertheless, or what the peers send
/// would meet no socket.
pub(crate) fn move_bare(idle: &Idle, locker: &Locker) -> Result<[Duration; 2]> {
    let lock = locker.lock(&idle.flows()?)?;
    let mut times = [Duration::ZERO; 2];
    let mut add = |more: [Duration; 2]| (0..2).for_each(|n| times[n] += more[n]);
    for Move { source: shard, .. } in &idle.moves {
        add(shard.run(|ends| {
            let values = values(ends)?;
            let restorers: Vec<_> = values.iter().map(floor::Restorer::new).collect();
            let stopwatch = Stopwatch::start();
            for socket in ends.streams.drain(..) {
                floor::save(socket.as_fd(), &mut []);
                floor::detach(socket.as_fd());
            }
            ends.streams = restorers.iter().map(|restorer| restorer.restore().into()).collect();
            Ok::<_, anyhow::Error>(stopwatch.stop())
        })?);
    }
    lock.release()?;
    for Move { source: shard, .. } in &idle.moves {
        add(shard.run(|ends| {
            let stopwatch = Stopwatch::start();
            ends.streams.iter().for_each(|socket| floor::resume(socket.as_fd()));
            stopwatch.stop()
        }));
    }
    Ok(times)
}

/// The time that passes, and the processor time that is used.
#[derive(Clone, Copy)]
pub(crate) struct Stopwatch(Instant, Duration);

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self(Instant::now(), processor_time())
    }

    pub(crate) fn stop(self) -> [Duration; 2] {
        self.until([Self::start()])
    }

    /// Until the last of these was started.
    pub(crate) fn until<const N: usize>(self, others: [Self; N]) -> [Duration; 2] {
        others.into_iter().fold([Duration::ZERO; 2], |[time, used], other| {
            [time.max(other.0 - self.0), used.max(other.1 - self.1)]
        })
    }
}

fn values(ends: &Ends) -> Result<Vec<Connection>> {
    let mut values = Vec::new();
    bulk::save(&ends.streams, |_, saved| {
        let Saved { connection, paused } = saved?;
        values.push(connection.clone());
        paused.leave_paused();
        Ok::<_, soccr::Error>(())
    })?;
    ends.streams.iter().for_each(|socket| floor::unpause(socket.as_fd()));
    Ok(values)
}

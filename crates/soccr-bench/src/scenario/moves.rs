//! Whole moves of idle connections: lock, save, stream, read, restore, unlock, resume.
//!
//! The floor does the same without lock and stream, without writing back the options, and one connection after the
//! other: its system calls are those of [`floor`].

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use soccr::Connection;
use soccr::bulk::{self, Saved};
use soccr::lock::{Locker, Mode};
use soccr_image::stream::{Message, Reader, Writer};

use crate::arguments::Arguments;
use crate::floor;
use crate::idle::{Ends, Idle};
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};

const COUNTS: [usize; 5] = [1, 100, 1_000, 10_000, 50_000];

/// The parts of a move.
const PHASES: [&str; 5] = ["lock", "save and stream", "read and restore", "unlock", "resume"];

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    for count in COUNTS {
        match Idle::new(count) {
            Ok(idle) => one(idle, count, arguments, report)?,
            Err(error) => report.note(format!("{count} connections cannot be made here: {error}")),
        }
    }
    Ok(())
}

fn one(idle: Idle, count: usize, arguments: &Arguments, report: &mut Report) -> Result<()> {
    let locker = idle.pair.a.run(|| Locker::new(Mode::HOLD))?;
    let budget = Duration::from_millis(if arguments.full { 20_000 } else { 1_500 });
    let mut samples = Samples::default();
    let mut phases: [Samples; PHASES.len()] = Default::default();
    let mut bare = Samples::default();
    repeat(budget, 3, |_| {
        let start = Instant::now();
        move_all(&idle, &locker, &mut phases)?;
        samples.push(start.elapsed());
        idle.check().context("after the move")?;
        bare.push(move_bare(&idle)?);
        idle.check().context("after the bare move")
    })?;
    report.add(Row::new("moves", format!("{count}"), &samples).against(&bare));
    for (name, samples) in PHASES.iter().zip(&phases) {
        report.add(Row::new("moves", format!("{count}: {name}"), samples));
    }
    Ok(())
}

fn move_all(idle: &Idle, locker: &Locker, phases: &mut [Samples; PHASES.len()]) -> Result<()> {
    let [locking, saving, restoring, unlocking, resuming] = phases;
    let lock = locking.time(|| locker.lock(&idle.flows()?))?;
    let images =
        saving.time(|| idle.shards.iter().map(|shard| shard.run(save)).collect::<Result<Vec<_>>>())?;
    restoring.time(|| {
        idle.shards
            .iter()
            .zip(images)
            .try_for_each(|(shard, image)| shard.run(move |ends| restore(ends, &image)))
    })?;
    unlocking.time(|| lock.release())?;
    resuming.time(|| idle.shards.iter().try_for_each(|shard| shard.run(resume)))
}

fn save(ends: &mut Ends) -> Result<Vec<u8>> {
    let mut stream = Writer::new(Vec::new())?;
    bulk::save(&ends.streams, |index, saved| {
        let Saved { connection, paused } = saved?;
        stream.connection(index as u32 + 1, "", connection)?;
        paused.detach()?;
        Ok::<_, anyhow::Error>(())
    })?;
    ends.restored.resize_with(ends.streams.len(), || None);
    ends.streams.clear();
    Ok(stream.finish()?)
}

fn restore(ends: &mut Ends, mut image: &[u8]) -> Result<()> {
    let mut reader = Reader::new(&mut image)?;
    let connections = std::iter::from_fn(|| match reader.receive() {
        Ok(Some(Message::Connection { id, connection, .. })) => Some((id as usize - 1, connection)),
        _ => None,
    });
    let mut failure = None;
    bulk::restore(connections, |index, outcome| match outcome {
        Ok(socket) => ends.restored[index] = Some(socket),
        Err(error) => failure = Some(error),
    });
    match failure {
        Some(error) => bail!(error),
        None => Ok(()),
    }
}

fn resume(ends: &mut Ends) -> Result<()> {
    let restored = ends.restored.drain(..);
    ends.streams =
        restored.map(|socket| Ok(socket.context("it is missing")?.resume()?)).collect::<Result<_>>()?;
    Ok(())
}

/// The same by bare system calls, for the time that these take.
fn move_bare(idle: &Idle) -> Result<Duration> {
    let mut time = Duration::ZERO;
    for shard in &idle.shards {
        time += shard.run(|ends| {
            let values = values(ends)?;
            let restorers: Vec<_> = values.iter().map(floor::Restorer::new).collect();
            let start = Instant::now();
            for socket in ends.streams.drain(..) {
                floor::save(socket.as_fd(), &mut []);
                floor::detach(socket.as_fd());
            }
            ends.streams = restorers.iter().map(|restorer| restorer.restore().into()).collect();
            ends.streams.iter().for_each(|socket| floor::resume(socket.as_fd()));
            Ok::<_, anyhow::Error>(start.elapsed())
        })?;
    }
    Ok(time)
}

fn values(ends: &Ends) -> Result<Vec<Connection>> {
    let mut values = Vec::new();
    bulk::save(&ends.streams, |_, saved| {
        let Saved { connection, paused } = saved?;
        values.push(connection.clone());
        paused.release();
        Ok::<_, soccr::Error>(())
    })?;
    ends.streams.iter().for_each(|socket| floor::unpause(socket.as_fd()));
    Ok(values)
}

//! Connections handed over from one program to another in the same network, by the library and its whole protocol: the target
//! answers for each connection, and the old socket is in the way until it is let go of.
//!
//! The floor is that of [`moves`](super::moves), for one program. Two need more than it has, each measured by itself: a lock at either
//! end, since one of the two may die, and messages.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soccr::lock::{Locker, Mode};
use soccr_handover::{Mover, Outcome};

use super::moves::{Stopwatch, move_bare};
use crate::arguments::Arguments;
use crate::idle::{Ends, Idle, Move};
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};

const COUNTS: [usize; 4] = [1, 100, 5_000, 10_000];

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let budget = Duration::from_millis(if arguments.full { 10_000 } else { 1_500 });
    for count in COUNTS {
        let mut idle = Idle::new(count)?;
        let locker = idle.pair.a.run(|| Locker::new(Mode::HOLD))?;
        for shards in &idle.moves {
            for shard in [&shards.source, &shards.target] {
                shard.run(|ends| Mover::new().map(|mover| ends.mover = Some(mover)))?;
            }
        }
        let (mut samples, mut bare) = (Samples::default(), Samples::default());
        let (mut used, mut used_bare) = (Samples::default(), Samples::default());
        let (mut locks, mut messages) = (Samples::default(), Samples::default());
        repeat(budget, 3, |_| {
            let mut times = [Duration::ZERO; 2];
            for shards in &idle.moves {
                connect(shards)?;
                let more = hand_over(shards)?;
                (0..2).for_each(|n| times[n] += more[n]);
            }
            samples.push(times[0]);
            used.push(times[1]);
            idle.turn();
            idle.check().context("after the hand-over")?;
            let [time, processor] = move_bare(&idle, &locker)?;
            bare.push(time);
            used_bare.push(processor);
            idle.check().context("after the bare move")?;
            let flows = idle.flows()?;
            locks.time(|| locker.lock(&flows)?.release())?;
            idle.moves.iter().try_for_each(|shards| {
                connect(shards)?;
                messages.push(talk(shards)?);
                anyhow::Ok(())
            })
        })?;
        report.add(Row::new("handover", format!("{count}"), &samples).against(&bare));
        report.add(Row::new("handover", format!("{count}: processor time"), &used).against(&used_bare));
        report.add(Row::new("handover", format!("{count}: lock and unlock, one end"), &locks));
        report.add(Row::new("handover", format!("{count}: three exchanges of messages"), &messages));
    }
    Ok(())
}

/// Source and target have descriptors of their own: they meet by name.
fn connect(shards: &Move) -> Result<()> {
    let address = SocketAddr::from_abstract_name(format!("soccr-bench-{}", std::process::id()))?;
    let (name, listener) = (address.clone(), shards.target.run(move |_| UnixListener::bind_addr(&address))?);
    shards
        .source
        .run(move |ends| UnixStream::connect_addr(&name).map(|channel| ends.channel = Some(channel)))?;
    shards.target.run(move |ends| listener.accept().map(|(channel, _)| ends.channel = Some(channel)))?;
    Ok(())
}

/// How long the messages of a hand-over take that say nothing: BEGIN and HERE, CONNECTION and READY, COMMIT and TAKEN.
fn talk(Move { source, target, .. }: &Move) -> Result<Duration> {
    const EXCHANGES: usize = 3;
    let answering = target.start(|ends| {
        let mut channel = ends.channel.take().context("a channel")?;
        (0..EXCHANGES)
            .try_for_each(|_| channel.read_exact(&mut [0]).and_then(|()| channel.write_all(&[0])))?;
        anyhow::Ok(())
    });
    let asking = source.run(|ends| {
        let mut channel = ends.channel.take().context("a channel")?;
        let begin = Instant::now();
        (0..EXCHANGES)
            .try_for_each(|_| channel.write_all(&[0]).and_then(|()| channel.read_exact(&mut [0])))?;
        anyhow::Ok(begin.elapsed())
    });
    answering.recv().context("the target does not panic")??;
    asking
}

/// From when the source begins until both are done: the clocks are theirs, since waking their threads is no part of it.
fn hand_over(shards: &Move) -> Result<[Duration; 2]> {
    let Move { source, target, .. } = shards;
    let count = source.run(|ends| ends.streams.len());
    let receiving = target.start(move |ends| receive(ends, count).map(|()| Stopwatch::start()));
    let sending = source.start(|ends| {
        let begin = Stopwatch::start();
        send(ends).map(|()| (begin, Stopwatch::start()))
    });
    let received = receiving.recv().context("the target does not panic")??;
    let (begin, sent) = sending.recv().context("the source does not panic")??;
    Ok(begin.until([received, sent]))
}

fn send(ends: &mut Ends) -> Result<()> {
    let (mover, mut channel) =
        (ends.mover.as_ref().context("a mover")?, ends.channel.take().context("a channel")?);
    let mut departing = Vec::new();
    for (number, stream) in ends.streams.drain(..).enumerate() {
        departing.push(mover.take(stream)?.named(format!("{number:05}")));
    }
    let outcomes = mover.send_all(departing, &mut channel);
    ensure!(outcomes.iter().all(Outcome::is_moved), "a connection has not moved");
    Ok(())
}

fn receive(ends: &mut Ends, count: usize) -> Result<()> {
    let channel = ends.channel.take().context("a channel")?;
    let mut arriving = ends.mover.as_ref().context("a mover")?.listen(channel);
    let mut arrived = Vec::with_capacity(count);
    while arrived.len() < count {
        arrived.push(arriving.next()?.context("a connection is missing")?);
    }
    // They arrive in any order, and their peers have one.
    arrived.sort_by(|one, other| one.name().cmp(other.name()));
    ends.streams =
        arrived.into_iter().map(|arrived| arrived.into_stream()).collect::<std::io::Result<_>>()?;
    Ok(())
}

//! How fast a connection is after a move.
//!
//! Goodput is what the receiving application gets in the first second after the move, beside that of the second before it.
//! Recovery is how long the peer waits for the first segment after the move where that is lost, beside the retransmission
//! timeout before it. Each connection is locked (hold), saved, detached and restored on the same host.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soccr::connection::Path;
use soccr::{Flow, Lock, pause};
use soccr_lab::{Family, Pair, Shape, Side};

use crate::arguments::Arguments;
use crate::effort::Effort;
use crate::report::{Report, Row};
use crate::statistics::Samples;

const SECOND: Duration = Duration::from_secs(1);
/// Until congestion control has found its window.
const WARM_UP: Duration = Duration::from_secs(2);

/// A way in which the connection is busy, as the end that moves sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Sending,
    Receiving,
}

use Direction::{Receiving, Sending};

const DIRECTIONS: [(&[Direction], &str); 3] =
    [(&[Sending], "sending"), (&[Receiving], "receiving"), (&[Sending, Receiving], "both ways")];
/// bbr with all that comes back: how little the usual recipe brings back is seen with cubic.
const CONGESTION: [(&str, &[(Effort, &str)]); 2] =
    [("cubic", &Effort::ALL), ("bbr", &[(Effort::All, "everything")])];

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let runs = if arguments.full { 5 } else { 1 };
    for (line, delay, rate) in
        [("20 ms, 200 Mbit/s", 10_000, 200_000_000), ("1 ms, 1 Gbit/s", 500, 1_000_000_000)]
    {
        let shape = Shape {
            delay: Duration::from_micros(delay),
            rate: Some(rate),
            queue: 1 << 20,
            ..Shape::default()
        };
        for ((directions, doing), (congestion, efforts)) in
            DIRECTIONS.iter().flat_map(|doing| CONGESTION.map(|congestion| (*doing, congestion)))
        {
            for (effort, name) in efforts {
                let moves = (0..runs).map(|_| goodput(&shape, directions, congestion, *effort));
                let mut moves = moves.collect::<Result<Vec<_>>>()?;
                moves.sort_by(|a, b| (a[1] / a[0]).total_cmp(&(b[1] / b[0])));
                let what = format!("{line}, {doing}, {name}, {congestion}");
                report.add(Row::goodput("speed", what, runs, moves[moves.len() / 2]));
            }
        }
    }
    for (effort, name) in Effort::ALL {
        let (mut waits, mut timeouts) = (Samples::default(), Samples::default());
        for _ in 0..6 * runs {
            let [wait, timeout] = recovery(effort)?;
            waits.push(wait);
            timeouts.push(timeout);
        }
        report
            .add(Row::new("speed", format!("20 ms, first segment lost, {name}"), &waits).against(&timeouts));
    }
    Ok(())
}

/// A connection between two hosts: the end that moves, and the peer.
fn connect(pair: &Pair, congestion: &str) -> Result<(TcpStream, TcpStream)> {
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(Family::V4, 80)))?;
    let ours = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, Family::V4, 80)))?;
    let (peer, _) = listener.accept()?;
    for socket in [&ours, &peer] {
        rustix::net::sockopt::set_tcp_congestion(socket, congestion)?;
    }
    Ok((ours, peer))
}

/// Bits per second in the second before the move, and in the one after it; of both directions together.
fn goodput(shape: &Shape, directions: &[Direction], congestion: &str, effort: Effort) -> Result<[f64; 2]> {
    let pair = Pair::shaped(shape)?;
    let (ours, peer) = connect(&pair, congestion)?;
    let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    // What the end does that is sending where the other one receives.
    let carry = |mut end: &TcpStream, sends: bool, until: &dyn Fn() -> bool| {
        while !until() {
            if sends { write(&mut end) } else { read(&mut end, &received) }
        }
    };
    let (carry, peer, stop) = (&carry, &peer, &stop);
    thread::scope(|scope| {
        for &direction in directions {
            scope.spawn(move || carry(peer, direction == Receiving, &|| stop.load(Ordering::Relaxed)));
        }
        let work = |ours: &TcpStream, time: Duration| {
            let (start, before) = (Instant::now(), received.load(Ordering::Relaxed));
            thread::scope(|scope| {
                for &direction in directions {
                    scope.spawn(move || carry(ours, direction == Sending, &|| start.elapsed() >= time));
                }
            });
            (received.load(Ordering::Relaxed) - before) as f64 * 8.0 / start.elapsed().as_secs_f64()
        };
        work(&ours, WARM_UP);
        let before = work(&ours, SECOND);
        let after = move_once(&pair, ours, effort).map(|(ours, _)| {
            let after = work(&ours, SECOND);
            stop.store(true, Ordering::Relaxed);
            // The peer may wait for bytes or for room.
            let _ = ours.shutdown(std::net::Shutdown::Both);
            after
        });
        stop.store(true, Ordering::Relaxed);
        Ok([before, after?])
    })
}

/// How long a message takes whose first segment is lost, and the timeout that the connection had.
fn recovery(effort: Effort) -> Result<[Duration; 2]> {
    const MESSAGE: [u8; 1000] = [7; 1000];
    let pair = Pair::shaped(&Shape::rtt(Duration::from_millis(20)))?;
    let line = pair.line.as_ref().context("a line")?;
    let (mut ours, mut peer) = connect(&pair, "cubic")?;
    let mut buffer = MESSAGE;
    for _ in 0..20 {
        ours.write_all(&MESSAGE)?;
        peer.read_exact(&mut buffer)?;
        peer.write_all(&MESSAGE)?;
        ours.read_exact(&mut buffer)?;
    }
    let (mut ours, before) = move_once(&pair, ours, effort)?;
    line.lose_next(Side::A, |segment| segment.payload_len > 0);
    let start = Instant::now();
    ours.write_all(&MESSAGE)?;
    peer.read_exact(&mut buffer)?;
    let wait = start.elapsed();
    ensure!(line.lost(Side::A) > 0, "no segment was lost");
    Ok([wait, before.rto])
}

fn write(stream: &mut &TcpStream) {
    const PIECE: [u8; 1 << 14] = [7; 1 << 14];
    // The end of the connection is the end of the measurement.
    let _ = stream.write(&PIECE);
}

fn read(stream: &mut &TcpStream, received: &AtomicU64) {
    let mut piece = [0; 1 << 16];
    received.fetch_add(stream.read(&mut piece).unwrap_or(0) as u64, Ordering::Relaxed);
}

/// Returns what the connection had learned about its path, too.
fn move_once(pair: &Pair, ours: TcpStream, effort: Effort) -> Result<(TcpStream, Path)> {
    let lock = pair.a.run(|| Lock::hold(&[Flow::of(&ours)?]))?;
    let paused = pause(&ours)?;
    let mut connection = paused.save()?;
    paused.detach()?;
    let path = connection.path.unwrap_or_default();
    effort.reduce(&mut connection);
    let restored = pair.a.run(|| connection.restore())?;
    lock.release_into(&[&restored])?;
    Ok((restored.resume()?, path))
}

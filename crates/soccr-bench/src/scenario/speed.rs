//! How fast a connection is after a move.
//!
//! Goodput is what the receiving application gets in the first second after the move, beside that of the second before it.
//! Each connection is locked (hold), saved, detached and restored on the same host.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use soccr::{Flow, Lock, pause};
use soccr_lab::{Family, Pair, Shape};

use crate::arguments::Arguments;
use crate::effort::Effort;
use crate::report::{Report, Row};

const SECOND: Duration = Duration::from_secs(1);
/// Until congestion control has found its window.
const WARM_UP: Duration = Duration::from_secs(2);

/// Which of its two ways the connection is busy.
#[derive(Clone, Copy, Debug)]
enum Direction {
    Sending,
    Receiving,
}

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
        for (direction, doing) in [(Direction::Sending, "sending"), (Direction::Receiving, "receiving")] {
            for (effort, name) in Effort::ALL {
                let moves = (0..runs).map(|_| goodput(&shape, direction, effort));
                let mut moves = moves.collect::<Result<Vec<_>>>()?;
                moves.sort_by(|a, b| (a[1] / a[0]).total_cmp(&(b[1] / b[0])));
                let what = format!("{line}, {doing}, {name}");
                report.add(Row::goodput("speed", what, runs, moves[moves.len() / 2]));
            }
        }
    }
    Ok(())
}

/// A connection between two hosts: the end that moves, and the peer.
fn connect(pair: &Pair) -> Result<(TcpStream, TcpStream)> {
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(Family::V4, 80)))?;
    let ours = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, Family::V4, 80)))?;
    let (peer, _) = listener.accept()?;
    for socket in [&ours, &peer] {
        rustix::net::sockopt::set_tcp_congestion(socket, "cubic")?;
    }
    Ok((ours, peer))
}

/// Bits per second in the second before the move, and in the one after it.
fn goodput(shape: &Shape, direction: Direction, effort: Effort) -> Result<[f64; 2]> {
    let pair = Pair::shaped(shape)?;
    let (mut ours, mut peer) = connect(&pair)?;
    let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let (received, stop) = (&received, &stop);
        let busy = scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match direction {
                    Direction::Sending => read(&mut peer, received),
                    Direction::Receiving => write(&mut peer),
                }
            }
        });
        let work = |ours: &mut TcpStream, time: Duration| {
            let (start, before) = (Instant::now(), received.load(Ordering::Relaxed));
            while start.elapsed() < time {
                match direction {
                    Direction::Sending => write(ours),
                    Direction::Receiving => read(ours, received),
                }
            }
            (received.load(Ordering::Relaxed) - before) as f64 * 8.0 / start.elapsed().as_secs_f64()
        };
        work(&mut ours, WARM_UP);
        let before = work(&mut ours, SECOND);
        let moved = move_once(&pair, ours, effort);
        let after = moved.map(|mut ours| {
            let after = work(&mut ours, SECOND);
            stop.store(true, Ordering::Relaxed);
            // The peer may wait for bytes or for room.
            let _ = ours.shutdown(std::net::Shutdown::Both);
            after
        });
        stop.store(true, Ordering::Relaxed);
        let _ = busy.join();
        Ok([before, after?])
    })
}

fn write(stream: &mut TcpStream) {
    const PIECE: [u8; 1 << 14] = [7; 1 << 14];
    // The end of the connection is the end of the measurement.
    let _ = stream.write(&PIECE);
}

fn read(stream: &mut TcpStream, received: &AtomicU64) {
    let mut piece = [0; 1 << 16];
    received.fetch_add(stream.read(&mut piece).unwrap_or(0) as u64, Ordering::Relaxed);
}

fn move_once(pair: &Pair, ours: TcpStream, effort: Effort) -> Result<TcpStream> {
    let lock = pair.a.run(|| Lock::hold(&[Flow::of(&ours)?]))?;
    let paused = pause(&ours)?;
    let mut connection = paused.save()?;
    paused.detach()?;
    effort.reduce(&mut connection);
    let restored = pair.a.run(|| connection.restore())?;
    lock.release()?;
    Ok(restored.resume()?)
}

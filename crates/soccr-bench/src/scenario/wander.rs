//! A connection that wanders among three hosts, A → B → C → A, with 200 Mbit/s in each direction: the silence that its peer
//! feels, beside that of moves within one host, where nothing is steered. Every byte is compared.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soccr::lock::{Locker, Mode};
use soccr::steer::{Foreign, NextHop, Numbers, Steerer};
use soccr::{Flow, pause};
use soccr_lab::{Flags, Lan, Sniffer};

use crate::arguments::Arguments;
use crate::report::{Report, Row};
use crate::statistics::Samples;

/// Bytes per second, in each direction: 200 Mbit/s.
const RATE: f64 = 25e6;
const CHUNK: usize = 16 << 10;
/// Before and after a move.
const PAUSE: Duration = Duration::from_millis(25);

pub(super) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let moves = if arguments.full { 100 } else { 21 };
    for (ipv6, family) in [(false, "IPv4"), (true, "IPv6")] {
        let unsteered = wander(ipv6, moves, &[0])?;
        let steered = wander(ipv6, moves, &[1, 2, 0])?;
        let what = format!("silence of {moves} moves A-B-C-A, {family}");
        report.add(Row::new("steer", what, &steered).against(&unsteered));
    }
    Ok(())
}

/// Moves a connection round and round.
fn wander(ipv6: bool, moves: usize, round: &[usize]) -> Result<Samples> {
    let lan = Lan::new()?;
    let address = |host: usize| -> IpAddr {
        let host = &lan.hosts[host];
        if ipv6 { host.v6.into() } else { host.v4.into() }
    };
    let home = address(0);
    let mut resets = Sniffer::flagged(&lan.peer.namespace, "eth0", Flags::RST)?;
    let listener = lan.hosts[0].run(|| TcpListener::bind((home, 80)))?;
    let peer = lan.peer.run(|| TcpStream::connect((home, 80)))?;
    let mut stream = listener.accept()?.0;
    let flow = Flow::of(&stream)?;
    let mut lockers = Vec::new();
    let mut hops = Vec::new();
    for host in 0..3 {
        lockers.push(lan.hosts[host].run(|| Locker::new(Mode::HOLD))?);
        if host > 0 {
            lan.hosts[host].run(|| Foreign::deliver(home, Numbers::default()))?;
            hops.push(lan.hosts[0].run(|| NextHop::new(address(host)))?);
        }
    }
    let mut steerer = lan.hosts[0].run(Steerer::new)?;
    let mut samples = Samples::default();
    let heard = Heard::default();
    stream.set_nonblocking(true)?;
    let mut ours = End::new(1);
    thread::scope(|scope| {
        let peer = &peer;
        let receiver = scope.spawn(|| receive(peer, &heard));
        let sender = scope.spawn(|| send(peer, &heard));
        let mut place = 0;
        for next in round.iter().copied().cycle().take(moves) {
            ours.carry_on(&stream, PAUSE, true)?;
            heard.longest.store(0, Ordering::Relaxed);
            let source = lockers[place].lock(&[flow])?;
            let paused = pause(&stream)?;
            let connection = paused.save()?;
            if next == place {
                // The new socket takes the place of the old one.
                paused.detach()?;
                let restored = lan.hosts[next].run(|| connection.restore())?;
                let held = source.take()?;
                held[0].replay(&restored)?;
                drop(source);
                stream = restored.resume()?;
            } else {
                let target = lockers[next].lock(&[flow])?;
                let restored = lan.hosts[next].run(|| connection.restore())?;
                match next {
                    0 => steerer.stop(&[flow]).map(drop)?,
                    next => steerer.redirect(&[flow], &hops[next - 1])?,
                }
                paused.detach()?;
                source.take()?[0].replay(&restored)?;
                drop(source);
                target.release()?;
                stream = restored.resume()?;
            }
            place = next;
            ours.carry_on(&stream, PAUSE, true)?;
            samples.push(Duration::from_nanos(heard.longest.load(Ordering::Relaxed)));
        }
        heard.stop.store(1, Ordering::Relaxed);
        ours.carry_on(&stream, Duration::MAX, false)?;
        stream.shutdown(Shutdown::Write)?;
        let received = receiver.join().ok().context("the receiver has panicked")??;
        let sent = sender.join().ok().context("the sender has panicked")??;
        ensure!((ours.sent, ours.received) == (received, sent), "bytes are missing");
        Ok::<_, anyhow::Error>(())
    })?;
    ensure!(resets.segments()?.is_empty(), "the connection was reset");
    Ok(samples)
}

/// What the peer hears.
#[derive(Debug, Default)]
struct Heard {
    /// The longest time without a byte: nanoseconds.
    longest: AtomicU64,
    stop: AtomicU64,
}

/// The byte at a place of a stream.
fn byte(place: u64, seed: u64) -> u8 {
    let word = (place / 8 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word >> (8 * (place % 8))) as u8
}

fn fill(chunk: &mut [u8], place: u64, seed: u64) {
    (place..).zip(chunk).for_each(|(place, slot)| *slot = byte(place, seed));
}

fn check(chunk: &[u8], place: u64, seed: u64) -> Result<()> {
    let differs = (place..).zip(chunk).find(|(place, found)| **found != byte(*place, seed));
    ensure!(differs.is_none(), "the byte at {} is another one", differs.map_or(0, |(place, _)| place));
    Ok(())
}

fn receive(mut peer: &TcpStream, heard: &Heard) -> Result<u64> {
    let (mut buffer, mut received, mut last) = (vec![0; 4 * CHUNK], 0, Instant::now());
    loop {
        let read = peer.read(&mut buffer)?;
        heard.longest.fetch_max(last.elapsed().as_nanos() as u64, Ordering::Relaxed);
        last = Instant::now();
        if read == 0 {
            return Ok(received);
        }
        check(&buffer[..read], received, 1)?;
        received += read as u64;
    }
}

fn send(mut peer: &TcpStream, heard: &Heard) -> Result<u64> {
    let (mut chunk, mut sent, start) = (vec![0; CHUNK], 0, Instant::now());
    while heard.stop.load(Ordering::Relaxed) == 0 {
        let due = Duration::from_secs_f64(sent as f64 / RATE);
        thread::sleep(due.saturating_sub(start.elapsed()));
        fill(&mut chunk, sent, 2);
        peer.write_all(&chunk)?;
        sent += chunk.len() as u64;
    }
    peer.shutdown(Shutdown::Write)?;
    Ok(sent)
}

/// Our end.
struct End {
    seed: u64,
    sent: u64,
    received: u64,
}

impl End {
    fn new(seed: u64) -> Self {
        Self { seed, sent: 0, received: 0 }
    }

    /// Sends and receives for so long, or until the peer has ended.
    fn carry_on(&mut self, mut stream: &TcpStream, time: Duration, send: bool) -> Result<()> {
        let (start, before) = (Instant::now(), self.sent);
        let (mut buffer, mut chunk) = (vec![0; 4 * CHUNK], vec![0; CHUNK]);
        while start.elapsed() < time {
            let due = start.elapsed().as_secs_f64() * RATE;
            if send && ((self.sent - before) as f64) < due {
                fill(&mut chunk, self.sent, self.seed);
                match stream.write(&chunk) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    written => self.sent += written? as u64,
                }
            }
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => {
                    check(&buffer[..read], self.received, 2)?;
                    self.received += read as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_micros(100))
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

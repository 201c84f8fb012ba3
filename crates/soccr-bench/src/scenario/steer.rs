//! Steering: what it costs to begin and to end, what each packet costs, and what a steered connection carries beside a direct
//! one and beside one that a program relays.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
use soccr::lock::{Locker, Mode};
use soccr::steer::{Foreign, NextHop, Numbers, Steerer, redirect, stop};
use soccr::{Flow, Lock, pause};
use soccr_lab::{Host, Lan, sysctl};

use super::wander;
use crate::arguments::Arguments;
use crate::connections::budget;
use crate::report::{Report, Row};
use crate::statistics::{Samples, repeat};
use crate::sys;

pub(crate) fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let lan = Lan::new()?;
    let home = lan.hosts[0].v4;
    lan.hosts[1].run(|| Foreign::deliver(home.into(), Numbers::default()))?;
    let [b, c] = [1, 2].map(|host| lan.hosts[0].run(|| NextHop::new(lan.hosts[host].v4.into())));
    let (b, c) = (b?, c?);
    let mut steerer = lan.hosts[0].run(Steerer::new)?;
    for count in [1, 1_000, 10_000] {
        let flows: Vec<Flow> = (0..count).map(|number| flow(&lan, number)).collect();
        let (mut on, mut on_to, mut off) = (Samples::default(), Samples::default(), Samples::default());
        repeat(budget(arguments.full), 10, |_| {
            on.time(|| steerer.redirect(&flows, &b))?;
            on_to.time(|| steerer.redirect(&flows, &c))?;
            off.time(|| steerer.stop(&flows)).map(drop)
        })?;
        report.add(Row::new("steer", format!("steer {count}"), &on));
        report.add(Row::new("steer", format!("steer {count} to another host"), &on_to));
        report.add(Row::new("steer", format!("end {count}"), &off));
    }
    packets(&lan, &b, arguments, report)?;
    throughput(&lan, &b, arguments, report)?;
    wander::run(arguments, report)
}

/// Connections that exist nowhere.
fn flow(lan: &Lan, number: u16) -> Flow {
    Flow { local: (lan.hosts[0].v4, 443).into(), remote: (lan.peer.v4, 1000 + number).into() }
}

/// One packet from the peer to where it is dropped: by the next hop, or, as the floor, by a lock of the host with the address.
fn packets(lan: &Lan, hop: &NextHop, arguments: &Arguments, report: &mut Report) -> Result<()> {
    const BATCH: u32 = 1000;
    let raw = lan.peer.run(|| socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW)))?;
    let first = flow(lan, 0);
    let packet = segment(lan.peer.v4, lan.hosts[0].v4, 1000, 443);
    let measure = || {
        let mut samples = Samples::default();
        repeat(budget(arguments.full), 10, |_| {
            let start = Instant::now();
            for _ in 0..BATCH {
                sendto(&raw, &packet, SendFlags::empty(), &SocketAddrV4::new(lan.hosts[0].v4, 0))?;
            }
            samples.push(start.elapsed() / BATCH);
            Ok::<_, rustix::io::Errno>(())
        })?;
        Ok::<_, anyhow::Error>(samples)
    };
    let lock = lan.hosts[0].run(|| Lock::drop_traffic(&[first]))?;
    let floor = measure()?;
    drop(lock);
    for count in [1, 10_000, 60_000] {
        let flows: Vec<Flow> = (0..count).map(|number| flow(lan, number)).collect();
        lan.hosts[0].run(|| redirect(&flows, hop))?;
        report.add(Row::new("steer", format!("a packet, {count} steered"), &measure()?).against(&floor));
        lan.hosts[0].run(|| stop(&flows))?;
    }
    Ok(())
}

/// An ACK over IPv4; the kernel writes length and checksum of the IP header, and nobody looks at that of TCP.
fn segment(source: Ipv4Addr, destination: Ipv4Addr, from: u16, to: u16) -> Vec<u8> {
    const IP: [u8; 12] = [0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, libc::IPPROTO_TCP as u8, 0, 0];
    const REST: [u8; 16] = [0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0];
    let (from, to) = (from.to_be_bytes(), to.to_be_bytes());
    [&IP[..], &source.octets(), &destination.octets(), &from, &to, &REST].concat()
}

fn throughput(lan: &Lan, hop: &NextHop, arguments: &Arguments, report: &mut Report) -> Result<()> {
    let runs = if arguments.full { 10 } else { 3 };
    let (mut direct, mut routed, mut steered, mut relayed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    route_through_the_old_host(lan)?;
    for _ in 0..runs {
        let (peer, ours) = connect(lan, &lan.hosts[0], 80)?;
        direct.push(rate(peer, ours)?);
        let (peer, ours) = connect(lan, &lan.hosts[1], 80)?;
        routed.push(rate(peer, ours)?);
        let (peer, ours) = connect(lan, &lan.hosts[0], 80)?;
        let ours = transfer(lan, hop, ours)?;
        steered.push(rate(peer, ours)?);
        relayed.push(relay(lan)?);
    }
    let [direct, routed, steered, relayed] = [direct, routed, steered, relayed].map(median);
    report.add(Row::goodput("steer", "direct, then steered", runs, [direct, steered]));
    report.add(Row::goodput("steer", "direct, then routed by the old host", runs, [direct, routed]));
    report.add(Row::goodput("steer", "direct, then relayed by a program", runs, [direct, relayed]));
    on_a_line(lan, hop, runs, report)
}

/// The hosts of this machine share its processors, so without a line between them the second hop takes from both ends.
fn on_a_line(lan: &Lan, hop: &NextHop, runs: usize, report: &mut Report) -> Result<()> {
    for gigabits in [1, 10] {
        let on_the_line = |peer: TcpStream, ours| {
            sys::set(peer.as_fd(), libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &[gigabits * 125_000_000]);
            rate(peer, ours)
        };
        let (mut direct, mut steered) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let (peer, ours) = connect(lan, &lan.hosts[0], 80)?;
            direct.push(on_the_line(peer, ours)?);
            let (peer, ours) = connect(lan, &lan.hosts[0], 80)?;
            let ours = transfer(lan, hop, ours)?;
            steered.push(on_the_line(peer, ours)?);
        }
        let what = format!("direct, then steered, {gigabits} Gbit/s at most");
        report.add(Row::goodput("steer", what, runs, [direct, steered].map(median)));
    }
    Ok(())
}

/// What is for the new host's own address goes through the old host, too, and back directly: the least that a second hop costs.
fn route_through_the_old_host(lan: &Lan) -> Result<()> {
    lan.hosts[0].run(|| sysctl("net/ipv4/ip_forward", "1"))?;
    let [old, new] = [0, 1].map(|host| lan.hosts[host].v4.into());
    Ok(lan.router.rtnetlink()?.route(new, 32, "lan", Some(old))?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn connect(lan: &Lan, host: &Host, port: u16) -> Result<(TcpStream, TcpStream)> {
    let listener = host.run(|| TcpListener::bind((host.v4, port)))?;
    let peer = lan.peer.run(|| TcpStream::connect((host.v4, port)))?;
    Ok((peer, listener.accept()?.0))
}

/// Moves a connection to the next hop.
fn transfer(lan: &Lan, hop: &NextHop, stream: TcpStream) -> Result<TcpStream> {
    let flow = Flow::of(&stream)?;
    let source = lan.hosts[0].run(|| Locker::new(Mode::HOLD))?.lock(&[flow])?;
    let paused = pause(&stream)?;
    let connection = paused.save()?;
    let restored = lan.hosts[1].run(|| connection.restore())?;
    lan.hosts[0].run(|| redirect(&[flow], hop))?;
    paused.detach()?;
    drop(source);
    Ok(restored.resume()?)
}

/// Bits per second from the peer to us.
fn rate(mut peer: TcpStream, mut ours: TcpStream) -> Result<f64> {
    const TIME: Duration = Duration::from_secs(1);
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let (chunk, start) = (vec![7; 128 << 10], Instant::now());
            while start.elapsed() < TIME {
                peer.write_all(&chunk)?;
            }
            peer.shutdown(Shutdown::Write)?;
            // It stays open until everything has been read.
            peer.read(&mut [0])
        });
        let (mut buffer, mut bytes, start) = (vec![0; 128 << 10], 0, Instant::now());
        loop {
            match ours.read(&mut buffer)? {
                0 => break,
                read => bytes += read,
            }
        }
        let taken = start.elapsed();
        drop(ours);
        sender.join().ok().context("the sender has panicked")??;
        Ok(bytes as f64 * 8.0 / taken.as_secs_f64())
    })
}

/// The old host as a program that copies from one connection to another.
fn relay(lan: &Lan) -> Result<f64> {
    let (peer, mut from) = connect(lan, &lan.hosts[0], 81)?;
    let listener = lan.hosts[1].run(|| TcpListener::bind((lan.hosts[1].v4, 82)))?;
    let mut to = lan.hosts[0].run(|| TcpStream::connect((lan.hosts[1].v4, 82)))?;
    let (ours, _) = listener.accept()?;
    thread::scope(|scope| {
        // On Linux it splices.
        let relay = scope.spawn(move || std::io::copy(&mut from, &mut to));
        let rate = rate(peer, ours)?;
        relay.join().ok().context("the relay has panicked")??;
        Ok(rate)
    })
}

//! Much that a lock holds: it goes straight into the queue of a restored connection.

use std::io::Write;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::sockopt::{set_socket_recv_buffer_size, socket_recv_buffer_size};
use soccr::ErrorKind::Invalid;
use soccr::connection::Flow;
use soccr::lock::{Locker, Mode};
use soccr::{Connection, Lock, pause};
use soccr_lab::{Family, OnCpu, Pair, Shape, Side, TcpInfo, sysctl, wait_until};

use crate::{Baseline, be_patient, bytes, connect_in, expect, transfer};

/// A handful of the longest packets.
const MUCH: usize = 600_000;

/// A connection whose peer sends so much at a time.
fn warm(pair: &Pair, family: Family) -> (TcpStream, TcpStream) {
    // One whose window only grows.
    pair.a.run(|| sysctl("net/ipv4/tcp_congestion_control", "reno")).unwrap();
    let (mut peer, mut ours) = connect_in(pair, family, 80);
    wait_until("the windows are large", || {
        let writing = write(&peer, 4 * MUCH);
        expect(&mut ours, &bytes(4 * MUCH));
        writing.join().unwrap();
        let info = TcpInfo::of(&peer).unwrap();
        info.snd_cwnd.saturating_mul(info.snd_mss).min(info.snd_wnd) as usize > 2 * MUCH
    });
    transfer(&mut ours, &mut peer, b"and back");
    (peer, ours)
}

/// The peer sends, and all of it is held.
fn send(pair: &Pair, mut peer: &TcpStream, lock: &Lock) {
    peer.write_all(&bytes(MUCH)).unwrap();
    wait_until("all has been sent", || TcpInfo::of(peer).unwrap().unsent == 0);
    // What is sent later arrives later.
    let (mut a, mut b) = connect_in(pair, Family::V4, 81);
    transfer(&mut a, &mut b, b"over");
    wait_until("much is held", || lock.held() > 5);
}

fn write(peer: &TcpStream, length: usize) -> JoinHandle<()> {
    let mut peer = peer.try_clone().unwrap();
    thread::spawn(move || peer.write_all(&bytes(length)).unwrap())
}

/// Saves a connection and lets the socket forget it.
fn take(socket: TcpStream) -> Connection {
    let paused = pause(&socket).unwrap();
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    connection
}

fn segments(socket: impl AsFd) -> usize {
    TcpInfo::of(socket).unwrap().segments_in as usize
}

/// Moves a connection while its peer sends much, and gives it what was held by `deliver`. Returns how many packets that
/// were, and how many of them have come as such.
fn move_much(
    pair: &Pair,
    family: Family,
    deliver: impl Fn(Lock, &soccr::Restored) -> usize,
) -> (usize, usize) {
    be_patient(&pair.a.namespace);
    let (mut peer, ours) = warm(pair, family);
    let baseline = Baseline::of(&pair.a.namespace);
    let lock = Locker::beside(&ours, Mode::HOLD).unwrap().lock(&[Flow::of(&ours).unwrap()]).unwrap();
    let connection = take(ours);
    send(pair, &peer, &lock);
    let restored = pair.b.run(|| connection.restore()).unwrap();
    let before = segments(&restored);
    let count = deliver(lock, &restored);
    let injected = segments(&restored) - before;
    let mut ours = restored.resume().unwrap();
    expect(&mut ours, &bytes(MUCH));
    transfer(&mut ours, &mut peer, b"and back");
    transfer(&mut peer, &mut ours, b"and on");
    baseline.assert_unchanged(family);
    (count, injected)
}

pub fn a_restored_connection_gets_it_in_its_queue() {
    let _cpu = OnCpu::stay(0);
    for family in Family::ALL {
        let (count, injected) = move_much(&Pair::new().unwrap(), family, |lock, restored| {
            lock.release_into(&[restored]).unwrap()
        });
        assert!(count > 5 && injected < count, "{family:?}: {injected} of {count} were injected");
    }
}

pub fn so_it_does_from_another_host() {
    let _cpu = OnCpu::stay(0);
    for family in Family::ALL {
        let (count, injected) = move_much(&Pair::new().unwrap(), family, |lock, restored| {
            let held = lock.take().unwrap().remove(0);
            let count = held.replay(restored).unwrap();
            lock.release().unwrap();
            count
        });
        assert!(count > 5 && injected < count, "{family:?}: {injected} of {count} were injected");
    }
}

pub fn twice_does_no_harm() {
    let _cpu = OnCpu::stay(0);
    move_much(&Pair::new().unwrap(), Family::V4, |lock, restored| {
        let held = lock.take().unwrap().remove(0);
        let count = held.replay(restored).unwrap();
        assert_eq!(held.replay(restored).unwrap(), count);
        lock.release().unwrap()
    });
}

pub fn a_connection_that_stayed_gets_it_too() {
    let _cpu = OnCpu::stay(0);
    let pair = Pair::new().unwrap();
    be_patient(&pair.a.namespace);
    let (peer, mut ours) = warm(&pair, Family::V6);
    let baseline = Baseline::of(&pair.a.namespace);
    let lock = Locker::beside(&ours, Mode::HOLD).unwrap().lock(&[Flow::of(&ours).unwrap()]).unwrap();
    send(&pair, &peer, &lock);
    assert!(lock.release_into(&[&ours]).unwrap() > 5);
    expect(&mut ours, &bytes(MUCH));
    baseline.assert_unchanged("stayed");
}

/// What is behind the gap waits for the peer to fill it.
pub fn a_gap_in_it_is_filled_by_the_peer() {
    let pair = Pair::shaped(&Shape::rtt(Duration::from_millis(10))).unwrap();
    let (mut peer, ours) = warm(&pair, Family::V4);
    let lock = Locker::beside(&ours, Mode::HOLD).unwrap().lock(&[Flow::of(&ours).unwrap()]).unwrap();
    let connection = take(ours);
    let mut segments_left = 200;
    pair.line.as_ref().unwrap().lose_next(Side::A, move |segment| {
        segments_left -= i32::from(segment.payload_len > 0);
        segments_left < 0
    });
    peer.write_all(&bytes(MUCH)).unwrap();
    wait_until("there is a gap", || pair.line.as_ref().unwrap().lost(Side::A) > 0 && lock.held() > 5);
    let restored = pair.b.run(|| connection.restore()).unwrap();
    lock.release_into(&[&restored]).unwrap();
    let mut ours = restored.resume().unwrap();
    expect(&mut ours, &bytes(MUCH));
    transfer(&mut ours, &mut peer, b"and back");
}

pub fn what_finds_no_room_is_sent_again() {
    let _cpu = OnCpu::stay(0);
    let pair = Pair::new().unwrap();
    let (mut peer, ours) = warm(&pair, Family::V4);
    let lock = Locker::beside(&ours, Mode::HOLD).unwrap().lock(&[Flow::of(&ours).unwrap()]).unwrap();
    let connection = take(ours);
    send(&pair, &peer, &lock);
    let restored = pair.b.run(|| connection.restore()).unwrap();
    set_socket_recv_buffer_size(&restored, 100_000).unwrap();
    lock.release_into(&[&restored]).unwrap();
    let mut ours = restored.resume().unwrap();
    assert_eq!(socket_recv_buffer_size(&ours), Ok(200_000));
    expect(&mut ours, &bytes(MUCH));
    transfer(&mut ours, &mut peer, b"and back");
}

pub fn each_connection_gets_its_own() {
    let pair = Pair::new().unwrap();
    let ends = [80, 81].map(|port| connect_in(&pair, Family::V4, port));
    let flows = ends.each_ref().map(|(_, ours)| Flow::of(ours).unwrap());
    let locker = Locker::beside(&ends[0].1, Mode::HOLD).unwrap();

    // Without a socket for each they are unlocked nevertheless.
    let lock = locker.lock(&flows).unwrap();
    let refused = lock.release_into(&[&ends[0].1]).unwrap_err();
    assert_eq!((refused.kind(), refused.step()), (Invalid, "unlock"), "{refused}");

    let lock = locker.lock(&flows).unwrap();
    let mut peers = Vec::new();
    let mut restored = Vec::new();
    for (mut peer, ours) in ends {
        peer.write_all(&peer.peer_addr().unwrap().port().to_be_bytes()).unwrap();
        peers.push(peer);
        let connection = take(ours);
        restored.push(pair.b.run(|| connection.restore()).unwrap());
    }
    wait_until("both have packets", || lock.held() == 2);
    assert_eq!(lock.release_into(&restored).unwrap(), 2);
    for (mut peer, restored) in peers.into_iter().zip(restored) {
        let mut ours = restored.resume().unwrap();
        expect(&mut ours, &peer.peer_addr().unwrap().port().to_be_bytes());
        transfer(&mut ours, &mut peer, b"and back");
    }
}

//! Much that a lock holds: it goes straight into the queue of a restored connection.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_tcp_cork, socket_recv_buffer_size};
use soccr::ErrorKind::Invalid;
use soccr::connection::Flow;
use soccr::lock::{Locker, Mode};
use soccr::{Connection, Lock, Restored, pause};
use soccr_lab::{Family, OnCpu, Pair, Shape, Side, State, TcpInfo, set_option, sysctl, wait_until};

use crate::{Baseline, bytes, connect_in, expect, transfer};

/// A handful of the longest packets.
const MUCH: usize = 600_000;

/// Two hosts between which much is under way at a time, in order.
fn far_apart() -> (Pair, OnCpu) {
    let cpu = OnCpu::stay(0);
    let pair = Pair::shaped(&Shape::rtt(Duration::from_millis(5))).unwrap();
    pair.a.run(|| {
        // A window that grows, and stays.
        sysctl("net/ipv4/tcp_congestion_control", "reno").unwrap();
        sysctl("net/ipv4/tcp_slow_start_after_idle", "0").unwrap();
    });
    (pair, cpu)
}

/// A connection whose peer sends so much at a time.
fn warm(pair: &Pair, family: Family, port: u16) -> (TcpStream, TcpStream) {
    let (mut peer, mut ours) = connect_in(pair, family, port);
    wait_until("the windows are large", || {
        thread::scope(|scope| {
            scope.spawn(|| (&peer).write_all(&bytes(4 * MUCH)).unwrap());
            expect(&mut ours, &bytes(4 * MUCH));
        });
        let info = TcpInfo::of(&peer).unwrap();
        info.snd_cwnd.saturating_mul(info.snd_mss).min(info.snd_wnd) as usize > 2 * MUCH
    });
    transfer(&mut ours, &mut peer, b"and back");
    (peer, ours)
}

/// The peer sends, and all of it is held.
fn send(pair: &Pair, mut peer: &TcpStream, lock: &Lock) {
    peer.write_all(&bytes(MUCH)).unwrap();
    wait_until_held(pair, peer, lock);
}

fn wait_until_held(pair: &Pair, peer: &TcpStream, lock: &Lock) {
    wait_until("all has been sent", || TcpInfo::of(peer).unwrap().unsent == 0);
    // What is sent later arrives later.
    let (mut a, mut b) = connect_in(pair, Family::V4, 100);
    transfer(&mut a, &mut b, b"over");
    wait_until("much is held", || lock.held() > 5);
}

fn lock(ours: &TcpStream) -> Lock {
    Locker::beside(ours, Mode::HOLD).unwrap().lock(&[Flow::of(ours).unwrap()]).unwrap()
}

/// Saves a connection and lets the socket forget it.
fn take(socket: TcpStream) -> Connection {
    let paused = pause(&socket).unwrap();
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    connection
}

/// Locks a connection, moves it while the peer sends much, and gives it that. `prepare` gets the new socket before.
fn move_on(pair: &Pair, peer: &TcpStream, ours: TcpStream, prepare: impl FnOnce(&Restored)) -> TcpStream {
    let lock = lock(&ours);
    let connection = take(ours);
    send(pair, peer, &lock);
    let restored = pair.b.run(|| connection.restore()).unwrap();
    prepare(&restored);
    lock.release_into(&[&restored]).unwrap();
    restored.resume().unwrap()
}

/// Both ends close, and nothing of the connection is left: what still waits for the peer would keep the kernel from removing
/// the link.
fn finish(mut peer: TcpStream, mut ours: TcpStream) {
    peer.shutdown(Shutdown::Write).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    wait_until("the last acknowledgement has come", || TcpInfo::of(&ours).unwrap().state == State::Close);
}

pub fn a_restored_connection_gets_it_in_its_queue() {
    for family in Family::ALL {
        let (pair, _cpu) = far_apart();
        pair.a.namespace.be_patient().unwrap();
        let (mut peer, ours) = warm(&pair, family, 80);
        let baseline = Baseline::of(&pair.a.namespace);
        let lock = lock(&ours);
        let connection = take(ours);
        send(&pair, &peer, &lock);
        let restored = pair.b.run(|| connection.restore()).unwrap();
        let segments = || TcpInfo::of(&restored).unwrap().segments_in as usize;
        let before = segments();
        let count = lock.release_into(&[&restored]).unwrap();
        let injected = segments() - before;
        let mut ours = restored.resume().unwrap();
        expect(&mut ours, &bytes(MUCH));
        transfer(&mut ours, &mut peer, b"and back");
        transfer(&mut peer, &mut ours, b"and on");
        finish(peer, ours);
        baseline.assert_unchanged(family);
        assert!(count > 5 && 2 * injected < count, "{family:?}: {injected} of {count} were injected");
    }
}

pub fn a_connection_that_stayed_gets_it_too() {
    let (pair, _cpu) = far_apart();
    pair.a.namespace.be_patient().unwrap();
    let (peer, mut ours) = warm(&pair, Family::V6, 80);
    let baseline = Baseline::of(&pair.a.namespace);
    let lock = lock(&ours);
    send(&pair, &peer, &lock);
    assert!(lock.release_into(&[&ours]).unwrap() > 5);
    wait_until("the peer has heard of it", || TcpInfo::of(&peer).unwrap().unacknowledged == 0);
    expect(&mut ours, &bytes(MUCH));
    finish(peer, ours);
    baseline.assert_unchanged("stayed");
}

/// As routers do that speak BGP (RFC 5082): the acknowledgement of a resume has the hop limit of its socket.
pub fn a_peer_that_hears_only_its_neighbours_is_told() {
    const IPV6_MINHOPCOUNT: i32 = 73;
    for (family, level, options) in [
        (Family::V4, libc::IPPROTO_IP, [libc::IP_TTL, libc::IP_MINTTL]),
        (Family::V6, libc::IPPROTO_IPV6, [libc::IPV6_UNICAST_HOPS, IPV6_MINHOPCOUNT]),
    ] {
        let (pair, _cpu) = far_apart();
        pair.a.namespace.be_patient().unwrap();
        let (peer, ours) = warm(&pair, family, 80);
        for name in options {
            for end in [&peer, &ours] {
                set_option(end, level, name, &255i32.to_ne_bytes()).unwrap();
            }
        }
        let baseline = Baseline::of(&pair.a.namespace);
        let mut ours = move_on(&pair, &peer, ours, |_| ());
        wait_until("the peer has heard of it", || TcpInfo::of(&peer).unwrap().unacknowledged == 0);
        expect(&mut ours, &bytes(MUCH));
        finish(peer, ours);
        baseline.assert_unchanged(family);
    }
}

/// The FIN comes behind it, and a queue that takes no bytes in repair mode any more gets packets.
pub fn the_end_comes_last() {
    for half_closed in [false, true] {
        let (pair, _cpu) = far_apart();
        pair.a.namespace.be_patient().unwrap();
        let (mut peer, ours) = warm(&pair, Family::V4, 80);
        if half_closed {
            ours.shutdown(Shutdown::Write).unwrap();
            assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        }
        let baseline = Baseline::of(&pair.a.namespace);
        let lock = lock(&ours);
        let connection = take(ours);
        // With a cork in place the FIN comes with the last bytes.
        set_tcp_cork(&peer, true).unwrap();
        peer.write_all(&bytes(MUCH)).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        wait_until_held(&pair, &peer, &lock);
        let restored = pair.b.run(|| connection.restore()).unwrap();
        lock.release_into(&[&restored]).unwrap();
        let mut ours = restored.resume().unwrap();
        expect(&mut ours, &bytes(MUCH));
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "half closed: {half_closed}");
        if !half_closed {
            transfer(&mut ours, &mut peer, b"and back");
        }
        baseline.assert_unchanged(half_closed);
    }
}

/// What is behind the gap waits for the peer to fill it.
pub fn a_gap_in_it_is_filled_by_the_peer() {
    let (pair, _cpu) = far_apart();
    let (mut peer, ours) = warm(&pair, Family::V4, 80);
    let mut segments_left = 200;
    let line = pair.line.as_ref().unwrap();
    line.lose_next(Side::A, move |segment| {
        segments_left -= i32::from(segment.payload_len > 1000);
        segments_left < 0
    });
    let mut ours = move_on(&pair, &peer, ours, |_| assert_eq!(line.lost(Side::A), 1));
    expect(&mut ours, &bytes(MUCH));
    transfer(&mut ours, &mut peer, b"and back");
}

pub fn what_finds_no_room_is_sent_again() {
    let (pair, _cpu) = far_apart();
    let (mut peer, ours) = warm(&pair, Family::V4, 80);
    let mut ours =
        move_on(&pair, &peer, ours, |restored| set_socket_recv_buffer_size(restored, 100_000).unwrap());
    assert_eq!(socket_recv_buffer_size(&ours), Ok(200_000));
    expect(&mut ours, &bytes(MUCH));
    transfer(&mut ours, &mut peer, b"and back");
}

pub fn each_connection_gets_its_own() {
    let (pair, _cpu) = far_apart();
    let ends = [80, 81].map(|port| warm(&pair, Family::V4, port));
    let flows = ends.each_ref().map(|(_, ours)| Flow::of(ours).unwrap());
    let locker = Locker::beside(&ends[0].1, Mode::HOLD).unwrap();

    // Without a socket for each they are unlocked nevertheless.
    let lock = locker.lock(&flows).unwrap();
    let refused = lock.release_into(&[&ends[0].1]).unwrap_err();
    assert_eq!((refused.kind(), refused.step()), (Invalid, "unlock"), "{refused}");

    // Even where their sockets are mistaken for each other.
    let lock = locker.lock(&flows).unwrap();
    let (peers, connections): (Vec<_>, Vec<_>) =
        ends.into_iter().map(|(peer, ours)| (peer, take(ours))).unzip();
    peers.iter().for_each(|peer| send(&pair, peer, &lock));
    let restored: Vec<_> = connections.iter().map(|one| pair.b.run(|| one.restore()).unwrap()).collect();
    lock.release_into(&[&restored[1], &restored[0]]).unwrap();
    for (mut peer, restored) in peers.into_iter().zip(restored) {
        let mut ours = restored.resume().unwrap();
        expect(&mut ours, &bytes(MUCH));
        transfer(&mut ours, &mut peer, b"and back");
    }
}

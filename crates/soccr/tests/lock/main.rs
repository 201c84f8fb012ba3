//! Locks on the real packet filter: what they stop, what they keep, and that nothing of them stays behind.

mod dump;
mod firewall;
mod held;
mod much;
mod persistent;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};
use std::{env, fs, thread};

use soccr::ErrorKind::Refused;
use soccr::connection::{Flow, Tracked};
use soccr::lock::{Locker, Mode, SILENCE};
use soccr::{Connection, Lock, pause};
use soccr_lab::{Family, LIMIT, Lab, Namespace, OnCpu, Pair, Side, Test, harness, wait_until};

/// Names the addresses of a connection for a process that shall lock it, and wait to be killed.
const VICTIM: &str = "LOCK_AND_WAIT";

/// For a process that has no rights in its own network namespace.
const STRANGER: &str = "LOCK_ELSEWHERE";

fn main() -> ExitCode {
    if let Ok(flow) = env::var(VICTIM) {
        return lock_and_wait(&flow);
    }
    if env::var(STRANGER).is_ok() {
        return lock_elsewhere();
    }
    macro_rules! tests {
        ($($name:path),* $(,)?) => { [$(Test::new(stringify!($name), $name)),*] };
    }
    harness(tests![
        both_directions_stop_and_nothing_else,
        held::a_held_connection_goes_on_without_retransmission,
        held::a_full_flight_stays_in_order,
        held::a_dropping_lock_costs_a_retransmission,
        a_moved_connection_gets_what_was_held,
        held_packets_move_to_another_host,
        a_strict_firewall_lets_a_moved_connection_pass,
        a_strict_firewall_that_has_never_seen_the_connection_lets_it_pass,
        held::the_longest_packets_are_held_whole,
        held::a_narrow_way_back_gets_it_in_pieces,
        held::urgent_data_in_a_long_packet_stays_where_it_is,
        held::urgent_data_comes_in_pieces_by_a_narrow_way,
        held::what_is_held_has_a_limit,
        much::a_restored_connection_gets_it_in_its_queue,
        much::a_connection_that_stayed_gets_it_too,
        much::a_peer_that_hears_only_its_neighbours_is_told,
        much::the_end_comes_last,
        much::a_gap_in_it_is_filled_by_the_peer,
        much::what_finds_no_room_is_sent_again,
        much::each_connection_gets_its_own,
        dropping_the_guard_unlocks,
        what_was_held_for_a_connection_that_has_left_draws_no_reset,
        a_connection_is_locked_once,
        addresses_on_the_wire_are_locked_once,
        two_lockers_do_not_disturb_each_other,
        a_killed_process_leaves_no_lock,
        ten_thousand_connections,
        three_hundred_lockers_hold,
        a_locker_for_the_namespace_of_a_socket,
        rights_in_the_namespace_of_the_socket_suffice,
        persistent::a_persistent_lock_is_listed_and_removed,
        persistent::a_persistent_lock_ends_with_its_time,
        persistent::what_is_over_may_be_cleared_up_by_others_at_any_moment,
        persistent::a_persistent_lock_grows,
        persistent::what_others_add_stays_locked,
        persistent::a_lock_becomes_persistent,
        persistent::names_of_persistent_locks_are_checked,
        dump::an_end_with_an_error_is_one,
        dump::the_kernel_says_that_something_has_changed,
        dump::what_changes_meanwhile_is_asked_for_again,
    ])
}

/// An established connection between the two hosts, seen from both ends.
struct Connected {
    pair: Pair,
    /// On host `a`: the end that stays.
    peer: TcpStream,
    /// On host `b`: the end that is locked and moved.
    ours: TcpStream,
    flow: Flow,
}

fn connect(family: Family) -> Connected {
    let pair = Pair::new().unwrap();
    let (peer, ours) = connect_in(&pair, family, 80);
    let flow = Flow::of(&ours).unwrap();
    Connected { pair, peer, ours, flow }
}

fn connect_in(pair: &Pair, family: Family, port: u16) -> (TcpStream, TcpStream) {
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, port))).unwrap();
    let peer = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, family, port))).unwrap();
    let (ours, _) = listener.accept().unwrap();
    for stream in [&peer, &ours] {
        stream.set_nodelay(true).unwrap();
    }
    (peer, ours)
}

impl Connected {
    fn lock(&self, mode: Mode) -> Lock {
        Locker::beside(&self.ours, mode).unwrap().lock(&[self.flow]).unwrap()
    }

    /// What has been sent before this call has arrived after it, or never will by itself.
    fn settle(&self) {
        let (mut a, mut b) = connect_in(&self.pair, Family::V4, 81);
        for _ in 0..3 {
            transfer(&mut a, &mut b, b"over");
            transfer(&mut b, &mut a, b"and back");
        }
    }
}

fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    from.write_all(bytes).unwrap();
    expect(to, bytes);
}

#[track_caller]
fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.read_exact(&mut read).unwrap();
    assert!(read == bytes, "other bytes than were sent");
}

#[track_caller]
fn expect_nothing(stream: &mut TcpStream) {
    stream.set_nonblocking(true).unwrap();
    let read = stream.read(&mut [0; 8]);
    stream.set_nonblocking(false).unwrap();
    assert_eq!(read.map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
}

/// Segments that a host has sent more than once.
fn retransmissions(host: &Namespace) -> u32 {
    host.counter("RetransSegs")
}

/// What a host has counted so far, so that a handshake with a lost SYN is not taken for the test's own doing.
struct Baseline<'a>(&'a Namespace, u32);

impl<'a> Baseline<'a> {
    fn of(host: &'a Namespace) -> Self {
        Self(host, retransmissions(host))
    }

    #[track_caller]
    fn assert_unchanged(&self, what: impl std::fmt::Debug) {
        let counters = || self.0.run(|| fs::read_to_string("/proc/thread-self/net/netstat")).unwrap();
        assert!(retransmissions(self.0) == self.1, "{what:?}: a segment was repeated\n{}", counters());
    }
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 251) as u8).collect()
}

fn both_directions_stop_and_nothing_else() {
    for family in Family::ALL {
        for mode in [Mode::Drop, Mode::HOLD] {
            let mut connected = connect(family);
            let lock = connected.lock(mode);
            connected.peer.write_all(b"to us").unwrap();
            connected.ours.write_all(b"to them").unwrap();
            connected.settle();
            expect_nothing(&mut connected.peer);
            expect_nothing(&mut connected.ours);
            lock.release().unwrap();
            expect(&mut connected.ours, b"to us");
            expect(&mut connected.peer, b"to them");
        }
    }
}

fn a_moved_connection_gets_what_was_held() {
    for family in Family::ALL {
        move_on_one_host(&Pair::new().unwrap(), family);
    }
}

fn a_strict_firewall_lets_a_moved_connection_pass() {
    let pair = Pair::new().unwrap();
    pair.b.run(firewall::let_established_connections_pass);
    move_on_one_host(&pair, Family::V4);
}

fn move_on_one_host(pair: &Pair, family: Family) {
    let _cpu = OnCpu::stay(0);
    pair.a.namespace.be_patient().unwrap();
    let (mut peer, mut ours) = connect_in(pair, family, 80);
    let flow = Flow::of(&ours).unwrap();
    let locker = Locker::beside(&ours, Mode::HOLD).unwrap();
    let baseline = Baseline::of(&pair.a.namespace);
    let sent = bytes(20_000);
    for _ in 0..3 {
        transfer(&mut peer, &mut ours, b"received before");
        let lock = locker.lock(&[flow]).unwrap();
        let paused = pause(&ours).unwrap();
        let connection = paused.save().unwrap();
        let expected = sent.clone();
        let mut writer = peer.try_clone().unwrap();
        let writing = thread::spawn(move || writer.write_all(&expected).unwrap());
        wait_until("packets are held", || lock.held() > 0);
        paused.detach().unwrap();
        let restored = pair.b.run(|| connection.restore()).unwrap();
        assert!(lock.release().unwrap() > 0);
        ours = restored.resume().unwrap();
        expect(&mut ours, &sent);
        writing.join().unwrap();
        transfer(&mut ours, &mut peer, b"and back");
    }
    baseline.assert_unchanged(family);
}

fn held_packets_move_to_another_host() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        move_to_another_host(&Lab::new().unwrap(), family, false);
        move_to_another_host(&Lab::new().unwrap(), family, true);
    }
}

fn a_strict_firewall_that_has_never_seen_the_connection_lets_it_pass() {
    for closing in [false, true] {
        let lab = Lab::new().unwrap();
        lab.b.run(firewall::let_established_connections_pass);
        move_to_another_host(&lab, Family::V4, closing);
    }
}

/// Moves a connection from `a` to `b`; the peer closes its side before (`closing`) or sends data meanwhile.
fn move_to_another_host(lab: &Lab, family: Family, closing: bool) {
    lab.peer.namespace.be_patient().unwrap();
    let listener = lab.a.run(|| TcpListener::bind(lab.a.address(family, 80))).unwrap();
    let mut peer = lab.peer.run(|| TcpStream::connect(lab.peer.address_of(&lab.a, family, 80))).unwrap();
    let (mut ours, _) = listener.accept().unwrap();
    let flow = Flow::of(&ours).unwrap();
    transfer(&mut peer, &mut ours, b"received before");
    if closing {
        peer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    }
    let baseline = Baseline::of(&lab.peer.namespace);

    let mut lock = Locker::beside(&ours, Mode::HOLD).unwrap().lock(&[flow]).unwrap();
    let paused = pause(&ours).unwrap();
    let connection = paused.save().unwrap();
    if !closing {
        peer.write_all(b"early").unwrap();
        wait_until("packets are held", || lock.held() > 0);
    }
    paused.detach().unwrap();
    drop(ours);
    lab.steer(Side::B).unwrap();
    let held = lock.take().unwrap();
    assert_eq!(lock.held(), 0);
    lock.persist("gone", Some(SILENCE)).unwrap();

    let restored = lab.b.run(|| connection.restore()).unwrap();
    for held in &held {
        assert_eq!(held.replay(&restored).unwrap(), held.packets.len());
    }
    let mut ours = restored.resume().unwrap();
    if !closing {
        expect(&mut ours, b"early");
        transfer(&mut peer, &mut ours, b"late");
    }
    transfer(&mut ours, &mut peer, b"and back");
    baseline.assert_unchanged((family, closing));
    if !closing {
        // A late packet to the old host draws no reset.
        lab.steer(Side::A).unwrap();
        peer.write_all(b"astray").unwrap();
        lab.steer(Side::B).unwrap();
        expect_nothing(&mut ours);
        transfer(&mut ours, &mut peer, b"still there");
    }
}

fn dropping_the_guard_unlocks() {
    let mut connected = connect(Family::V6);
    let lock = connected.lock(Mode::HOLD);
    connected.peer.write_all(b"held").unwrap();
    connected.settle();
    expect_nothing(&mut connected.ours);
    drop(lock);
    expect(&mut connected.ours, b"held");
    transfer(&mut connected.ours, &mut connected.peer, b"and back");
}

fn what_was_held_for_a_connection_that_has_left_draws_no_reset() {
    for (family, release) in Family::ALL.into_iter().flat_map(|family| [(family, false), (family, true)]) {
        let mut connected = connect(family);
        // Keeps what the peer sends again from drawing a reset. The lock that is made last comes first.
        let _silence = connected.lock(Mode::Drop);
        let lock = connected.lock(Mode::HOLD);
        connected.peer.write_all(b"too late").unwrap();
        wait_until("it is held", || lock.held() > 0);
        pause(&connected.ours).unwrap().detach().unwrap();
        drop(connected.ours);
        if release {
            assert_eq!(lock.release().unwrap(), 0);
        } else {
            drop(lock);
        }
        assert_eq!(connected.pair.b.namespace.counter("OutRsts"), 0);
    }
}

fn a_connection_is_locked_once() {
    let connected = connect(Family::V4);
    let locker = Locker::beside(&connected.ours, Mode::HOLD).unwrap();
    let lock = locker.lock(&[connected.flow]).unwrap();
    let mapped = |end: std::net::SocketAddr| match end.ip() {
        std::net::IpAddr::V4(v4) => (v4.to_ipv6_mapped(), end.port()).into(),
        std::net::IpAddr::V6(_) => end,
    };
    let same = Flow { local: mapped(connected.flow.local), remote: mapped(connected.flow.remote) };
    for flows in [&[connected.flow][..], &[same]] {
        let error = locker.lock(flows).unwrap_err();
        assert_eq!((error.kind(), error.step()), (Refused, "lock"), "{error}");
    }
    lock.release().unwrap();
    assert_eq!(locker.lock(&[connected.flow, same]).unwrap_err().kind(), Refused);
    locker.lock(&[connected.flow]).unwrap().release().unwrap();
    let contradiction = Flow { local: "[2001:db8::1]:1".parse().unwrap(), ..connected.flow };
    assert_eq!(locker.lock(&[contradiction]).unwrap_err().kind(), soccr::ErrorKind::Invalid);
}

/// Otherwise the first to be unlocked would unlock the other one as well.
fn addresses_on_the_wire_are_locked_once() {
    let flow =
        |port| Flow { local: (Ipv4Addr::LOCALHOST, 80).into(), remote: (Ipv4Addr::LOCALHOST, port).into() };
    let arriving = |[port, wire]: [u16; 2]| {
        let mut connection = Connection::empty();
        let Flow { local, remote } = flow(port);
        (connection.local, connection.remote) = (local, remote);
        connection.tracked = Some(Tracked { wire: flow(wire), initiator: false, mark: 0 });
        connection
    };
    let locker = Locker::new(Mode::HOLD).unwrap();
    let lock = |ports: &[[u16; 2]]| {
        let connections: Vec<Connection> = ports.iter().copied().map(arriving).collect();
        locker.lock_arriving(&connections)
    };
    let first = lock(&[[1, 2]]).unwrap();
    for others in [&[[2, 2]][..], &[[3, 1]], &[[3, 2]], &[[3, 4], [4, 4]], &[[3, 4], [5, 4]]] {
        assert_eq!(lock(others).unwrap_err().kind(), Refused, "{others:?}");
    }
    // Nothing is left of those that were refused, and of one that is unlocked.
    let second = lock(&[[3, 4], [5, 5]]).unwrap();
    first.release().unwrap();
    lock(&[[2, 1]]).unwrap().release().unwrap();
    second.release().unwrap();
}

fn two_lockers_do_not_disturb_each_other() {
    let mut connected = connect(Family::V4);
    let (first, second) = (connected.lock(Mode::HOLD), connected.lock(Mode::HOLD));
    connected.peer.write_all(b"patience").unwrap();
    connected.settle();
    first.release().unwrap();
    connected.ours.write_all(b"locked still").unwrap();
    connected.settle();
    expect_nothing(&mut connected.peer);
    second.release().unwrap();
    expect(&mut connected.ours, b"patience");
    expect(&mut connected.peer, b"locked still");
}

fn a_killed_process_leaves_no_lock() {
    let mut connected = connect(Family::V4);
    let flow = format!("{} {}", connected.flow.local, connected.flow.remote);
    let mut victim = connected.pair.b.run(|| {
        let itself = env::current_exe().unwrap();
        Command::new(itself).env(VICTIM, flow).stdout(Stdio::piped()).spawn().unwrap()
    });
    let mut line = String::new();
    BufReader::new(victim.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "locked\n");
    connected.peer.write_all(b"stopped").unwrap();
    connected.settle();
    expect_nothing(&mut connected.ours);
    victim.kill().unwrap();
    victim.wait().unwrap();
    expect(&mut connected.ours, b"stopped");
}

fn lock_and_wait(flow: &str) -> ExitCode {
    let (local, remote) = flow.split_once(' ').unwrap();
    let flow = Flow { local: local.parse().unwrap(), remote: remote.parse().unwrap() };
    let _lock = Lock::hold(&[flow]).unwrap();
    println!("locked");
    loop {
        thread::park();
    }
}

fn three_hundred_lockers_hold() {
    let lockers: Vec<_> = (0..300).map(|_| Locker::new(Mode::HOLD).unwrap()).collect();
    drop(lockers);
}

fn ten_thousand_connections() {
    let mut connected = connect(Family::V6);
    let mut flows: Vec<_> = (0..5_000u16)
        .flat_map(|port| {
            let v4 = ([192, 0, 2, 7], 1000 + port).into();
            let v6 = ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 7], 1000 + port).into();
            let remote = [([192, 0, 2, 8], 443).into(), ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 8], 443).into()];
            [Flow { local: v4, remote: remote[0] }, Flow { local: v6, remote: remote[1] }]
        })
        .collect();
    flows.insert(7_000, connected.flow);
    let locker = Locker::beside(&connected.ours, Mode::HOLD).unwrap();
    for _ in 0..2 {
        let lock = locker.lock(&flows).unwrap();
        connected.peer.write_all(b"one of many").unwrap();
        connected.settle();
        expect_nothing(&mut connected.ours);
        lock.release().unwrap();
        expect(&mut connected.ours, b"one of many");
    }
}

fn a_locker_for_the_namespace_of_a_socket() {
    let mut connected = connect(Family::V4);
    // The other host has the same connection, seen from its end; its namespace is not the one that is locked.
    let locker = Locker::beside(connected.peer.as_fd(), Mode::Drop).unwrap();
    let lock = locker.lock(&[connected.flow]).unwrap();
    transfer(&mut connected.peer, &mut connected.ours, b"not here");
    lock.release().unwrap();
    let reverse = Flow { local: connected.flow.remote, remote: connected.flow.local };
    let lock = locker.lock(&[reverse]).unwrap();
    connected.peer.write_all(b"but here").unwrap();
    connected.settle();
    expect_nothing(&mut connected.ours);
    lock.release().unwrap();
    expect(&mut connected.ours, b"but here");
}

fn rights_in_the_namespace_of_the_socket_suffice() {
    let itself = env::current_exe().unwrap();
    let status =
        Command::new("unshare").arg("--map-root-user").arg(itself).env(STRANGER, "").status().unwrap();
    assert!(status.success(), "{status}");
}

fn lock_elsewhere() -> ExitCode {
    let flow = Flow { local: "192.0.2.1:1".parse().unwrap(), remote: "192.0.2.2:2".parse().unwrap() };
    assert_eq!(Lock::hold(&[flow]).unwrap_err().errno(), Some(libc::EPERM));
    let elsewhere = Namespace::new().unwrap();
    // There is no way back for the thread that goes there.
    let listen = || {
        elsewhere.enter().unwrap();
        TcpListener::bind("0.0.0.0:0").unwrap()
    };
    let socket = thread::scope(|scope| scope.spawn(listen).join()).unwrap();
    Locker::beside(&socket, Mode::HOLD).unwrap().lock(&[flow]).unwrap().release().unwrap();
    ExitCode::SUCCESS
}

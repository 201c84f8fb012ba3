//! Many connections at once, on the real kernel.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use soccr::bulk::{self, Kit, Needs, Saved};
use soccr::lock::{Locker, Mode};
use soccr::settings::Value;
use soccr::{Connection, ErrorKind, Flow};

const COUNT: usize = 300;
const BAD: usize = 123;
const ABSURD: usize = 200;

soccr_lab::tests![
    one_bad_socket_among_300_stays_alone,
    bad_connections_among_300_are_lost_alone,
    what_follows_an_error_of_the_caller_is_not_touched,
    a_slow_source_gets_its_answers,
    queues_travel_in_reused_memory,
    options_come_back_whatever_new_sockets_have,
    what_new_sockets_have_is_asked_for_each_time,
];

/// Connections over `lo`, our ends and the peers'. What each peer has written is its number.
fn connect(count: usize) -> (Vec<TcpStream>, Vec<TcpStream>) {
    // Tests run side by side, and many shells allow 1024 descriptors, though the system allows more.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
    (0..count)
        .map(|number| {
            let mut peer = TcpStream::connect("127.0.0.1:8080").unwrap();
            peer.write_all(&(number as u32).to_be_bytes()).unwrap();
            (listener.accept().unwrap().0, peer)
        })
        .unzip()
}

fn flows(streams: &[TcpStream]) -> Vec<Flow> {
    streams.iter().map(|stream| Flow::of(stream).unwrap()).collect()
}

/// Our end still has the number that the peer sent before, and both hear from each other.
fn assert_alive(number: usize, mut ours: &TcpStream, peer: &TcpStream) {
    let mut read = [0; 4];
    ours.read_exact(&mut read).unwrap();
    assert_eq!(u32::from_be_bytes(read), number as u32);
    for (mut from, mut to) in [(ours, peer), (peer, ours)] {
        from.write_all(b"hello").unwrap();
        let mut read = [0; 5];
        to.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"hello");
    }
}

/// Takes all connections out of their sockets.
fn save_all(streams: &[TcpStream]) -> Vec<(usize, Connection)> {
    let mut connections = Vec::new();
    bulk::save(streams, |index, saved| {
        let Saved { connection, paused } = saved?;
        connections.push((index, connection.clone()));
        paused.detach()
    })
    .unwrap();
    connections
}

fn resume_all(restored: Vec<(usize, soccr::Restored)>) -> HashMap<usize, TcpStream> {
    let mut streams = HashMap::new();
    bulk::resume(restored, |index, stream| drop(streams.insert(index, stream.unwrap())));
    streams
}

fn one_bad_socket_among_300_stays_alone() {
    let (mut ours, peers) = connect(COUNT);
    let flows = flows(&ours);
    Needs::of(&flows).check().unwrap();
    let lock = Locker::new(Mode::HOLD).unwrap().lock(&flows).unwrap();
    // A listener in place of the connection.
    let listener = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let good = std::mem::replace(&mut ours[BAD], listener.into());
    let (mut connections, mut refused) = (Vec::new(), Vec::new());
    bulk::save(&ours, |index, saved| {
        match saved {
            Ok(Saved { connection, paused }) => {
                connections.push((index, connection.clone()));
                paused.detach()?;
            }
            Err(error) => refused.push((index, error.kind())),
        }
        Ok::<_, soccr::Error>(())
    })
    .unwrap();
    assert_eq!(refused, [(BAD, ErrorKind::Refused)]);
    let mut restored = Vec::new();
    bulk::restore(connections, |index, socket| restored.push((index, socket.unwrap())));
    lock.release().unwrap();
    let streams = resume_all(restored);
    assert_eq!(streams.len(), COUNT - 1);
    for (number, peer) in peers.iter().enumerate() {
        assert_alive(number, if number == BAD { &good } else { &streams[&number] }, peer);
    }
}

fn bad_connections_among_300_are_lost_alone() {
    let (ours, peers) = connect(COUNT);
    let lock = Locker::new(Mode::HOLD).unwrap().lock(&flows(&ours)).unwrap();
    let mut connections = save_all(&ours);
    // An address that this host does not have, and lengths that nobody has.
    connections[BAD].1.local = "192.0.2.77:8080".parse().unwrap();
    connections[ABSURD].1.control.inq_len = u32::MAX;
    connections[ABSURD].1.control.outq_len = u32::MAX;
    let (mut restored, mut failed) = (Vec::new(), Vec::new());
    bulk::restore(connections, |index, outcome| match outcome {
        Ok(socket) => restored.push((index, socket)),
        Err(error) => failed.push((index, error.errno())),
    });
    failed.sort_unstable();
    assert_eq!(failed, [(BAD, Some(libc::EADDRNOTAVAIL)), (ABSURD, None)]);
    lock.release().unwrap();
    let streams = resume_all(restored);
    assert_eq!(streams.len(), COUNT - 2);
    for (number, stream) in &streams {
        assert_alive(*number, stream, &peers[*number]);
    }
}

fn what_follows_an_error_of_the_caller_is_not_touched() {
    let (ours, peers) = connect(10);
    let mut seen = 0;
    let outcome = bulk::save(&ours, |index, saved| {
        seen += 1;
        drop(saved); // resumes it
        if index == 4 { Err("the pipe is broken") } else { Ok(()) }
    });
    assert_eq!((outcome, seen), (Err("the pipe is broken"), 5));
    for (number, (ours, peer)) in ours.iter().zip(&peers).enumerate() {
        assert!(soccr::Paused::take_over(ours.as_fd()).is_err(), "connection {number} is still paused");
        assert_alive(number, ours, peer);
    }
}

fn a_slow_source_gets_its_answers() {
    let (ours, _peers) = connect(40);
    let _lock = Locker::new(Mode::HOLD).unwrap().lock(&flows(&ours)).unwrap();
    let connections = save_all(&ours);
    let (answers, heard) = std::sync::mpsc::channel();
    // Each connection comes when the one before is in place.
    let slow =
        connections.into_iter().inspect(|(index, _)| assert!(*index == 0 || heard.recv() == Ok(index - 1)));
    bulk::restore(slow, |index, socket| {
        drop(socket.unwrap());
        answers.send(index).unwrap();
    });
    assert_eq!(heard.try_recv(), Ok(39));
}

fn queues_travel_in_reused_memory() {
    let (ours, mut peers) = connect(3);
    let bytes: Vec<u8> = (0..50_000u32).flat_map(u32::to_be_bytes).collect();
    peers[1].write_all(&bytes[..100_000]).unwrap();
    soccr_lab::wait_until("everything has arrived", || {
        soccr_lab::TcpInfo::of(&ours[1]).unwrap().unread == 100_004
    });
    let mut queues = Vec::new();
    bulk::save(&ours, |_, saved| {
        let Saved { connection, paused: _ } = saved?;
        queues.push((connection.receive_queue.as_ptr(), connection.receive_queue.clone()));
        Ok::<_, soccr::Error>(())
    })
    .unwrap();
    assert_eq!(queues[0].1, 0u32.to_be_bytes());
    assert_eq!(queues[1].1, [&1u32.to_be_bytes()[..], &bytes[..100_000]].concat());
    // Nothing of the long one is left in the short one, though it lies where that was.
    assert_eq!(queues[2].1, 2u32.to_be_bytes());
    assert_eq!(queues[2].0, queues[1].0);
}

fn options_come_back_whatever_new_sockets_have() {
    let (ours, peers) = connect(20);
    let lock = Locker::new(Mode::HOLD).unwrap().lock(&flows(&ours)).unwrap();
    let mut connections = save_all(&ours);
    for (_, connection) in &mut connections[..10] {
        // It would set SO_PRIORITY as well, which is that of a new socket.
        connection.settings.set("IP_TOS", Value::Number(0x10));
    }
    let before: Vec<_> = connections.iter().map(|(_, connection)| connection.settings.clone()).collect();
    for (name, value) in [("tcp_keepalive_time", "600"), ("ip_default_ttl", "77"), ("tcp_syn_retries", "3")] {
        soccr_lab::sysctl(&format!("net/ipv4/{name}"), value).unwrap();
    }
    let mut restored = Vec::new();
    bulk::restore(connections, |index, socket| restored.push((index, socket.unwrap())));
    lock.release().unwrap();
    let streams = resume_all(restored);
    for (number, peer) in peers.iter().enumerate() {
        let settings = soccr::pause(&streams[&number]).unwrap().save().unwrap().settings;
        for (name, value) in before[number].iter() {
            assert_eq!(settings.get(name), Some(value), "{name} of connection {number}");
        }
        assert_alive(number, &streams[&number], peer);
    }
}

/// A sysctl that is changed between two calls decides about the second, however soon that comes.
fn what_new_sockets_have_is_asked_for_each_time() {
    let (ours, peers) = connect(20);
    let lock = Locker::new(Mode::HOLD).unwrap().lock(&flows(&ours)).unwrap();
    let connections = save_all(&ours);
    let idle = connections[0].1.settings.get("TCP_KEEPIDLE").cloned();
    let set = |seconds: &str| soccr_lab::sysctl("net/ipv4/tcp_keepalive_time", seconds).unwrap();
    let Some(Value::Number(seconds)) = idle else { panic!("{idle:?}") };
    let before = seconds.to_string();
    let (kit, mut restored) = (Kit::default(), Vec::new());
    for connection in connections {
        set(if connection.0 % 2 == 0 { &before } else { "600" });
        kit.restore([connection], |index, socket| restored.push((index, socket.unwrap())));
    }
    set("999");
    lock.release().unwrap();
    kit.resume(restored, |number, stream| {
        let stream = stream.unwrap();
        // Where it was what new sockets had, it goes on to follow the sysctl, as it did in its old socket.
        let wanted = if number % 2 == 0 { Some(Value::Number(999)) } else { idle.clone() };
        let settings = soccr::pause(&stream).unwrap().save().unwrap().settings;
        assert_eq!(settings.get("TCP_KEEPIDLE"), wanted.as_ref(), "connection {number}");
        assert_alive(number, &stream, &peers[number]);
    });
}

//! Live sockets are given to a server.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, socket, sockopt};
use soccr::adopt::DRAIN;
use soccr_lab::{Family, Host, TcpInfo, supervised, sysctl, wait_until};

use crate::ends::{Ends, On, PORT, accept, adopter, connect, pattern, read};

/// Writes until the client, which does not read, takes no more. Returns what was written.
fn overfill(ends: &Ends) -> Vec<u8> {
    let bytes = pattern(16 << 20);
    let mut socket = &ends.ours;
    socket.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(count) = socket.write(&bytes[written..]) {
        written += count;
    }
    socket.set_nonblocking(false).unwrap();
    assert!(TcpInfo::of(socket).unwrap().unacknowledged > 0, "the client took everything");
    bytes[..written].to_vec()
}

fn ours(ends: &Ends) -> OwnedFd {
    ends.ours.try_clone().unwrap().into()
}

pub fn a_socket_waits_until_its_peer_has_acknowledged() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::new(family);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        let listener = ends.listen(family, On::DualStack);
        let bytes = overfill(&ends);
        let client = ends.client.try_clone().unwrap();
        let length = bytes.len();
        let reader = thread::spawn(move || read(&client, length));
        let (locker, socket) = (ends.locker(), ours(&ends));
        let adopted =
            ends.pair.a.run(|| adopter.give(&locker, vec![socket], Duration::MAX)).remove(0).unwrap();
        assert_eq!(adopted.flow().local.port(), PORT);
        assert!(reader.join().unwrap() == bytes, "the client read other bytes");
        ends.talk(&accept(&listener));
    }
}

pub fn a_socket_that_is_never_acknowledged_stays() {
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let _listener = ends.listen(Family::V4, On::Wildcard);
    let bytes = overfill(&ends);
    let (locker, socket) = (ends.locker(), ours(&ends));
    let limit = Duration::from_millis(50);
    let kept = ends.pair.a.run(|| adopter.give(&locker, vec![socket], limit)).remove(0).unwrap_err();
    assert!(kept.error().to_string().contains("not acknowledged in time"), "{kept}");
    let socket = TcpStream::from(kept.into_socket().unwrap());
    assert!(read(&ends.client, bytes.len()) == bytes, "the client read other bytes");
    ends.talk(&socket);
}

pub fn a_release_that_fails_is_told() {
    supervised(|faults| {
        let mut told = 0;
        for left in 0.. {
            let ends = Ends::new(Family::V4);
            let Some(mut adopter) = adopter(&ends.pair) else { return };
            let _listener = ends.listen(Family::V4, On::Address);
            let (locker, socket) = (ends.locker(), ours(&ends));
            faults.arm_among(&[libc::SYS_recvfrom], left, libc::ENOMEM);
            let outcome = ends.pair.a.run(|| adopter.give(&locker, vec![socket], DRAIN)).remove(0);
            let failed = faults.disarm();
            if let Ok(adopted) = outcome
                && let Some(entry) = adopted.report().get("unlock")
            {
                assert!(entry.reason().contains("ENOMEM"), "{entry}, after {failed:?}");
                told += 1;
            }
            if failed.is_none() {
                break;
            }
        }
        assert!(told > 0, "it never fails");
    });
}

pub fn many_sockets_enter_one_queue() {
    let count = 300;
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let (old, new) = (shared(&ends), shared(&ends));
    // Until now only one of the two takes connections.
    drop(new);
    let clients: Vec<TcpStream> = (0..count).map(|_| connect(&ends.pair, Family::V4)).collect();
    let sockets: Vec<OwnedFd> = clients.iter().map(|_| accept(&old).into()).collect();
    drop(old);
    let listener = shared(&ends);
    let locker = ends.locker();
    let outcomes = ends.pair.a.run(|| adopter.give(&locker, sockets, DRAIN));
    assert_eq!(outcomes.len(), count);
    for outcome in outcomes {
        outcome.unwrap();
    }
    let servers: Vec<TcpStream> = clients.iter().map(|_| accept(&listener)).collect();
    for (mut client, number) in clients.iter().zip(0_u32..) {
        client.write_all(&number.to_be_bytes()).unwrap();
        let address = client.local_addr().unwrap();
        let server = servers.iter().find(|server| server.peer_addr().unwrap() == address).unwrap();
        assert_eq!(read(server, 4), number.to_be_bytes());
    }
    ends.no_reset();
}

pub fn a_full_queue_keeps_the_rest() {
    // Whoever connects to a full queue in the ordinary way is reset here.
    let abort = |host: &Host| host.run(|| sysctl("net/ipv4/tcp_abort_on_overflow", "1")).unwrap();
    let mut ends = Ends::prepared(Family::V4, abort);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let old = shared(&ends);
    let clients: Vec<TcpStream> = (0..6).map(|_| connect(&ends.pair, Family::V4)).collect();
    let sockets: Vec<OwnedFd> = clients.iter().map(|_| accept(&old).into()).collect();
    drop(old);
    let listener = listen_with(&ends, 2);
    let locker = ends.locker();
    let outcomes = ends.pair.a.run(|| adopter.give(&locker, sockets, DRAIN));
    // The kernel lets one more in than the backlog says.
    let (adopted, kept): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((adopted.len(), kept.len()), (3, 3));
    let mut servers: Vec<TcpStream> = adopted.iter().map(|_| accept(&listener)).collect();
    for outcome in kept {
        let kept = outcome.unwrap_err();
        assert!(kept.error().to_string().contains("is full"), "{kept}");
        servers.push(kept.into_socket().unwrap().into());
    }
    for mut client in &clients {
        client.write_all(b"alive").unwrap();
    }
    servers.iter().for_each(|server| assert_eq!(read(server, 5), b"alive"));
    ends.no_reset();
}

/// Echoes until it is told to stop, at a boundary: what it has read is answered.
fn echo(stream: TcpStream, stop: &AtomicBool) -> TcpStream {
    let mut buffer = vec![0; 65536];
    while !stop.load(Ordering::Relaxed) {
        match (&stream).read(&mut buffer).unwrap() {
            0 => break,
            count => (&stream).write_all(&buffer[..count]).unwrap(),
        }
    }
    stream
}

/// Writes the bytes over and over, until it is told to stop. How many that were.
fn talk(mut client: &TcpStream, bytes: &[u8], stop: &AtomicBool) -> usize {
    let chunks = bytes.chunks(8192).cycle().take_while(|_| !stop.load(Ordering::Relaxed));
    let written = chunks.map(|chunk| client.write_all(chunk).map(|()| chunk.len()).unwrap()).sum();
    client.shutdown(Shutdown::Write).unwrap();
    written
}

/// Reads the bytes over and over, to the end of the stream. How many that were.
fn listen(mut client: &TcpStream, bytes: &[u8]) -> usize {
    let (mut buffer, mut total) = (vec![0; 65536], 0);
    loop {
        // As far as the bytes go before they begin anew.
        let expected = &bytes[total % bytes.len()..];
        let room = expected.len().min(buffer.len());
        match client.read(&mut buffer[..room]).unwrap() {
            0 => return total,
            count => {
                assert!(buffer[..count] == expected[..count], "other bytes behind {total}");
                total += count;
            }
        }
    }
}

pub fn every_byte_arrives_while_the_client_talks() {
    for (family, moves) in [(Family::V4, 15), (Family::V6, 15)] {
        let ends = Ends::new(family);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        let locker = ends.locker();
        let listener = ends.listen(family, On::Address);
        let (client, bytes, done) = (&ends.client, &pattern(1 << 20), &AtomicBool::new(false));
        thread::scope(|scope| {
            let written = scope.spawn(|| talk(client, bytes, done));
            let heard = scope.spawn(|| listen(client, bytes));
            let mut server = ends.ours.try_clone().unwrap();
            for _ in 0..moves {
                let stop = AtomicBool::new(false);
                let ours = thread::scope(|inner| {
                    let server = inner.spawn(|| echo(server, &stop));
                    thread::yield_now();
                    stop.store(true, Ordering::Relaxed);
                    server.join().unwrap()
                });
                let outcome = ends.pair.a.run(|| adopter.give(&locker, vec![ours.into()], DRAIN)).remove(0);
                outcome.unwrap();
                server = accept(&listener);
            }
            done.store(true, Ordering::Relaxed);
            drop(echo(server, &AtomicBool::new(false)));
            assert_eq!(heard.join().unwrap(), written.join().unwrap());
        });
    }
}

pub fn a_buffer_hardly_grows_from_move_to_move() {
    let ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let locker = ends.locker();
    let listener = ends.listen(Family::V4, On::Address);
    ends.client.set_nonblocking(true).unwrap();
    // Nobody reads, and the client sends what it can.
    let fill = |server: &TcpStream| {
        let bytes = vec![7; 1 << 20];
        wait_until("the server's window is closed, and the rest waits with the client", || {
            while (&ends.client).write(&bytes).is_ok() {}
            let client = TcpInfo::of(&ends.client).unwrap();
            client.unacknowledged == client.unsent && client.snd_wnd < client.snd_mss
        });
        TcpInfo::of(server).unwrap().unread
    };
    let mut server = ends.ours.try_clone().unwrap();
    let first = fill(&server);
    for _ in 0..20 {
        ends.pair.a.run(|| adopter.give(&locker, vec![server.into()], DRAIN)).remove(0).unwrap();
        server = accept(&listener);
        let now = fill(&server);
        // What the last segment may waste adds up to some hundred kB, and no further.
        assert!(now <= 5 * first, "{now} unread bytes, {first} before the first move");
    }
}

/// A listener beside which others may listen.
fn shared(ends: &Ends) -> TcpListener {
    listen_with(ends, 1000)
}

fn listen_with(ends: &Ends, backlog: i32) -> TcpListener {
    ends.pair.a.run(|| {
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseport(&listener, true).unwrap();
        sockopt::set_socket_reuseaddr(&listener, true).unwrap();
        rustix::net::bind(&listener, &ends.pair.a.address(Family::V4, PORT)).unwrap();
        rustix::net::listen(&listener, backlog).unwrap();
        listener.into()
    })
}

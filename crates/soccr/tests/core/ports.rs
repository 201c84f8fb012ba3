//! A restored client takes its port away from nobody.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use soccr::pause;
use soccr_lab::{Family, Pair, option, skip, sysctl};

use crate::ends::{PORT, assert_same_bytes, option as get_option, set_option, unconnected};

/// Where connections to different peers share the host's few ports, they do so after a move.
pub fn connections_to_other_peers_can_have_the_same_port() {
    const IP_LOCAL_PORT_RANGE: i32 = 51;
    const PORTS: usize = 4;
    let mut range = [0; 4];
    if option(unconnected(Family::V4), libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, &mut range).is_err() {
        return skip("before Linux 6.3 no range of ports can be chosen for a socket");
    }
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let pair = Pair::new().unwrap();
        pair.a.run(|| sysctl("net/ipv4/ip_local_port_range", "40000 40003")).unwrap();
        let listen = |port| {
            let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, port))).unwrap();
            (listener, pair.a.address_of(&pair.b, family, port))
        };
        let connect = |to| {
            let socket = pair.a.run(|| unconnected(family));
            rustix::net::connect(&socket, &to).map(|()| socket)
        };
        let ((one, to_one), (_other, to_other)) = (listen(PORT), listen(PORT + 1));
        let ours: Vec<TcpStream> = (0..PORTS).map(|_| connect(to_one).unwrap()).collect();
        let peers: Vec<TcpStream> = ours.iter().map(|_| one.accept().unwrap().0).collect();
        let moved: Vec<TcpStream> = ours.into_iter().map(|socket| move_to(&pair, socket)).collect();
        for (socket, peer) in moved.iter().zip(&peers) {
            assert_talk(socket, peer);
            // Its application finds its options as they were.
            let mut range = [1; 4];
            option(socket, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, &mut range).unwrap();
            assert_eq!(range, [0; 4]);
        }
        let new: Vec<_> = (0..PORTS).map(|_| connect(to_other)).collect();
        assert!(new.iter().all(Result::is_ok), "{family:?}: {new:?}");
    }
}

/// A port that a listener has is shared with nobody, and its connection comes back nevertheless.
pub fn a_port_that_is_bound_is_had_again() {
    let pair = Pair::new().unwrap();
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(Family::V4, PORT))).unwrap();
    let to = pair.a.address_of(&pair.b, Family::V4, PORT);
    let ours = pair.a.run(|| TcpStream::connect(to)).unwrap();
    let peer = listener.accept().unwrap().0;
    let (local, paused) = (ours.local_addr().unwrap(), pause(&ours).unwrap());
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    drop(ours);
    let _there = pair.a.run(|| TcpListener::bind(local)).unwrap();
    let ours = pair.a.run(|| connection.restore()).unwrap().resume().unwrap();
    assert_talk(&ours, &peer);
}

/// Nor may its user listen there beside somebody else, though the connection itself shares its port.
pub fn a_port_that_is_bound_is_shared_with_nobody() {
    for family in [Family::V4, Family::V6] {
        let pair = Pair::new().unwrap();
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, PORT))).unwrap();
        let to = pair.a.address_of(&pair.b, family, PORT);
        let sharing = || {
            let socket = pair.a.run(|| unconnected(family));
            set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1);
            socket
        };
        let ours = sharing();
        rustix::net::connect(&ours, &to).unwrap();
        let peer = listener.accept().unwrap().0;
        let (local, paused) = (ours.local_addr().unwrap(), pause(&ours).unwrap());
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        drop(ours);
        let _there = pair.a.run(|| TcpListener::bind(local)).unwrap();
        let ours = pair.a.run(|| connection.restore()).unwrap().resume().unwrap();
        assert_talk(&ours, &peer);
        assert_eq!(get_option(&ours, libc::SOL_SOCKET, libc::SO_REUSEPORT).unwrap(), 1);
        assert_eq!(rustix::net::bind(sharing(), &local), Err(rustix::io::Errno::ADDRINUSE));
    }
}

fn move_to(pair: &Pair, socket: TcpStream) -> TcpStream {
    let paused = pause(&socket).unwrap();
    let connection = paused.save().unwrap();
    paused.detach().unwrap();
    drop(socket);
    pair.a.run(|| connection.restore()).unwrap().resume().unwrap()
}

fn assert_talk(ours: &TcpStream, peer: &TcpStream) {
    for (mut from, mut to) in [(ours, peer), (peer, ours)] {
        from.write_all(b"and on").unwrap();
        let mut read = [0; 6];
        to.read_exact(&mut read).unwrap();
        assert_same_bytes(&read, b"and on");
    }
}

//! What cannot be carried is refused, and goes on.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use rustix::net::sockopt::{set_socket_reuseaddr, socket_reuseaddr};
use rustix::net::{AddressFamily, Protocol, SendFlags, SocketType, sendto, socket};
use soccr::connection::Connection;
use soccr::{Error, ErrorKind, pause};
use soccr_lab::{Family, Pair, State, sysctl, wait_until};

use crate::ends::{Ends, PORT, assert_same, busy, info, set_deaf, unconnected};
use crate::sys::Memory;

pub fn assert_refused<T: std::fmt::Debug>(
    result: soccr::Result<T>,
    step: &str,
    what: &str,
    remedy: &str,
) -> Error {
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Refused, step), "{error}");
    assert!(error.what().contains(what) && error.remedy().contains(remedy), "{error}");
    error
}

pub fn save(socket: impl AsFd) -> soccr::Result<Connection> {
    pause(&socket)?.save()
}

/// As a whole, and as the C library saves it.
fn assert_not_saved(socket: impl AsFd, what: &str) {
    let paused = pause(&socket).unwrap();
    let bare = paused.save_bare(|length| Some(Memory(vec![0; length]))).map(drop);
    for error in [paused.save().map(drop), bare].map(Result::unwrap_err) {
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.what().contains(what) && !error.remedy().is_empty(), "{error}");
    }
    paused.resume().unwrap();
}

pub fn a_handshake_that_carries_data() {
    for family in [Family::V4, Family::V6] {
        let pair = Pair::new().unwrap();
        // A client, of servers whose cookie it has not got either.
        pair.a.run(|| sysctl("net/ipv4/tcp_fastopen", "5")).unwrap();
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, PORT))).unwrap();
        set_deaf(&listener, true).unwrap();
        let remote = pair.a.address_of(&pair.b, family, PORT);
        let ours = pair.a.run(|| unconnected(family));
        let flags = SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32) | SendFlags::DONTWAIT;
        assert_eq!(sendto(&ours, b"early", flags, &remote), Ok(5));
        assert_eq!(info(&ours).state, State::SynSent);
        assert_not_saved(&ours, "a handshake that carries data");
        set_deaf(&listener, false).unwrap();
        wait_until("the handshake is over", || info(&ours).state == State::Established);
        let (peer, _) = listener.accept().unwrap();
        let mut ends = Ends::between(pair, ours, peer, remote);
        ends.to_peer.extend(b"early");
        ends.finish();
    }
}

pub fn a_socket_that_signs_its_segments() {
    const ADD_KEY: i32 = 38;
    let mut missing = None;
    let mut sign = |socket: std::os::fd::BorrowedFd<'_>, peer: SocketAddr| {
        let set = soccr_lab::set_option(socket, libc::IPPROTO_TCP, ADD_KEY, &key(peer));
        missing = set.err().or(missing.take());
    };
    let pair = Pair::new().unwrap();
    let listener = pair.b.run(|| TcpListener::bind(pair.b.address(Family::V4, PORT))).unwrap();
    let ours = pair.a.run(|| unconnected(Family::V4));
    let remote = pair.a.address_of(&pair.b, Family::V4, PORT);
    sign(listener.as_fd(), pair.a.address(Family::V4, 0));
    sign(ours.as_fd(), pair.b.address(Family::V4, 0));
    if let Some(error) = missing {
        assert_eq!(error.raw_os_error(), Some(libc::ENOPROTOOPT), "{error}");
        return soccr_lab::skip("this kernel has no TCP-AO");
    }
    rustix::net::connect(&ours, &remote).unwrap();
    let (peer, _) = listener.accept().unwrap();
    assert_not_saved(&ours, "TCP-AO");
    Ends::between(pair, ours, peer, remote).finish();
}

pub fn a_socket_that_was_never_connected_is_refused() {
    for family in [Family::V4, Family::V6] {
        assert_refused(save(unconnected(family)), "save", "not connected", "no connection");
    }
}

pub fn a_listener_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    set_socket_reuseaddr(&listener, true).unwrap();
    assert_refused(save(&listener), "pause", "listening", "accept");
    TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    listener.accept().unwrap();
    assert_eq!(socket_reuseaddr(&listener), Ok(true));
}

pub fn an_mptcp_socket_is_refused() {
    let mptcp = Protocol::from_raw(rustix::net::RawProtocol::new(262).unwrap());
    match socket(AddressFamily::INET, SocketType::STREAM, Some(mptcp)) {
        Ok(socket) => drop(assert_refused(save(socket), "pause", "MPTCP", "multipathtcp=0")),
        Err(error) => soccr_lab::skip(format_args!("no MPTCP here: {error}")),
    }
}

pub fn an_upper_layer_protocol_is_refused() {
    let ends = Ends::new(Family::V4);
    match soccr_lab::set_option(&ends.ours, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls\0") {
        Ok(()) => drop(assert_refused(save(&ends.ours), "save", "kernel TLS", "handshake")),
        Err(error) => soccr_lab::skip(format_args!("no kTLS here: {error}")),
    }
}

pub fn a_second_pause_of_one_socket_is_refused() {
    let ends = busy();
    let duplicate = ends.ours.try_clone().unwrap();
    let first = pause(&ends.ours).unwrap();
    assert_refused(save(&duplicate), "pause", "repair mode already", "resume");
    let connection = first.save().unwrap();
    assert_refused(save(&duplicate), "pause", "repair mode already", "resume");
    assert_same(&connection, &first.save().unwrap());
    first.resume().unwrap();
    assert_same(&connection, &save(&duplicate).unwrap());
    ends.finish();
}

pub fn a_socket_with_a_connection_is_not_restored_onto() {
    let ends = busy();
    let other = busy().take();
    assert_refused(
        soccr::Restore::unbound(&ends.ours, &other.control, None),
        "restore",
        "has a connection",
        "fresh",
    );
    ends.finish();
}

/// `struct tcp_ao_add`
fn key(peer: SocketAddr) -> [u8; 288] {
    let mut key = [0; 288];
    let SocketAddr::V4(peer) = peer else { unreachable!("of IPv4") };
    key[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    key[4..8].copy_from_slice(&peer.ip().octets());
    key[128..138].copy_from_slice(b"hmac(sha1)");
    // Prefix, the two numbers of the key, the length of a signature (0: as usual), flags, the length of the key.
    key[202..208].copy_from_slice(&[32, 1, 1, 0, 0, 6]);
    key[208..214].copy_from_slice(b"secret");
    key
}

//! A connection that has left its socket comes back into it.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use soccr::Flow;
use soccr_handover::Seat;
use soccr_lab::{State, TcpInfo, attach_filter, wait_until};

use super::*;

/// Lets a listener hear nothing, or everything.
fn set_hearing(listener: &TcpListener, hears: bool) {
    let bytes = if hears { u32::MAX } else { 0 };
    let code = (libc::BPF_RET | libc::BPF_K) as u16;
    attach_filter(listener, &[libc::sock_filter { code, jt: 0, jf: 0, k: bytes }]).unwrap();
}

pub fn a_handshake_comes_back() {
    let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
    for bound in [None, Some(([127, 0, 0, 1], 5000)), Some(([0; 4], 5001))] {
        set_hearing(&listener, false);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        if let Some(address) = bound {
            rustix::net::bind(&socket, &SocketAddr::from(address)).unwrap();
        }
        let remote = listener.local_addr().unwrap();
        assert_eq!(rustix::net::connect(&socket, &remote), Err(Errno::INPROGRESS));
        let local = rustix::net::getsockname(&socket).unwrap().try_into().unwrap();
        let mut seat = Seat::new(socket, Flow { local, remote });
        seat.save().unwrap();
        seat.let_go().unwrap();
        assert_eq!(TcpInfo::of(seat.as_fd()).unwrap().state, State::Close);
        seat.come_back().unwrap();
        assert_eq!(TcpInfo::of(seat.as_fd()).unwrap().state, State::SynSent);
        set_hearing(&listener, true);
        let (peer, address) = listener.accept().unwrap();
        assert_eq!(address, local);
        let ours = TcpStream::from(seat.into_socket());
        wait_until("the handshake is over", || TcpInfo::of(&ours).unwrap().state == State::Established);
        ours.set_nonblocking(false).unwrap();
        assert_alive(&ours, &peer);
    }
}

pub fn what_a_disconnect_clears_comes_back() {
    const CLAMP: u32 = 20_000;
    let (ours, peers) = connect(1);
    let (ours, peer) = (ours.into_iter().next().unwrap(), &peers[0]);
    assert_alive(&ours, peer);
    soccr_lab::set_option(&ours, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &CLAMP.to_ne_bytes()).unwrap();
    ours.shutdown(Shutdown::Read).unwrap();
    let flow = Flow::of(&ours).unwrap();
    let mut seat = Seat::new(ours.into(), flow);
    let before = seat.save().unwrap().path.unwrap();
    seat.let_go().unwrap();
    seat.come_back().unwrap();
    let mut ours = TcpStream::from(seat.into_socket());
    let paused = soccr::pause(&ours).unwrap();
    assert_eq!(paused.window_clamp().unwrap(), CLAMP);
    let after = paused.save().unwrap().path.unwrap();
    assert!(!before.rtt.is_zero() && !after.rtt.is_zero(), "{before:?} {after:?}");
    paused.resume().unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    ours.write_all(b"hello").unwrap();
    assert_eq!(read(peer, 5), b"hello");
}

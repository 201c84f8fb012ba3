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
    /// TCP_RTO_MIN_US, TCP_DELACK_MAX_US, which not every kernel has, in whole ticks of any kernel.
    const OPTIONS: [(i32, i32, i32); 3] = [
        (libc::IPPROTO_TCP, 45, 80_000),
        (libc::IPPROTO_TCP, 46, 40_000),
        (libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0),
    ];
    let (ours, peers) = connect(1);
    let (ours, peer) = (ours.into_iter().next().unwrap(), &peers[0]);
    assert_alive(&ours, peer);
    let set: Vec<_> = OPTIONS
        .into_iter()
        .filter(|(level, name, value)| {
            soccr_lab::set_option(&ours, *level, *name, &value.to_ne_bytes()).is_ok()
        })
        .collect();
    soccr_lab::set_option(&ours, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &CLAMP.to_ne_bytes()).unwrap();
    ours.shutdown(Shutdown::Read).unwrap();
    let flow = Flow::of(&ours).unwrap();
    let mut seat = Seat::new(ours.into(), flow);
    let before = seat.save().unwrap().path.unwrap();
    seat.let_go().unwrap();
    seat.come_back().unwrap();
    let mut ours = TcpStream::from(seat.into_socket());
    for (level, name, value) in set {
        let mut now = [0; 4];
        soccr_lab::option(&ours, level, name, &mut now).unwrap();
        assert_eq!(i32::from_ne_bytes(now), value, "{level} {name}");
    }
    let paused = soccr::pause(&ours).unwrap();
    assert_eq!(paused.window_clamp().unwrap(), CLAMP);
    let after = paused.save().unwrap().path.unwrap();
    assert!(!before.rtt.is_zero() && !after.rtt.is_zero(), "{before:?} {after:?}");
    paused.resume().unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    ours.write_all(b"hello").unwrap();
    assert_eq!(read(peer, 5), b"hello");
}

/// What a connection takes from its peer alone, which segments that play the peer's are not.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gate {
    /// TCP_MD5SIG.
    Keys,
    /// IP_MINTTL.
    Hops,
    /// A filter that lets no FIN in.
    Filter,
}

impl Gate {
    fn close(self, ours: &TcpStream, peer: &TcpStream) {
        let set = |stream: &TcpStream, name, value: i32| {
            soccr_lab::set_option(stream, libc::IPPROTO_IP, name, &value.to_ne_bytes()).unwrap();
        };
        match self {
            // From the beginning: the two agree on it.
            Self::Keys => {}
            Self::Hops => {
                set(peer, libc::IP_TTL, 255);
                set(ours, libc::IP_MINTTL, 255);
            }
            Self::Filter => {
                let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
                let flags = 13;
                let code = [
                    step(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, flags),
                    step(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 1, 1),
                    step(libc::BPF_RET | libc::BPF_K, 0, 0),
                    step(libc::BPF_RET | libc::BPF_K, 0, u32::MAX),
                ];
                attach_filter(ours, &code).unwrap();
            }
        }
    }
}

fn set_key(socket: impl AsFd) {
    // struct tcp_md5sig.
    let mut key = [0; 216];
    key[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    key[4..8].copy_from_slice(&[127, 0, 0, 1]);
    key[130..132].copy_from_slice(&6u16.to_ne_bytes());
    key[136..142].copy_from_slice(b"secret");
    soccr_lab::set_option(socket, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &key).unwrap();
}

pub fn what_lets_in_the_peer_alone_is_no_obstacle() {
    for gate in [Gate::Keys, Gate::Hops, Gate::Filter] {
        for state in [State::Established, State::CloseWait, State::FinWait2] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            if gate == Gate::Keys {
                set_key(&listener);
                set_key(&socket);
            }
            rustix::net::connect(&socket, &listener.local_addr().unwrap()).unwrap();
            let (peer, ours) = (TcpStream::from(socket), listener.accept().unwrap().0);
            match state {
                State::CloseWait => peer.shutdown(Shutdown::Write).unwrap(),
                State::FinWait2 => ours.shutdown(Shutdown::Write).unwrap(),
                _ => {}
            }
            let is_in = |state| move |stream: &TcpStream| TcpInfo::of(stream).unwrap().state == state;
            wait_until("it is in its state", || is_in(state)(&ours));
            gate.close(&ours, &peer);
            let flow = Flow::of(&ours).unwrap();
            let mut seat = Seat::new(ours.into(), flow);
            let before = seat.save().unwrap().settings.clone();
            seat.let_go().unwrap();
            seat.come_back().unwrap_or_else(|error| panic!("{gate:?} {state:?}: {error}"));
            let mut ours = TcpStream::from(seat.into_socket());
            assert!(is_in(state)(&ours), "{gate:?} {state:?}");
            let after = soccr::pause(&ours).unwrap().save().unwrap().settings;
            assert_eq!(after, before, "{gate:?} {state:?}");
            if state != State::FinWait2 {
                ours.write_all(b"hello").unwrap();
                assert_eq!(read(&peer, 5), b"hello", "{gate:?} {state:?}");
            }
            if state != State::CloseWait {
                (&peer).write_all(b"hello").unwrap();
                assert_eq!(read(&ours, 5), b"hello", "{gate:?} {state:?}");
            }
        }
    }
}

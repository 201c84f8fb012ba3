//! What cannot be adopted is refused before anything is touched, and goes on.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, Protocol, SocketType, bind, listen, socket, sockopt};
use soccr::adopt::Adopter;
use soccr::connection::State;
use soccr::settings::Value;
use soccr::{Connection, Lock};
use soccr_lab::{Family, attach_filter, set_option, sysctl, wait_until};

use crate::ends::{Ends, On, PORT, adopter, pattern, read};

/// The adoption fails with this reason; restored, the connection goes on.
fn assert_stays(ends: &mut Ends, adopter: &mut Adopter, reason: &str) {
    let (lock, connection) = ends.leave();
    assert_refused(ends, adopter, &lock, &connection, reason);
    go_on(ends, lock, &connection);
}

fn assert_refused(ends: &Ends, adopter: &mut Adopter, lock: &Lock, connection: &Connection, reason: &str) {
    let connections = [connection.clone()];
    let error = ends.pair.a.run(|| adopter.adopt(lock, &connections)).remove(0).unwrap_err();
    assert!(error.to_string().contains(reason), "{error}");
}

fn go_on(ends: &mut Ends, lock: Lock, connection: &Connection) {
    let restored = ends.pair.a.run(|| connection.restore()).unwrap();
    lock.release().unwrap();
    let ours = restored.resume().unwrap();
    ends.talk(&ours);
}

pub fn what_no_server_can_have_stays() {
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let _listener = ends.listen(Family::V4, On::Wildcard);
    let (lock, connection) = ends.leave();
    let mut other = connection.clone();
    other.urgent = Some(soccr::connection::Urgent { offset: 0, consumed: false });
    other.control.inq_len = 1;
    other.receive_queue = vec![0];
    assert_refused(&ends, &mut adopter, &lock, &other, "urgent data");
    for state in [State::FinWait1, State::FinWait2, State::Closing, State::LastAck, State::SynSent] {
        other = connection.clone();
        other.control.state = state;
        assert_refused(&ends, &mut adopter, &lock, &other, &format!("a connection in {state}"));
    }
    other = connection.clone();
    other.control.reset = true;
    assert_refused(&ends, &mut adopter, &lock, &other, "its peer has reset");
    other = connection.clone();
    other.settings.set("TCP_MD5SIG", Value::Bytes(vec![0; 216]));
    assert_refused(&ends, &mut adopter, &lock, &other, "TCP MD5");
    other = connection.clone();
    other.control.options.mss_clamp = 500;
    assert_refused(&ends, &mut adopter, &lock, &other, "an MSS of 500");
    other = connection.clone();
    other.remote.set_port(1);
    assert_refused(&ends, &mut adopter, &lock, &other, "not the one that is locked");
    go_on(&mut ends, lock, &connection);

    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = self::adopter(&ends.pair) else { return };
    ends.ours.shutdown(Shutdown::Write).unwrap();
    wait_until("FIN_WAIT2", || {
        soccr_lab::TcpInfo::of(&ends.ours).unwrap().state == soccr_lab::State::FinWait2
    });
    let (lock, connection) = ends.leave();
    assert_refused(&ends, &mut adopter, &lock, &connection, "FIN_WAIT2");
    let restored = ends.pair.a.run(|| connection.restore()).unwrap();
    lock.release().unwrap();
    let ours = restored.resume().unwrap();
    ends.client.write_all(b"last words").unwrap();
    assert_eq!(read(&ours, 10), b"last words");
    ends.no_reset();
}

pub fn what_does_not_enter_as_a_whole_is_taken_back() {
    let length = 100_000;
    let mut ends = Ends::prepared(Family::V4, |host| {
        host.run(|| sysctl("net/ipv4/tcp_rmem", "4096 400000 400000")).unwrap();
    });
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    ends.client.write_all(&pattern(length)).unwrap();
    ends.received(length);
    let listener = ends.listen(Family::V4, On::Wildcard);
    // The first segments are long and pass; the last one is short.
    let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let only_long = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, 20_000),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    attach_filter(&listener, &only_long).unwrap();
    let (lock, connection) = ends.leave();
    assert_refused(&ends, &mut adopter, &lock, &connection, "96000 of 100000 bytes");
    let restored = ends.pair.a.run(|| connection.restore()).unwrap();
    lock.release().unwrap();
    let ours = restored.resume().unwrap();
    assert!(read(&ours, length) == pattern(length), "other bytes than were unread");
    ends.talk(&ours);
    // The server finds an end where the connection was, or nothing.
    listener.set_nonblocking(true).unwrap();
    if let Ok((server, _)) = listener.accept() {
        assert_eq!(server.take_error().unwrap().unwrap().raw_os_error(), Some(libc::ECONNABORTED));
    }
}

pub fn a_kernel_without_cookies() {
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let _listener = ends.listen(Family::V4, On::Wildcard);
    ends.pair.a.run(|| sysctl("net/ipv4/tcp_syncookies", "0")).unwrap();
    assert_stays(&mut ends, &mut adopter, "net.ipv4.tcp_syncookies=1");
    let error = ends.pair.a.run(Adopter::new).unwrap_err();
    assert!(error.remedy().contains("net.ipv4.tcp_syncookies=1"), "{error}");
}

pub fn a_kernel_without_an_option() {
    for name in ["tcp_sack", "tcp_timestamps", "tcp_window_scaling", "tcp_ecn"] {
        let mut ends = Ends::prepared(Family::V4, |host| {
            host.run(|| sysctl("net/ipv4/tcp_ecn", "1")).unwrap();
        });
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        let _listener = ends.listen(Family::V4, On::Wildcard);
        ends.pair.a.run(|| sysctl(&format!("net/ipv4/{name}"), "0")).unwrap();
        assert_stays(&mut ends, &mut adopter, name);
    }
}

pub fn a_loopback_that_is_down() {
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let _listener = ends.listen(Family::V4, On::Wildcard);
    let mut control = ends.pair.a.namespace.rtnetlink().unwrap();
    control.down("lo").unwrap();
    let (lock, connection) = ends.leave();
    assert_refused(&ends, &mut adopter, &lock, &connection, "bring `lo` up");
    control.up("lo").unwrap();
    go_on(&mut ends, lock, &connection);
}

/// Listens on the port of the servers, beside others; 0 is TCP. `None` where this kernel has no MPTCP.
fn listen_beside(ends: &Ends, protocol: i32) -> Option<OwnedFd> {
    let protocol = NonZeroU32::new(protocol as u32).map(Protocol::from_raw);
    let listener = ends.pair.a.run(|| {
        let listener = socket(AddressFamily::INET, SocketType::STREAM, protocol)?;
        sockopt::set_socket_reuseaddr(&listener, true)?;
        sockopt::set_socket_reuseport(&listener, true)?;
        bind(&listener, &ends.pair.a.address(Family::V4, PORT))?;
        listen(&listener, 10).map(|()| listener)
    });
    listener.inspect_err(|error| soccr_lab::skip(format_args!("this kernel has no MPTCP: {error}"))).ok()
}

pub fn a_listener_that_speaks_mptcp() {
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let Some(_listener) = listen_beside(&ends, libc::IPPROTO_MPTCP) else { return };
    assert_stays(&mut ends, &mut adopter, "speaks MPTCP");
}

pub fn listeners_one_of_which_speaks_mptcp() {
    for protocols in [[0, libc::IPPROTO_MPTCP], [libc::IPPROTO_MPTCP, 0]] {
        let mut ends = Ends::new(Family::V4);
        let Some(mut adopter) = adopter(&ends.pair) else { return };
        let [Some(_one), Some(_other)] = protocols.map(|protocol| listen_beside(&ends, protocol)) else {
            return;
        };
        let (lock, connection) = ends.leave();
        let error = ends.pair.a.run(|| adopter.check(&connection)).unwrap_err();
        assert!(error.to_string().contains("speaks MPTCP"), "{error}");
        go_on(&mut ends, lock, &connection);
    }
}

pub fn a_listener_that_is_bound_to_another_device() {
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let listener = ends.listen(Family::V4, On::Wildcard);
    set_option(&listener, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0").unwrap();
    assert_stays(&mut ends, &mut adopter, "is bound to a device that does not lead to");
}

pub fn nobody_listens() {
    let mut ends = Ends::new(Family::V6);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    assert_stays(&mut ends, &mut adopter, "nobody listens on [2001:db8::1]:80");
}

pub fn a_socket_is_in_the_way() {
    let mut ends = Ends::new(Family::V4);
    let Some(mut adopter) = adopter(&ends.pair) else { return };
    let _listener = ends.listen(Family::V4, On::Wildcard);
    let (lock, connection) = ends.leave();
    let restored = ends.pair.a.run(|| connection.restore()).unwrap();
    assert_refused(&ends, &mut adopter, &lock, &connection, "a connection with these addresses");
    lock.release().unwrap();
    let ours: TcpStream = restored.resume().unwrap();
    ends.talk(&ours);
}

//! The networks of this crate, used as its users use them.

mod case;
mod line;
mod sniffer;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::{fs, thread};

use soccr_lab::{Family, Host, Lab, Namespace, Pair, Side, sysctl, wait_until};

use case::*;
use line::*;
use sniffer::*;

soccr_lab::tests![
    a_test_is_alone_in_its_network,
    a_thread_is_back_after_running_inside,
    threads_inherit_the_namespace,
    a_sysctl_belongs_to_one_namespace,
    every_family_connects,
    an_address_moves,
    a_link_goes_down_and_up,
    steering_chooses_the_host,
    waiting_ends_with_the_condition,
    a_line_delays_at_least_as_long_as_asked,
    a_line_carries_packets_of_any_size,
    a_line_keeps_its_rate,
    a_line_loses_the_chosen_segment,
    a_line_loses_at_random,
    a_full_queue_loses,
    a_line_survives_a_link_that_goes_down,
    a_line_delays_between_peer_and_router,
    a_dropped_line_takes_its_links_along,
    a_sniffer_sees_a_connection_as_it_is,
    a_sniffer_sees_a_reset_where_there_is_one,
    a_sniffer_sees_each_packet_on_lo_once,
    a_sniffer_that_missed_packets_says_so,
    a_router_is_a_place_to_sniff,
    every_state_is_made_and_goes_on,
    long_queues_are_made,
    impossible_cases_are_known,
];

/// The identity of the calling thread's network.
fn here() -> String {
    fs::read_link("/proc/thread-self/ns/net").unwrap().display().to_string()
}

/// Accepts one connection at a time and answers each with `name`.
fn announce(host: &Host, address: SocketAddr, name: u8) {
    let listener = host.run(|| TcpListener::bind(address)).unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            stream.write_all(&[name]).unwrap();
        }
    });
}

fn who_answers(host: &Host, address: SocketAddr) -> u8 {
    let mut stream = host.run(|| TcpStream::connect(address)).unwrap();
    let mut name = [0];
    stream.read_exact(&mut name).unwrap();
    name[0]
}

fn a_test_is_alone_in_its_network() {
    let links = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    assert_eq!(links.lines().skip(2).count(), 1, "{links}");
    TcpListener::bind("127.0.0.1:80").unwrap();
    let echo = TcpListener::bind("[::1]:80").unwrap();
    TcpStream::connect(echo.local_addr().unwrap()).unwrap();
}

fn a_thread_is_back_after_running_inside() {
    let (outside, namespace) = (here(), Namespace::new().unwrap());
    assert_eq!(here(), outside);
    let inside = namespace.run(here);
    assert_ne!(inside, outside);
    assert_eq!(here(), outside);
    let panicked = catch_unwind(AssertUnwindSafe(|| namespace.run(|| resume_unwind(Box::new(())))));
    panicked.unwrap_err();
    assert_eq!(here(), outside);
    namespace.enter().unwrap();
    assert_eq!(here(), inside);
}

fn threads_inherit_the_namespace() {
    let test = here();
    assert_eq!(thread::spawn(here).join().unwrap(), test);
    let namespace = Namespace::new().unwrap();
    let inside = namespace.run(|| thread::spawn(here).join().unwrap());
    assert_eq!(inside, namespace.run(here));
    assert_ne!(inside, test);
}

fn a_sysctl_belongs_to_one_namespace() {
    let name = "net/ipv4/tcp_ecn";
    let read = || fs::read_to_string(format!("/proc/sys/{name}")).unwrap().trim().to_owned();
    let (one, two) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    one.run(|| sysctl(name, "1")).unwrap();
    two.run(|| sysctl(name, "0")).unwrap();
    assert_eq!((one.run(read).as_str(), two.run(read).as_str()), ("1", "0"));
    let error = sysctl("net/ipv4/no_such_setting", "1").unwrap_err();
    assert!(error.to_string().contains("no_such_setting"), "{error}");
}

fn every_family_connects() {
    let pair = Pair::new().unwrap();
    for family in Family::ALL {
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
        let mut a = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, family, 80))).unwrap();
        let (mut b, from) = listener.accept().unwrap();
        assert_eq!(from.ip(), pair.a.address(family, 0).ip());
        a.write_all(b"there").unwrap();
        b.write_all(b"again").unwrap();
        let (mut at_a, mut at_b) = ([0; 5], [0; 5]);
        a.read_exact(&mut at_a).unwrap();
        b.read_exact(&mut at_b).unwrap();
        assert_eq!((&at_a, &at_b), (b"again", b"there"), "{family:?}");
    }
}

fn an_address_moves() {
    let pair = Pair::new().unwrap();
    let address: IpAddr = "192.0.2.9".parse().unwrap();
    let (mut a, mut b) = (pair.a.namespace.rtnetlink().unwrap(), pair.b.namespace.rtnetlink().unwrap());
    a.add_address("eth0", address, 24).unwrap();
    pair.a.run(|| TcpListener::bind((address, 80))).unwrap();
    a.remove_address("eth0", address, 24).unwrap();
    b.add_address("eth0", address, 24).unwrap();
    pair.a.run(|| TcpListener::bind((address, 80))).unwrap_err();
    announce(&pair.b, (address, 80).into(), b'b');
    assert_eq!(who_answers(&pair.a, (address, 80).into()), b'b');
}

fn a_link_goes_down_and_up() {
    let pair = Pair::new().unwrap();
    announce(&pair.b, pair.b.address(Family::V4, 80), b'b');
    let (mut a, mut b) = (pair.a.namespace.rtnetlink().unwrap(), pair.b.namespace.rtnetlink().unwrap());
    assert!(a.is_operational("eth0").unwrap() && b.is_operational("eth0").unwrap());
    a.down("eth0").unwrap();
    let error = pair.a.run(|| TcpStream::connect((pair.b.v4, 80))).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NetworkUnreachable);
    wait_until("b has noticed", || !b.is_operational("eth0").unwrap());
    a.up("eth0").unwrap();
    wait_until("the link is back", || a.is_operational("eth0").unwrap() && b.is_operational("eth0").unwrap());
    assert_eq!(who_answers(&pair.a, pair.b.address(Family::V4, 80)), b'b');
}

fn steering_chooses_the_host() {
    let lab = Lab::new().unwrap();
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let port = 80 + family as u16;
        announce(&lab.a, lab.a.address(family, port), b'a');
        announce(&lab.b, lab.b.address(family, port), b'b');
        let shared = lab.peer.address_of(&lab.a, family, port);
        assert_eq!(shared, lab.peer.address_of(&lab.b, family, port));
        for side in [Side::A, Side::B, Side::B, Side::A, Side::B] {
            lab.steer(side).unwrap();
            let name = if side == Side::A { b'a' } else { b'b' };
            assert_eq!(who_answers(&lab.peer, shared), name, "{family:?} {side:?}");
        }
        lab.steer(Side::A).unwrap();
    }
    // The hosts reach the peer, too.
    announce(&lab.peer, lab.peer.address(Family::V6, 99), b'p');
    assert_eq!(who_answers(&lab.a, lab.a.address_of(&lab.peer, Family::V6, 99)), b'p');
    assert_eq!(lab.host(Side::B).v4, lab.host(Side::B.other()).v4);
}

fn waiting_ends_with_the_condition() {
    let mut left = 3;
    wait_until("three rounds are over", || {
        left -= 1;
        left == 0
    });
    assert_eq!(left, 0);
}

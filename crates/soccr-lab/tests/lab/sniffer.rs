//! The sniffer.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use soccr_lab::{Family, Flags, Lab, Namespace, Pair, Side, Sniffer};

fn resets(sniffer: &mut Sniffer) -> usize {
    let segments = sniffer.segments().unwrap();
    segments.iter().filter(|segment| segment.flags.contains(Flags::RST)).count()
}

pub fn a_sniffer_sees_a_connection_as_it_is() {
    let pair = Pair::new().unwrap();
    for family in Family::ALL {
        let mut sniffer = Sniffer::on(&pair.a.namespace, "eth0").unwrap();
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
        let mut a = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, family, 80))).unwrap();
        a.write_all(b"seven ..").unwrap();
        let (mut b, _) = listener.accept().unwrap();
        b.read_exact(&mut [0; 8]).unwrap();
        let all = sniffer.segments().unwrap();
        let [syn, syn_ack, ack, data, ..] = all[..] else { panic!("{all:?}") };
        assert_eq!(
            [syn, syn_ack, ack, data].map(|segment| segment.flags),
            [Flags::SYN, Flags::SYN | Flags::ACK, Flags::ACK, Flags::PSH | Flags::ACK]
        );
        assert_eq!((syn_ack.ack, ack.seq, ack.ack), (syn.seq + 1, syn.seq + 1, syn_ack.seq + 1));
        assert_eq!((data.payload_len, ack.payload_len, data.seq), (8, 0, syn.seq + 1));
        // The scope id is not on the wire.
        let canonical = |address: std::net::SocketAddr| (address.ip().to_canonical(), address.port());
        assert_eq!(canonical(data.source), canonical(a.local_addr().unwrap()));
        assert_eq!(canonical(data.destination), canonical(a.peer_addr().unwrap()));
    }
}

pub fn a_sniffer_sees_a_reset_where_there_is_one() {
    let pair = Pair::new().unwrap();
    let mut every = Sniffer::on(&pair.b.namespace, "eth0").unwrap();
    let mut only = Sniffer::flagged(&pair.b.namespace, "eth0", Flags::RST).unwrap();
    for family in Family::ALL {
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
        let mut a = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, family, 80))).unwrap();
        let (mut b, _) = listener.accept().unwrap();
        a.write_all(b"x").unwrap();
        b.read_exact(&mut [0]).unwrap();
        assert_eq!(resets(&mut every), 0);
        b.write_all(b"unread").unwrap();
        a.peek(&mut [0]).unwrap();
        // Closing with unread data resets the connection (RFC 2525 §2.17).
        drop(a);
        b.read(&mut [0]).unwrap_err();
        assert_eq!(resets(&mut every), 1, "{family:?}");
        let seen = only.segments().unwrap();
        let [reset] = seen[..] else { panic!("one reset and nothing else: {seen:?}") };
        assert!(reset.flags.contains(Flags::RST));
    }
}

pub fn a_sniffer_sees_each_packet_on_lo_once() {
    let namespace = Namespace::current().unwrap();
    let mut sniffer = Sniffer::on(&namespace, "lo").unwrap();
    let listener = TcpListener::bind("[::1]:80").unwrap();
    TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let syns = sniffer.segments().unwrap();
    assert_eq!(syns.iter().filter(|segment| segment.flags == Flags::SYN).count(), 1);
}

pub fn a_sniffer_that_missed_packets_says_so() {
    let namespace = Namespace::current().unwrap();
    let mut sniffer = Sniffer::on(&namespace, "lo").unwrap();
    let listener = TcpListener::bind("127.0.0.1:80").unwrap();
    let mut a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    a.set_nodelay(true).unwrap();
    let (mut b, _) = listener.accept().unwrap();
    for _ in 0..1 << 16 {
        a.write_all(b"x").unwrap();
        b.read_exact(&mut [0]).unwrap();
    }
    let error = sniffer.segments().unwrap_err();
    assert!(error.to_string().contains("unseen"), "{error}");
    a.write_all(b"x").unwrap();
    b.read_exact(&mut [0]).unwrap();
    assert!(!sniffer.segments().unwrap().is_empty(), "it goes on");
}

pub fn a_router_is_a_place_to_sniff() {
    let lab = Lab::new().unwrap();
    let mut at = ["a", "b"].map(|link| Sniffer::flagged(&lab.router, link, Flags::SYN).unwrap());
    lab.steer(Side::B).unwrap();
    let listener = lab.b.run(|| TcpListener::bind((lab.b.v4, 80))).unwrap();
    lab.peer.run(|| TcpStream::connect((lab.b.v4, 80))).unwrap();
    listener.accept().unwrap();
    assert_eq!(at.each_mut().map(|sniffer| sniffer.segments().unwrap().len()), [0, 2]);
}

//! The delay line.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use soccr_lab::{Family, Lab, Pair, Segment, Shape, Side, Sniffer, wait_until};

fn connect(pair: &Pair) -> (TcpStream, TcpStream) {
    let listener = pair.b.run(|| TcpListener::bind((pair.b.v4, 80))).unwrap();
    let a = pair.a.run(|| TcpStream::connect((pair.b.v4, 80))).unwrap();
    (a, listener.accept().unwrap().0)
}

/// Sends `length` bytes from `a` to `b` and compares them; returns the time from the first to the last.
fn transfer(mut a: TcpStream, mut b: TcpStream, length: usize) -> Duration {
    let bytes: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
    let expected = bytes.clone();
    let start = Instant::now();
    let sender = thread::spawn(move || {
        a.write_all(&bytes).unwrap();
        drop(a);
    });
    let mut received = Vec::new();
    b.read_to_end(&mut received).unwrap();
    let time = start.elapsed();
    sender.join().unwrap();
    assert!(received == expected, "{} bytes of {length} came, or other ones", received.len());
    time
}

pub fn a_line_delays_at_least_as_long_as_asked() {
    for rtt in [0, 1, 20, 80].map(Duration::from_millis) {
        let pair = Pair::shaped(&Shape::rtt(rtt)).unwrap();
        for family in Family::ALL {
            let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
            let start = Instant::now();
            let mut a = pair.a.run(|| TcpStream::connect(pair.a.address_of(&pair.b, family, 80))).unwrap();
            assert!(start.elapsed() >= rtt, "the handshake took {:?} of {rtt:?}", start.elapsed());
            let (mut b, _) = listener.accept().unwrap();
            let start = Instant::now();
            a.write_all(b"?").unwrap();
            b.read_exact(&mut [0]).unwrap();
            assert!(start.elapsed() >= rtt / 2);
            b.write_all(b"!").unwrap();
            a.read_exact(&mut [0]).unwrap();
            assert!(start.elapsed() >= rtt, "a round trip took {:?} of {rtt:?}", start.elapsed());
        }
    }
}

pub fn a_line_carries_packets_of_any_size() {
    for mtu in [1280, 1500, 9000, 65535] {
        let pair = Pair::shaped(&Shape { mtu, ..Shape::default() }).unwrap();
        let mut sniffer = Sniffer::on(&pair.b.namespace, "eth0").unwrap();
        let (a, b) = connect(&pair);
        transfer(a, b, 1 << 20);
        let longest = sniffer.segments().unwrap().iter().map(|segment| segment.payload_len).max().unwrap();
        // IPv4 and TCP headers with timestamps. Beyond 9000 the peer's window, too, limits a segment.
        let headers = 52;
        assert!(longest <= mtu as usize - headers, "segments of {longest} bytes have been joined");
        assert!(longest >= mtu.min(9000) as usize - headers, "segments have been cut to {longest} bytes");
    }
}

pub fn a_line_keeps_its_rate() {
    let rate = 80_000_000;
    let pair = Pair::shaped(&Shape { rate: Some(rate), ..Shape::default() }).unwrap();
    let (a, b) = connect(&pair);
    let length = 500_000;
    let least = Duration::from_secs_f64(length as f64 * 8.0 / rate as f64);
    let took = transfer(a, b, length);
    assert!(took >= least, "{took:?} of {least:?}");
}

pub fn a_line_loses_the_chosen_segment() {
    let pair = Pair::shaped(&Shape::default()).unwrap();
    let line = pair.line.as_ref().unwrap();
    let mut sniffer = Sniffer::on(&pair.a.namespace, "eth0").unwrap();
    line.lose_next(Side::A, |segment| segment.payload_len > 0);
    let (a, b) = connect(&pair);
    transfer(a, b, 100);
    assert_eq!((line.lost(Side::A), line.lost(Side::B)), (1, 0));
    let data = |segments: Vec<Segment>| {
        segments
            .into_iter()
            .filter(|segment| segment.payload_len > 0)
            .map(|segment| segment.seq)
            .collect::<Vec<_>>()
    };
    let sent = data(sniffer.segments().unwrap());
    assert_eq!(sent.len(), 2, "sent, lost and sent again");
    assert_eq!(sent[0], sent[1]);
}

pub fn a_line_loses_at_random() {
    let pair = Pair::shaped(&Shape { loss: 0.05, ..Shape::default() }).unwrap();
    let (a, b) = connect(&pair);
    transfer(a, b, 300_000);
    assert!(pair.line.as_ref().unwrap().lost(Side::A) > 0);
}

pub fn a_full_queue_loses() {
    let shape = Shape { rate: Some(20_000_000), queue: 20_000, ..Shape::default() };
    let pair = Pair::shaped(&shape).unwrap();
    let (a, b) = connect(&pair);
    transfer(a, b, 200_000);
    assert!(pair.line.as_ref().unwrap().lost(Side::A) > 0);
}

pub fn a_line_survives_a_link_that_goes_down() {
    let pair = Pair::shaped(&Shape::default()).unwrap();
    let mut control = pair.a.namespace.rtnetlink().unwrap();
    control.down("eth0").unwrap();
    control.up("eth0").unwrap();
    wait_until("the link is back", || control.is_operational("eth0").unwrap());
    let (a, b) = connect(&pair);
    transfer(a, b, 1000);
}

pub fn a_line_delays_between_peer_and_router() {
    let rtt = Duration::from_millis(10);
    let lab = Lab::shaped(&Shape::rtt(rtt)).unwrap();
    for side in [Side::A, Side::B] {
        lab.steer(side).unwrap();
        let listener = lab.host(side).run(|| TcpListener::bind((lab.a.v6, 80))).unwrap();
        let start = Instant::now();
        let peer = lab.peer.run(|| TcpStream::connect((lab.a.v6, 80))).unwrap();
        assert!(start.elapsed() >= rtt);
        let (host, _) = listener.accept().unwrap();
        transfer(host, peer, 1 << 20);
    }
}

pub fn a_dropped_line_takes_its_links_along() {
    let pair = Pair::shaped(&Shape::default()).unwrap();
    let control = pair.a.namespace.rtnetlink().unwrap();
    let Pair { line, .. } = pair;
    drop(line);
    let is_gone = || control.index("eth0").is_err();
    // A network that cannot be removed yet holds up all others: an orphan of an IPv6 connection may take 100 s to end.
    if !happens(is_gone) && !networks_are_removed() {
        soccr_lab::skip("the kernel waits for another network before it removes the next one");
        return;
    }
    wait_until("the link is gone", is_gone);
}

/// A link goes when the namespace of its other end does.
fn networks_are_removed() -> bool {
    let Pair { a, b, .. } = Pair::new().unwrap();
    let control = a.namespace.rtnetlink().unwrap();
    drop(b);
    happens(|| control.index("eth0").is_err())
}

fn happens(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    condition()
}

//! Packets that play the peer's reach the socket, or nobody: where its address belongs to another host as well, and where
//! it hears one device alone.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::ExitCode;

use soccr::lock::{Lock, Locker, Mode};
use soccr::{ErrorKind, Flow, Restored, pause};
use soccr_lab::{Flags, LIMIT, Lab, Pair, Sniffer, State, TcpInfo, Test, harness, wait_until};
use soccr_netlink::{ACK, Batch, CREATE, EXCLUSIVE, Family, Message, REQUEST, Socket};
use socket2::{Domain, SockRef, Type};

fn main() -> ExitCode {
    macro_rules! tests {
        ($($name:ident),* $(,)?) => { [$(Test::new(stringify!($name), $name)),*] };
    }
    harness(tests![
        a_played_segment_never_goes_to_the_owner_of_a_foreign_address,
        held_packets_never_go_to_the_owner_of_a_foreign_address,
        a_rule_for_our_mark_brings_them_to_a_transparent_proxy,
        a_socket_that_hears_one_device_hears_them,
        a_socket_that_cannot_hear_them_is_refused,
        a_socket_that_hears_one_device_hears_what_was_held,
        what_was_held_is_refused_where_it_cannot_be_heard,
    ])
}

/// A transparent proxy: a router that takes the connections from a peer to a host behind it.
///
/// ```text
///  peer ─── router ─── a (192.0.2.1, which the proxy answers for)
/// ```
struct Proxy {
    lab: Lab,
    peer: TcpStream,
    ours: TcpStream,
    /// What only the proxy may cause on the link of the peer.
    resets: Sniffer,
    /// What reaches the owner of the address.
    owner: Sniffer,
}

impl Proxy {
    fn new() -> Self {
        let lab = Lab::new().unwrap();
        let address = SocketAddr::from((lab.a.v4, 80));
        let listener = lab.router.run(|| {
            rule(None, |m| m.string(RULE_INCOMING, "peer"));
            deliver_locally();
            let socket = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_ip_transparent_v4(true).unwrap();
            socket.bind(&address.into()).unwrap();
            socket.listen(1).unwrap();
            TcpListener::from(socket)
        });
        let mut peer = lab.peer.run(|| TcpStream::connect(address)).unwrap();
        let (mut ours, _) = listener.accept().unwrap();
        assert_eq!(ours.local_addr().unwrap(), address);
        exchange(&mut peer, &mut ours);
        let resets = Sniffer::flagged(&lab.peer.namespace, "eth0", Flags::RST).unwrap();
        let owner = Sniffer::on(&lab.a.namespace, "eth0").unwrap();
        Self { lab, peer, ours, resets, owner }
    }

    /// Takes the connection out of its socket, and puts it into another one.
    fn move_on(&mut self) -> soccr::Result<Restored> {
        self.lab.router.run(|| {
            let paused = pause(&self.ours)?;
            let connection = paused.save()?;
            paused.detach()?;
            connection.restore()
        })
    }

    fn assert_nothing_left(&mut self) {
        assert_eq!(self.owner.segments().unwrap(), [], "to the owner of the address");
        assert_eq!(self.resets.segments().unwrap(), [], "to the peer");
    }
}

fn a_played_segment_never_goes_to_the_owner_of_a_foreign_address() {
    let mut proxy = Proxy::new();
    // The round-trip time cannot be played, and the report says why.
    let restored = proxy.move_on().unwrap();
    let report = restored.report().to_string();
    assert!(report.contains("no local address"), "{report}");
    proxy.ours = restored.resume().unwrap();
    exchange(&mut proxy.peer, &mut proxy.ours);
    proxy.assert_nothing_left();

    half_close(&proxy.peer, &proxy.ours);
    let error = proxy.move_on().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.remedy().contains("ip rule add fwmark 0xc114 to 192.0.2.1"), "{error}");
    proxy.assert_nothing_left();
}

fn held_packets_never_go_to_the_owner_of_a_foreign_address() {
    let mut proxy = Proxy::new();
    let flow = Flow::of(&proxy.ours).unwrap();
    let lock = Locker::beside(&proxy.ours, Mode::HOLD).unwrap().lock(&[flow]).unwrap();
    proxy.peer.write_all(b"held").unwrap();
    wait_until("it is held", || lock.held() > 0);
    let held = lock.take().unwrap();
    let error = held[0].replay(&proxy.ours).unwrap_err();
    assert!(error.remedy().contains("fwmark 0xc114"), "{error}");
    wait_until("the peer sends it again", || lock.held() > 0);
    let error = lock.release().unwrap_err();
    assert!(error.remedy().contains("fwmark 0xc114"), "{error}");
    proxy.assert_nothing_left();
    expect(&mut proxy.ours, b"held");
    exchange(&mut proxy.peer, &mut proxy.ours);
    proxy.assert_nothing_left();
}

fn a_rule_for_our_mark_brings_them_to_a_transparent_proxy() {
    let mut proxy = Proxy::new();
    proxy.lab.router.run(|| {
        rule(Some(proxy.lab.a.v4), |m| m.u32(RULE_MARK, 0xc114));
    });
    let flow = Flow::of(&proxy.ours).unwrap();
    let lock = Locker::beside(&proxy.ours, Mode::HOLD).unwrap().lock(&[flow]).unwrap();
    proxy.peer.write_all(b"held").unwrap();
    wait_until("it is held", || lock.held() > 0);
    let restored = proxy.move_on().unwrap();
    assert!(lock.release_into(&[&restored]).unwrap() > 0);
    proxy.ours = restored.resume().unwrap();
    expect(&mut proxy.ours, b"held");
    exchange(&mut proxy.peer, &mut proxy.ours);

    half_close(&proxy.peer, &proxy.ours);
    let restored = proxy.move_on().unwrap();
    let mut told = Sniffer::on(&proxy.lab.peer.namespace, "eth0").unwrap();
    proxy.ours = restored.resume().unwrap();
    assert!(is_in(&proxy.ours, State::CloseWait));
    wait_until("the peer is told", || told.segments().unwrap().iter().any(|one| one.source == flow.local));
    proxy.ours.write_all(b"the rest").unwrap();
    expect(&mut proxy.peer, b"the rest");
    proxy.assert_nothing_left();
}

/// A connection of a socket on `b` that is bound to this device.
fn bound_to(device: &str, address: impl Fn(&Pair) -> SocketAddr) -> (Pair, TcpStream, TcpStream) {
    let pair = Pair::new().unwrap();
    let address = address(&pair);
    let listener = pair.b.run(|| TcpListener::bind(address)).unwrap();
    SockRef::from(&listener).bind_device(Some(device.as_bytes())).unwrap();
    let mut peer = pair.a.run(|| TcpStream::connect(address)).unwrap();
    let (mut ours, _) = listener.accept().unwrap();
    exchange(&mut peer, &mut ours);
    (pair, peer, ours)
}

fn a_socket_that_hears_one_device_hears_them() {
    for family in soccr_lab::Family::ALL {
        let (pair, mut peer, ours) = bound_to("eth0", |pair| match family {
            soccr_lab::Family::Mapped => pair.b.address(soccr_lab::Family::V4, 80),
            family => pair.a.address_of(&pair.b, family, 80),
        });
        let mut resets = Sniffer::flagged(&pair.a.namespace, "eth0", Flags::RST).unwrap();
        half_close(&peer, &ours);
        let restored = moved(&pair, &ours).unwrap();
        let mut ours = restored.resume().unwrap();
        ours.write_all(b"the rest").unwrap();
        expect(&mut peer, b"the rest");
        assert_eq!(resets.segments().unwrap(), [], "{family:?}");
    }
}

fn a_socket_that_hears_one_device_hears_what_was_held() {
    for family in soccr_lab::Family::ALL {
        let (pair, mut peer, mut ours) = bound_to("eth0", |pair| match family {
            soccr_lab::Family::Mapped => pair.b.address(soccr_lab::Family::V4, 80),
            family => pair.a.address_of(&pair.b, family, 80),
        });
        let mut resets = Sniffer::flagged(&pair.a.namespace, "eth0", Flags::RST).unwrap();
        let flow = Flow::of(&ours).unwrap();
        let locker = Locker::beside(&ours, Mode::HOLD).unwrap();
        let ends: [fn(Lock); 2] = [|lock| assert!(lock.release().unwrap() > 0), drop];
        for end in ends {
            let lock = hold(&locker, flow, &mut peer);
            end(lock);
            expect(&mut ours, b"held");
            exchange(&mut peer, &mut ours);
            assert_eq!(resets.segments().unwrap(), [], "{family:?}");
        }
        let lock = hold(&locker, flow, &mut peer);
        let restored = moved(&pair, &ours).unwrap();
        assert!(lock.release_into(&[&restored]).unwrap() > 0);
        // It is there, and not sent again.
        wait_until("it has arrived", || unread(&restored) == 4);
        ours = restored.resume().unwrap();
        expect(&mut ours, b"held");
        exchange(&mut peer, &mut ours);
        assert_eq!(resets.segments().unwrap(), [], "{family:?}");
    }
}

fn hold(locker: &Locker, flow: Flow, peer: &mut TcpStream) -> Lock {
    let lock = locker.lock(&[flow]).unwrap();
    peer.write_all(b"held").unwrap();
    wait_until("it is held", || lock.held() > 0);
    lock
}

/// The connection in another socket of the same host.
fn moved(pair: &Pair, ours: &TcpStream) -> soccr::Result<Restored> {
    pair.b.run(|| {
        let paused = pause(ours)?;
        let connection = paused.save()?;
        paused.detach()?;
        connection.restore()
    })
}

fn unread(socket: impl AsFd) -> u64 {
    rustix::io::ioctl_fionread(socket).unwrap()
}

/// The same, for an address of another device than the one it is bound to: packets that this host sends itself never come from
/// there.
fn bound_elsewhere() -> (Pair, TcpStream, TcpStream) {
    const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
    bound_to("eth0", |pair| {
        let rtnetlink = || soccr_lab::Rtnetlink::here().unwrap();
        pair.b.run(|| rtnetlink().add_address("lo", ELSEWHERE.into(), 32)).unwrap();
        pair.a.run(|| rtnetlink().route(ELSEWHERE.into(), 32, "eth0", Some(pair.b.v4.into()))).unwrap();
        SocketAddr::from((ELSEWHERE, 80))
    })
}

fn a_socket_that_cannot_hear_them_is_refused() {
    let (pair, peer, ours) = bound_elsewhere();
    let mut resets = Sniffer::flagged(&pair.a.namespace, "eth0", Flags::RST).unwrap();
    half_close(&peer, &ours);
    let error = moved(&pair, &ours).unwrap_err();
    assert!(error.remedy().contains("0xc114"), "{error}");
    assert_eq!(resets.segments().unwrap(), []);
}

fn what_was_held_is_refused_where_it_cannot_be_heard() {
    let (pair, mut peer, mut ours) = bound_elsewhere();
    let mut resets = Sniffer::flagged(&pair.a.namespace, "eth0", Flags::RST).unwrap();
    let flow = Flow::of(&ours).unwrap();
    let locker = Locker::beside(&ours, Mode::HOLD).unwrap();
    let ends: [fn(Lock); 2] = [drop, |lock| refused(lock.release())];
    for end in ends {
        end(hold(&locker, flow, &mut peer));
        // The peer sends it again.
        expect(&mut ours, b"held");
        exchange(&mut peer, &mut ours);
        assert_eq!(resets.segments().unwrap(), []);
    }
    let lock = hold(&locker, flow, &mut peer);
    let restored = moved(&pair, &ours).unwrap();
    refused(lock.release_into(&[&restored]));
    ours = restored.resume().unwrap();
    expect(&mut ours, b"held");
    exchange(&mut peer, &mut ours);
    assert_eq!(resets.segments().unwrap(), []);
}

#[track_caller]
fn refused(released: soccr::Result<usize>) {
    let error = released.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.remedy().contains("0xc114"), "{error}");
}

/// The peer has said its last, and knows that it was heard.
fn half_close(peer: &TcpStream, ours: &TcpStream) {
    peer.shutdown(Shutdown::Write).unwrap();
    wait_until("its FIN is acknowledged", || is_in(ours, State::CloseWait) && is_in(peer, State::FinWait2));
}

fn is_in(stream: impl AsFd, state: State) -> bool {
    TcpInfo::of(stream).unwrap().state == state
}

fn exchange(a: &mut TcpStream, b: &mut TcpStream) {
    a.write_all(b"hello").unwrap();
    expect(b, b"hello");
    b.write_all(b"hello").unwrap();
    expect(a, b"hello");
}

#[track_caller]
fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.read_exact(&mut read).unwrap();
    assert_eq!(read, bytes);
}

/// The table from which a transparent proxy gets packets for everybody.
const TABLE: u8 = 100;

/// `ip route add local default dev lo table 100`
fn deliver_locally() {
    const NEW_ROUTE: u16 = 24;
    const LOOPBACK: u32 = 1;
    let [static_route, host_scope, local] = [4, 254, 2];
    change(NEW_ROUTE, |m| {
        m.bytes(&[libc::AF_INET as u8, 0, 0, 0, TABLE, static_route, host_scope, local, 0, 0, 0, 0]);
        m.u32(4, LOOPBACK);
    });
}

const RULE_INCOMING: u16 = 3;
const RULE_MARK: u16 = 10;

/// `ip rule add … lookup 100`, for packets to this address, or to any.
fn rule(to: Option<Ipv4Addr>, which: impl FnOnce(&mut Message<'_>)) {
    const NEW_RULE: u16 = 32;
    const TO_TABLE: u8 = 1;
    change(NEW_RULE, |m| {
        let bits = if to.is_some() { 32 } else { 0 };
        m.bytes(&[libc::AF_INET as u8, bits, 0, 0, TABLE, 0, 0, TO_TABLE, 0, 0, 0, 0]);
        if let Some(to) = to {
            m.attribute(1, &to.octets());
        }
        which(m);
    });
}

fn change(kind: u16, body: impl FnOnce(&mut Message<'_>)) {
    let mut batch = Batch::new();
    batch.message(kind, REQUEST | ACK | CREATE | EXCLUSIVE, body);
    Socket::open(Family::Route).unwrap().transact(&batch).unwrap();
}

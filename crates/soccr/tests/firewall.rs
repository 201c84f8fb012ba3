//! Moves beside firewalls that other people have set up: they work, or say why not. The firewalls are made by the
//! program `nft`; where it is not installed, the tests say so and pass over it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::net::sockopt::{set_socket_linger, set_socket_oobinline};
use rustix::net::{SendFlags, send};
use rustix::process::{
    DumpableBehavior, Signal, dumpable_behavior, parent_process_death_signal, set_dumpable_behavior,
    set_parent_process_death_signal,
};
use soccr::lock::{Locker, Mode, PersistentLock};
use soccr::{ErrorKind, Flow, Lock};
use soccr_lab::{
    Family, Flags, Host, LIMIT, Lab, Pair, Side, Sniffer, State, TcpInfo, Test, as_owner, harness, option,
    skip, sysctl, wait_until,
};
use socket2::{Domain, Protocol, Socket, Type};

fn main() -> ExitCode {
    let tests = [
        Test::new("invalid_packets_are_dropped", || {
            moves_beside(
                "chain input { type filter hook input priority 0; ct state invalid drop; }
                 chain output { type filter hook output priority 0; ct state invalid drop; }",
            );
        }),
        Test::new("only_what_is_established_may_pass", || {
            moves_beside(
                "chain input { type filter hook input priority 0; policy drop;
                               ct state established accept; tcp dport 80 ct state new accept; }
                 chain output { type filter hook output priority 0; policy drop; ct state established accept; }",
            );
        }),
        Test::new("only_what_is_established_may_enter_but_lo_is_free", || {
            moves_beside(
                "chain input { type filter hook input priority 0; policy drop;
                               iif lo accept; ct state established accept; tcp dport 80 ct state new accept; }",
            );
        }),
        Test::new("reverse_paths_are_checked", || moves_beside("")),
        Test::new("a_firewall_that_swallows_our_mark_is_named", a_firewall_that_swallows_our_mark_is_named),
        Test::new(
            "a_rule_that_takes_our_mark_away_brings_nothing_twice",
            a_rule_that_takes_our_mark_away_brings_nothing_twice,
        ),
        Test::new(
            "a_strict_firewall_of_a_host_that_has_never_seen_it",
            a_strict_firewall_of_a_host_that_has_never_seen_it,
        ),
        Test::new("a_host_it_comes_back_to", a_host_it_comes_back_to),
        Test::new("a_redirected_connection_moves_on_one_host", a_redirected_connection_moves_on_one_host),
        Test::new(
            "a_redirected_connection_moves_to_another_host",
            a_redirected_connection_moves_to_another_host,
        ),
        Test::new(
            "a_connection_with_another_source_moves_to_another_host",
            a_connection_with_another_source_moves_to_another_host,
        ),
        Test::new("without_the_same_nat_it_is_refused", without_the_same_nat_it_is_refused),
        Test::new(
            "a_redirected_connection_that_was_reset_is_carried",
            a_redirected_connection_that_was_reset_is_carried,
        ),
        Test::new(
            "legacy_iptables_translate_in_another_namespace",
            legacy_iptables_translate_in_another_namespace,
        ),
        Test::new("a_link_local_connection_that_we_began_moves", a_link_local_connection_that_we_began_moves),
        Test::new("a_socket_belongs_to_its_owner_again", a_socket_belongs_to_its_owner_again),
    ];
    harness(tests)
}

/// What many servers have: nothing that was not there from its beginning may pass, whoever else is trusted.
const STRICT: &str = "chain input { type filter hook input priority 0; iif lo accept; ct state invalid drop;
                                       ct state established accept;
                                       tcp flags & (fin | syn | rst | ack) == syn accept; drop; }";

/// A connection that travels between two hosts with one address.
struct Traveller {
    lab: Lab,
    side: Side,
    peer: TcpStream,
    ours: TcpStream,
    resets: Sniffer,
}

impl Traveller {
    /// `None` where no rules can be made.
    fn with(rules: &str, connect: impl FnOnce(&Lab) -> (TcpStream, TcpStream)) -> Option<Self> {
        let lab = Lab::new().unwrap();
        for host in [&lab.a, &lab.b] {
            if !apply(host, rules) {
                return None;
            }
            host.run(|| sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")).unwrap();
        }
        let (peer, ours) = connect(&lab);
        let resets = Sniffer::flagged(&lab.peer.namespace, "eth0", Flags::RST).unwrap();
        let mut traveller = Self { lab, side: Side::A, peer, ours, resets };
        traveller.talk();
        Some(traveller)
    }

    /// To a port of the shared address where a listener is, or from where packets are redirected to that of the listener.
    fn to(rules: &str, port: u16, listener: u16) -> Option<Self> {
        Self::with(rules, |lab| {
            let listener = lab.a.run(|| TcpListener::bind(lab.a.address(Family::V4, listener))).unwrap();
            let peer = lab.peer.run(|| TcpStream::connect(lab.a.address(Family::V4, port))).unwrap();
            (peer, listener.accept().unwrap().0)
        })
    }

    fn talk(&mut self) {
        for number in 0..3u8 {
            self.ours.write_all(&[number; 5000]).unwrap();
            expect(&mut self.peer, &[number; 5000]);
            self.peer.write_all(&[number; 5000]).unwrap();
            expect(&mut self.ours, &[number; 5000]);
        }
    }

    /// The other host gets the connection, with what the peer sends meanwhile; our end is the first that speaks.
    fn travel(&mut self) -> soccr::Result<()> {
        let (from, to) = (self.lab.host(self.side), self.lab.host(self.side.other()));
        let mut lock = from.run(|| Lock::hold(&[Flow::of(&self.ours)?]))?;
        self.peer.write_all(b"held").unwrap();
        wait_until("it is held", || lock.held() > 0);
        let paused = soccr::pause(&self.ours)?;
        let connection = paused.save()?;
        paused.detach()?;
        let held = lock.take()?;
        lock.persist("gone", None)?;
        // Until it is there, what the peer sends again would draw a reset.
        let silence = to.run(|| Lock::drop_traffic(&[connection.flow()]))?;
        self.side = self.side.other();
        self.lab.steer(self.side).unwrap();
        let restored = to.run(|| connection.restore())?;
        to.run(|| PersistentLock::list()?.iter().try_for_each(PersistentLock::remove))?;
        silence.release()?;
        held[0].replay(&restored)?;
        self.ours = restored.resume()?;
        self.ours.write_all(b"first").unwrap();
        expect(&mut self.peer, b"first");
        expect(&mut self.ours, b"held");
        self.talk();
        assert_eq!(self.resets.segments().unwrap(), []);
        Ok(())
    }
}

fn a_strict_firewall_of_a_host_that_has_never_seen_it() {
    let Some(mut traveller) = Traveller::to(STRICT, 80, 80) else { return };
    traveller.travel().unwrap();
}

fn a_host_it_comes_back_to() {
    // It knows the connection, but not how far it has got meanwhile.
    let Some(mut traveller) = Traveller::to(STRICT, 80, 80) else { return };
    traveller.travel().unwrap();
    for _ in 0..100 {
        traveller.talk();
    }
    traveller.travel().unwrap();
}

/// As service meshes and published ports do it.
const REDIRECT: &str =
    "chain nat { type nat hook prerouting priority -100; tcp dport 80 redirect to :8080; }";

fn a_redirected_connection_moves_on_one_host() {
    let Some(mut traveller) = Traveller::to(REDIRECT, 80, 8080) else { return };
    for _ in 0..2 {
        let restored = traveller.lab.a.run(|| {
            let lock = Lock::hold(&[Flow::of(&traveller.ours).unwrap()]).unwrap();
            let paused = soccr::pause(&traveller.ours).unwrap();
            let connection = paused.save().unwrap();
            traveller.peer.write_all(b"held").unwrap();
            wait_until("it is held", || lock.held() > 0);
            paused.detach().unwrap();
            let restored = connection.restore().unwrap();
            assert!(
                restored.report().get("rtt").is_none_or(|rtt| !rtt.reason().contains("arrive")),
                "{}",
                restored.report()
            );
            lock.release_into(&[&restored]).unwrap();
            restored
        });
        traveller.ours = restored.resume().unwrap();
        expect(&mut traveller.ours, b"held");
        traveller.talk();
    }
    assert_eq!(traveller.resets.segments().unwrap(), []);
}

fn a_redirected_connection_moves_to_another_host() {
    for strict in ["", STRICT] {
        let Some(mut traveller) = Traveller::to(&format!("{REDIRECT}\n{strict}"), 80, 8080) else { return };
        traveller.travel().unwrap();
        traveller.travel().unwrap();
    }
}

fn a_connection_with_another_source_moves_to_another_host() {
    // Our end has begun it, from an address of its own that the peer never sees.
    let rules = "chain nat { type nat hook postrouting priority 100; ip saddr 10.0.0.1 snat to 192.0.2.1; }";
    let own = std::net::Ipv4Addr::new(10, 0, 0, 1);
    let connect = |lab: &Lab| {
        for host in [&lab.a, &lab.b] {
            host.run(|| soccr_lab::Rtnetlink::here().unwrap().add_address("lo", own.into(), 32)).unwrap();
        }
        let listener = lab.peer.run(|| TcpListener::bind(lab.peer.address(Family::V4, 80))).unwrap();
        let ours = lab.a.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&std::net::SocketAddr::from((own, 0)).into()).unwrap();
            socket.connect(&listener.local_addr().unwrap().into()).unwrap();
            TcpStream::from(socket)
        });
        (listener.accept().unwrap().0, ours)
    };
    let Some(mut traveller) = Traveller::with(rules, connect) else { return };
    assert_eq!(traveller.peer.peer_addr().unwrap().ip(), traveller.lab.a.v4);
    traveller.travel().unwrap();
    traveller.travel().unwrap();
}

fn without_the_same_nat_it_is_refused() {
    let Some(mut traveller) = Traveller::to(REDIRECT, 80, 8080) else { return };
    assert!(flush(&traveller.lab.b));
    let error = traveller.travel().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("192.0.2.1:80") && error.to_string().contains("NAT"), "{error}");
    assert_eq!(traveller.resets.segments().unwrap(), []);
}

/// The reset that is played shows the addresses that the peer knows, as all that is played does.
fn a_redirected_connection_that_was_reset_is_carried() {
    let strict =
        "chain first { type filter hook input priority -1; ct state invalid,new tcp flags & syn == 0 drop; }";
    for rules in ["", strict] {
        let Some(Traveller { lab, mut peer, ours, .. }) =
            Traveller::to(&format!("{REDIRECT}\n{rules}"), 80, 8080)
        else {
            return;
        };
        let remote = ours.peer_addr().unwrap();
        peer.write_all(b"unread").unwrap();
        wait_until("the bytes have arrived", || ours.peek(&mut [0; 6]).unwrap() == 6);
        set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
        drop(peer);
        wait_until("the reset has arrived", || TcpInfo::of(&ours).unwrap().state == State::Close);
        let mut ours = lab.a.run(|| {
            let paused = soccr::pause(&ours).unwrap().with_peer(remote);
            let connection = paused.save().unwrap();
            assert!(connection.control.reset && connection.tracked.is_some());
            paused.detach().unwrap();
            connection.restore().unwrap().resume().unwrap()
        });
        expect(&mut ours, b"unread");
        assert_eq!(ours.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

/// Their tables are known in the network namespace that they are in, and not where the lock is made.
fn legacy_iptables_translate_in_another_namespace() {
    let Some(mut traveller) = Traveller::to(REDIRECT, 80, 8080) else { return };
    let host = &traveller.lab.a;
    // Whoever asks for the table has made it (linux/netfilter_ipv4/ip_tables.h), and entries are applied on.
    const IPT_SO_GET_INFO: i32 = 64;
    let mut table = [0; 84];
    table[..3].copy_from_slice(b"nat");
    let asked = host.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::from(libc::SOCK_RAW), Some(Protocol::TCP)).unwrap();
        option(&socket, libc::IPPROTO_IP, IPT_SO_GET_INFO, &mut table)
    });
    if let Err(error) = asked {
        return soccr_lab::skip(format_args!("LEGACY IPTABLES: this kernel has none ({error})"));
    }
    // No table of nftables translates any more, and connections are tracked on.
    assert!(flush(host) && apply(host, STRICT));
    traveller.talk();
    let flow = Flow::of(&traveller.ours).unwrap();
    let lock = Locker::beside(&traveller.ours, Mode::HOLD).unwrap().lock(&[flow]).unwrap();
    traveller.peer.write_all(b"held").unwrap();
    wait_until("it is here", || lock.held() > 0 || TcpInfo::of(&traveller.ours).unwrap().unread > 0);
    assert!(lock.release().unwrap() > 0);
    expect(&mut traveller.ours, b"held");
    traveller.talk();
}

/// Connection tracking knows no scopes.
fn a_link_local_connection_that_we_began_moves() {
    let rules = "chain input { type filter hook input priority 0; policy drop;
                               meta l4proto ipv6-icmp accept; iif lo accept; ct state established accept; }";
    let pair = Pair::new().unwrap();
    if !apply(&pair.b, rules) {
        return;
    }
    let listener = pair.a.run(|| TcpListener::bind(pair.a.address(Family::LinkLocal, 80))).unwrap();
    let ours = pair.b.run(|| TcpStream::connect(pair.b.address_of(&pair.a, Family::LinkLocal, 80))).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(b"unread").unwrap();
    wait_until("the bytes have arrived", || ours.peek(&mut [0; 6]).unwrap() == 6);
    let mut behind = Behind { pair, peer, ours };
    behind.ours = behind.move_on().unwrap();
    expect(&mut behind.ours, b"unread");
    behind.ours.write_all(b"goes on").unwrap();
    expect(&mut behind.peer, b"goes on");
    behind.peer.write_all(b"and back").unwrap();
    expect(&mut behind.ours, b"and back");
}

fn a_socket_belongs_to_its_owner_again() {
    const OWNER: u32 = 1000;
    // As a service mesh does it: what its proxy has not sent goes nowhere.
    let rules = "chain output { type filter hook output priority 0; tcp sport 80 meta skuid 1000 meta skgid 1000 accept;
                                tcp sport 80 drop; }";
    let connect = |lab: &Lab| {
        let listener = lab.a.run(|| TcpListener::bind(lab.a.address(Family::V4, 80))).unwrap();
        let peer = lab.peer.run(|| TcpStream::connect(lab.a.address(Family::V4, 80))).unwrap();
        (peer, as_owner(OWNER, || listener.accept().unwrap().0))
    };
    let Some(mut traveller) = Traveller::with("", connect) else { return };
    if rustix::fs::fstat(&traveller.ours).unwrap().st_uid != OWNER {
        soccr_lab::skip("this user may open no files for another one");
        return;
    }
    for host in [&traveller.lab.a, &traveller.lab.b] {
        assert!(flush(host) && apply(host, rules));
    }
    traveller.talk();
    // Whoever becomes another user loses both, be it for a moment.
    set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
    set_parent_process_death_signal(Some(Signal::HUP)).unwrap();
    traveller.travel().unwrap();
    let stat = rustix::fs::fstat(&traveller.ours).unwrap();
    assert_eq!((stat.st_uid, stat.st_gid), (OWNER, OWNER));
    assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::Dumpable);
    assert_eq!(parent_process_death_signal().unwrap(), Some(Signal::HUP));
    set_parent_process_death_signal(None).unwrap();
}

/// A connection from `a` to a listener on `b`, behind the firewall of `b`, with bytes that wait on both sides.
struct Behind {
    pair: Pair,
    peer: TcpStream,
    ours: TcpStream,
}

impl Behind {
    fn firewall(rules: &str) -> Option<Self> {
        let pair = Pair::new().unwrap();
        pair.b.run(|| {
            for device in ["all", "lo", "eth0"] {
                sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "1").unwrap();
            }
        });
        if !apply(&pair.b, rules) {
            return None;
        }
        let address = pair.b.address(Family::V4, 80);
        let listener = pair.b.run(|| TcpListener::bind(address)).unwrap();
        let mut peer = pair.a.run(|| TcpStream::connect(address)).unwrap();
        let (mut ours, _) = listener.accept().unwrap();
        peer.write_all(b"hello").unwrap();
        ours.write_all(b"hello").unwrap();
        expect(&mut peer, b"hello");
        expect(&mut ours, b"hello");
        peer.write_all(b"unread").unwrap();
        wait_until("the bytes have arrived", || ours.peek(&mut [0; 6]).unwrap() == 6);
        Some(Self { pair, peer, ours })
    }

    fn is_in(&self, state: State) -> bool {
        TcpInfo::of(&self.ours).unwrap().state == state
    }

    /// Moves our end into another socket on the same host.
    fn move_on(&self) -> soccr::Result<TcpStream> {
        self.pair.b.run(|| {
            let lock = Lock::hold(&[Flow::of(&self.ours)?])?;
            let paused = soccr::pause(&self.ours)?;
            let connection = paused.save()?;
            paused.detach()?;
            let restored = connection.restore()?;
            lock.release()?;
            restored.resume()
        })
    }
}

fn moves_beside(rules: &str) {
    for state in [State::Established, State::CloseWait, State::FinWait2] {
        let Some(mut behind) = Behind::firewall(rules) else { return };
        let mut resets = Sniffer::flagged(&behind.pair.a.namespace, "eth0", Flags::RST).unwrap();
        match state {
            State::CloseWait => behind.peer.shutdown(Shutdown::Write).unwrap(),
            State::FinWait2 => behind.ours.shutdown(Shutdown::Write).unwrap(),
            _ => {}
        }
        wait_until("the state is reached", || behind.is_in(state));
        let mut ours = behind.move_on().unwrap_or_else(|error| panic!("{state:?}: {error}"));
        expect(&mut ours, b"unread");
        if state != State::FinWait2 {
            ours.write_all(b"goes on").unwrap();
            expect(&mut behind.peer, b"goes on");
        }
        if state != State::CloseWait {
            behind.peer.write_all(b"and back").unwrap();
            expect(&mut ours, b"and back");
        }
        assert_eq!(resets.segments().unwrap(), [], "{state:?}");
    }
}

fn a_firewall_that_swallows_our_mark_is_named() {
    let rules = "chain input { type filter hook input priority 0; meta mark 0xC114 drop; }";
    let Some(behind) = Behind::firewall(rules) else { return };
    behind.peer.shutdown(Shutdown::Write).unwrap();
    wait_until("the FIN has arrived", || behind.is_in(State::CloseWait));
    let error = behind.move_on().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("0xC114"), "{error}");
}

/// As hosts with two providers or a tunnel have it. What is given back meets the lock once more.
fn a_rule_that_takes_our_mark_away_brings_nothing_twice() {
    let rules = "chain output { type route hook output priority mangle; meta mark set ct mark; }";
    let Some(Behind { pair, mut peer, mut ours }) = Behind::firewall(rules) else { return };
    expect(&mut ours, b"unread");
    set_socket_oobinline(&ours, true).unwrap();
    peer.set_nodelay(true).unwrap();
    pair.a.namespace.be_patient().unwrap();
    for moves in [false, true, true] {
        // So that the peer counts anew how long it waits.
        peer.write_all(b"and on").unwrap();
        expect(&mut ours, b"and on");
        ours.write_all(b"and back").unwrap();
        expect(&mut peer, b"and back");
        let before = ours;
        let flow = Flow::of(&before).unwrap();
        let lock = pair.b.run(|| Lock::hold(&[flow]).unwrap());
        // What is urgent is not joined to other packets.
        for (bytes, flags) in [("a", SendFlags::empty()), ("b", SendFlags::OOB)].into_iter().cycle().take(5) {
            assert_eq!(send(&peer, bytes.as_bytes(), flags), Ok(1));
        }
        wait_until("all is held", || lock.held() >= 5);
        let (segments, count);
        (ours, segments, count) = if moves {
            let restored = pair.b.run(|| {
                let paused = soccr::pause(&before).unwrap();
                let connection = paused.save().unwrap();
                paused.detach().unwrap();
                connection.restore().unwrap()
            });
            let segments = TcpInfo::of(&restored).unwrap().segments_in;
            let count = lock.release_into(&[&restored]).unwrap();
            (restored.resume().unwrap(), segments, count)
        } else {
            let segments = TcpInfo::of(&before).unwrap().segments_in;
            let count = lock.release().unwrap();
            (before, segments, count)
        };
        expect(&mut ours, b"ababa");
        // Beside them the lock has held what the restore has played, and what the peer has acknowledged. Given back until it
        // comes back no more, they would be thousands.
        let arrived = TcpInfo::of(&ours).unwrap().segments_in as usize - segments as usize;
        for number in [count, arrived] {
            assert!((5..50).contains(&number), "{count} given, {arrived} arrived, moved: {moves}");
        }
    }
    ours.write_all(b"the end").unwrap();
    expect(&mut peer, b"the end");
}

/// Loads rules into a host's firewall; false, and a word about it, where `nft` is not installed.
fn apply(host: &Host, rules: &str) -> bool {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    let mut nft = match host.run(|| command.spawn()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            skip("nft is not in PATH");
            return false;
        }
        nft => nft.unwrap(),
    };
    write!(nft.stdin.take().unwrap(), "table inet others {{\n{rules}\n}}\n").unwrap();
    assert!(nft.wait().unwrap().success());
    true
}

/// Removes what was loaded.
fn flush(host: &Host) -> bool {
    host.run(|| Command::new("nft").args(["delete", "table", "inet", "others"]).status())
        .is_ok_and(|status| status.success())
}

#[track_caller]
fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.read_exact(&mut read).unwrap();
    assert_eq!(read, bytes);
}

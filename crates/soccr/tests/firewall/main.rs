//! Moves beside firewalls that other people have set up: they work, or say why not. The firewalls are made by the
//! program `nft`; where it is not installed, the tests say so and pass over it.

mod nat;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, ExitCode, Stdio};

use rustix::net::sockopt::set_socket_oobinline;
use rustix::net::{SendFlags, send};
use rustix::process::{
    DumpableBehavior, Signal, dumpable_behavior, parent_process_death_signal, set_dumpable_behavior,
    set_parent_process_death_signal,
};
use soccr::lock::{Locker, Mode, PersistentLock};
use soccr::{ErrorKind, Flow, Lock};
use soccr_lab::{
    Family, Faults, Flags, Host, LIMIT, Lab, Pair, Side, Sniffer, State, TcpInfo, Test, as_owner, calls_of,
    harness, skip, supervised, sysctl, wait_until,
};

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
        Test::new("what_is_swallowed_is_waited_for_once", what_is_swallowed_is_waited_for_once),
        Test::new(
            "a_rule_that_takes_our_mark_away_brings_nothing_twice",
            a_rule_that_takes_our_mark_away_brings_nothing_twice,
        ),
        Test::new(
            "a_strict_firewall_of_a_host_that_has_never_seen_it",
            a_strict_firewall_of_a_host_that_has_never_seen_it,
        ),
        Test::new("a_host_it_comes_back_to", a_host_it_comes_back_to),
        Test::new("what_is_restored_is_let_through", what_is_restored_is_let_through),
        Test::new(
            "nat::a_redirected_connection_moves_on_one_host",
            nat::a_redirected_connection_moves_on_one_host,
        ),
        Test::new(
            "nat::a_redirected_connection_moves_to_another_host",
            nat::a_redirected_connection_moves_to_another_host,
        ),
        Test::new(
            "nat::a_connection_with_another_source_moves_to_another_host",
            nat::a_connection_with_another_source_moves_to_another_host,
        ),
        Test::new(
            "nat::what_arrives_early_waits_for_the_connection",
            nat::what_arrives_early_waits_for_the_connection,
        ),
        Test::new(
            "nat::late_packets_draw_no_reset_where_it_was",
            nat::late_packets_draw_no_reset_where_it_was,
        ),
        Test::new("nat::without_the_same_nat_it_is_refused", nat::without_the_same_nat_it_is_refused),
        Test::new(
            "nat::a_redirected_connection_that_was_reset_is_carried",
            nat::a_redirected_connection_that_was_reset_is_carried,
        ),
        Test::new("nat::a_redirected_connection_is_not_steered", nat::a_redirected_connection_is_not_steered),
        Test::new("nat::what_cannot_be_found_out_is_told", nat::what_cannot_be_found_out_is_told),
        Test::new(
            "nat::of_what_is_not_translated_nobody_need_tell",
            nat::of_what_is_not_translated_nobody_need_tell,
        ),
        Test::new(
            "nat::legacy_iptables_translate_in_another_namespace",
            nat::legacy_iptables_translate_in_another_namespace,
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
        let silence = to.run(|| Locker::new(Mode::Drop)?.lock_arriving([&connection]))?;
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

/// Whichever call of a restore fails: it says so, or the firewall knows the connection.
fn what_is_restored_is_let_through() {
    let Some(mut traveller) = Traveller::to(STRICT, 80, 80) else { return };
    let address = traveller.lab.a.address(Family::V4, 80);
    let listener = traveller.lab.a.run(|| TcpListener::bind(address)).unwrap();
    // A new connection each time: what has failed may have left an entry.
    let mut failed_call = |faults: &Faults, errno, left| {
        let Traveller { lab, peer, ours, .. } = &mut traveller;
        lab.steer(Side::A).unwrap();
        *peer = lab.peer.run(|| TcpStream::connect(address)).unwrap();
        *ours = listener.accept().unwrap().0;
        let paused = soccr::pause(&*ours).unwrap();
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        lab.steer(Side::B).unwrap();
        faults.arm(left, errno);
        let restored = lab.b.run(|| connection.restore());
        let failed = faults.disarm();
        match restored {
            Ok(restored) => {
                *ours = restored.resume().unwrap();
                traveller.talk();
            }
            Err(error) => {
                assert!(failed.is_some() && error.errno() == Some(errno), "{error}, for {failed:?}")
            }
        }
        failed
    };
    supervised(|faults| {
        for errno in [libc::ENOMEM, libc::EMFILE] {
            let mut left = 0;
            while failed_call(faults, errno, left).is_some() {
                left += 1;
            }
        }
    });
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

/// Many connections would otherwise be silent one after the other.
fn what_is_swallowed_is_waited_for_once() {
    let rules = "chain input { type filter hook input priority 0; meta mark 0xC114 drop; }";
    let Some(mut behind) = Behind::firewall(rules) else { return };
    expect(&mut behind.ours, b"unread");
    let flow = Flow::of(&behind.ours).unwrap();
    let lock = behind.pair.b.run(|| Lock::hold(&[flow]).unwrap());
    behind.peer.write_all(b"held").unwrap();
    wait_until("it is held", || lock.held() > 0);
    let held = lock.take().unwrap().remove(0);
    let (pair, ours) = (&behind.pair, &behind.ours);
    let replay = || {
        let calls = calls_of(&[libc::SYS_getsockopt], || {
            let error = pair.b.run(|| held.replay(ours)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        });
        calls.len()
    };
    replay();
    // A wait asks thousands of times, unless the machine is very busy.
    wait_until("it is not waited for again", || replay() < 100);
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
        // What the peer has sent again, with all bytes in one segment, may be there before the last of the others.
        let arrived = || TcpInfo::of(&ours).unwrap().segments_in as usize - segments as usize;
        wait_until("all have arrived", || arrived() >= 5);
        // Beside them the lock has held what the restore has played, and what the peer has acknowledged. Given back until it
        // comes back no more, they would be thousands.
        for number in [count, arrived()] {
            assert!((5..50).contains(&number), "{count} given, {} arrived, moved: {moves}", arrived());
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

//! Connections whose packets have other addresses on the wire than their sockets: they move where the same rules are, or are
//! refused.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use soccr::lock::{Locker, Mode, PersistentLock};
use soccr::steer::{NextHop, Steering, redirect};
use soccr::{ErrorKind, Flow, Lock};
use soccr_lab::{Family, Lab, Side, State, TcpInfo, option, supervised, wait_until};
use socket2::{Domain, Protocol, Socket, Type};

use super::{STRICT, Traveller, apply, expect, flush};

/// As service meshes and published ports do it.
const REDIRECT: &str =
    "chain nat { type nat hook prerouting priority -100; tcp dport 80 redirect to :8080; }";

pub fn a_redirected_connection_moves_on_one_host() {
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

pub fn a_redirected_connection_moves_to_another_host() {
    for strict in ["", STRICT] {
        let Some(mut traveller) = Traveller::to(&format!("{REDIRECT}\n{strict}"), 80, 8080) else { return };
        traveller.travel().unwrap();
        traveller.travel().unwrap();
    }
}

pub fn a_connection_with_another_source_moves_to_another_host() {
    let Some(mut traveller) = with_another_source() else { return };
    traveller.travel().unwrap();
    traveller.travel().unwrap();
}

/// The new host does not know yet that the packets are translated.
pub fn what_arrives_early_waits_for_the_connection() {
    for traveller in [Traveller::to(REDIRECT, 80, 8080), with_another_source()] {
        let Some(mut traveller) = traveller else { return };
        let Traveller { lab, peer, ours, resets, .. } = &mut traveller;
        let paused = soccr::pause(&*ours).unwrap();
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        let lock = lab.b.run(|| Locker::new(Mode::HOLD).unwrap().lock_arriving([&connection])).unwrap();
        lab.steer(Side::B).unwrap();
        peer.write_all(b"early").unwrap();
        wait_until("it is held, or has drawn a reset", || {
            lock.held() > 0 || !resets.segments().unwrap().is_empty()
        });
        let restored = lab.b.run(|| connection.restore()).unwrap();
        lock.release_into(&[&restored]).unwrap();
        *ours = restored.resume().unwrap();
        expect(ours, b"early");
        traveller.talk();
        assert_eq!(traveller.resets.segments().unwrap(), []);
    }
}

/// The old host's connection tracking has not seen what they acknowledge, and leaves them untranslated.
pub fn late_packets_draw_no_reset_where_it_was() {
    for traveller in [Traveller::to(REDIRECT, 80, 8080), with_another_source()] {
        let Some(mut traveller) = traveller else { return };
        let Traveller { lab, peer, ours, .. } = &mut traveller;
        let flow = Flow::of(&*ours).unwrap();
        let mut lock = lab.a.run(|| Lock::hold(&[flow])).unwrap();
        let paused = soccr::pause(&*ours).unwrap();
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        lock.persist("gone", None).unwrap();
        *ours = lab.b.run(|| connection.restore()).unwrap().resume().unwrap();
        ours.write_all(b"from there").unwrap();
        expect(peer, b"from there");
        peer.write_all(b"late").unwrap();
        lab.steer(Side::B).unwrap();
        expect(ours, b"late");
        // When it comes home it is not silent.
        let all: HashSet<Flow> = connection.flows().collect();
        assert_eq!(all.len(), 2);
        lab.a.run(|| {
            for again in [false, true] {
                if again {
                    PersistentLock::create("again", &[flow], None).unwrap();
                }
                let [lock] = &PersistentLock::list().unwrap()[..] else { panic!("not one lock") };
                assert_eq!(lock.flows.iter().copied().collect::<HashSet<_>>(), all);
                lock.unlock(&[flow]).unwrap();
                assert_eq!(PersistentLock::list().unwrap(), []);
            }
        });
        traveller.talk();
        assert_eq!(traveller.resets.segments().unwrap(), []);
    }
}

/// Our end has begun it, from an address of its own that the peer never sees.
fn with_another_source() -> Option<Traveller> {
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
    let traveller = Traveller::with(rules, connect)?;
    assert_eq!(traveller.peer.peer_addr().unwrap().ip(), traveller.lab.a.v4);
    Some(traveller)
}

pub fn without_the_same_nat_it_is_refused() {
    let Some(mut traveller) = Traveller::to(REDIRECT, 80, 8080) else { return };
    assert!(flush(&traveller.lab.b));
    let error = traveller.travel().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("192.0.2.1:80") && error.to_string().contains("NAT"), "{error}");
    assert_eq!(traveller.resets.segments().unwrap(), []);
}

/// The reset that is played shows the addresses that the peer knows, as all that is played does.
pub fn a_redirected_connection_that_was_reset_is_carried() {
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
pub fn legacy_iptables_translate_in_another_namespace() {
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
    let locker = Locker::beside(&traveller.ours, Mode::HOLD).unwrap();
    // The kernel names the tables to root alone, whoever else has rights over the network.
    supervised(|faults| {
        for errno in [libc::EACCES, libc::EMFILE] {
            for left in 0.. {
                faults.arm_among(&[libc::SYS_openat], left, errno);
                let locked = locker.lock(&[flow]);
                let failed = faults.disarm();
                match locked {
                    Ok(lock) => {
                        traveller.peer.write_all(b"held").unwrap();
                        let arrived = || TcpInfo::of(&traveller.ours).unwrap().unread > 0;
                        wait_until("it is here", || lock.held() > 0 || arrived());
                        assert!(lock.release().unwrap() > 0, "not locked, after {failed:?}");
                        expect(&mut traveller.ours, b"held");
                    }
                    Err(error) => assert_eq!(error.errno(), Some(libc::EMFILE), "{error}"),
                }
                if failed.is_none() {
                    break;
                }
            }
        }
    });
    traveller.talk();
}

/// The kernel has an entry, and a call fails that asks for it: that is no reason to lock or to save what is on no wire.
pub fn what_cannot_be_found_out_is_told() {
    let Some(traveller) = Traveller::to(REDIRECT, 80, 8080) else { return };
    let Traveller { lab, mut peer, mut ours, mut resets, .. } = traveller;
    let flow = Flow::of(&ours).unwrap();
    let locker = lab.a.run(|| Locker::new(Mode::HOLD)).unwrap();
    supervised(|faults| {
        for left in 0.. {
            faults.arm(left, libc::ENOMEM);
            let locked = locker.lock(&[flow]);
            let failed = faults.disarm();
            match locked {
                Ok(lock) => {
                    peer.write_all(b"held").unwrap();
                    wait_until("it is here", || lock.held() > 0 || TcpInfo::of(&ours).unwrap().unread > 0);
                    assert!(lock.release().unwrap() > 0, "not locked, after {failed:?}");
                    expect(&mut ours, b"held");
                }
                Err(error) => {
                    assert_eq!((error.step(), error.errno()), ("lock", Some(libc::ENOMEM)), "{error}")
                }
            }
            if failed.is_none() {
                break;
            }
        }
        // Without rights, and by kernels that tell nobody, too.
        for errno in [libc::ENOMEM, libc::EPERM, libc::EINVAL] {
            for left in 0.. {
                let paused = soccr::pause(&ours).unwrap();
                faults.arm(left, errno);
                let saved = paused.save();
                let failed = faults.disarm();
                paused.resume().unwrap();
                match saved {
                    Ok(saved) => assert!(saved.tracked.is_some(), "its NAT is not saved, after {failed:?}"),
                    Err(error) if error.kind() == ErrorKind::Refused => {
                        assert!(
                            error.to_string().contains("NAT") && error.to_string().contains("192.0.2.1:80"),
                            "{error}"
                        );
                    }
                    Err(error) => assert_eq!(error.errno(), Some(errno), "{error}"),
                }
                if failed.is_none() {
                    break;
                }
            }
        }
    });
    assert_eq!(resets.segments().unwrap(), []);
}

/// Rights over the socket alone are enough for it.
pub fn of_what_is_not_translated_nobody_need_tell() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let connect = |lab: &Lab| {
            let listener = lab.a.run(|| TcpListener::bind(lab.a.address(family, 80))).unwrap();
            let peer = lab.peer.run(|| TcpStream::connect(lab.a.address(family, 80))).unwrap();
            (peer, listener.accept().unwrap().0)
        };
        let tracked = "chain input { type filter hook input priority 0; ct state established accept; }";
        let Some(traveller) = Traveller::with(tracked, connect) else { return };
        supervised(|faults| {
            let paused = soccr::pause(&traveller.ours).unwrap();
            // The question to connection tracking.
            faults.arm_among(&[libc::SYS_sendto], 0, libc::EPERM);
            let saved = paused.save();
            assert!(faults.disarm().is_some());
            assert_eq!(saved.unwrap().tracked, None);
        });
    }
}

/// Packets are steered before they are translated.
pub fn a_redirected_connection_is_not_steered() {
    let Some(mut traveller) = Traveller::to(REDIRECT, 80, 8080) else { return };
    let Traveller { lab, ours, .. } = &traveller;
    let flow = Flow::of(ours).unwrap();
    lab.a.run(|| {
        let error = redirect(&[flow], &NextHop::known(lab.peer.v4.into(), "eth0")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains("NAT") && error.to_string().contains("192.0.2.1:80 "), "{error}");
        assert_eq!(Steering::list().unwrap(), []);
    });
    traveller.talk();
}

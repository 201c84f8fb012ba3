//! What is steered, as the host that steers it sees it.

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto};
use soccr::ErrorKind::Refused;
use soccr::Flow;
use soccr::lock::{Locker, Mode};
use soccr::steer::{
    Foreign, Homecoming, NextHop, Numbers, Steered, Steering, Times, is_foreign, redirect, stop,
};
use soccr_lab::{LIMIT, Sniffer, TcpInfo, wait_until};

use super::moves::transfer;
use super::{Net, address, connect, devices, listings};

pub fn contents() -> Vec<Steered> {
    Steering::list().unwrap().iter().flat_map(|steering| steering.contents().unwrap()).collect()
}

/// Connections that exist nowhere.
pub fn flows(count: u16, ipv6: bool) -> Vec<Flow> {
    let (local, remote): (IpAddr, IpAddr) = match ipv6 {
        false => ([192, 0, 2, 1].into(), [198, 51, 100, 1].into()),
        true => {
            let v6 = |network| Ipv6Addr::new(0x2001, 0xdb8, network, 0, 0, 0, 0, 1).into();
            (v6(0), v6(1))
        }
    };
    let flow =
        |port| Flow { local: SocketAddr::new(local, 80), remote: SocketAddr::new(remote, 1000 + port) };
    (0..count).map(flow).collect()
}

pub fn many_are_added_moved_and_removed() {
    let lan = Net::flat();
    lan.hosts[0].run(|| {
        for ipv6 in [false, true] {
            let flows = flows(10_000, ipv6);
            let [b, c] = [1, 2].map(|host| NextHop::new(address(&lan.hosts[host], ipv6)).unwrap());
            let to =
                |hop: &NextHop| contents().iter().filter(|steered| steered.next_hop == hop.address()).count();
            redirect(&flows, &b).unwrap();
            assert_eq!((to(&b), to(&c)), (10_000, 0));
            // Some of them, twice, with some that are new.
            redirect(&flows[..7000], &c).unwrap();
            redirect(&flows[..7000], &c).unwrap();
            assert_eq!((to(&b), to(&c)), (3000, 7000));
            assert_eq!(stop(&flows[5000..8000]).unwrap(), 3000);
            assert_eq!(stop(&flows[5000..8000]).unwrap(), 0);
            redirect(&flows, &c).unwrap();
            assert_eq!((to(&b), to(&c)), (0, 10_000));
            assert!(contents().iter().all(|steered| flows.contains(&steered.flow)));
            // The first are new, and the others are not.
            assert_eq!(stop(&flows[..100]).unwrap(), 100);
            redirect(&flows, &b).unwrap();
            assert_eq!((to(&b), to(&c)), (10_000, 0));
            assert_eq!(stop(&flows).unwrap(), 10_000);
        }
        assert_eq!(contents(), []);
        let [steering] = &Steering::list().unwrap()[..] else { panic!("there is one") };
        assert_eq!((steering.ingress(), steering.egress()), ("eth0", "eth0"));
    });
}

/// The same connection is named more than once.
pub fn named_twice_it_is_steered_once() {
    let lan = Net::flat();
    lan.hosts[0].run(|| {
        let b = NextHop::new(lan.hosts[1].v4.into()).unwrap();
        let flow = flows(1, false)[0];
        let mapped = |end: SocketAddr| {
            let IpAddr::V4(v4) = end.ip() else { panic!("IPv4") };
            SocketAddr::from((v4.to_ipv6_mapped(), end.port()))
        };
        let same = Flow { local: mapped(flow.local), remote: mapped(flow.remote) };
        for _ in 0..2 {
            redirect(&[flow, flow, same], &b).unwrap();
            assert_eq!(contents().iter().map(|steered| steered.flow).collect::<Vec<_>>(), [flow]);
        }
        assert_eq!(stop(&[flow, flow, same]).unwrap(), 1);
        assert_eq!(contents(), []);
        let many = flows(100, false).repeat(2);
        redirect(&many, &b).unwrap();
        assert_eq!(contents().len(), 100);
    });
}

pub fn what_is_steered_is_counted() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (mut peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let stream = transfer(&lan, stream, flow, 0, 1);
        let steered = || lan.hosts[0].run(contents).pop().unwrap();
        let before = steered();
        let mut sniffer = Sniffer::on(&lan.hosts[1].namespace, "eth0").unwrap();
        for _ in 0..10 {
            peer.write_all(&[7; 100]).unwrap();
            wait_until("it has arrived", || TcpInfo::of(&peer).unwrap().unacknowledged == 0);
        }
        let header = if ipv6 { 72 } else { 52 };
        let (mut after, mut seen) = (steered(), Vec::new());
        // Where this machine is busy, the peer sends again or acknowledges late.
        wait_until("as much is counted as has been steered", || {
            after = steered();
            seen.extend(
                sniffer.segments().unwrap().into_iter().filter(|segment| segment.source == flow.remote),
            );
            let bytes: usize = seen.iter().map(|segment| header + segment.payload_len).sum();
            (after.packets - before.packets, after.bytes - before.bytes) == (seen.len() as u64, bytes as u64)
        });
        assert!(seen.len() >= 10);
        assert_eq!((after.flow, after.next_hop), (flow, address(&lan.hosts[1], ipv6)));
        assert!(!after.closing && after.idle < Duration::from_secs(3600), "{after:?}");
        drop(stream);
        lan.hosts[0].run(|| stop(&[flow])).unwrap();
    }
}

/// Short times, so that a test can see them pass.
fn short() -> Times {
    let mut times = Times::default();
    times.closing = Duration::from_millis(300);
    times.reset = Duration::from_millis(100);
    times
}

pub fn an_entry_ends_with_its_connection() {
    let lan = Net::flat();
    lan.hosts[0].run(|| Steering::open("eth0", "eth0", short()).unwrap());
    let gone = || lan.hosts[0].run(contents).is_empty();
    for ipv6 in [false, true] {
        let (peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let stream = transfer(&lan, stream, flow, 0, 1);
        drop(stream);
        assert!(!gone());
        drop(peer);
        wait_until("it has ended after a FIN", gone);

        let (mut peer, mut stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        stream.write_all(b"unread").unwrap();
        peer.peek(&mut [0]).unwrap();
        stream = transfer(&lan, stream, flow, 0, 1);
        // Closing with unread data resets the connection.
        peer.write_all(b"x").unwrap();
        drop(peer);
        wait_until("it has ended after an RST", gone);
        drop(stream);
    }
}

pub fn what_has_ended_makes_room() {
    const FIN: u8 = 0x01;
    let lan = Net::flat();
    let mut times = Times::default();
    times.idle = Duration::from_secs(1);
    let raw = devices::raw(&lan.peer, None);
    lan.hosts[0].run(|| {
        let hop = NextHop::new(lan.hosts[1].v4.into()).unwrap();
        Steering::open("eth0", "eth0", times).unwrap();
        let flows = |port| {
            let mut flows = flows(25_000, false);
            flows.iter_mut().for_each(|flow| flow.local.set_port(port));
            flows
        };
        let living = flows(79)[0];
        wait_until("one connection stays for an hour", || {
            redirect(&[living], &hop).unwrap();
            devices::send_by(&raw, &segment(living, FIN), living);
            contents().first().is_some_and(|steered| steered.closing)
        });
        let steered = || contents().iter().map(|steered| steered.flow).collect::<Vec<_>>();
        // More than a set can hold, one third after the other.
        for port in 80..83 {
            redirect(&flows(port), &hop).unwrap();
            wait_until("they have ended", || steered() == [living]);
        }
    });
}

pub fn a_new_connection_with_the_same_ports_is_not_steered() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let mut stream = transfer(&lan, stream, flow, 0, 1);
        // While the connection lives, a SYN belongs to it: it draws an answer, and no reset.
        assert_eq!(lan.hosts[0].run(contents).len(), 1);
        stream.write_all(b"unread").unwrap();
        peer.peek(&mut [0]).unwrap();
        drop(peer);
        wait_until("the FIN or RST was seen", || lan.hosts[0].run(contents)[0].closing);
        let listener = lan.hosts[0].run(|| TcpListener::bind(flow.local)).unwrap();
        let again = lan.peer.run(|| {
            let family = if ipv6 { AddressFamily::INET6 } else { AddressFamily::INET };
            let socket = rustix::net::socket(family, SocketType::STREAM, None).unwrap();
            rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
            rustix::net::bind(&socket, &flow.remote).unwrap();
            rustix::net::connect(&socket, &flow.local).unwrap();
            TcpStream::from(socket)
        });
        let (accepted, from) = listener.accept().unwrap();
        assert_eq!(from, flow.remote);
        assert_eq!(lan.hosts[0].run(contents), []);
        drop((again, accepted, stream));
    }
}

pub fn two_processes_at_once() {
    let lan = Net::flat();
    let hop = lan.hosts[0].run(|| NextHop::new(lan.hosts[1].v4.into())).unwrap();
    let all = flows(400, false);
    thread::scope(|scope| {
        for number in 0..4 {
            let (lan, hop, all) = (&lan, &hop, &all);
            scope.spawn(move || {
                lan.hosts[0].run(|| {
                    let ours = &all[100 * number..][..100];
                    for _ in 0..5 {
                        redirect(ours, hop).unwrap();
                        // What all of them have.
                        redirect(&all[..10], hop).unwrap();
                        let stopped = stop(&ours[50..]).unwrap();
                        assert_eq!(stopped, 50);
                    }
                });
            });
            scope.spawn(move || {
                let home = lan.hosts[0].v4.into();
                lan.hosts[2].run(|| {
                    for _ in 0..5 {
                        Foreign::deliver(home, Numbers::default()).unwrap();
                    }
                });
            });
        }
    });
    assert_eq!(lan.hosts[0].run(contents).len(), 200);
    assert_eq!(lan.hosts[2].run(Foreign::list).unwrap().len(), 1);
}

pub fn a_next_hop_that_is_none_is_refused() {
    let lan = Net::flat();
    lan.hosts[0].run(|| {
        let refused = |address: IpAddr, why: &str| {
            let error = NextHop::new(address).unwrap_err();
            assert_eq!(error.kind(), Refused);
            assert!(error.to_string().contains(why), "{error}");
        };
        wait_until("the address can be used", || !is_foreign(lan.hosts[0].v6.into()).unwrap());
        refused(lan.hosts[0].v4.into(), "of this host");
        refused(lan.hosts[0].v6.into(), "of this host");
        refused(lan.peer.v4.into(), "behind a router");
        refused([192, 0, 2, 77].into(), "does not answer");
        assert!(NextHop::on(lan.hosts[1].v4.into(), "nosuch").is_err());
        let hop = NextHop::new(lan.hosts[1].v6.into()).unwrap();
        let error = redirect(&flows(1, false), &hop).unwrap_err();
        assert_eq!(error.kind(), Refused);
        assert!(hop.answers().unwrap());
    });
}

pub fn nothing_is_left_behind() {
    let lan = Net::flat();
    let say_all = |host: usize| listings(&lan, host);
    let before = [0, 1].map(say_all);
    for ipv6 in [false, true] {
        let (_peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let stream = transfer(&lan, stream, flow, 0, 1);
        // What people see of it can be read.
        if let Some(all) = say_all(0) {
            assert!(all[0].contains("fwd ip"), "{}", all[0]);
        }
        transfer(&lan, stream, flow, 1, 0);
    }
    lan.hosts[0].run(|| Steering::list().unwrap().iter().for_each(|steering| steering.remove().unwrap()));
    lan.hosts[1].run(|| {
        let all = Foreign::list().unwrap();
        assert_eq!(all.len(), 2);
        all.iter().for_each(|foreign| foreign.remove().unwrap());
        // Twice does no harm.
        all.iter().for_each(|foreign| foreign.remove().unwrap());
    });
    // The locks' tables go a moment later.
    wait_until("everything is as it was", || [0, 1].map(say_all) == before);
}

/// A connection that is to come home is steered again where it does not.
/// A connection is expected home by a process that is killed: it goes on where it was, and nothing here resets its peer.
pub fn who_waits_for_a_killed_process_is_steered_again() {
    let lan = Net::flat();
    let (mut peer, stream) = connect(&lan, false);
    let flow = Flow::of(&stream).unwrap();
    let mut stream = transfer(&lan, stream, flow, 0, 1);
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let raw = lan.peer.run(|| rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::TCP)));
    let (raw, packet) = (raw.unwrap(), stray_segment(flow));
    for _ in 0..5 {
        let mut victim = lan.hosts[0].run(|| {
            let ends = format!("{} {}", flow.local, flow.remote);
            let mut itself = Command::new(env::current_exe().unwrap());
            itself.env(VICTIM, ends).stdout(Stdio::piped()).spawn().unwrap()
        });
        let mut line = String::new();
        BufReader::new(victim.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "expected\n");
        victim.kill().unwrap();
        // Whatever the order in which the kernel takes things from the dead process, there is a packet in between.
        while victim.try_wait().unwrap().is_none() {
            sendto(&raw, &packet, SendFlags::empty(), &flow.local).unwrap();
        }
        assert_eq!(resets(&lan), 0);
        peer.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
}

/// Segments with RST that the first host has sent.
pub fn resets(lan: &Net) -> u32 {
    lan.hosts[0].namespace.counter("OutRsts")
}

/// An ACK from the peer, which draws a reset where nobody knows the connection.
pub fn stray_segment(flow: Flow) -> Vec<u8> {
    segment(flow, 0x10)
}

/// A segment from the peer, with these flags.
pub fn segment(flow: Flow, flags: u8) -> Vec<u8> {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (flow.remote.ip(), flow.local.ip()) else { panic!("IPv4 only") };
    let ports = [flow.remote.port(), flow.local.port()].map(u16::to_be_bytes).concat();
    let mut tcp = [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0]].concat();
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 6, 0, tcp.len() as u8], &tcp].concat();
    let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    tcp[16..18].copy_from_slice(&(!sum as u16).to_be_bytes());
    tcp
}

/// What the killed process does.
pub const VICTIM: &str = "SOCCR_TEST_VICTIM";

pub fn expect_and_wait(ends: &str) -> ExitCode {
    let (local, remote) = ends.split_once(' ').unwrap();
    let flow = Flow { local: local.parse().unwrap(), remote: remote.parse().unwrap() };
    let locker = Locker::new(Mode::HOLD).unwrap();
    let mut homecoming = Homecoming::new(&locker).unwrap();
    let _lock = locker.lock(&[flow]).unwrap();
    homecoming.expect(&[flow]).unwrap();
    println!("expected");
    loop {
        thread::park();
    }
}

pub fn who_stays_away_is_steered_again() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (mut peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let mut stream = transfer(&lan, stream, flow, 0, 1);
        // A reset would reach the peer alone.
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        peer.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        let packets = || lan.hosts[0].run(|| contents()[0].packets);
        let home = |work: &mut dyn FnMut(&mut Homecoming)| {
            lan.hosts[0].run(|| {
                let locker = Locker::new(Mode::HOLD).unwrap();
                let mut homecoming = Homecoming::new(&locker).unwrap();
                let lock = locker.lock(&[flow]).unwrap();
                homecoming.expect(&[flow]).unwrap();
                homecoming.expect(&[flow]).unwrap();
                work(&mut homecoming);
                drop(homecoming);
                drop(lock);
            });
        };
        // Given up, and dropped.
        for give_up in [true, false] {
            let before = packets();
            home(&mut |homecoming| {
                peer.write_all(b"y").unwrap();
                let sent = TcpInfo::of(&peer).unwrap().total_retrans;
                wait_until("it is sent again", || TcpInfo::of(&peer).unwrap().total_retrans > sent);
                assert_eq!(packets(), before);
                if give_up {
                    homecoming.stay_away(&[flow]).unwrap();
                }
            });
            stream.read_exact(&mut [0]).unwrap();
            assert!(packets() > before);
        }
        // What comes the moment after finds no lock any more: it must find the steering, also while children have copies of all
        // descriptors.
        let child = || assert!(Command::new("true").status().unwrap().success());
        let children = thread::spawn(move || (0..200).for_each(|_| child()));
        for _ in 0..10 {
            home(&mut |_| ());
            peer.write_all(b"z").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        children.join().unwrap();
        home(&mut |homecoming| homecoming.arrived(&[flow]).unwrap());
        assert_eq!(lan.hosts[0].run(contents), []);
        // Other than a steered one, it needs no table.
        home(&mut |_| ());
    }
}

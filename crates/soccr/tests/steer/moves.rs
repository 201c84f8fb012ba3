//! Connections that move, steered.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

use soccr::lock::{Locker, Mode};
use soccr::settings::Value;
use soccr::steer::{Foreign, adopt_address};
use soccr::{Flow, Lock, pause};
use soccr_lab::{Flags, LIMIT, Sniffer, TcpInfo, supervised, sysctl, wait_until};

use super::traffic::{End, Peer};
use super::{Net, address, connect, deliver, firewall, say, steer};

/// Moves a connection from one host to another: what happens between two programs, in their order.
pub fn transfer(lan: &Net, stream: TcpStream, flow: Flow, from: usize, to: usize) -> TcpStream {
    deliver(lan, to, !flow.is_ipv4());
    let source = lan.hosts[from].run(|| Locker::new(Mode::HOLD)).unwrap().lock(&[flow]).unwrap();
    let paused = pause(&stream).unwrap();
    let connection = paused.save().unwrap();
    let (target, restored) = lan.hosts[to].run(|| {
        let lock = Lock::hold(&[flow]).unwrap();
        (lock, connection.restore().unwrap())
    });
    steer(lan, flow, to, connection.control.rcv_nxt);
    paused.detach().unwrap();
    source.take().unwrap()[0].replay(&restored).unwrap();
    drop(source);
    target.release().unwrap();
    restored.resume().unwrap()
}

/// The socket is at home on one host, and moves on and on: every byte is compared, in both directions.
pub fn wander(lan: &Net, ipv6: bool) {
    let mut resets = Sniffer::flagged(&lan.peer.namespace, "eth0", Flags::RST).unwrap();
    let (peer, mut stream) = connect(lan, ipv6);
    let flow = Flow::of(&stream).unwrap();
    stream.set_nonblocking(true).unwrap();
    let peer = Peer::start(peer);
    let mut ours = End::new(false);
    let mut place = 0;
    for next in [1, 2, 0, 2, 1, 0, 1, 2] {
        let (sent, received) = (peer.received() + (256 << 10), ours.received + (256 << 10));
        wait_until("data flows both ways", || {
            assert!(ours.step(&stream, true));
            peer.received() >= sent && ours.received >= received
        });
        stream = transfer(lan, stream, flow, place, next);
        assert_eq!(stream.local_addr().unwrap(), flow.local);
        place = next;
    }
    peer.stop();
    wait_until("the peer has sent everything", || !ours.step(&stream, false));
    stream.shutdown(Shutdown::Write).unwrap();
    let theirs = peer.join();
    assert_eq!((ours.sent, ours.received), (theirs.received, theirs.sent));
    assert_eq!(resets.segments().unwrap().len(), 0);
}

pub fn a_connection_wanders_while_data_flows_ipv4() {
    wander(&Net::flat(), false);
}

pub fn a_connection_wanders_while_data_flows_ipv6() {
    wander(&Net::flat(), true);
}

/// One request and its answer.
pub fn exchange(peer: &mut TcpStream, ours: &mut TcpStream) {
    let transmit = |from: &mut TcpStream, to: &mut TcpStream| {
        from.write_all(b"question").unwrap();
        let mut read = [0; 8];
        to.set_read_timeout(Some(LIMIT)).unwrap();
        to.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"question");
    };
    transmit(peer, ours);
    transmit(ours, peer);
}

pub fn requests_are_answered_wherever_the_connection_is() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (mut peer, mut stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let mut place = 0;
        for next in [1, 2, 0] {
            exchange(&mut peer, &mut stream);
            stream = transfer(&lan, stream, flow, place, next);
            place = next;
        }
        exchange(&mut peer, &mut stream);
        assert_eq!(TcpInfo::of(&peer).unwrap().total_retrans, 0);
    }
}

/// The router says that packets are too big, to the address: the new host hears of it.
pub fn narrow(lan: &Net, ipv6: bool) {
    let (peer, stream) = connect(lan, ipv6);
    let flow = Flow::of(&stream).unwrap();
    stream.set_nonblocking(true).unwrap();
    let stream = transfer(lan, stream, flow, 0, 1);
    let peer = Peer::start(peer);
    let mut ours = End::new(false);
    let mut flows = |amount: u64| {
        let wanted = peer.received() + amount;
        wait_until("data flows", || {
            assert!(ours.step(&stream, true));
            peer.received() >= wanted
        });
    };
    flows(256 << 10);
    let before = TcpInfo::of(&stream).unwrap().snd_mss;
    lan.router.rtnetlink().unwrap().set_mtu("peer", 1300).unwrap();
    lan.peer.namespace.rtnetlink().unwrap().set_mtu("eth0", 1300).unwrap();
    flows(2 << 20);
    let after = TcpInfo::of(&stream).unwrap().snd_mss;
    assert!(after < before && before - after >= 50, "{before} {after}");
    peer.stop();
    wait_until("the peer has sent everything", || !ours.step(&stream, false));
    drop(stream);
    assert_eq!(peer.join().received, ours.sent);
}

pub fn the_path_mtu_changes_while_steered_ipv4() {
    narrow(&Net::flat(), false);
}

pub fn the_path_mtu_changes_while_steered_ipv6() {
    narrow(&Net::flat(), true);
}

pub fn a_strict_firewall_lets_a_foreign_connection_pass() {
    let lan = Net::flat();
    let (mut peer, stream) = connect(&lan, false);
    let flow = Flow::of(&stream).unwrap();
    let loose = lan.hosts[1].run(|| {
        firewall::let_established_connections_pass();
        sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")
    });
    if let Err(error) = loose {
        soccr_lab::skip(format_args!("connections cannot be tracked strictly: {error}"));
        return;
    }
    let mut stream = transfer(&lan, stream, flow, 0, 1);
    exchange(&mut peer, &mut stream);
    assert_eq!(TcpInfo::of(&peer).unwrap().total_retrans, 0);
}

pub fn a_half_closed_connection_is_restored_where_its_address_is_not() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (mut peer, mut stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        peer.write_all(b"last words").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        wait_until("the FIN is there", || TcpInfo::of(&stream).unwrap().state == soccr_lab::State::CloseWait);
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            stream = transfer(&lan, stream, flow, from, to);
        }
        let mut read = Vec::new();
        stream.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"last words");
        stream.write_all(b"farewell").unwrap();
        drop(stream);
        read.clear();
        peer.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"farewell");
    }
}

pub fn transparent_only_where_the_address_is_not() {
    let lan = Net::flat();
    for (ipv6, name) in [(false, "IP_TRANSPARENT"), (true, "IPV6_TRANSPARENT")] {
        let (_peer, mut stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let transparent =
            |stream: &TcpStream| pause(stream).unwrap().save().unwrap().settings.get(name).cloned();
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            stream = transfer(&lan, stream, flow, from, to);
            // On the other hosts it must be, which says nothing of what the application wants.
            assert_eq!(transparent(&stream), None, "on host {to}");
        }
        // What an application wants for itself stays.
        let paused = pause(&stream).unwrap();
        let mut connection = paused.save().unwrap();
        connection.settings.set(name, Value::Number(1));
        paused.detach().unwrap();
        drop(stream);
        let stream: TcpStream = lan.hosts[0].run(|| connection.restore()).unwrap().resume().unwrap();
        assert_eq!(transparent(&stream), Some(Value::Number(1)));
    }
}

pub fn a_save_that_cannot_find_out_why_it_is_transparent_fails() {
    let lan = Net::flat();
    for (ipv6, name) in [(false, "IP_TRANSPARENT"), (true, "IPV6_TRANSPARENT")] {
        let (_peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let stream = transfer(&lan, stream, flow, 0, 1);
        supervised(|faults| {
            for left in 0.. {
                faults.arm(left, libc::ENOMEM);
                let paused = pause(&stream);
                let saved = paused.as_ref().map(|paused| paused.save());
                let Some(call) = faults.disarm() else { break };
                if let Ok(Ok(connection)) = saved {
                    assert_eq!(connection.settings.get(name), None, "after {call:?}");
                }
            }
        });
    }
}

pub fn neighbours_hear_nothing_of_it() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (mut peer, mut stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        exchange(&mut peer, &mut stream);
        let home = address(&lan.hosts[0], ipv6).to_string();
        let neighbour = || {
            let all = lan.router.run(|| say("ip", &["neigh", "show", &home]))?;
            all.split_whitespace().skip_while(|word| *word != "lladdr").nth(1).map(str::to_owned)
        };
        let before = neighbour();
        let mut place = 0;
        for next in [1, 2] {
            stream = transfer(&lan, stream, flow, place, next);
            exchange(&mut peer, &mut stream);
            place = next;
        }
        assert_eq!(neighbour(), before);
        // New connections are still answered by the host that has the address.
        drop(connect(&lan, ipv6));
        transfer(&lan, stream, flow, place, 0);
    }
}

pub fn the_new_host_takes_the_address() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (mut peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let mut stream = transfer(&lan, stream, flow, 0, 2);
        exchange(&mut peer, &mut stream);
        // The old host is gone for good.
        let home = address(&lan.hosts[0], ipv6);
        let prefix = if ipv6 { 64 } else { 24 };
        lan.hosts[0].namespace.rtnetlink().unwrap().remove_address("eth0", home, prefix).unwrap();
        lan.hosts[2].run(|| adopt_address(home, prefix, "eth0")).unwrap();
        exchange(&mut peer, &mut stream);
        assert_eq!(lan.hosts[2].run(Foreign::list).unwrap(), []);
        // New connections find it, too.
        let listener = lan.hosts[2].run(|| TcpListener::bind((home, 81))).unwrap();
        drop(lan.peer.run(|| TcpStream::connect((home, 81))).unwrap());
        drop(listener);
    }
}

//! Hosts in networks of their own: what is steered goes through tunnels.

use std::io::Write;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType};
use soccr::ErrorKind::Refused;
use soccr::Flow;
use soccr::steer::{Foreign, Numbers, Steering, Times, Tunnel};
use soccr_lab::{TcpInfo, supervised, sysctl, wait_until};

use super::moves::{narrow, transfer, wander};
use super::traffic::{End, Peer};
use super::{Net, address, connect, listings, say};

pub fn a_connection_wanders_between_networks_ipv4() {
    wander(&Net::routed(false), false);
}

pub fn a_connection_wanders_between_networks_ipv6() {
    wander(&Net::routed(false), true);
}

/// The router takes no packet from a network whose address it does not have.
fn strict() -> Option<Net> {
    const RULES: &str = "table inet strict { chain in { type filter hook prerouting priority raw; fib saddr . iif oif missing drop; }; }";
    let net = Net::routed(true);
    net.be_strict().unwrap();
    net.router.run(|| say("nft", &[RULES]))?;
    Some(net)
}

pub fn answers_go_back_through_the_old_host_ipv4() {
    // Without nft(8), rp_filter alone is strict.
    wander(&strict().unwrap_or_else(|| Net::routed(true)), false);
}

pub fn answers_go_back_through_the_old_host_ipv6() {
    let Some(net) = strict() else { return };
    wander(&net, true);
}

/// No host takes or sends what is not of a connection that it has seen from its beginning.
pub fn strict_firewalls_let_it_pass_between_networks() {
    const RULES: &str = "table inet strict {
        chain in { type filter hook input priority 0; policy drop; ct state established,related accept; meta l4proto icmpv6 accept;
                   udp dport 4789 accept; tcp flags & (fin | syn | rst | ack) == syn accept; }
        chain out { type filter hook output priority 0; policy drop; ct state established,related accept; meta l4proto icmpv6 accept;
                    udp dport 4789 accept; }
    }";
    for (back, ipv6) in [(false, false), (false, true), (true, false), (true, true)] {
        let net = Net::routed(back);
        for host in &net.hosts {
            if host.run(|| say("nft", &[RULES])).is_none() {
                return;
            }
            host.run(|| sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")).unwrap();
        }
        wander(&net, ipv6);
    }
}

pub fn a_firewall_that_lets_no_message_out_is_named() {
    const RULES: &str =
        "table inet silent { chain out { type filter hook output priority 0; meta l4proto icmp drop; }\n }";
    let net = Net::routed(false);
    let (_peer, stream) = connect(&net, false);
    let flow = Flow::of(&stream).unwrap();
    if net.hosts[0].run(|| say("nft", &[RULES])).is_none() {
        return;
    }
    let error = net.hosts[0].run(|| soccr::steer::narrow(&flow, 1, 1450)).unwrap_err().to_string();
    assert!(error.contains("EPERM — a firewall of this host drops it"), "{error}");
}

pub fn the_path_mtu_changes_behind_a_tunnel_ipv4() {
    narrow(&Net::routed(true), false);
}

pub fn the_path_mtu_changes_behind_a_tunnel_ipv6() {
    narrow(&Net::routed(true), true);
}

/// How many packets the first host has cut.
fn fragments(net: &Net) -> u64 {
    let statistics = net.hosts[0].run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut lines = statistics.lines().filter(|line| line.starts_with("Ip: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut all = names.split(' ').zip(values.split(' '));
    all.find(|(name, _)| *name == "FragCreates").unwrap().1.parse().unwrap()
}

pub fn peers_send_what_fits_into_the_tunnel() {
    let net = Net::routed(false);
    for ipv6 in [false, true] {
        let (peer, stream) = connect(&net, ipv6);
        let flow = Flow::of(&stream).unwrap();
        stream.set_nonblocking(true).unwrap();
        let socket = peer.try_clone().unwrap();
        let before = TcpInfo::of(&socket).unwrap().snd_mss;
        let stream = transfer(&net, stream, flow, 0, 1);
        let peer = Peer::start(peer);
        let mut ours = End::new(false);
        let mut flows = |amount: u64| {
            let wanted = ours.received + amount;
            wait_until("data flows", || {
                assert!(ours.step(&stream, true));
                ours.received >= wanted
            });
        };
        flows(256 << 10);
        let (after, cut) = (TcpInfo::of(&socket).unwrap().snd_mss, fragments(&net));
        assert_eq!(before - after, 50);
        flows(2 << 20);
        assert_eq!(fragments(&net), cut);
        peer.stop();
        wait_until("the peer has sent everything", || !ours.step(&stream, false));
        drop(stream);
        assert_eq!(peer.join().received, ours.sent);
    }
}

pub fn a_tunnel_is_made_once() {
    let net = Net::routed(false);
    let tunnels = [net.tunnel(1), net.tunnel(2)];
    assert_eq!(tunnels, [net.tunnel(1), net.tunnel(2)]);
    assert_eq!(net.hosts[0].run(Tunnel::list).unwrap(), tunnels);
    // The other host comes to the same tunnel.
    let there = net.hosts[1].run(|| Tunnel::to(net.hosts[0].v4.into())).unwrap();
    assert_eq!(there, tunnels[0].reversed());
    assert_eq!(net.hosts[1].run(Tunnel::list).unwrap(), [there]);
    for ipv6 in [false, true] {
        net.hosts[0].run(|| assert_eq!(tunnels[0].other_end(ipv6).unwrap().device(), tunnels[0].device()));
        net.hosts[1].run(|| assert_eq!(there.other_end(ipv6).unwrap().device(), there.device()));
    }
    assert_eq!(net.hosts[0].run(|| tunnels[0].mtu()).unwrap(), 1450);
    // Over IPv6, and the other one from both sides.
    let over_ipv6 = net.hosts[2].run(|| Tunnel::to(net.hosts[1].v6.into())).unwrap();
    net.hosts[2].run(|| over_ipv6.open()).unwrap();
    net.hosts[1].run(|| over_ipv6.reversed().open()).unwrap();
    net.hosts[2].run(|| over_ipv6.other_end(false)).unwrap();
    assert_eq!(net.hosts[1].run(|| over_ipv6.mtu()).unwrap(), 1430);
}

pub fn a_tunnel_that_is_none_is_refused() {
    let net = Net::routed(false);
    let [a, b, c] = [0, 1, 2].map(|host| IpAddr::from(net.hosts[host].v4));
    net.hosts[0].run(|| {
        let refused = |result: soccr::Result<()>, why: &str| {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), Refused, "{error}");
            assert!(error.to_string().contains(why), "{error}");
        };
        refused(Tunnel::to(a).map(drop), "both are of this host");
        refused(Tunnel::between(a, net.hosts[1].v6.into()).map(drop), "two address families");
        refused(Tunnel::between(c, b).unwrap().open().map(drop), "no address of this host");
        let tunnel = Tunnel::to(b).unwrap();
        assert!(tunnel.open().unwrap());
        assert!(!tunnel.open().unwrap(), "it is there already");
        refused(tunnel.other_end(false).map(drop), "UDP port 4789");
        let mut same = Tunnel::to(c).unwrap();
        same.id = tunnel.id;
        refused(same.open().map(drop), "which is another device's");
        assert_eq!(Tunnel::list().unwrap(), [tunnel]);
        tunnel.remove_unused().unwrap();
        assert_eq!(Tunnel::list().unwrap(), []);
    });
}

pub fn what_rp_filter_would_drop_is_refused() {
    let net = Net::routed(false);
    let (home, peer) = (net.hosts[0].v4.into(), net.peer.v4.into());
    let tunnel = net.tunnel(1);
    net.hosts[1].run(|| {
        let device = tunnel.device();
        let foreign = Foreign::deliver(home, Numbers::default()).unwrap();
        foreign.check_arrival(peer, &device).unwrap();
        sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), "1").unwrap();
        let error = foreign.check_arrival(peer, &device).unwrap_err();
        assert_eq!(error.kind(), Refused, "{error}");
        assert!(error.to_string().contains("rp_filter=2"), "{error}");
        // Where answers take the same way, it is no harm.
        foreign.answer_through(&tunnel.reversed().other_end(false).unwrap()).unwrap();
        foreign.check_arrival(peer, &device).unwrap();
    });
}

/// Without that, the entry would stay for a day, and the same ports would be of no use for the peer.
pub fn a_reset_of_the_new_host_ends_the_steering() {
    let nets = [Net::flat(), Net::routed(false), Net::routed(true), Net { back: true, ..Net::flat() }];
    for (net, ipv6) in nets.iter().flat_map(|net| [(net, false), (net, true)]) {
        let steered = || {
            net.hosts[0].run(|| {
                let all = Steering::list().unwrap();
                all.iter().flat_map(|steering| steering.contents().unwrap()).collect::<Vec<_>>()
            })
        };
        let egress = net.hop(1, ipv6).device().to_owned();
        let mut times = Times::default();
        times.reset = Duration::from_secs(2);
        net.hosts[0].run(|| Steering::open("eth0", &egress, times)).unwrap();
        if net.back && net.routed {
            net.hosts[0].run(|| Steering::open(&egress, "eth0", times)).unwrap();
        }
        let (mut peer, stream) = connect(net, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let stream = transfer(net, stream, flow, 0, 1);
        peer.write_all(b"unread").unwrap();
        stream.peek(&mut [0]).unwrap();
        assert!(steered().iter().all(|entry| !entry.closing));
        // Closing with unread data resets the connection.
        drop(stream);
        wait_until("the old host has heard of it", || steered().iter().all(|entry| entry.closing));
        drop(peer);
        let listener = net.hosts[0].run(|| TcpListener::bind(flow.local)).unwrap();
        let again: TcpStream = net.peer.run(|| {
            let family = if ipv6 { AddressFamily::INET6 } else { AddressFamily::INET };
            let socket = rustix::net::socket(family, SocketType::STREAM, None).unwrap();
            rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
            rustix::net::bind(&socket, &flow.remote).unwrap();
            rustix::net::connect(&socket, &flow.local).unwrap();
            socket.into()
        });
        assert_eq!(listener.accept().unwrap().1, flow.remote);
        drop(again);
        wait_until("nothing is steered any more", || steered().is_empty());
    }
}

pub fn nothing_is_left_of_tunnels() {
    let net = Net::routed(true);
    let before = [0, 1].map(|host| listings(&net, host));
    for ipv6 in [false, true] {
        let home =
            || net.router.run(|| say("ip", &["neigh", "show", &address(&net.hosts[0], ipv6).to_string()]));
        let lladdr =
            |all: Option<String>| all.and_then(|all| all.split_whitespace().nth(4).map(str::to_owned));
        let (_peer, stream) = connect(&net, ipv6);
        let known = lladdr(home());
        let flow = Flow::of(&stream).unwrap();
        let stream = transfer(&net, stream, flow, 0, 1);
        assert_eq!(lladdr(home()), known);
        transfer(&net, stream, flow, 1, 0);
        assert_eq!(lladdr(home()), known);
    }
    let tunnel = net.tunnel(1);
    net.hosts[0].run(|| {
        Steering::list().unwrap().iter().for_each(|steering| steering.remove().unwrap());
        tunnel.remove().unwrap();
        tunnel.remove().unwrap();
    });
    net.hosts[1].run(|| {
        Foreign::list().unwrap().iter().for_each(|foreign| foreign.remove().unwrap());
        tunnel.reversed().remove().unwrap();
    });
    // The locks' tables go a moment later.
    wait_until("everything is as it was", || [0, 1].map(|host| listings(&net, host)) == before);
}

/// A new host whose kernel can copy no packet has the tunnel by which the old one steers.
pub fn a_tunnel_by_which_packets_come_is_used() {
    let net = Net::routed(false);
    let tunnel = net.tunnel(1);
    let (home, hop) = (net.hosts[0].v4.into(), net.hop_back(1, false));
    net.hosts[1].run(|| {
        Foreign::deliver_from(home, Numbers::default(), Some(&hop)).unwrap().remove().unwrap();
        tunnel.reversed().remove_unused().unwrap();
        assert_eq!(Tunnel::list().unwrap(), [], "nothing needs it");
    });
    net.tunnel(1);
    supervised(|faults| {
        net.hosts[1].run(|| {
            for left in 0.. {
                faults.arm_among(&[libc::SYS_sendto], left, libc::EOPNOTSUPP);
                let made = Foreign::deliver_from(home, Numbers::default(), Some(&hop));
                let failed = faults.disarm().is_some();
                if made.is_ok() {
                    tunnel.reversed().remove_unused().unwrap();
                    assert_eq!(Tunnel::list().unwrap(), [tunnel.reversed()], "after {left} calls");
                }
                if !failed {
                    break;
                }
                Foreign::list().unwrap().iter().for_each(|foreign| foreign.remove().unwrap());
            }
        });
    });
}

/// Nobody needs a tunnel for what has ended, although its entry is still in the map.
pub fn a_tunnel_for_what_has_ended_is_unused() {
    let net = Net::routed(false);
    let tunnel = net.tunnel(1);
    let flow = Flow { local: (net.hosts[0].v4, 80).into(), remote: (net.peer.v4, 1000).into() };
    let mut times = Times::default();
    times.idle = Duration::from_millis(300);
    net.hosts[0].run(|| {
        let steering = Steering::open("eth0", &tunnel.device(), times).unwrap();
        steering.steer(&[flow], net.hop(1, false).address()).unwrap();
        tunnel.remove_unused().unwrap();
        assert_eq!(Tunnel::list().unwrap(), [tunnel]);
        wait_until("it has ended", || steering.contents().unwrap().is_empty());
        tunnel.remove_unused().unwrap();
        assert_eq!((Tunnel::list().unwrap(), Steering::list().unwrap()), (vec![], vec![]));
    });
}

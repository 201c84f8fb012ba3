//! Devices that are removed, and made anew under the same name.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SendFlags, SocketType, bind, ipproto, sendto};
use soccr::Flow;
use soccr::steer::{Foreign, NextHop, Numbers, redirect, stop};
use soccr_lab::{Host, Sniffer, VethEnd, set_option, sysctl, veth, wait_until};
use soccr_netlink::Policy;

use super::Net;
use super::tables::{segment, stray_segment};

pub const FIRST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// Connects two hosts by a device `eth1` of each.
pub fn connect_by_another(first: &Host, second: &Host) {
    let end = |number, host| VethEnd { namespace: host, name: "eth1", mac: [2, 0, 0, 0, 1, number] };
    let ends = [end(1, &first.namespace), end(2, &second.namespace)];
    veth(&mut first.namespace.rtnetlink().unwrap(), ends, 1500).unwrap();
    for (host, address) in [(first, FIRST), (second, SECOND)] {
        host.namespace.rtnetlink().unwrap().add_address("eth1", address.into(), 24).unwrap();
    }
}

fn remove_the_other(host: &Host) {
    host.namespace.rtnetlink().unwrap().remove_link("eth1").unwrap();
}

pub fn raw(host: &Host, device: Option<&str>) -> OwnedFd {
    let raw = host.run(|| rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::TCP)));
    let raw = raw.unwrap();
    if let Some(device) = device {
        set_option(&raw, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_bytes()).unwrap();
    }
    raw
}

pub fn send_by(raw: &OwnedFd, packet: &[u8], flow: Flow) {
    sendto(raw, packet, SendFlags::empty(), &flow.local).unwrap();
}

/// Sends a packet of the connection from the host that is its peer.
pub fn send(peer: &Host, device: Option<&str>, flow: Flow) {
    let raw = raw(peer, device);
    // Both its devices have addresses.
    bind(&raw, &flow.remote).unwrap();
    send_by(&raw, &stray_segment(flow), flow);
}

fn flow(local: Ipv4Addr, remote: Ipv4Addr, port: u16) -> Flow {
    Flow { local: (local, 80).into(), remote: (remote, port).into() }
}

fn is_steered(lan: &Net, device: &str, flow: Flow) {
    arrives_at(&lan.hosts[1], device, &lan.hosts[2], flow);
}

fn arrives_at(new: &Host, device: &str, peer: &Host, flow: Flow) {
    let mut sniffer = Sniffer::on(&new.namespace, device).unwrap();
    wait_until("a packet has arrived at the new host", || {
        send(peer, None, flow);
        sniffer.segments().unwrap().iter().any(|segment| segment.source == flow.remote)
    });
}

/// All of them are steered again, whichever is asked for.
fn made_anew(local: impl Fn(&Net) -> [Ipv4Addr; 2], to: impl Fn(&Net) -> IpAddr, other: usize) {
    let lan = Net::flat();
    let device = if other == 1 { "eth1" } else { "eth0" };
    let [home, _, _] = &lan.hosts;
    connect_by_another(home, &lan.hosts[other]);
    let [local, remote] = local(&lan);
    let flows = [1000, 1001].map(|port| flow(local, remote, port));
    let hop = || home.run(|| NextHop::new(to(&lan))).unwrap();
    home.run(|| redirect(&flows, &hop())).unwrap();
    flows.iter().for_each(|flow| is_steered(&lan, device, *flow));
    for _ in 0..2 {
        remove_the_other(home);
        connect_by_another(home, &lan.hosts[other]);
        home.run(|| redirect(&flows[..1], &hop())).unwrap();
        flows.iter().for_each(|flow| is_steered(&lan, device, *flow));
    }
}

pub fn made_anew_ingress() {
    made_anew(|_| [FIRST, SECOND], |lan| lan.hosts[1].v4.into(), 2);
}

pub fn made_anew_egress() {
    made_anew(|lan| [lan.hosts[0].v4, lan.hosts[2].v4], |_| SECOND.into(), 1);
}

/// The old host hears of resets by it again.
pub fn made_anew_towards_the_old_host() {
    let lan = Net::flat();
    let [home, away, peer] = &lan.hosts;
    let flow = flow(home.v4, peer.v4, 1000);
    for _ in 0..2 {
        connect_by_another(home, away);
        let hop = NextHop::known(FIRST.into(), "eth1");
        away.run(|| Foreign::deliver_from(home.v4.into(), Numbers::default(), Some(&hop))).unwrap();
        hears_of_a_reset(home, "eth1", away, flow);
        remove_the_other(home);
    }
}

/// The new host resets a connection, and the one that steers it there hears of it.
fn hears_of_a_reset(home: &Host, device: &str, away: &Host, flow: Flow) {
    const RST: u8 = 0x04;
    let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (flow.local, flow.remote) else { panic!("IPv4") };
    let mut sniffer = Sniffer::on(&home.namespace, device).unwrap();
    // It has its IP header with it, with an address that this host does not have.
    let raw = away.run(|| rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW)));
    let raw = raw.unwrap();
    let segment = segment(flow.reversed(), RST);
    let header = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
    let packet = [&header[..], &local.ip().octets(), &remote.ip().octets(), &segment].concat();
    wait_until("the old host has heard of the reset", || {
        sendto(&raw, &packet, SendFlags::empty(), &flow.remote).unwrap();
        sniffer.segments().unwrap().iter().any(|segment| segment.source == flow.local)
    });
}

/// An address on a device of its own, as those of services are, or on a network that the peer is not in.
pub fn by_another_device_than_has_the_address() {
    let lan = Net::flat();
    let [home, away, other] = &lan.hosts;
    connect_by_another(home, other);
    lan.router.rtnetlink().unwrap().route(FIRST.into(), 32, "lan", Some(home.v4.into())).unwrap();
    let flow = flow(FIRST, lan.peer.v4, 1000);
    home.run(|| redirect(&[flow], &NextHop::new(away.v4.into()).unwrap())).unwrap();
    arrives_at(away, "eth0", &lan.peer, flow);
    home.run(|| assert_eq!(stop(&[flow]).unwrap(), 1));
    // Where the routes name another device for what the address sends, it arrives by that one.
    home.run(|| {
        let mut route = home.namespace.rtnetlink().unwrap();
        route.add_gateway_table(77, SECOND.into(), route.index("eth1").unwrap(), 4).unwrap();
        let all = Policy { priority: 500, mark: 0, mask: 0, to: None, from: None, table: 77, protocol: 4 };
        route.add_policy(&Policy { from: Some(home.v4.into()), ..all }, false).unwrap();
    });
    let flow = Flow { local: (home.v4, 80).into(), remote: (other.v4, 1000).into() };
    home.run(|| redirect(&[flow], &NextHop::new(away.v4.into()).unwrap())).unwrap();
    other.namespace.rtnetlink().unwrap().route(home.v4.into(), 32, "eth1", Some(FIRST.into())).unwrap();
    arrives_at(away, "eth0", other, flow);
}

/// The second host gets the packets by another network than the one that leads to the peer.
pub fn from_the_host_that_steers_here() {
    let lan = Net::flat();
    let [home, second, third] = &lan.hosts;
    connect_by_another(home, second);
    let flow = flow(home.v4, lan.peer.v4, 1000);
    home.run(|| redirect(&[flow], &NextHop::new(SECOND.into()).unwrap())).unwrap();
    second.run(|| {
        let hop = NextHop::new(FIRST.into()).unwrap();
        Foreign::deliver_from(home.v4.into(), Numbers::default(), Some(&hop)).unwrap();
        redirect(&[flow], &NextHop::new(third.v4.into()).unwrap()).unwrap();
    });
    arrives_at(third, "eth0", &lan.peer, flow);
}

/// Two hosts steer here what is for one address: one that has it, and one that has got a connection from that.
pub fn from_two_hosts_at_once() {
    let lan = Net::flat();
    let [home, away, other] = &lan.hosts;
    connect_by_another(other, away);
    let hops = [NextHop::known(home.v4.into(), "eth0"), NextHop::known(FIRST.into(), "eth1")];
    away.run(|| {
        for hop in &hops {
            Foreign::deliver_from(home.v4.into(), Numbers::default(), Some(hop)).unwrap();
        }
    });
    hears_of_a_reset(home, "eth0", away, flow(home.v4, lan.peer.v4, 1000));
    hears_of_a_reset(other, "eth1", away, flow(home.v4, lan.peer.v4, 1001));
    // What no socket has is dropped from both, although this host forwards.
    away.run(|| sysctl("net/ipv4/ip_forward", "1")).unwrap();
    other.namespace.rtnetlink().unwrap().route(home.v4.into(), 32, "eth1", Some(SECOND.into())).unwrap();
    let mut sniffer = Sniffer::on(&home.namespace, "eth0").unwrap();
    let dropped = flow(home.v4, FIRST, 1000);
    send(other, Some("eth1"), dropped);
    // Behind it, to another port of a host that takes it.
    let passes = flow(lan.peer.v4, FIRST, 1000);
    other.namespace.rtnetlink().unwrap().route(lan.peer.v4.into(), 32, "eth1", Some(SECOND.into())).unwrap();
    let mut behind = Sniffer::on(&lan.peer.namespace, "eth0").unwrap();
    wait_until("a later packet has passed", || {
        send(other, Some("eth1"), passes);
        behind.segments().unwrap().iter().any(|segment| segment.source == passes.remote)
    });
    assert!(sniffer.segments().unwrap().iter().all(|segment| segment.source != dropped.remote));
}

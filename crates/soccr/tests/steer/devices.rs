//! Devices that are removed, and made anew under the same name.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SendFlags, SocketType, bind, ipproto, sendto};
use soccr::Flow;
use soccr::steer::{Foreign, NextHop, Numbers, redirect};
use soccr_lab::{Host, Sniffer, VethEnd, set_option, veth, wait_until};

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
    let mut sniffer = Sniffer::on(&lan.hosts[1].namespace, device).unwrap();
    wait_until("a packet has arrived at the new host", || {
        send(&lan.hosts[2], None, flow);
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
    const RST: u8 = 0x04;
    let lan = Net::flat();
    let [home, away, peer] = &lan.hosts;
    let flow = flow(home.v4, peer.v4, 1000);
    for _ in 0..2 {
        connect_by_another(home, away);
        let hop = NextHop::known(FIRST.into(), "eth1");
        away.run(|| Foreign::deliver_from(home.v4.into(), Numbers::default(), Some(&hop))).unwrap();
        let mut sniffer = Sniffer::on(&home.namespace, "eth1").unwrap();
        // It has its IP header with it, with an address that this host does not have.
        let raw = away.run(|| rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW)));
        let raw = raw.unwrap();
        let segment = segment(flow.reversed(), RST);
        let header = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
        let packet = [&header[..], &home.v4.octets(), &peer.v4.octets(), &segment].concat();
        wait_until("the old host has heard of the reset", || {
            sendto(&raw, &packet, SendFlags::empty(), &flow.remote).unwrap();
            sniffer.segments().unwrap().iter().any(|segment| segment.source == flow.local)
        });
        remove_the_other(home);
    }
}

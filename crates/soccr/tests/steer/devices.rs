//! Devices that are removed, and made anew under the same name.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SendFlags, SocketType, bind, ipproto, sendto};
use soccr::Flow;
use soccr_lab::{Host, VethEnd, set_option, veth};

use super::tables::stray_segment;

const FIRST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// Connects two hosts by a device `eth1` of each.
pub fn connect_by_another(first: &Host, second: &Host) {
    let end = |number, host| VethEnd { namespace: host, name: "eth1", mac: [2, 0, 0, 0, 1, number] };
    let ends = [end(1, &first.namespace), end(2, &second.namespace)];
    veth(&mut first.namespace.rtnetlink().unwrap(), ends, 1500).unwrap();
    for (host, address) in [(first, FIRST), (second, SECOND)] {
        host.namespace.rtnetlink().unwrap().add_address("eth1", address.into(), 24).unwrap();
    }
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

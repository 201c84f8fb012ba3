//! What people read when it does not work: the step, the option, the errno, and what to do.

use std::net::{SocketAddr, TcpStream};
use std::thread;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use soccr::{ErrorKind, pause};
use soccr_lab::{Family, set_option, sysctl};
use soccr_netlink::link_header;

use crate::ends::Ends;

fn assert_line<T: std::fmt::Debug>(result: soccr::Result<T>, begins: &str, remedy: &str) {
    let error = result.unwrap_err();
    let line = error.to_string();
    assert!(line.starts_with(begins), "{line}");
    assert!(line.contains(" — ") && error.remedy().contains(remedy), "{line}");
    assert_eq!(error.kind(), ErrorKind::System);
    assert!(!line.contains('\n'));
}

/// Runs `body` on a thread without these capabilities.
fn without<T: Send>(dropped: CapabilitySet, body: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let sets = capabilities(None).unwrap();
            let effective = sets.effective - dropped;
            set_capabilities(None, CapabilitySets { effective, ..sets }).unwrap();
            body()
        });
        thread.join().unwrap()
    })
}

pub fn a_pause_without_capabilities() {
    let ends = Ends::new(Family::V4);
    without(CapabilitySet::NET_ADMIN, || {
        assert_line(pause(&ends.ours), "pause: TCP_REPAIR: EPERM", "CAP_NET_ADMIN");
    });
    ends.finish();
}

pub fn a_restore_without_capabilities() {
    let mut ends = Ends::new(Family::V4);
    let connection = ends.take();
    without(CapabilitySet::NET_ADMIN, || {
        assert_line(connection.restore(), "restore: TCP_REPAIR: EPERM", "CAP_NET_ADMIN");
    });
    ends.restore_and_resume(&connection);
    ends.finish();
}

pub fn a_restore_at_a_port_of_services_without_capability() {
    let at_80 = |socket: &TcpStream| rustix::net::bind(socket, &SocketAddr::from(([0; 4], 80))).unwrap();
    let mut ends = Ends::with(Family::V4, at_80, |_| {});
    let connection = ends.take();
    let restored =
        ends.pair.a.run(|| without(CapabilitySet::NET_BIND_SERVICE, || connection.restore().map(drop)));
    assert_line(restored, "restore: bind: EACCES", "CAP_NET_BIND_SERVICE");
    ends.restore_and_resume(&connection);
    ends.finish();
}

pub fn a_restore_where_the_old_socket_lives() {
    let ends = Ends::new(Family::V4);
    let connection = pause(&ends.ours).unwrap().save().unwrap();
    assert_line(ends.restore(&connection), "restore: connect: EADDRNOTAVAIL", "detach the old one");
    ends.finish();
}

pub fn a_restore_where_the_address_is_not() {
    for (family, remedy) in [
        (Family::V4, "ip addr add 192.0.2.1/32 dev lo"),
        (Family::V6, "ip addr add 2001:db8::1/128 dev lo"),
        (Family::Mapped, "ip addr add 192.0.2.1/32 dev lo"),
    ] {
        let mut ends = Ends::new(family);
        let connection = ends.take();
        let elsewhere = ends.pair.b.run(|| connection.restore());
        assert_line(elsewhere, "restore: bind: EADDRNOTAVAIL", remedy);
        ends.restore_and_resume(&connection);
        ends.finish();
    }
}

/// The address of our host comes anew, and others may have it.
fn readdress(ends: &Ends, detections: &str) {
    let host = &ends.pair.a;
    host.run(|| sysctl("net/ipv6/conf/eth0/dad_transmits", detections)).unwrap();
    let mut control = host.namespace.rtnetlink().unwrap();
    control.remove_address("eth0", host.v6.into(), 64).unwrap();
    control.add_tentative_address("eth0", host.v6.into(), 64).unwrap();
}

pub fn a_restore_where_the_address_is_tentative_waits() {
    let mut ends = Ends::new(Family::V6);
    let connection = ends.take();
    readdress(&ends, "1");
    ends.restore_and_resume(&connection);
    ends.finish();
}

pub fn a_restore_where_the_address_stays_tentative() {
    let mut ends = Ends::new(Family::V6);
    let connection = ends.take();
    readdress(&ends, "1000");
    assert_line(ends.restore(&connection), "restore: bind: EADDRNOTAVAIL", "the address is tentative");
    readdress(&ends, "0");
    ends.restore_and_resume(&connection);
    ends.finish();
}

/// Restored, the socket would be bound to none.
pub fn a_save_where_the_device_is_gone() {
    const RTM_DELLINK: u16 = 17;
    let ends = Ends::new(Family::V4);
    set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"eth0\0").unwrap();
    let mut control = ends.pair.a.namespace.rtnetlink().unwrap();
    let index = control.index("eth0").unwrap();
    control.change(RTM_DELLINK, 0, |message| message.bytes(&link_header(index, 0))).unwrap();
    let saved = pause(&ends.ours).unwrap().save();
    assert_line(saved, "save: SO_BINDTODEVICE: ENODEV", "is gone");
}

pub fn what_is_no_socket() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert_line(pause(&file), "pause: SO_REUSEADDR: ENOTSOCK", "no socket");
}

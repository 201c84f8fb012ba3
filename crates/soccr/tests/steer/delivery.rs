//! The host that delivers packets for an address that it does not have.

use std::io::Write;

use soccr::ErrorKind::Refused;
use soccr::settings::Value;
use soccr::steer::{Foreign, NextHop, Numbers, is_foreign};
use soccr::{Flow, pause};
use soccr_lab::{Sniffer, TcpInfo, supervised, sysctl, wait_until};
use soccr_netlink::{Policy, Rtnetlink};

use super::devices::{FIRST, SECOND, connect_by_another, send};
use super::moves::{exchange, transfer};
use super::{Net, address, connect};

pub fn numbers_of_others_are_refused() {
    let lan = Net::flat();
    let home = lan.hosts[0].v4.into();
    lan.hosts[1].run(|| {
        let numbers = Numbers::default();
        let mut route = Rtnetlink::here().unwrap();
        let theirs = Policy { priority: 500, mark: 0, mask: 0, to: None, from: None, table: 0, protocol: 4 };
        let refused = |why: &str| {
            let error = Foreign::deliver(home, numbers).unwrap_err();
            assert_eq!(error.kind(), Refused);
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(Foreign::list().unwrap(), []);
        };
        for (policy, why) in [
            (Policy { table: numbers.table, ..theirs }, "routing table 20684"),
            (
                Policy { mark: numbers.mark, mask: u32::MAX, table: 77, priority: 5000, ..theirs },
                "the mark 0x50cc",
            ),
            (Policy { mark: 0x4000, mask: 0x4000, table: 77, ..theirs }, "the mark 0x50cc"),
            (Policy { mark: 0x100, mask: 0x100, table: 77, ..theirs }, "the mark 0xc114"),
        ] {
            route.add_policy(&policy, false).unwrap();
            refused(why);
            route.remove_policy(&policy, false).unwrap();
        }
        route.add_local_table(numbers.table, false, 4).unwrap();
        refused("which has routes of others");
        route.remove_local_table(numbers.table, false, 4).unwrap();
        Foreign::deliver(home, numbers).unwrap();
    });
}

pub fn an_old_host_of_the_other_family_is_refused() {
    let lan = Net::flat();
    lan.hosts[1].run(|| {
        for ipv6 in [false, true] {
            let home = address(&lan.hosts[0], ipv6);
            let hop = NextHop::known(address(&lan.hosts[0], !ipv6), "eth0");
            let error = Foreign::deliver_from(home, Numbers::default(), Some(&hop)).unwrap_err();
            assert_eq!(error.kind(), Refused, "{error}");
            assert_eq!(Foreign::list().unwrap(), []);
            let foreign = Foreign::deliver(home, Numbers::default()).unwrap();
            let error = foreign.answer_through(&hop).unwrap_err();
            assert_eq!(error.kind(), Refused, "{error}");
            assert_eq!(Foreign::list().unwrap(), [foreign]);
            foreign.remove().unwrap();
        }
    });
}

pub fn an_address_is_delivered_once() {
    let lan = Net::flat();
    lan.hosts[1].run(|| {
        for ipv6 in [false, true] {
            let home = address(&lan.hosts[0], ipv6);
            assert!(is_foreign(home).unwrap());
            assert!(!is_foreign(address(&lan.hosts[1], ipv6)).unwrap());
            for _ in 0..2 {
                assert_eq!(Foreign::deliver(home, Numbers::default()).unwrap().address(), home);
            }
        }
        let all = Foreign::list().unwrap();
        assert_eq!(all.len(), 2);
        // The table of routes stays for the other.
        let other = Foreign::deliver(lan.hosts[2].v4.into(), Numbers::default()).unwrap();
        all[0].remove().unwrap();
        assert_eq!(Foreign::list().unwrap().len(), 2);
        let table = other.numbers().table;
        let mut route = Rtnetlink::here().unwrap();
        assert_eq!(route.table_protocols(table, false).unwrap().len(), 1);
        other.remove().unwrap();
        assert_eq!(route.table_protocols(table, false).unwrap().len(), 0);
    });
}

pub fn what_no_socket_has_is_dropped() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (mut peer, stream) = connect(&lan, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let stream = transfer(&lan, stream, flow, 0, 1);
        pause(&stream).unwrap().detach().unwrap();
        drop(stream);
        let mut sniffer = Sniffer::on(&lan.hosts[1].namespace, "eth0").unwrap();
        peer.write_all(b"anybody there?").unwrap();
        wait_until("the peer has sent it twice", || TcpInfo::of(&peer).unwrap().total_retrans > 0);
        let seen: Vec<_> = sniffer
            .segments()
            .unwrap()
            .into_iter()
            .filter(|segment| [segment.source, segment.destination].contains(&flow.remote))
            .collect();
        // It comes, and nothing goes: neither an answer nor the packet back to where it came from.
        assert!(!seen.is_empty());
        assert!(seen.iter().all(|segment| segment.source == flow.remote), "{seen:?}");
        assert!(seen.len() < 10, "{seen:?}");
    }
}

/// The new host is a router on the way to the address.
pub fn what_comes_by_another_device_passes() {
    let lan = Net::flat();
    let [home, away, other] = &lan.hosts;
    connect_by_another(other, away);
    away.run(|| sysctl("net/ipv4/ip_forward", "1")).unwrap();
    let mut routes = other.namespace.rtnetlink().unwrap();
    routes.route(home.v4.into(), 32, "eth1", Some(SECOND.into())).unwrap();
    let hop = lan.hop_back(1, false);
    away.run(|| Foreign::deliver_from(home.v4.into(), Numbers::default(), Some(&hop))).unwrap();
    let flow = Flow { local: (home.v4, 80).into(), remote: (FIRST, 1000).into() };
    let mut sniffer = Sniffer::on(&home.namespace, "eth0").unwrap();
    wait_until("it has come to the host that has the address", || {
        send(other, None, flow);
        sniffer.segments().unwrap().iter().any(|segment| segment.source == flow.remote)
    });
}

pub fn without_it_a_foreign_address_is_refused() {
    let lan = Net::flat();
    let (_peer, stream) = connect(&lan, false);
    let connection = pause(&stream).unwrap().save().unwrap();
    let error = lan.hosts[1].run(|| connection.restore()).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EADDRNOTAVAIL));
    assert!(error.to_string().contains("soccr::steer"), "{error}");
}

pub fn where_any_address_can_be_bound_nothing_changes() {
    for (family, ipv6) in [("ipv4", false), ("ipv6", true)] {
        let lan = Net::flat();
        lan.hosts[1].run(|| sysctl(&format!("net/{family}/ip_nonlocal_bind"), "1")).unwrap();
        let (mut peer, stream) = connect(&lan, ipv6);
        let paused = pause(&stream).unwrap();
        let connection = paused.save().unwrap();
        let error = lan.hosts[1].run(|| connection.restore()).unwrap_err();
        assert!(error.to_string().contains("ip addr add"), "{error}");
        paused.resume().unwrap();
        let mut stream = transfer(&lan, stream, connection.flow(), 0, 1);
        exchange(&mut peer, &mut stream);
    }
}

pub fn where_nobody_tells_who_can_bind_any_address_nothing_changes() {
    let lan = Net::flat();
    lan.hosts[1].run(|| sysctl("net/ipv6/ip_nonlocal_bind", "1")).unwrap();
    let (_peer, stream) = connect(&lan, true);
    let connection = pause(&stream).unwrap().save().unwrap();
    supervised(|faults| {
        for left in 0.. {
            faults.arm(left, libc::ENOMEM);
            let restored = lan.hosts[1].run(|| connection.restore());
            let failed = faults.disarm();
            assert!(restored.is_err(), "it hears nothing, after {failed:?}");
            if failed.is_none() {
                break;
            }
        }
    });
}

pub fn a_socket_that_is_free_to_have_any_address_is_refused_one_of_another_host() {
    let lan = Net::flat();
    for ipv6 in [false, true] {
        let (_peer, stream) = connect(&lan, ipv6);
        let mut connection = pause(&stream).unwrap().save().unwrap();
        connection.settings.set(if ipv6 { "IPV6_FREEBIND" } else { "IP_FREEBIND" }, Value::Number(1));
        let error = lan.hosts[1].run(|| connection.restore()).unwrap_err();
        assert!(error.to_string().contains("ip addr add"), "{error}");
    }
}

//! Connections that are expected home.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use soccr::Flow;
use soccr::lock::{Locker, Mode};
use soccr::steer::{Homecoming, Steered, Steering, Times, stop};
use soccr_lab::{sysctl, wait_until};

use super::devices::{SECOND, connect_by_another, raw, send, send_by};
use super::tables::{contents, flows, resets, segment, stray_segment};
use super::{Net, say};

/// A connection can arrive by several devices. While it is expected, packets that come by neither of them are steered.
pub fn by_whichever_device_it_arrives() {
    let lan = Net::flat();
    let [home, away, peer] = &lan.hosts;
    connect_by_another(home, peer);
    peer.namespace.rtnetlink().unwrap().route(home.v4.into(), 32, "eth1", None).unwrap();
    for link in ["all", "eth0", "eth1"] {
        home.run(|| sysctl(&format!("net/ipv4/conf/{link}/rp_filter"), "0")).unwrap();
    }
    let flow = Flow { local: (home.v4, 80).into(), remote: (peer.v4, 1000).into() };
    let send_both = || ["eth0", "eth1"].map(|device| send(peer, Some(device), flow));
    home.run(|| {
        for device in ["eth0", "eth1"] {
            let steering = Steering::open(device, "eth0", Times::default()).unwrap();
            steering.steer(&[flow], away.v4.into()).unwrap();
        }
        let packets = || contents().iter().map(|steered| steered.packets).collect::<Vec<_>>();
        send_both();
        wait_until("both are steered", || packets() == [1, 1]);
        let mut homecoming = Homecoming::new(&Locker::new(Mode::HOLD).unwrap()).unwrap();
        homecoming.expect(&[flow]).unwrap();
        let before = resets(&lan);
        send_both();
        wait_until("both have come home, where nobody knows them", || resets(&lan) == before + 2);
        assert_eq!(packets(), [1, 1]);
        homecoming.arrived(&[flow]).unwrap();
        assert_eq!(contents(), []);
    });
}

/// It arrives by a device of which packets go on to several.
pub fn by_a_device_with_several_ways_on() {
    let lan = Net::flat();
    let [home, away, peer] = &lan.hosts;
    connect_by_another(home, away);
    // Nobody else sees how it is kept from being steered.
    let rules =
        "table ip marks { chain in { type filter hook prerouting priority -300; meta mark != 0 drop; }\n }";
    if home.run(|| say("nft", &[rules])).is_none() {
        return;
    }
    let to_each = [("eth0", away.v4), ("eth1", SECOND)];
    for (port, (device, next)) in (1000..).zip(to_each) {
        let flow = Flow { local: (home.v4, 80).into(), remote: (peer.v4, port).into() };
        home.run(|| {
            for (device, _) in to_each {
                Steering::open("eth0", device, Times::default()).unwrap();
            }
            let steering = Steering::open("eth0", device, Times::default()).unwrap();
            steering.steer(&[flow], next.into()).unwrap();
            let mut homecoming = Homecoming::new(&Locker::new(Mode::HOLD).unwrap()).unwrap();
            homecoming.expect(&[flow]).unwrap();
            let before = resets(&lan);
            send(peer, None, flow);
            wait_until("it has come home, where nobody knows it", || resets(&lan) == before + 1);
            assert_eq!(contents()[0].packets, 0);
            homecoming.arrived(&[flow]).unwrap();
        });
    }
}

/// By a device that is gone nothing arrives: it is in nobody's way.
pub fn by_a_device_that_is_gone() {
    let lan = Net::flat();
    let [home, away, peer] = &lan.hosts;
    connect_by_another(home, peer);
    let flows = flows(2, false);
    home.run(|| {
        Steering::open("eth1", "eth0", Times::default()).unwrap().steer(&flows, away.v4.into()).unwrap();
        home.namespace.rtnetlink().unwrap().remove_link("eth1").unwrap();
        let mut homecoming = Homecoming::new(&Locker::new(Mode::HOLD).unwrap()).unwrap();
        homecoming.expect(&flows[..1]).unwrap();
        homecoming.expect(&flows).unwrap();
        homecoming.arrived(&flows).unwrap();
        assert_eq!(contents(), []);
    });
}

pub fn while_packets_change_the_sets() {
    const RST: u8 = 0x04;
    let lan = Net::flat();
    let [home, away, _] = &lan.hosts;
    let flows = flows(2000, false);
    let mut times = Times::default();
    times.reset = Duration::from_millis(100);
    let steering = home.run(|| Steering::open("eth0", "eth0", times)).unwrap();
    let steer = || home.run(|| steering.steer(&flows, away.v4.into())).unwrap();
    steer();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let socket = raw(&lan.peer, None);
            let mut all = flows.iter().cycle();
            while !is_over.load(Ordering::Relaxed) {
                let flow = *all.next().unwrap();
                // The connection ends soon, and then it does not, because packets go on.
                for packet in [segment(flow, RST), stray_segment(flow)] {
                    send_by(&socket, &packet, flow);
                }
            }
        });
        let outcome = home.run(|| {
            wait_until("many seem to end", || {
                let closing = |all: Vec<_>| all.iter().filter(|one: &&Steered| one.closing).count();
                steering.contents().map(closing).is_ok_and(|count| count > 200)
            });
            for _ in 0..2 {
                steering.contents()?;
            }
            let mut homecoming = Homecoming::new(&Locker::new(Mode::HOLD)?)?;
            homecoming.expect(&flows)?;
            homecoming.arrived(&flows)?;
            assert_eq!(contents(), []);
            drop(homecoming);
            steer();
            stop(&flows)
        });
        is_over.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
    assert_eq!(home.run(contents), []);
}

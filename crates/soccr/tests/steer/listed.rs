//! What other people's tools make of our tables: `nft list ruleset` must go on working for everybody on the host.

use std::net::SocketAddr;

use soccr::Flow;
use soccr::lock::{Locker, Mode, PersistentLock};

use super::{Net, connect, deliver, say, steer};

/// Also where only one table is odd, the whole listing fails.
fn can_be_listed(net: &Net, host: usize, expected: &[&str]) {
    net.hosts[host].run(|| {
        for arguments in [&["list", "ruleset"][..], &["-j", "list", "ruleset"]] {
            let Some(all) = say("nft", arguments) else { return };
            for table in expected {
                assert!(all.contains(table), "{arguments:?}: no {table} in {all}");
            }
        }
    });
}

pub fn by_nft_on_one_network() {
    has_all_of(&Net::flat());
}

pub fn by_nft_with_tunnels() {
    has_all_of(&Net::routed(true));
}

fn has_all_of(net: &Net) {
    let mut held = Vec::new();
    for ipv6 in [false, true] {
        let (peer, stream) = connect(net, ipv6);
        let flow = Flow::of(&stream).unwrap();
        let beside = |port| Flow { remote: SocketAddr::new(flow.remote.ip(), port), ..flow };
        net.hosts[0].run(|| {
            for (number, mode) in [Mode::HOLD, Mode::Drop].into_iter().enumerate() {
                held.push(Locker::new(mode).unwrap().lock(&[beside(number as u16 + 1)]).unwrap());
            }
            PersistentLock::create(&format!("kept-{ipv6}"), &[beside(3)], None).unwrap();
        });
        deliver(net, 1, ipv6);
        steer(net, flow, 1, 1);
        can_be_listed(net, 0, &["soccr-persistent-kept", "soccr-steer"]);
        can_be_listed(net, 1, &["soccr-foreign-"]);
        drop(peer);
    }
}

//! Connections that are expected home.

use soccr::Flow;
use soccr::lock::{Locker, Mode};
use soccr::steer::{Homecoming, Steering, Times};
use soccr_lab::{sysctl, wait_until};

use super::Net;
use super::devices::{connect_by_another, send};
use super::tables::{contents, resets};

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

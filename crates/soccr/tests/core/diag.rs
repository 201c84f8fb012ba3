//! Connections are looked for by their addresses, in whatever number.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use rustix::net::sockopt::set_socket_reuseaddr;
use soccr::Flow;
use soccr::diag::Diag;
use soccr_lab::{Family, Namespace, VethEnd, calls_of, veth};

use crate::ends::Ends;

/// A host of containers has hundreds of links, and a connection that arrives is not there yet: nobody waits for a question
/// about each of them.
pub fn those_that_are_not_here_are_looked_for_together() {
    const MANY: u16 = 50;
    let here = Namespace::new().unwrap();
    let mut control = here.rtnetlink().unwrap();
    for nth in 0..20 {
        let names = [format!("near{nth}"), format!("far{nth}")];
        let ends = [1, 2].map(|side| VethEnd {
            name: &names[side - 1],
            namespace: &here,
            mac: [2, 0, 0, 1, nth, side as u8],
        });
        veth(&mut control, ends, 1500).unwrap();
    }
    let flow = |port| Flow {
        local: SocketAddr::from(([127, 0, 0, 1], port)),
        remote: SocketAddr::from(([127, 0, 0, 1], 1)),
    };
    let flows: Vec<Flow> = (1..=MANY).map(flow).collect();
    let asked = here.run(|| {
        let mut diag = Diag::open().unwrap();
        calls_of(&[libc::SYS_sendto, libc::SYS_sendmsg], || {
            diag.find_each(&flows, |_, socket| panic!("{socket:?}")).unwrap();
        })
    });
    assert!(asked.len() < usize::from(MANY) + 10, "{} questions", asked.len());
}

/// Each by its place, the one that is bound to a link and is asked for twice as well.
pub fn those_that_are_here_are_told_by_their_places() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let bound = Ends::with(family, |ours| bind_to(ours, "eth0"), |_| {});
        let (here, port) = (Flow::of(&bound.ours).unwrap(), 1);
        let mut nowhere = here;
        nowhere.remote.set_port(port);
        let mut found = Vec::new();
        bound.pair.a.run(|| {
            let mut diag = Diag::open().unwrap();
            diag.find_each(&[here, nowhere, here], |place, socket| found.push((place, socket.interface)))
                .unwrap();
        });
        let link = bound.pair.a.namespace.rtnetlink().unwrap().index("eth0").unwrap();
        assert_eq!(found, [(0, link), (2, link)], "{family:?}");
        bound.finish();
    }
}

fn bind_to(socket: impl AsFd, link: &str) {
    set_socket_reuseaddr(&socket, true).unwrap();
    soccr_lab::set_option(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, link.as_bytes()).unwrap();
}

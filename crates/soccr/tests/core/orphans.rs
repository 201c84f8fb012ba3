//! What a restore has injected holds nothing of the host that the connection would not hold otherwise.

use std::io::Write;

use soccr::connection::State as Saved;
use soccr::diag::Diag;
use soccr_lab::{Case, Family, State, sysctl};

use crate::ends::Ends;

const RTM_DELLINK: u16 = 17;

/// How many sockets nobody owns wait for their peer.
fn orphans(ends: &Ends) -> usize {
    let mut count = 0;
    let mut diag = ends.pair.a.run(Diag::open).unwrap();
    diag.visit(|socket| count += usize::from(socket.state == Saved::LastAck)).unwrap();
    count
}

/// The peer has gone, and the socket was closed: it repeats its FIN for a while, and the link goes nevertheless.
pub fn an_orphan_does_not_hold_its_link() {
    for family in [Family::V4, Family::V6] {
        let case = Case { family, state: State::CloseWait, received: 0, sent: 0, unsent: 0 };
        let mut ends = Ends::of(case);
        // For some 25 s.
        ends.pair.a.run(|| sysctl("net/ipv4/tcp_orphan_retries", "6")).unwrap();
        let connection = ends.take();
        let restored = ends.restore(&connection).unwrap();
        // What the peer sends does not arrive.
        ends.ours = restored.resume().unwrap();
        ends.deafen();
        ends.ours.write_all(b"lost").unwrap();
        let mut control = ends.pair.a.namespace.rtnetlink().unwrap();
        let link = control.index("eth0").unwrap();
        drop(std::mem::replace(&mut ends.ours, crate::ends::unconnected(family)));
        assert_eq!(orphans(&ends), 1);
        control.change(RTM_DELLINK, 0, |body| body.bytes(&soccr_netlink::link_header(link, 0))).unwrap();
        assert_eq!(orphans(&ends), 1, "{family:?}: the link has waited for the orphan");
    }
}

//! What a resumed connection tells its peer leaves by the way that its other packets take.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};

use soccr::pause;
use soccr_lab::{Family, Pair, Segment, Sniffer, State, TcpInfo, VethEnd, veth, wait_until};
use soccr_netlink::Policy;
use socket2::SockRef;

/// The mark of the socket on `b`.
const MARK: u32 = 7;

/// Two hosts with a second link between them, to which a rule on `b` sends what leaves it.
fn detour(family: Family, rule: impl Fn(IpAddr) -> Policy) -> Pair {
    const SECOND: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 2]];
    let pair = Pair::new().unwrap();
    let [a, b] = [&pair.a, &pair.b].map(|host| host.address(family, 80).ip());
    let end = |namespace, mac| VethEnd { namespace, name: "eth1", mac };
    let mut control = pair.b.namespace.rtnetlink().unwrap();
    veth(&mut control, [end(&pair.a.namespace, SECOND[0]), end(&pair.b.namespace, SECOND[1])], 1500).unwrap();
    // A router on the link, whose name the other host has as well.
    let router: IpAddr =
        if a.is_ipv4() { [198, 51, 100, 1].into() } else { "2001:db8:1::1".parse().unwrap() };
    let own: IpAddr = if a.is_ipv4() { [198, 51, 100, 2].into() } else { "2001:db8:1::2".parse().unwrap() };
    control.add_address("eth1", own, if a.is_ipv4() { 24 } else { 64 }).unwrap();
    control.neighbour("eth1", router, SECOND[0]).unwrap();
    let policy = rule(b);
    control.add_gateway_table(policy.table, router, control.index("eth1").unwrap(), 4).unwrap();
    control.add_policy(&policy, a.is_ipv6()).unwrap();
    pair
}

fn leaves_by_the_second_link(rule: impl Fn(IpAddr) -> Policy + Copy) {
    for family in [Family::V4, Family::V6] {
        let pair = detour(family, rule);
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, 80))).unwrap();
        SockRef::from(&listener).set_mark(MARK).unwrap();
        let mut peer = pair.a.run(|| TcpStream::connect(pair.b.address(family, 80))).unwrap();
        let (ours, local) = (listener.accept().unwrap().0, peer.peer_addr().unwrap());
        // In CLOSE_WAIT the kernel itself says nothing.
        peer.shutdown(Shutdown::Write).unwrap();
        wait_until("the peer is heard", || TcpInfo::of(&peer).unwrap().state == State::FinWait2);
        let paused = pause(&ours).unwrap();
        let connection = paused.save().unwrap();
        paused.detach().unwrap();
        let restored = pair.b.run(|| connection.restore()).unwrap();

        let mut links = ["eth0", "eth1"].map(|link| Sniffer::on(&pair.a.namespace, link).unwrap());
        let mut ours = restored.resume().unwrap();
        let mut left = [0, 0];
        wait_until("the peer is told", || {
            for (link, left) in links.iter_mut().zip(&mut left) {
                let is_ours = |segment: &Segment| segment.source == local;
                *left += link.segments().unwrap().iter().filter(|segment| is_ours(segment)).count();
            }
            left != [0, 0]
        });
        assert_eq!(left[0], 0, "{family:?}");
        ours.write_all(b"the rest").unwrap();
        drop(ours);
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"the rest");
    }
}

/// As on a host with two providers.
pub fn a_rule_for_its_source_counts() {
    leaves_by_the_second_link(|source| Policy {
        priority: 100,
        mark: 0,
        mask: 0,
        to: None,
        from: Some(source),
        table: 100,
        protocol: 4,
    });
}

/// As beside a tunnel that only chosen programs use.
pub fn a_rule_for_its_mark_counts() {
    leaves_by_the_second_link(|_| Policy {
        priority: 100,
        mark: MARK,
        mask: u32::MAX,
        to: None,
        from: None,
        table: 100,
        protocol: 4,
    });
}

//! Every state, with every kind of address and every kind of queue, carried and continued to its end.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;

use soccr::connection::Connection;
use soccr::settings::Value;
use soccr::{Paused, Restored, pause};
use soccr_lab::{Case, Family, Flags, Made, Pair, Segment, Sniffer, State, Test, wait_until};

use crate::ends::{Ends, PORT, assert_nothing_new, assert_same, info, set_deaf, unconnected};

const RECEIVED: usize = 5000;
const SENT: usize = 6000;
const UNSENT: usize = 3000;

const CONTENTS: [(&str, [usize; 3]); 5] = [
    ("empty", [0, 0, 0]),
    ("receive_queue", [RECEIVED, 0, 0]),
    ("sent", [0, SENT, 0]),
    ("unsent", [0, 0, UNSENT]),
    ("all", [RECEIVED, SENT, UNSENT]),
];

/// One test for each connection that can exist.
pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for state in State::MAKEABLE {
        for family in Family::ALL {
            for (contents, [received, sent, unsent]) in CONTENTS {
                let case = Case { family, state, received, sent, unsent };
                let scoped =
                    family != Family::LinkLocal || [State::Established, State::CloseWait].contains(&state);
                if case.is_possible() && scoped {
                    // Every other one travels as bytes.
                    let as_bytes = tests.len() % 2 == 1;
                    let name = format!("states::{state:?}_{family:?}_{contents}").to_lowercase();
                    tests.push(Test::new(name, move || carry(case, as_bytes)));
                }
            }
        }
    }
    tests
}

fn carry(case: Case, as_bytes: bool) {
    if case.state == State::SynSent {
        return carry_handshake(case, as_bytes);
    }
    let mut ends = Ends::of(case);
    let before = info(&ends.ours);
    let connection = through_bytes(ends.take(), as_bytes);
    assert_eq!(connection.control.state as u8, case.state as u8);
    assert_eq!(connection.receive_queue, ends.to_us);
    assert_eq!(connection.control.unsq_len as usize, case.unsent);
    assert_eq!(connection.control.outq_len as usize, case.sent + case.unsent);
    assert!(ends.to_peer.ends_with(&connection.send_queue));
    let mut wire = Sniffer::on(&ends.pair.b.namespace, "eth0").unwrap();
    let restored = ends.restore(&connection).unwrap();
    assert_nothing_new(&mut wire, &connection, "during the restore");
    assert_same(&connection, &save_again(&restored, ends.remote));
    restored.report().strict().unwrap();
    ends.resume(restored);
    assert_eq!(info(&ends.ours).snd_mss, before.snd_mss);
    ends.finish();
}

/// The peer has answered the SYN, and the answer was lost.
pub fn a_handshake_that_the_peer_has_answered_goes_on() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let pair = Pair::new().unwrap();
        let mut wire = Sniffer::flagged(&pair.b.namespace, "eth0", Flags::SYN | Flags::RST).unwrap();
        let listener = pair.b.run(|| TcpListener::bind(pair.b.address(family, PORT))).unwrap();
        let remote = pair.a.address_of(&pair.b, family, PORT);
        let socket = pair.a.run(|| unconnected(family));
        socket.set_nonblocking(true).unwrap();
        set_deaf(&socket, true).unwrap();
        rustix::net::connect(&socket, &remote).unwrap_err();
        let mut answer = None;
        wait_until("the peer has answered", || {
            answer = wire.segments().unwrap().into_iter().find(|segment| segment.source.port() == PORT);
            answer.is_some()
        });
        let paused = pause(&socket).unwrap().with_peer(remote);
        let mut connection = paused.save().unwrap();
        paused.detach().unwrap();
        // That was our lock.
        connection.settings.set("SO_ATTACH_FILTER", Value::Bytes(Vec::new()));
        let restored = pair.a.run(|| connection.restore()).unwrap();
        let ours = restored.resume().unwrap();
        wait_until("the handshake is over", || info(&ours).state == State::Established);
        let (peer, _) = listener.accept().unwrap();
        // The answer echoes the clock of the first SYN, so ours may reset it, and ask again; the peer never does.
        let refuses = |segment: &Segment| segment.source.port() == PORT && segment.flags.contains(Flags::RST);
        let segments = wire.segments().unwrap();
        assert!(!segments.iter().any(refuses), "{segments:?}");
        Ends::between(pair, ours, peer, remote).finish();
    }
}

/// Whoever tells a peer for the case that the kernel has forgotten it, may be wrong about one that it knows.
pub fn a_handshake_goes_on_with_its_own_peer() {
    for family in [Family::V4, Family::V6, Family::Mapped] {
        let pair = Pair::new().unwrap();
        let case = Case { family, state: State::SynSent, received: 0, sent: 0, unsent: 0 };
        let Made { socket, remote, peer: _peer, .. } = case.make(&pair.a, &pair.b);
        let mut other = remote;
        other.set_port(remote.port() + 1);
        let paused = pair.a.run(|| pause(&socket)).unwrap().with_peer(other);
        assert_eq!(paused.peer_address().unwrap(), remote);
        assert_eq!(paused.save().unwrap().remote, remote);
        paused.resume().unwrap();
    }
}

/// A connection that waits for its SYN|ACK starts anew, with the same addresses.
fn carry_handshake(case: Case, as_bytes: bool) {
    let pair = Pair::new().unwrap();
    let mut wire = Sniffer::flagged(&pair.b.namespace, "eth0", Flags::SYN | Flags::RST).unwrap();
    let Made { socket, local, remote, peer, .. } = case.make(&pair.a, &pair.b);
    // It may wait for the address of its neighbour, and would come late.
    wait_until("the SYN is lost", || !wire.segments().unwrap().is_empty());
    let paused = pause(&socket).unwrap().with_peer(remote);
    let connection = through_bytes(paused.save().unwrap(), as_bytes);
    paused.detach().unwrap();
    assert_eq!((connection.local, connection.remote), (local, remote));
    let restored = pair.a.run(|| connection.restore()).unwrap();
    peer.unblock().unwrap();
    let ours = restored.resume().unwrap();
    let peer = peer.into_stream().unwrap();
    wait_until("the handshake is over", || info(&ours).state == State::Established);
    assert_eq!(peer.peer_addr().unwrap().port(), local.port());
    assert!(wire.segments().unwrap().iter().all(|segment| segment.flags.contains(Flags::SYN)));
    Ends::between(pair, ours, peer, remote).finish();
}

pub fn save_again(restored: &Restored, remote: SocketAddr) -> Connection {
    let paused = Paused::take_over(restored.as_fd()).unwrap().with_peer(remote);
    let connection = paused.save().unwrap();
    paused.leave_paused();
    connection
}

pub fn through_bytes(connection: Connection, really: bool) -> Connection {
    if !really {
        return connection;
    }
    let mut bytes = Vec::new();
    soccr_image::write(&mut bytes, &connection).unwrap();
    let read = soccr_image::read(&bytes[..]).unwrap();
    assert_eq!(read, connection);
    read
}

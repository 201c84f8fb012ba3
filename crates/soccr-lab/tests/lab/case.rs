//! Connections made in every state.

use std::io::{Read, Write};
use std::net::Shutdown;

use soccr_lab::{Case, Family, Made, Pair, State, TcpInfo, wait_until};

/// Every state, family and combination of queues that can be.
fn every_case() -> impl Iterator<Item = Case> {
    let queues = [(0, 0, 0), (5000, 0, 0), (0, 3000, 0), (0, 0, 2000), (0, 3000, 2000), (5000, 3000, 9000)];
    let all = State::MAKEABLE.into_iter().flat_map(move |state| {
        Family::ALL.into_iter().flat_map(move |family| {
            queues.map(|(received, sent, unsent)| Case { family, state, received, sent, unsent })
        })
    });
    all.filter(Case::is_possible)
}

/// Reads what is expected, and the end where the other side has sent a FIN.
fn read(stream: &mut impl Read, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert!(bytes == expected);
}

/// Lets both ends finish and compares every byte.
fn finish(case: &Case, made: Made) {
    let Made { mut socket, peer, incoming, mut outgoing, .. } = made;
    let mut peer = peer.into_stream().unwrap();
    if case.state == State::SynSent {
        wait_until("connected", || TcpInfo::of(&socket).unwrap().state == State::Established);
    }
    let fin_queued = !matches!(case.state, State::Established | State::SynSent | State::CloseWait);
    if !fin_queued {
        socket.write_all(b"and more").unwrap();
        outgoing.extend(b"and more");
        socket.shutdown(Shutdown::Write).unwrap();
    }
    read(&mut peer, &outgoing);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the end of what we sent");
    // Fails with ENOTCONN where the peer has done so already.
    let _ = peer.shutdown(Shutdown::Write);
    read(&mut socket, &incoming);
    assert_eq!(socket.read(&mut [0]).unwrap(), 0, "the end of what the peer sent");
    for stream in [&socket, &peer] {
        wait_until("closed", || TcpInfo::of(stream).unwrap().state == State::Close);
    }
}

pub fn every_state_is_made_and_goes_on() {
    let pair = Pair::new().unwrap();
    let make = |case: Case| {
        let made = case.make(&pair.a, &pair.b);
        assert_eq!(made.local.ip(), pair.a.address(case.family, 0).ip());
        assert_eq!(made.remote.ip(), pair.b.address(case.family, 0).ip());
        (case, made)
    };
    // All are made before the first goes on, so that their retransmission timers run side by side.
    let all: Vec<_> = every_case().map(make).collect();
    for (case, made) in &all {
        let info = TcpInfo::of(&made.socket).unwrap();
        let fin = usize::from(matches!(case.state, State::FinWait1 | State::Closing | State::LastAck));
        let unsent_fin = if case.unsent > 0 { fin } else { 0 };
        assert_eq!((info.state, info.unread), (case.state, case.received), "{case:?}");
        assert_eq!(info.unacknowledged, case.sent + case.unsent + fin, "{case:?} has changed");
        assert_eq!(info.unsent, case.unsent + unsent_fin, "{case:?} has changed");
        made.peer.unblock().unwrap();
    }
    for (case, made) in all {
        finish(&case, made);
    }
}

pub fn long_queues_are_made() {
    let pair = Pair::new().unwrap();
    let long = 16 << 20;
    for state in [State::Established, State::LastAck] {
        for (received, sent, unsent) in [(long, 10_000, long), (0, 0, long)] {
            let case = Case { family: Family::V6, state, received, sent, unsent };
            let made = case.make(&pair.a, &pair.b);
            made.peer.unblock().unwrap();
            finish(&case, made);
        }
    }
}

pub fn impossible_cases_are_known() {
    let case = Case { family: Family::V4, state: State::Close, received: 1, sent: 0, unsent: 0 };
    assert!(case.is_possible());
    for other in [
        Case { sent: 1, ..case },
        Case { unsent: 1, ..case },
        Case { state: State::SynSent, ..case },
        Case { state: State::TimeWait, ..case },
        Case { state: State::Listen, ..case },
    ] {
        assert!(!other.is_possible(), "{other:?}");
    }
}

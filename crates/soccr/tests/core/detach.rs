//! A connection that was saved by one guard is detached by the next one, unless it has moved in between.

use std::io::{Read, Write};
use std::net::Shutdown;

use soccr::{ErrorKind, pause};
use soccr_lab::{Family, State, wait_until};

use crate::ends::{Ends, has_peek_offset, info, set_option};

type Act = fn(&mut Ends);

/// What moves a connection: each must be found out.
const MOVES: [(&str, Act); 7] = [
    ("the peer has written", |ends| ends.receive(3)),
    ("an urgent byte has come", |ends| ends.receive_urgent()),
    ("we have written", |ends| {
        ends.deafen();
        ends.send(3);
        ends.undeafen();
    }),
    ("some was read", |ends| {
        let mut byte = [0];
        ends.ours.read_exact(&mut byte).unwrap();
        assert_eq!(ends.to_us.remove(0), byte[0]);
    }),
    ("what was sent is acknowledged", |ends| {
        ends.undeafen();
        wait_until("all is acknowledged", || info(&ends.ours).unacknowledged == 0);
    }),
    ("the peer has ended", |ends| {
        ends.peer.shutdown(Shutdown::Write).unwrap();
        wait_until("its FIN is here", || info(&ends.ours).state == State::CloseWait);
    }),
    ("we have ended", |ends| ends.ours.shutdown(Shutdown::Write).unwrap()),
];

pub fn what_moves_between_two_guards_stops_the_detach() {
    for family in [Family::V4, Family::V6] {
        for (what, act) in MOVES {
            let mut ends = Ends::new(family);
            ends.receive(10);
            let is_acknowledged_late = what.contains("acknowledged");
            if is_acknowledged_late {
                ends.deafen();
                ends.send(5);
            }
            let paused = pause(&ends.ours).unwrap();
            assert_eq!(paused.position(), None);
            paused.save().unwrap();
            let position = paused.position().unwrap();
            paused.resume_silently().unwrap();
            act(&mut ends);
            let error = pause(&ends.ours).unwrap().detach_at(position).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Changed, "{what}: {error}");
            if !["the peer has ended", "we have ended"].contains(&what) {
                // The urgent byte is read with the others.
                set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1);
                ends.finish();
            }
        }
    }
}

/// The restored connection has what was saved before, though the guard in between has read nothing.
pub fn a_connection_that_stands_still_between_two_guards_leaves() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::new(family);
        ends.receive(10);
        if has_peek_offset(&ends.ours) {
            ends.receive_urgent();
        }
        ends.receive(10);
        ends.deafen();
        ends.send(70_000);
        // From then on nothing new is sent.
        wait_until("the first of it is sent again", || info(&ends.ours).total_retrans > 0);
        let paused = pause(&ends.ours).unwrap();
        let connection = paused.save().unwrap();
        let position = paused.position().unwrap();
        paused.resume_silently().unwrap();
        // What its user sees, and sets, does not move it.
        set_option(&ends.ours, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77);
        pause(&ends.ours).unwrap().detach_at(position).unwrap();
        assert!(ends.ours.write(&[0]).is_err());
        ends.restore_and_resume(&connection);
        ends.undeafen();
        set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1);
        ends.finish();
    }
}

/// A timer of the kernel sends it, in more segments: the path has become narrower.
pub fn what_is_sent_again_meanwhile_does_not_stop_the_detach() {
    for (family, at_once) in
        [(Family::V4, true), (Family::V4, false), (Family::V6, true), (Family::V6, false)]
    {
        let mut ends = Ends::new(family);
        ends.receive(10);
        ends.deafen();
        // So little that all of it is sent at once.
        ends.send(10_000);
        let paused = pause(&ends.ours).unwrap();
        let connection = paused.save().unwrap();
        let before = info(&ends.ours).total_retrans;
        ends.pair.a.namespace.rtnetlink().unwrap().set_mtu("eth0", 1280).unwrap();
        wait_until("it is sent again", || info(&ends.ours).total_retrans > before);
        if at_once {
            paused.detach().unwrap();
        } else {
            let position = paused.position().unwrap();
            paused.resume_silently().unwrap();
            pause(&ends.ours).unwrap().detach_at(position).unwrap();
        }
        ends.restore_and_resume(&connection);
        ends.undeafen();
        ends.finish();
    }
}

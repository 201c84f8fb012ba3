//! Full buffers in both directions, and long queues.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

use soccr_lab::{Case, Family, State, wait_until};

use crate::ends::{Ends, LIMIT, assert_same_bytes, info, pattern, timeouts};

/// How often the same has to go well.
const ROUNDS: usize = 25;

/// Both ends write until nothing moves any more.
fn fill(ends: &mut Ends) {
    let sides = [(&ends.ours, &mut ends.to_peer), (&ends.peer, &mut ends.to_us)];
    for (end, _) in &sides {
        end.set_nonblocking(true).unwrap();
    }
    let mut sides = sides;
    let mut quiet = 0;
    wait_until("everything is full", || {
        quiet += 1;
        for (mut end, bytes) in sides.iter_mut().map(|(end, bytes)| (*end, bytes)) {
            let mut piece = pattern(bytes.len(), 64 << 10);
            while let Ok(written) = end.write(&piece) {
                bytes.extend(&piece[..written]);
                piece = pattern(bytes.len(), 64 << 10);
                quiet = 0;
            }
            if info(end).snd_wnd > 0 {
                quiet = 0;
            }
        }
        quiet > 20
    });
    for (end, _) in &sides {
        end.set_nonblocking(false).unwrap();
    }
}

/// Reads to the end.
fn drain(mut end: &TcpStream, expected: &[u8]) {
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        let length = end.read(&mut buffer).unwrap();
        if length == 0 {
            return assert_eq!(at, expected.len());
        }
        assert_same_bytes(&buffer[..length], &expected[at..][..length]);
        at += length;
    }
}

fn drain_both(mut ends: Ends) {
    ends.undeafen();
    let before = [timeouts(&ends.ours), timeouts(&ends.peer)];
    for end in [&ends.ours, &ends.peer] {
        end.set_read_timeout(Some(LIMIT)).unwrap();
    }
    thread::scope(|scope| {
        for (end, expected) in [(&ends.ours, &ends.to_us), (&ends.peer, &ends.to_peer)] {
            scope.spawn(move || {
                end.shutdown(Shutdown::Write).unwrap();
                drain(end, expected);
            });
        }
    });
    let after = [timeouts(&ends.ours), timeouts(&ends.peer)];
    assert!(
        after.iter().zip(before).all(|(after, before)| after - before <= 1),
        "{before:?}, then {after:?}"
    );
    ends.assert_no_reset();
}

fn both_sides_full(family: Family) {
    for _ in 0..ROUNDS {
        let mut ends = Ends::new(family);
        fill(&mut ends);
        let connection = ends.move_once();
        assert!(connection.control.inq_len > 64 << 10, "{}", connection.control.inq_len);
        assert!(connection.control.unsq_len > 64 << 10, "{}", connection.control.unsq_len);
        drain_both(ends);
    }
}

pub fn both_sides_full_on_ipv4_then_drained_25_times() {
    both_sides_full(Family::V4);
}

pub fn both_sides_full_on_ipv6_then_drained_25_times() {
    both_sides_full(Family::V6);
}

/// The longest queues that are carried, in both directions.
pub fn queues_of_64_mib() {
    const LENGTH: usize = 64 << 20;
    if !may_force_buffers() {
        soccr_lab::skip(
            "full::queues_of_64_mib: buffers of that size need CAP_NET_ADMIN in the initial user namespace",
        );
        return;
    }
    let case = Case {
        family: Family::V4,
        state: State::Established,
        received: LENGTH,
        sent: 10_000,
        unsent: LENGTH - 10_000,
    };
    let mut ends = Ends::of(case);
    let connection = ends.move_once();
    assert_eq!((connection.receive_queue.len(), connection.send_queue.len()), (LENGTH, LENGTH));
    drop(connection);
    drain_both(ends);
}

fn may_force_buffers() -> bool {
    let socket = crate::ends::unconnected(Family::V4);
    rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, 1 << 20).is_ok()
}

//! Bytes that the application has read go back in front of the receive queue.

use std::io::Read;

use rustix::net::sockopt::set_socket_recv_buffer_size;
use rustix::net::{RecvFlags, recv};
use soccr::connection::{Connection, QUEUE_LIMIT, Urgent};
use soccr::pause;
use soccr_lab::{Case, Family, State, Test, wait_until};

use crate::ends::{Ends, assert_same_bytes, has_peek_offset, info, pattern};

/// One test for each state that something can have been read in, and family.
pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for family in Family::ALL {
        for state in State::MAKEABLE {
            if state == State::SynSent {
                continue;
            }
            let name = format!("unread::{family:?}_{state:?}").to_lowercase();
            tests.push(Test::new(name, move || {
                comes_first(Case { family, state, received: 9000, sent: 0, unsent: 0 })
            }));
        }
    }
    tests
}

/// Reads from our end.
fn read(ends: &Ends, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    (&ends.ours).read_exact(&mut bytes).unwrap();
    assert_same_bytes(&bytes, &ends.to_us[..length]);
    bytes
}

fn unread(ends: &Ends, bytes: &[u8]) -> Connection {
    let mut connection = ends.take();
    let (edge, before) = (connection.control.rcv_nxt, connection.control.copied_seq());
    connection.unread(bytes).unwrap();
    assert_eq!(connection.control.rcv_nxt, edge);
    assert_eq!(before.wrapping_sub(connection.control.copied_seq()), bytes.len() as u32);
    connection.validate().unwrap();
    connection
}

fn comes_first(case: Case) {
    let mut ends = Ends::of(case);
    let bytes = read(&ends, 6000);
    let connection = unread(&ends, &bytes[1000..]);
    ends.restore_and_resume(&connection);
    ends.to_us.drain(..1000);
    ends.finish();
}

/// More comes back than the window that the peer sees leaves room for.
pub fn into_a_closed_window() {
    let small = |ours: &std::net::TcpStream| set_socket_recv_buffer_size(ours, 8192).unwrap();
    let mut ends = Ends::with(Family::V4, small, |_| {});
    ends.receive(5000);
    let bytes = read(&ends, 5000);
    ends.peer.set_nonblocking(true).unwrap();
    let mut at = ends.to_us.len();
    wait_until("our window is closed", || {
        let piece = pattern(at, 64 << 10);
        if let Ok(written) = std::io::Write::write(&mut &ends.peer, &piece) {
            ends.to_us.extend(&piece[..written]);
            at += written;
        }
        let info = info(&ends.peer);
        info.unsent > 0 && info.unsent == info.unacknowledged && info.snd_wnd < 1000
    });
    ends.peer.set_nonblocking(false).unwrap();
    let connection = unread(&ends, &bytes);
    ends.restore_and_resume(&connection);
    ends.finish();
}

/// The mark stays at its byte, whose place in the queue is another one.
pub fn in_front_of_the_urgent_mark() {
    for family in Family::ALL {
        let mut ends = Ends::new(family);
        ends.receive(300);
        ends.receive_urgent();
        ends.receive(300);
        // Where the kernel cannot read behind a mark, nothing may lie before it.
        let read_before = if has_peek_offset(&ends.ours) { 200 } else { 300 };
        let bytes = read(&ends, read_before);
        let connection = unread(&ends, &bytes);
        assert_eq!(connection.urgent, Some(Urgent { offset: 300, consumed: false }));
        ends.restore_and_resume(&connection);
        read(&ends, 300);
        let mut byte = [0];
        recv(&ends.ours, &mut byte, RecvFlags::OOB | RecvFlags::DONTWAIT).unwrap();
        assert_eq!(byte[0], ends.to_us[300]);
        ends.to_us.drain(..301);
        ends.finish();
    }
}

/// As much as is carried at all; one byte more is refused, and changes nothing.
pub fn up_to_64_mib() {
    let mut ends = Ends::new(Family::V4);
    let bytes = pattern(0, QUEUE_LIMIT as usize);
    // The peer cannot tell whether they had been read before.
    ends.to_us.extend(&bytes);
    ends.receive(1);
    let mut connection = ends.take();
    let saved = connection.clone();
    let error = connection.unread(&bytes).unwrap_err();
    assert_eq!((error.kind(), error.step()), (soccr::ErrorKind::Refused, "unread"));
    assert!(connection == saved, "a refusal has changed it");
    connection.unread(&bytes[1..]).unwrap();
    let restored = match ends.restore(&connection) {
        // What the kernel lets an ordinary user have depends on the memory of the machine.
        Err(error) if error.remedy().contains("net.core.rmem_max") => {
            soccr_lab::skip(format_args!("unread::up_to_64_mib: {error}"));
            return;
        }
        restored => restored.unwrap(),
    };
    ends.resume(restored);
    ends.to_us.remove(0);
    ends.finish();
}

pub fn a_connection_that_is_not_established_has_been_read_nothing_from() {
    let pair = soccr_lab::Pair::new().unwrap();
    let made = Case { family: Family::V4, state: State::SynSent, received: 0, sent: 0, unsent: 0 };
    let made = made.make(&pair.a, &pair.b);
    let mut connection = pause(&made.socket).unwrap().save().unwrap();
    assert!(connection.unread(b"x").is_err());
    connection.unread(b"").unwrap();
}

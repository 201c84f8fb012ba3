//! A reset that the application has not been told of is carried; notices in its error queue are refused, since nothing can
//! look at them without taking them.

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendFlags, recvmsg, send};
use soccr::connection::State as Saved;
use soccr::pause;
use soccr_lab::{Family, State, wait_until};

use crate::ends::{Ends, assert_same, assert_same_bytes, info, set_option, unconnected};
use crate::states::through_bytes;

/// The application reads what has arrived, and then learns of it, as it would have here.
pub fn an_unread_reset_is_carried() {
    for family in [Family::V4, Family::V6] {
        for length in [0, 10, 50_000] {
            for behind_fin in [false, true] {
                let mut ends = Ends::new(family);
                ends.receive(length);
                if behind_fin {
                    ends.peer.shutdown(Shutdown::Write).unwrap();
                    wait_until("the FIN has arrived", || info(&ends.ours).state == State::CloseWait);
                }
                carry(ends, behind_fin);
            }
        }
    }
}

/// The peer resets our connection.
fn reset(ends: &mut Ends) {
    set_socket_linger(&ends.peer, Some(Duration::ZERO)).unwrap();
    drop(std::mem::replace(&mut ends.peer, unconnected(Family::V4)));
    wait_until("the reset has arrived", || info(&ends.ours).state == State::Close);
}

fn carry(mut ends: Ends, behind_fin: bool) {
    reset(&mut ends);
    let before = pause(&ends.ours).unwrap().with_peer(ends.remote).save().unwrap();
    // What the peer's host answers does not arrive any more.
    let connection = ends.take();
    assert_same(&before, &connection);
    assert!(connection.control.reset);
    assert_eq!(connection.control.state == Saved::CloseWait, behind_fin);
    assert_same_bytes(&connection.receive_queue, &ends.to_us);
    let connection = through_bytes(connection, true);
    let restored = ends.restore(&connection).unwrap();
    let to_us = ends.to_us;
    let mut ours = restored.resume().unwrap();
    let mut read = vec![0; to_us.len()];
    ours.read_exact(&mut read).unwrap();
    assert_same_bytes(&read, &to_us);
    let end = ours.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(end, if behind_fin { Ok(0) } else { Err(ErrorKind::ConnectionReset) });
    assert_eq!(ours.write(&[0]).unwrap_err().kind(), ErrorKind::BrokenPipe);
}

/// The application knows of the end, but not yet of everything that came before it. That something had not been acknowledged
/// is of no more interest.
pub fn what_an_ended_connection_has_not_read_is_carried() {
    for family in [Family::V4, Family::V6] {
        for unacknowledged in [0, 3000] {
            let mut ends = Ends::new(family);
            ends.receive(10);
            ends.deafen();
            ends.ours.write_all(&vec![1; unacknowledged]).unwrap();
            reset(&mut ends);
            assert_eq!(
                ends.ours.take_error().unwrap().map(|error| error.kind()),
                Some(ErrorKind::ConnectionReset)
            );
            let connection = through_bytes(ends.take(), true);
            assert_eq!((connection.control.state, connection.control.reset), (Saved::Close, false));
            assert_same_bytes(&connection.receive_queue, &ends.to_us);
            let mut ours = ends.restore(&connection).unwrap().resume().unwrap();
            let mut read = Vec::new();
            ours.read_to_end(&mut read).unwrap();
            assert_same_bytes(&read, &ends.to_us);
        }
    }
}

/// What is told in the error queue.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Notices {
    /// `MSG_ZEROCOPY`: the bytes are not needed any more.
    Zerocopy,
    /// `SO_TIMESTAMPING`: when they were acknowledged.
    Acknowledged,
}

const KINDS: [Notices; 2] = [Notices::Zerocopy, Notices::Acknowledged];

/// A connection whose application is told of what it sends.
fn noticed(kind: Notices, family: Family) -> Ends {
    const SOFTWARE_AND_ACK: i32 = 1 << 4 | 1 << 9;
    let ends = Ends::new(family);
    match kind {
        Notices::Zerocopy => set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1),
        Notices::Acknowledged => {
            set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_TIMESTAMPING, SOFTWARE_AND_ACK);
        }
    }
    ends
}

/// Sends something, and waits until the notice of it is there.
fn provoke(ends: &mut Ends) {
    const MSG_ZEROCOPY: SendFlags = SendFlags::from_bits_retain(0x400_0000);
    assert_eq!(send(&ends.ours, b"noticed", MSG_ZEROCOPY), Ok(7));
    ends.to_peer.extend(b"noticed");
    wait_until("the notice is there", || {
        let mut polled = [PollFd::new(&ends.ours, PollFlags::empty())];
        poll(&mut polled, Some(&Timespec::default())).unwrap() == 1
    });
}

/// One notice is read; there was one.
fn read_notice(ours: &TcpStream) {
    let mut room = [MaybeUninit::uninit(); 512];
    let mut notice = RecvAncillaryBuffer::new(&mut room);
    recvmsg(ours, &mut [], &mut notice, RecvFlags::ERRQUEUE | RecvFlags::DONTWAIT).unwrap();
}

/// Who waits for a notice of what was not acknowledged must hear that none comes; else nothing is said.
pub fn notices_that_never_come_are_told() {
    const MSG_ZEROCOPY: SendFlags = SendFlags::from_bits_retain(0x400_0000);
    for family in [Family::V4, Family::V6] {
        for (flags, is_told) in [(MSG_ZEROCOPY, true), (SendFlags::empty(), false)] {
            let mut ends = noticed(Notices::Zerocopy, family);
            ends.deafen();
            assert_eq!(send(&ends.ours, b"noticed", flags), Ok(7));
            ends.to_peer.extend(b"noticed");
            let connection = through_bytes(ends.take(), true);
            let restored = ends.restore(&connection).unwrap();
            let told =
                restored.report().get("MSG_ZEROCOPY").map(|entry| entry.reason().contains("never come"));
            assert_eq!(told, is_told.then_some(true), "{}", restored.report());
            assert!(!is_told || restored.report().strict().is_err());
            ends.undeafen();
            ends.resume(restored);
            ends.finish();
        }
    }
}

/// That it is sent notices does not matter, where none is waiting.
pub fn one_of_a_socket_that_is_sent_notices_is_carried() {
    for kind in KINDS {
        for length in [0, 10] {
            let mut ends = noticed(kind, Family::V4);
            ends.receive(length);
            if kind == Notices::Acknowledged && length > 0 {
                // Those take the same memory as the receive queue: it cannot be told.
                reset(&mut ends);
                let error = pause(&ends.ours).unwrap().with_peer(ends.remote).save().unwrap_err();
                assert!(error.remedy().contains("MSG_ERRQUEUE"), "{error}");
                continue;
            }
            provoke(&mut ends);
            read_notice(&ends.ours);
            carry(ends, false);
        }
    }
}

pub fn notices_that_nobody_has_read_are_refused() {
    for kind in KINDS {
        for is_reset in [false, true] {
            let mut ends = noticed(kind, Family::V6);
            provoke(&mut ends);
            if is_reset {
                reset(&mut ends);
            }
            let paused = pause(&ends.ours).unwrap().with_peer(ends.remote);
            let error = paused.save().unwrap_err();
            assert!(error.what().contains("error queue"), "{kind:?}, reset: {is_reset}: {error}");
            assert!(error.remedy().contains("MSG_ERRQUEUE"), "{error}");
            paused.resume().unwrap();
            // It is still there, and the connection goes on.
            read_notice(&ends.ours);
            if is_reset {
                let end = ends.ours.read(&mut [0]).map_err(|error| error.kind());
                assert_eq!(end, Err(ErrorKind::ConnectionReset));
            } else {
                ends.move_once();
                ends.finish();
            }
        }
    }
}

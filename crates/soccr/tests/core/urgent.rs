//! Urgent data in the receive queue: the mark and every byte, wherever the mark lies.

use std::io::Read;
use std::net::TcpStream;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_oobinline, set_socket_recv_buffer_size, socket_oobinline};
use rustix::net::{RecvFlags, recv};
use soccr::connection::Urgent;
use soccr::{Paused, pause};
use soccr_lab::{Family, Test};

use crate::ends::{Ends, assert_same, assert_same_bytes, has_peek_offset};

/// Bytes before and behind the urgent one.
const PLACES: [(&str, usize, usize); 5] =
    [("only", 0, 0), ("first", 0, 3), ("middle", 3, 3), ("last", 3, 0), ("behind_90_kb", 90_000, 3000)];

/// How the application treats urgent data.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reading {
    /// Out of band, not done yet.
    OutOfBand,
    /// Out of band, done already.
    Consumed,
    /// As part of the stream.
    Inline,
}

/// One test for each place, kind of reading and family.
pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for family in [Family::V4, Family::V6, Family::Mapped] {
        for reading in [Reading::OutOfBand, Reading::Consumed, Reading::Inline] {
            for (place, before, behind) in PLACES {
                let name = format!("urgent::{place}_{reading:?}_{family:?}").to_lowercase();
                tests.push(Test::new(name, move || carry(family, reading, before, behind)));
            }
        }
    }
    tests
}

fn carry(family: Family, reading: Reading, before: usize, behind: usize) {
    let roomy = |ours: &TcpStream| set_socket_recv_buffer_size(ours, 400_000).unwrap();
    let mut ends = Ends::with(family, roomy, |_| {});
    ends.receive(before);
    ends.receive_urgent();
    ends.receive(behind);
    set_socket_oobinline(&ends.ours, reading == Reading::Inline).unwrap();
    let byte = ends.to_us[before];
    if reading == Reading::Consumed {
        assert_eq!(read_urgent(&ends.ours), Ok(byte));
    }
    // Without it no kernel reads behind a mark and consumes nothing.
    if before > 0 && !has_peek_offset(&ends.ours) {
        let refused = pause(&ends.ours).unwrap().save().unwrap_err();
        assert_eq!(refused.what(), "urgent data behind other unread bytes");
        assert_eq!(socket_oobinline(&ends.ours), Ok(reading == Reading::Inline));
        if reading == Reading::OutOfBand {
            assert_eq!(read_urgent(&ends.ours), Ok(byte));
        }
        if reading != Reading::Inline {
            ends.to_us.remove(before);
        }
        return ends.finish();
    }
    let connection = ends.take();
    // Inline there is nothing to be consumed out of band.
    let consumed = reading == Reading::Consumed;
    assert_eq!(connection.urgent, Some(Urgent { offset: before as u32, consumed }));
    assert_same_bytes(&connection.receive_queue, &ends.to_us);

    let restored = ends.restore(&connection).unwrap();
    let paused = Paused::take_over(restored.as_fd()).unwrap();
    assert_same(&connection, &paused.save().unwrap());
    paused.leave_paused();
    ends.resume(restored);

    assert_eq!(socket_oobinline(&ends.ours), Ok(reading == Reading::Inline));
    let mut read = vec![0; before];
    (&ends.ours).read_exact(&mut read).unwrap();
    assert_same_bytes(&read, &ends.to_us[..before]);
    assert!(rustix::net::sockopt::socket_error(&ends.ours).unwrap().is_ok());
    ends.to_us.drain(..before);
    match reading {
        Reading::OutOfBand => {
            assert_eq!(read_urgent(&ends.ours), Ok(byte));
            ends.to_us.remove(0);
        }
        Reading::Consumed => {
            assert_eq!(read_urgent(&ends.ours), Err(Errno::INVAL));
            ends.to_us.remove(0);
        }
        // It comes with the rest.
        Reading::Inline => assert_eq!(read_urgent(&ends.ours), Err(Errno::INVAL)),
    }
    ends.finish();
}

fn read_urgent(socket: &TcpStream) -> rustix::io::Result<u8> {
    let mut byte = [0];
    recv(socket, &mut byte, RecvFlags::OOB | RecvFlags::DONTWAIT)?;
    Ok(byte[0])
}

/// What was read across the mark before is no hindrance, and the mark itself may be gone.
pub fn a_mark_that_has_been_read_past_is_none() {
    let mut ends = Ends::new(Family::V4);
    ends.receive(3);
    ends.receive_urgent();
    ends.receive(3);
    let mut read = [0; 10];
    assert_eq!((&ends.ours).read(&mut read).unwrap(), 3);
    assert_eq!((&ends.ours).read(&mut read).unwrap(), 3);
    ends.to_us.clear();
    let connection = pause(&ends.ours).unwrap().save().unwrap();
    assert_eq!((connection.urgent, connection.receive_queue.len()), (None, 0));
    ends.receive(1000);
    ends.move_once();
    ends.finish();
}

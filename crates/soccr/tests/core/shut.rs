//! The application has said that it reads no more (`SHUT_RD`).

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use soccr::settings::Value;
use soccr_lab::{Case, Family, State};

use crate::ends::{Ends, LIMIT, assert_same, assert_same_bytes};
use crate::states::{save_again, through_bytes};

fn hangs_up(stream: &TcpStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    polled[0].revents().contains(PollFlags::RDHUP)
}

pub fn who_reads_no_more_does_not_afterwards() {
    for state in [State::Established, State::FinWait1, State::FinWait2] {
        for received in [0, 5000] {
            let case = Case { family: Family::V4, state, received, sent: 0, unsent: 0 };
            if case.is_possible() {
                move_one(case);
            }
        }
    }
}

fn move_one(case: Case) {
    let mut ends = Ends::of(case);
    assert!(!hangs_up(&ends.ours));
    ends.ours.shutdown(Shutdown::Read).unwrap();
    assert!(hangs_up(&ends.ours));
    let connection = through_bytes(ends.take(), true);
    assert_eq!(connection.settings.get("SHUT_RD"), Some(&Value::Number(1)));
    let restored = ends.restore(&connection).unwrap();
    restored.report().strict().unwrap();
    assert_same(&connection, &save_again(&restored, ends.remote));
    ends.resume(restored);
    assert!(hangs_up(&ends.ours));
    let mut read = Vec::new();
    ends.ours.set_read_timeout(Some(LIMIT)).unwrap();
    ends.ours.read_to_end(&mut read).unwrap();
    assert_same_bytes(&read, &ends.to_us);
    ends.undeafen();
    if case.state == State::Established {
        ends.ours.write_all(b"goes on").unwrap();
        let mut read = [0; 7];
        ends.peer.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"goes on");
    }
    ends.assert_no_reset();
}

//! An acknowledgement that ends within a segment.

use std::io::Write;

use soccr::pause;
use soccr_lab::{Family, wait_until};

use crate::ends::{Ends, info};
use crate::sys::Memory;

const WRITTEN: usize = 100;

/// A restore joins what was sent in small segments, and the peer acknowledges them one by one.
pub fn what_is_acknowledged_of_a_segment_is_not_saved() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::new(family);
        ends.ours.set_nodelay(true).unwrap();
        ends.disconnect_hosts();
        ends.send(WRITTEN);
        wait_until("the first has arrived", || info(&ends.peer).unread == WRITTEN);
        ends.deafen();
        ends.send(WRITTEN);
        assert_eq!(ends.move_once().send_queue.len(), 2 * WRITTEN);
        // Its acknowledgement says that it has the first.
        ends.peer.write_all(b"x").unwrap();
        ends.to_us.push(b'x');
        wait_until("half of it is acknowledged", || info(&ends.ours).unacknowledged == WRITTEN);
        ends.disconnect_hosts();
        let rest = &ends.to_peer[WRITTEN..];
        let paused = pause(&ends.ours).unwrap();
        let bare = paused.save_bare(|length| Some(Memory(vec![0; length]))).unwrap();
        assert_eq!(bare.control.outq_len as usize, WRITTEN);
        assert_eq!(&bare.send_queue.0[..WRITTEN], rest);
        let connection = paused.save().unwrap();
        assert_eq!(connection.control.outq_len as usize, WRITTEN);
        assert_eq!(connection.send_queue, rest);
        paused.detach().unwrap();
        ends.restore_and_resume(&connection);
        ends.finish();
    }
}

//! Single values that are saved, restored and announced as they should be.

use std::net::Shutdown;

use soccr_lab::{Family, Sniffer, State, wait_until};

use crate::ends::{Ends, info, info_bytes, option, rto, set_option};

/// As behind a lock: nothing is answered, and each timeout is twice as long as the last one.
pub fn the_timeout_is_saved_without_its_doublings() {
    /// Where `struct tcp_info` has its `tcpi_backoff`.
    const BACKOFF: usize = 4;
    let mut ends = Ends::new(Family::V4);
    let before = rto(&ends.ours);
    ends.deafen();
    ends.send(1000);
    wait_until("it is doubled twice", || info_bytes(&ends.ours)[BACKOFF] >= 2);
    let connection = ends.take();
    assert_eq!(connection.path.unwrap().rto, before);
    ends.restore_and_resume(&connection);
    ends.finish();
}

/// Too large a window would invite the peer to send what is dropped.
pub fn the_window_is_announced_as_it_was_agreed() {
    for half_closed in [false, true] {
        let mut ends = Ends::new(Family::V4);
        if half_closed {
            ends.peer.shutdown(Shutdown::Write).unwrap();
            wait_until("the end has come", || info(&ends.ours).state == State::CloseWait);
        }
        let mut wire = Sniffer::on(&ends.pair.b.namespace, "eth0").unwrap();
        let connection = ends.move_once();
        let (shift, room) =
            (connection.control.options.window_scale.unwrap().rcv, connection.buffers.unwrap().receive);
        assert!(shift > 0);
        let port = connection.local.port();
        let mut ours = Vec::new();
        wait_until("it is announced", || {
            ours.extend(wire.segments().unwrap().into_iter().filter(|segment| segment.source.port() == port));
            !ours.is_empty()
        });
        for segment in ours {
            assert!(u32::from(segment.window) << shift <= room, "{segment:?}, where {room} bytes have room");
        }
        ends.finish();
    }
}

/// A segment may bear the time of its departure already: a clock behind that would be taken for an old one (PAWS).
pub fn the_clock_is_ahead_of_what_pacing_holds_back() {
    const RATE: i32 = 200_000;
    const TCP_TIMESTAMP: i32 = 24;
    let ends = Ends::new(Family::V4);
    set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, RATE);
    let now = option(&ends.ours, libc::IPPROTO_TCP, TCP_TIMESTAMP).unwrap() as u32;
    let saved = ends.take().control.options.timestamps.unwrap();
    // Two bursts of the largest size, and a tenth of a second in any case.
    let ahead = 2 * 65536 * 1000 / RATE + 100;
    assert!(saved.wrapping_sub(now) >= ahead as u32, "{now}, then {saved}");
}

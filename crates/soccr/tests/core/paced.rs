//! A sender that paces itself: a timer of the kernel sends what is unsent.

use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;

use soccr::{ErrorKind, pause};
use soccr_lab::{Call, Family, Sniffer, Supervisor, TcpInfo, option, sysctl, wait_until};

use crate::ends::{Ends, PORT, info, set_option};

const TCP_REPAIR_QUEUE: i32 = 20;
const SEND: i32 = 2;

/// Where the timer runs out while the send queue is read, the kernel counts all of it as sent, and sends nothing.
pub fn what_only_counts_as_sent_is_saved_as_unsent() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::new(family);
        let mut wire = Sniffer::on(&ends.pair.b.namespace, "eth0").unwrap();
        // Twenty segments a second, behind the first ten.
        set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 30_000);
        ends.send(40_000);
        wait_until("it paces itself", || info(&ends.ours).unsent < 24_000);
        ends.disconnect_hosts();
        let mut sent = Vec::new();
        let mut note = || {
            let segments = wire.segments().unwrap();
            let ours = segments.iter().filter(|segment| segment.destination.port() == PORT);
            sent.extend(ours.map(|segment| segment.seq.wrapping_add(segment.payload_len as u32)));
        };
        let connection = saved_slowly(&ends.ours, &mut note);
        let control = &connection.control;
        let furthest = sent.into_iter().max_by_key(|end| end.wrapping_sub(control.write_seq));
        assert_eq!(Some(control.write_seq.wrapping_sub(control.unsq_len)), furthest, "{control:?}");
        ends.restore_and_resume(&connection);
        ends.finish();
    }
}

/// The kernel takes no acknowledgement of what the restored connection has not sent yet.
pub fn what_was_sent_since_the_save_stops_the_detach() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::new(family);
        set_option(&ends.ours, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 30_000);
        ends.send(40_000);
        wait_until("it paces itself", || info(&ends.ours).unsent < 24_000);
        ends.disconnect_hosts();
        let paused = pause(&ends.ours).unwrap();
        let unsent = paused.save().unwrap().control.unsq_len as usize;
        wait_until("more is sent", || info(&ends.ours).unsent < unsent);
        assert_eq!(paused.detach().unwrap_err().kind(), ErrorKind::Changed);
        ends.connect_hosts();
        ends.finish();
    }
}

/// Saves a connection, and holds the thread that does so up where it reads the send queue, until the timer has run out. `note` is
/// called before: behind that the kernel soon repeats the last of what counts as sent.
fn saved_slowly(ours: &TcpStream, note: &mut impl FnMut()) -> soccr::Connection {
    let has_send_selected = || {
        let mut queue = [0; 4];
        option(ours, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, &mut queue).is_ok()
            && i32::from_ne_bytes(queue) == SEND
    };
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let saving = scope.spawn(move || {
            sender.send(Supervisor::of_this_thread(&[libc::SYS_recvfrom])).unwrap();
            let paused = pause(ours).unwrap();
            let connection = paused.save().unwrap();
            paused.detach().unwrap();
            connection
        });
        let supervisor = receiver.recv().unwrap().expect("seccomp");
        let mut hold_up = |_: Call| {
            if has_send_selected() {
                if TcpInfo::of(ours).unwrap().unsent > 0 {
                    note();
                }
                wait_until("all counts as sent", || TcpInfo::of(ours).unwrap().unsent == 0);
            }
            None
        };
        while supervisor.decide(&mut hold_up).unwrap().is_some() {}
        saving.join().unwrap()
    })
}

/// The kernel probes for a larger MTU with whatever is in the queue, in repair mode as well.
pub fn a_probe_of_the_mtu_does_not_end_the_silence() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::new(family);
        ends.pair.a.run(|| sysctl("net/ipv4/tcp_mtu_probing", "2")).unwrap();
        // The first acknowledgements widen the window enough for a probe.
        ends.send(20_000);
        wait_until("it is acknowledged", || info(&ends.ours).unacknowledged == 0);
        ends.deafen();
        ends.send(40_000);
        let connection = ends.take();
        assert!(connection.control.outq_len > 0 && connection.control.options.sack);
        ends.restore_and_resume(&connection);
        ends.finish();
    }
}

//! Full buffers in both directions, long queues, and what they cost.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use soccr_lab::{Family, wait_until};

use crate::ends::{Ends, info, pattern};

/// Both ends write until nothing moves any more.
fn fill(ends: &mut Ends) {
    for end in [&ends.ours, &ends.peer] {
        end.set_nonblocking(true).unwrap();
    }
    let mut last = (usize::MAX, usize::MAX);
    let mut still = 0;
    wait_until("everything is full", || {
        for (mut end, bytes) in [(&ends.ours, &mut ends.to_peer), (&ends.peer, &mut ends.to_us)] {
            while let Ok(written) = end.write(&pattern(bytes.len(), 64 << 10)) {
                bytes.extend(pattern(bytes.len(), written));
            }
        }
        let now = (info(&ends.ours).unacknowledged, info(&ends.peer).unacknowledged);
        still = if now == last { still + 1 } else { 0 };
        last = now;
        still > 20
    });
    for end in [&ends.ours, &ends.peer] {
        end.set_nonblocking(false).unwrap();
    }
}
/// Reads to the end; the longest time without a byte.
fn drain(mut end: &TcpStream, expected: &[u8]) -> Duration {
    let mut buffer = vec![0; 64 << 10];
    let (mut at, mut longest) = (0, Duration::ZERO);
    loop {
        let start = Instant::now();
        let length = end.read(&mut buffer).unwrap();
        longest = longest.max(start.elapsed());
        if length == 0 {
            assert_eq!(at, expected.len());
            return longest;
        }
        assert!(expected[at..].starts_with(&buffer[..length]), "other bytes from {at} on");
        at += length;
    }
}

pub fn probe() {
    for round in 0..4 {
        let mut ends = Ends::new(Family::V4);
        fill(&mut ends);
        let c = ends.move_once();
        let r = [crate::ends::rto(&ends.ours), crate::ends::rto(&ends.peer)];
        ends.ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let (a, b) = thread::scope(|s| {
            let a = s.spawn(|| { ends.ours.shutdown(Shutdown::Write).unwrap(); drain(&ends.ours, &ends.to_us) });
            let b = s.spawn(|| { ends.peer.shutdown(Shutdown::Write).unwrap(); drain(&ends.peer, &ends.to_peer) });
            (a.join().unwrap(), b.join().unwrap())
        });
        eprintln!("{round} inq {} outq {} unsq {} win {:?} rto {:?} gaps {a:?} {b:?} rtos {} {}", c.control.inq_len, c.control.outq_len, c.control.unsq_len, c.control.window, r, crate::ends::timeouts(&ends.ours), crate::ends::timeouts(&ends.peer));
    }
}

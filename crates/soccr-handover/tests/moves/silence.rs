//! Silence about what has left, begun and ended by many at the same time.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use soccr::Flow;
use soccr::lock::{PersistentLock, SILENCE};
use soccr_handover::silence::{begin, lift};

fn flow(port: u16) -> Flow {
    Flow { local: (Ipv4Addr::LOCALHOST, 80).into(), remote: (Ipv4Addr::LOCALHOST, port).into() }
}

fn is_silent(flow: Flow) -> bool {
    PersistentLock::list().unwrap().iter().any(|lock| lock.flows.contains(&flow))
}

/// A connection may come back without its silence being ended, and leave again: as the only one in the lock, or beside others.
pub fn a_silence_begins_again() {
    begin(&[flow(1)], Duration::from_secs(2)).unwrap();
    begin(&[flow(1)], SILENCE).unwrap();
    let lock = PersistentLock::list().unwrap().remove(0);
    assert_eq!(lock.flows, [flow(1)]);
    assert!(lock.remaining.unwrap() > SILENCE / 2);
    begin(&[flow(1), flow(2)], SILENCE).unwrap();
    begin(&[flow(2)], SILENCE).unwrap();
    assert!(is_silent(flow(1)) && is_silent(flow(2)));
    lift(&[flow(1), flow(2)]).unwrap();
    assert_eq!(PersistentLock::list().unwrap(), []);
}

/// The first to begin makes the lock, the last to end removes it, and neither may disturb the others.
pub fn silences_do_not_end_each_other() {
    const TIMES: usize = 15;
    let one_after_another = |port| {
        thread::spawn(move || {
            for _ in 0..TIMES {
                begin(&[flow(port)], SILENCE).unwrap();
                assert!(is_silent(flow(port)));
                lift(&[flow(port)]).unwrap();
                assert!(!is_silent(flow(port)));
            }
        })
    };
    let all: Vec<_> = (1..=3).map(one_after_another).collect();
    all.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(PersistentLock::list().unwrap(), []);
}

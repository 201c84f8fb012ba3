//! Whatever lies in the queues, in whatever state: it comes back.

use std::thread;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use soccr_lab::{Case, Family, State};

use crate::ends::{Ends, assert_same};
use crate::states::{save_again, through_bytes};

/// So many connections are made, moved and ended.
const CASES: u32 = 24;

/// The first congestion window is ten segments.
const MOST_SENT: usize = 10 * 1000;

fn cases() -> impl Strategy<Value = (Case, bool, usize)> {
    let family = prop::sample::select(Family::ALL.to_vec());
    let state = prop::sample::select(State::MAKEABLE.to_vec());
    let length = |most: usize| prop_oneof![Just(0), Just(1), 2..most];
    // What is sent before something unsent fills ten segments.
    let sent = prop_oneof![Just(0), 10..MOST_SENT];
    (family, state, length(100_000), sent, length(100_000), any::<bool>(), 1..4usize).prop_filter_map(
        "no such connection",
        |(family, state, received, sent, unsent, as_bytes, moves)| {
            let case = Case { family, state, received, sent, unsent };
            (case.is_possible() && state != State::SynSent).then_some((case, as_bytes, moves))
        },
    )
}

/// Most of the time a timer of the kernel is waited for.
const THREADS: u32 = 6;

pub fn every_connection_comes_back() {
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let config = Config {
                    cases: CASES / THREADS,
                    failure_persistence: None,
                    max_shrink_iters: 20,
                    ..Config::default()
                };
                TestRunner::new(config).run(&cases(), carry).unwrap();
            });
        }
    });
}

fn carry((case, as_bytes, moves): (Case, bool, usize)) -> Result<(), TestCaseError> {
    let mut ends = Ends::of(case);
    for _ in 0..moves {
        let connection = through_bytes(ends.take(), as_bytes);
        let restored = ends.restore(&connection).unwrap();
        assert_same(&connection, &save_again(&restored, ends.remote));
        ends.resume(restored);
    }
    ends.finish();
    Ok(())
}

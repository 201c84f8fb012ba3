//! The round-trip time and the clock it is measured with.

use std::time::Duration;

use soccr::Fidelity;
use soccr::connection::Path;
use soccr::settings::Settings;
use soccr_lab::{Family, has_kernel, sysctl, wait_until};

use crate::ends::Ends;
use crate::{assert_near, fidelity, is_near};

/// Microseconds: RTT and RTO, from next door to a satellite, steady and not.
const PATHS: [(u64, u64); 12] = [
    (40, 200_040),
    (900, 204_000),
    (20_000, 220_000),
    (20_000, 240_000),
    (20_000, 300_000),
    (20_000, 1_200_000),
    (100_000, 320_000),
    (150_000, 350_000),
    (200_000, 1_000_000),
    (300_000, 500_000),
    (600_000, 800_000),
    (2_000_000, 2_200_000),
];

pub fn every_path_gets_its_timeout_back() {
    for family in [Family::V4, Family::V6, Family::Mapped, Family::LinkLocal] {
        let mut ends = Ends::near(family);
        for (rtt, rto) in PATHS {
            ends.take();
            let path = ends.saved.path.as_mut().unwrap();
            (path.rtt, path.rto) = (Duration::from_micros(rtt), Duration::from_micros(rto));
            // Some of these timeouts only come back with another round-trip time.
            let restored = ends.restore_until(|report| is_near(report, "rto", 20));
            assert_near(restored.report(), "rto", 20);
            if rto <= 240_000 {
                // The clock goes on while the sample is taken.
                let [_, after] = restored.report().get("rtt").unwrap().values().unwrap();
                assert!((rtt..rtt + 100_000).contains(&after), "{}", restored.report());
            }
            ends.resume(restored);
            ends.transfer();
        }
    }
}

pub fn a_swallowed_acknowledgement_costs_only_the_estimate() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::near(family);
        ends.transfer();
        ends.pair.a.namespace.rtnetlink().unwrap().down("lo").unwrap();
        let mut is_tried = || {
            let restored = ends.restored();
            let report = restored.report();
            assert_eq!(fidelity(report, "rto"), Fidelity::Missing, "{report}");
            let reason = report.get("rto").unwrap().reason().to_owned();
            assert!(reason.contains("swallowed") || reason.contains("did not arrive"), "{reason}");
            ends.resume(restored);
            ends.transfer();
            !reason.contains("a moment ago")
        };
        assert!(is_tried());
        // For a while nothing is tried, unless this machine takes longer.
        wait_until("it rests after a failure", || !is_tried());
    }
}

pub fn without_timestamps_the_estimate_is_missing() {
    let mut ends = Ends::over(soccr_lab::Pair::new().unwrap(), Family::V4, |host| {
        host.run(|| sysctl("net/ipv4/tcp_timestamps", "0")).unwrap();
    });
    ends.transfer();
    let restored = ends.restored();
    let report = restored.report();
    assert_eq!(fidelity(report, "rto"), Fidelity::Missing, "{report}");
    assert!(report.get("rto").unwrap().reason().contains("timestamps"), "{report}");
    ends.resume(restored);
    ends.transfer();
}

pub fn without_a_path_nothing_is_tried() {
    let mut ends = Ends::near(Family::V4);
    ends.transfer();
    ends.take();
    ends.saved.path = None;
    ends.saved.settings = Settings::default();
    let restored = ends.restore();
    assert!(restored.report().get("rto").is_none());
    ends.resume(restored);
    assert_ne!(ends.save().path.unwrap(), Path::default());
    ends.transfer();
}

pub fn a_clock_far_ahead_is_accepted() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::near(family);
        ends.transfer();
        // Milliseconds: a moment, an hour, three weeks. What RFC 7323 takes for the past begins a little later.
        for ahead in [1000, 3_600_000, 21 * 86_400_000] {
            ends.take();
            let clock = ends.saved.control.options.timestamps.as_mut().unwrap();
            *clock = clock.wrapping_add(ahead);
            let restored = ends.restore();
            assert_near(restored.report(), "rto", 20);
            ends.resume(restored);
            ends.transfer();
        }
    }
}

pub fn a_clock_in_microseconds_stays_one() {
    for family in [Family::V4, Family::V6] {
        let mut ends = Ends::near(family);
        ends.transfer();
        ends.take();
        // As a route with the feature `tcp_usec_ts` makes it.
        *ends.saved.control.options.timestamps.as_mut().unwrap() |= 1;
        ends.saved.control.options.microseconds = true;
        let restored = ends.restore();
        ends.resume(restored);
        ends.transfer();
        if !ends.save().control.options.microseconds {
            assert!(!has_kernel([6, 7]), "the clock is one in milliseconds");
            return eprintln!("\nSKIPPED: MICROSECOND TIMESTAMPS: the kernel is older than Linux 6.7\n");
        }
        for _ in 0..2 {
            let restored = ends.restored();
            assert_near(restored.report(), "rto", 20);
            ends.resume(restored);
            let options = ends.save().control.options;
            assert!(options.microseconds && options.timestamps.unwrap() & 1 == 1);
            ends.transfer();
        }
    }
}

/// Before Linux 6.7 the lowest bit of the clock was part of the time; since then it would turn microseconds on.
pub fn an_odd_clock_in_milliseconds_stays_one() {
    for with_estimates in [true, false] {
        let mut ends = Ends::near(Family::V4);
        ends.transfer();
        ends.take();
        let clock = ends.saved.control.options.timestamps.as_mut().unwrap();
        *clock |= 1;
        let before = *clock;
        if !with_estimates {
            ends.saved.path = None;
        }
        let restored = ends.restore();
        ends.resume(restored);
        let options = ends.save().control.options;
        assert!(!options.microseconds, "with estimates: {with_estimates}");
        let passed = options.timestamps.unwrap().wrapping_sub(before);
        assert!(passed < 60_000, "it went from {before} on by {passed} ms");
        ends.transfer();
    }
}

pub fn the_samples_of_a_seed_do_not_end_the_slow_start() {
    let goes_on = || {
        let mut ends = Ends::delayed(Family::V4);
        ends.choose("cubic");
        ends.take();
        let path = ends.saved.path.as_mut().unwrap();
        // Beside it the line looks congested. A window of zero stays that of a new connection.
        (path.rtt, path.rto) = (Duration::from_millis(1), Duration::from_millis(201));
        (path.snd_cwnd, path.snd_ssthresh) = (0, 0);
        let restored = ends.restore();
        ends.resume(restored);
        ends.transfer();
        ends.save().path.unwrap().snd_ssthresh >= i32::MAX as u32
    };
    // On a busy machine packets may be as late as on a congested path.
    assert!((0..5).any(|_| goes_on()), "the slow start ended every time");
}

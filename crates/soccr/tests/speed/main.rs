//! A restored connection is as fast as it was, and what could not be brought back is told.

mod ends;
mod estimates;
mod options;

use ends::{Ends, bpf_is_allowed};
use rustix::net::sockopt::set_tcp_congestion;
use rustix::net::{AddressFamily, SocketType, socket};
use soccr::connection::Path;
use soccr::{Fidelity, Report};
use soccr_lab::{Family, Side, sysctl};

macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        [$($(soccr_lab::Test::new(concat!(stringify!($module), "::", stringify!($name)), $module::$name),)*)*]
    };
}

fn main() -> std::process::ExitCode {
    soccr_lab::harness(tests! {
        window: every_value_of_every_algorithm_comes_back
            explicit_congestion_notification_comes_back
            a_lost_first_segment_is_repeated_as_soon_as_before;
        estimates: every_path_gets_its_timeout_back
            a_swallowed_acknowledgement_costs_only_the_estimate
            without_timestamps_the_estimate_is_missing
            without_a_path_nothing_is_tried
            a_clock_far_ahead_is_accepted
            a_clock_in_microseconds_stays_one
            an_odd_clock_in_milliseconds_stays_one
            the_samples_of_a_seed_do_not_end_the_slow_start;
        options: every_option_comes_back
            an_option_that_is_missing_is_fatal_for_the_strict
            keys_come_back
            options_of_the_ip_header_come_back
            a_handshake_knows_its_peer
            a_closed_window_opens_though_its_update_was_lost;
    })
}

/// Whether an estimate is as near to what it was as was promised.
#[track_caller]
fn is_near(report: &Report, name: &str, percent: u64) -> bool {
    let entry = report.get(name).unwrap_or_else(|| panic!("{name} is not in {report:?}"));
    let [before, after] = entry.values().unwrap();
    before.abs_diff(after) * 100 <= before * percent
}

#[track_caller]
fn assert_near(report: &Report, name: &str, percent: u64) {
    assert!(is_near(report, name, percent), "{}", report.get(name).unwrap());
}

#[track_caller]
fn fidelity(report: &Report, name: &str) -> Fidelity {
    report.get(name).unwrap_or_else(|| panic!("{name} is not in {report:?}")).fidelity()
}

/// What needs BPF is back, or the report says what that needs.
#[track_caller]
fn assert_written(report: &Report, name: &str) {
    if bpf_is_allowed() {
        assert_near(report, name, 5);
    } else if fidelity(report, name) != Fidelity::Exact {
        assert_eq!(fidelity(report, name), Fidelity::Missing, "{report}");
        let reason = report.get(name).unwrap().reason();
        assert!(["CAP_BPF", "Linux 6.4", "CONFIG_"].iter().any(|needed| reason.contains(needed)), "{report}");
    }
}

mod window {
    use super::*;

    pub fn every_value_of_every_algorithm_comes_back() {
        for family in [Family::V4, Family::V6, Family::Mapped] {
            for algorithm in ["cubic", "reno", "bbr"] {
                let mut ends = Ends::delayed(family);
                ends.choose(algorithm);
                ends.transfer();
                // So that there is a threshold.
                ends.line().lose_next(Side::A, |segment| segment.payload_len > 1000);
                ends.transfer();
                ends.calm();
                ends.take();
                let is_good = |report: &Report| is_near(report, "rtt", 20) && is_near(report, "rto", 20);
                let restored = ends.restore_until(is_good);
                let report = restored.report();
                assert_eq!(fidelity(report, "snd_mss"), Fidelity::Exact, "{report}");
                assert_near(report, "rtt", 20);
                assert_near(report, "rto", 20);
                let [before, after] = report.get("rcv_ssthresh").unwrap().values().unwrap();
                assert!(after * 10 >= before * 9, "{report}");
                assert_written(report, "snd_cwnd");
                if algorithm != "bbr" {
                    assert_written(report, "snd_ssthresh");
                }
                report.strict().unwrap();
                let before = ends.saved.path.unwrap();
                ends.resume(restored);
                let after = ends.save();
                assert_eq!(after.settings, ends.saved.settings);
                assert_eq!(after.buffers, ends.saved.buffers.map(ends::even));
                assert_eq!(after.path.map(mss), Some(mss(before)));
                ends.transfer();
            }
        }
    }

    fn has_algorithm(name: &str) -> bool {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        set_tcp_congestion(&socket, name).is_ok()
    }

    fn mss(path: Path) -> u32 {
        path.snd_mss
    }

    pub fn explicit_congestion_notification_comes_back() {
        for (family, algorithm) in
            [(Family::V4, "cubic"), (Family::V6, "cubic"), (Family::V4, "dctcp"), (Family::V6, "dctcp")]
        {
            if !has_algorithm(algorithm) {
                soccr_lab::skip(format_args!("{algorithm} is not in this kernel, or not loaded"));
                continue;
            }
            let mut ends = Ends::prepared(family, |host| {
                host.run(|| sysctl("net/ipv4/tcp_ecn", "1")).unwrap();
            });
            ends.choose(algorithm);
            ends.transfer();
            let restored = ends.restored();
            assert!(ends.saved.control.options.ecn && ends.saved.control.options.ecn_seen);
            assert_written(restored.report(), "snd_cwnd");
            let expected = if bpf_is_allowed() { Fidelity::Exact } else { Fidelity::Missing };
            assert_eq!(fidelity(restored.report(), "ecn"), expected, "{}", restored.report());
            ends.resume(restored);
            let options = ends.save().control.options;
            assert_eq!((options.ecn, options.ecn_seen), (bpf_is_allowed(), bpf_is_allowed()));
            let now = ends.save().settings;
            assert_eq!(now.get("TCP_CONGESTION"), ends.saved.settings.get("TCP_CONGESTION"));
            ends.transfer();
        }
    }

    pub fn a_lost_first_segment_is_repeated_as_soon_as_before() {
        for family in [Family::V4, Family::V6, Family::Mapped] {
            let mut ends = Ends::delayed(family);
            ends.transfer();
            let restored = ends.restored();
            ends.line().lose_next(Side::A, |segment| segment.payload_len > 0);
            ends.resume(restored);
            let (before, after) = (ends.saved.path.unwrap().rto, ends.save().path.unwrap().rto);
            assert!(after.abs_diff(before) * 5 <= before, "{after:?} instead of {before:?}");
            ends.transfer();
            assert!(ends.line().lost(Side::A) > 0);
        }
    }
}

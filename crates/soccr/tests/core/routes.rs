//! A route of the target says how connections over it shall begin: one that comes there has begun long ago.

use std::io;
use std::os::fd::AsFd;
use std::process::Command;

use soccr::{Fidelity, Paused};
use soccr_lab::{Family, skip};

use crate::ends::{Ends, comparable};

/// What ip-route(8) may say of a route, and the values that the kernel then keeps from a connection. The congestion
/// window is set by an algorithm.
const METRICS: [(&str, &[&str]); 14] = [
    ("initcwnd 2", &[]),
    ("initrwnd 2", &[]),
    ("rto_min 3s", &["rto"]),
    ("quickack 1", &[]),
    ("features ecn", &[]),
    ("window 8192", &[]),
    ("congctl reno", &[]),
    ("congctl lock reno", &["snd_cwnd", "TCP_CONGESTION"]),
    ("advmss 700", &[]),
    ("reordering 100", &[]),
    ("cwnd lock 4", &[]),
    ("ssthresh lock 4", &[]),
    ("rtt 5s", &[]),
    ("rttvar 5s", &[]),
];

pub fn what_a_route_asks_for_changes_no_connection() {
    let usual = differences(None, &[]).unwrap_or_default();
    for (metric, kept) in METRICS {
        let Some(mut found) = differences(Some(metric), kept) else {
            return skip("what a route asks for: there is no ip(8)");
        };
        found.retain(|name| !usual.contains(name));
        let expected: Vec<_> =
            kept.iter().copied().filter(|name| !usual.iter().any(|usual| usual == name)).collect();
        assert_eq!(found, expected, "{metric}");
    }
}

/// Moves a connection to where its route says this, and returns the values that are told to differ. `None` without ip(8).
fn differences(metric: Option<&str>, kept: &[&str]) -> Option<Vec<String>> {
    let mut ends = Ends::new(Family::V4);
    ends.receive(5000);
    let mut connection = ends.take();
    // No route asks for so much: where it cannot be set, that is told each time.
    connection.path.as_mut().unwrap().snd_cwnd = 20;
    if let Some(metric) = metric {
        let mut ip = Command::new("ip");
        ip.args("route replace 192.0.2.0/24 dev eth0".split(' ')).args(metric.split(' '));
        match ends.pair.a.run(|| ip.status()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            status => assert!(status.unwrap().success(), "{metric}"),
        }
    }
    let restored = ends.restore(&connection).unwrap();
    let is_estimate = |name: &str| matches!(name, "rtt" | "rto" | "rcv_ssthresh");
    let report = restored.report().iter();
    let differs = report.filter(|entry| entry.fidelity() != Fidelity::Exact).map(|entry| entry.name());
    let names = differs.filter(|name| !is_estimate(name) || kept.contains(name)).map(str::to_owned).collect();
    let paused = Paused::take_over(restored.as_fd()).unwrap();
    let again = paused.save().unwrap();
    paused.leave_paused();
    if !kept.contains(&"TCP_CONGESTION") {
        assert_eq!(comparable(&again), comparable(&connection), "{metric:?}");
    }
    ends.resume(restored);
    ends.finish();
    Some(names)
}

//! A route of the target says how connections over it shall begin: one that comes there has begun long ago.

use std::os::fd::AsFd;

use soccr::{Fidelity, Paused};
use soccr_lab::{Family, Metric};

use crate::ends::{Ends, comparable};

/// `RTAX_LOCK`: the metrics by which a connection has to stay.
const LOCK: u16 = 1;

/// What a route may say, with the names of ip-route(8), and the values that the kernel then keeps from a connection. The
/// congestion window is set by an algorithm.
const METRICS: [(&str, &[Metric<'_>], &[&str]); 14] = [
    ("window", &[(3, &8192u32.to_ne_bytes())], &[]),
    ("rtt", &[(4, &40_000u32.to_ne_bytes())], &[]),
    ("rttvar", &[(5, &20_000u32.to_ne_bytes())], &[]),
    ("lock ssthresh", &[(LOCK, &(1u32 << 6).to_ne_bytes()), (6, &4u32.to_ne_bytes())], &[]),
    ("lock cwnd", &[(LOCK, &(1u32 << 7).to_ne_bytes()), (7, &4u32.to_ne_bytes())], &[]),
    ("advmss", &[(8, &700u32.to_ne_bytes())], &[]),
    ("reordering", &[(9, &100u32.to_ne_bytes())], &[]),
    ("initcwnd", &[(11, &2u32.to_ne_bytes())], &[]),
    ("features ecn", &[(12, &1u32.to_ne_bytes())], &[]),
    ("lock rto_min", &[(LOCK, &(1u32 << 13).to_ne_bytes()), (13, &3000u32.to_ne_bytes())], &["rto"]),
    ("initrwnd", &[(14, &2u32.to_ne_bytes())], &[]),
    ("quickack", &[(15, &1u32.to_ne_bytes())], &[]),
    ("congctl", &[(16, b"reno\0")], &[]),
    (
        "lock congctl",
        &[(LOCK, &(1u32 << 16).to_ne_bytes()), (16, b"reno\0")],
        &["snd_cwnd", "TCP_CONGESTION"],
    ),
];

pub fn what_a_route_asks_for_changes_no_connection() {
    let usual = differences(&[], &[]);
    for (name, metrics, kept) in METRICS {
        let mut found = differences(metrics, kept);
        found.retain(|name| !usual.contains(name));
        let expected: Vec<_> =
            kept.iter().copied().filter(|name| !usual.iter().any(|usual| usual == name)).collect();
        assert_eq!(found, expected, "{name}");
    }
}

/// Moves a connection to where its route says this, and returns the values that are told to differ.
fn differences(metrics: &[Metric<'_>], kept: &[&str]) -> Vec<String> {
    let mut ends = Ends::new(Family::V4);
    ends.receive(5000);
    let mut connection = ends.take();
    // No route asks for so much: where it cannot be set, that is told each time.
    connection.path.as_mut().unwrap().snd_cwnd = 20;
    ends.pair.a.namespace.set_metrics(metrics).unwrap();
    let restored = ends.restore(&connection).unwrap();
    let is_estimate = |name: &str| matches!(name, "rtt" | "rto" | "rcv_ssthresh");
    let report = restored.report().iter();
    let differs = report.filter(|entry| entry.fidelity() != Fidelity::Exact).map(|entry| entry.name());
    let names = differs.filter(|name| !is_estimate(name) || kept.contains(name)).map(str::to_owned).collect();
    let paused = Paused::take_over(restored.as_fd()).unwrap();
    let again = paused.save().unwrap();
    paused.leave_paused();
    if !kept.contains(&"TCP_CONGESTION") {
        assert_eq!(comparable(&again), comparable(&connection), "{metrics:?}");
    }
    ends.resume(restored);
    ends.finish();
    names
}

//! A route of the target says how connections over it shall begin: one that comes there has begun long ago.

use std::io;
use std::os::fd::AsFd;
use std::process::Command;

use soccr::{Fidelity, Paused};
use soccr_lab::{Family, skip};

use crate::ends::{Ends, comparable};

/// What ip-route(8) may say of a route, and the value that the kernel then keeps from a connection.
const METRICS: [(&str, Option<&str>); 14] = [
    ("initcwnd 2", None),
    ("initrwnd 2", None),
    ("rto_min 3s", Some("rto")),
    ("quickack 1", None),
    ("features ecn", None),
    ("window 8192", None),
    ("congctl reno", None),
    ("congctl lock reno", Some("TCP_CONGESTION")),
    ("advmss 700", None),
    ("reordering 100", None),
    ("cwnd lock 4", None),
    ("ssthresh lock 4", None),
    ("rtt 5s", None),
    ("rttvar 5s", None),
];

pub fn what_a_route_asks_for_changes_no_connection() {
    let usual = differences(None, None).unwrap_or_default();
    for (metric, kept) in METRICS {
        let Some(mut found) = differences(Some(metric), kept) else {
            return skip("what a route asks for: there is no ip(8)");
        };
        found.retain(|name| !usual.contains(name));
        assert_eq!(found, Vec::from_iter(kept), "{metric}");
    }
}

/// Moves a connection to where its route says this, and returns the values that are told to differ. `None` without ip(8).
fn differences(metric: Option<&str>, kept: Option<&str>) -> Option<Vec<String>> {
    let mut ends = Ends::new(Family::V4);
    ends.receive(5000);
    let connection = ends.take();
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
    let names = differs.filter(|name| !is_estimate(name) || kept == Some(*name)).map(str::to_owned).collect();
    let paused = Paused::take_over(restored.as_fd()).unwrap();
    let again = paused.save().unwrap();
    paused.leave_paused();
    if kept != Some("TCP_CONGESTION") {
        assert_eq!(comparable(&again), comparable(&connection), "{metric:?}");
    }
    ends.resume(restored);
    ends.finish();
    Some(names)
}

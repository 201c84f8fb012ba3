//! `soccr send --dry-run`: the target says what it would do, and nothing happens.

use std::process::Command;

use serde_json::Value;
use soccr::conntrack::Tracking;
use soccr_lab::{Call, Side, run_and_watch};

use crate::programs::{SOCCR, assert_runs, complaints, installed};
use crate::transfer::Move;

crate::tests![
    what_would_move_is_told,
    a_target_without_the_address_says_so,
    a_target_without_rights_or_program_says_so,
    nothing_is_stopped_or_locked,
    nothing_is_tracked,
];

/// Exit code, answers where there are any, and complaints.
fn ask(moving: &Move, via: &str) -> (i32, Vec<Value>, String) {
    let output = moving.send(&["--all", "--dry-run", "--json", "--via", via]).output().unwrap();
    let answers = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code().unwrap(), answers, complaints(&output.stderr))
}

/// All is as it was.
fn assert_untouched(mut moving: Move) {
    assert_runs(&moving.old.pid());
    moving.assert_lives_at(Side::A, "old ");
}

fn what_would_move_is_told() {
    if !installed("python3") {
        return;
    }
    for goal in [Side::A, Side::B] {
        let moving = Move::to(goal, 3);
        let (code, answers, complaint) = ask(&moving, &moving.receive());
        assert_eq!((code, complaint.as_str()), (0, ""), "{goal:?}");
        assert_eq!(answers.len(), 3);
        for answer in &answers {
            assert_eq!((&answer["moves"], &answer["reason"]), (&Value::Bool(true), &Value::Null), "{answer}");
            assert!(answer["local"].as_str().unwrap().ends_with(":7"), "{answer}");
        }
        // For people.
        let send = moving.send(&["--all", "--dry-run", "--via", &moving.receive()]).output().unwrap();
        let text = String::from_utf8(send.stdout).unwrap();
        assert!(text.ends_with("\n3 of 3 would move; nothing was done\n"), "{text}");
        assert_untouched(moving);
    }
}

fn a_target_without_the_address_says_so() {
    if !installed("python3") {
        return;
    }
    let moving = Move::new(2);
    // The network of this test is none of the two hosts.
    let (code, answers, complaint) = ask(&moving, &format!("{SOCCR} receive -- true"));
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("another network namespace of this host"), "{complaint}");
    for answer in &answers {
        assert!(answer["reason"].as_str().unwrap().contains("EADDRNOTAVAIL"), "{answer}");
    }
    assert_eq!(answers.len(), 2);
    assert_untouched(moving);
}

fn a_target_without_rights_or_program_says_so() {
    if !installed("python3") || !installed("setpriv") {
        return;
    }
    let moving = Move::new(1);
    let (code, answers, complaint) =
        ask(&moving, &format!("exec setpriv --bounding-set -net_admin {}", moving.receive()));
    assert_eq!((code, answers.len()), (1, 0));
    assert!(complaint.contains("EPERM") && complaint.contains("the target is gone"), "{complaint}");
    let netns = moving.beside.pid();
    let (code, answers, complaint) =
        ask(&moving, &format!("exec {SOCCR} receive --netns {netns} -- /nowhere/to/be/found"));
    assert_eq!((code, answers.len()), (1, 0));
    assert!(complaint.contains("/nowhere/to/be/found"), "{complaint}");
    assert_untouched(moving);
}

fn nothing_is_stopped_or_locked() {
    if !installed("python3") {
        return;
    }
    let moving = Move::to(Side::B, 2);
    let mut send = moving.send(&["--all", "--dry-run", "--via", &moving.receive()]);
    let disturbing = [libc::SYS_ptrace, libc::SYS_kill, libc::SYS_pidfd_send_signal, libc::SYS_tgkill];
    let mut seen = Vec::new();
    run_and_watch(&mut send, |call: &Call| {
        let is_netfilter = call.number == libc::SYS_socket
            && call.arguments[0] == libc::AF_NETLINK as u64
            && call.arguments[2] == libc::NETLINK_NETFILTER as u64;
        if disturbing.contains(&call.number) || is_netfilter {
            seen.push(call.number);
        }
    });
    assert!(seen.is_empty(), "{seen:?}");
    assert_untouched(moving);
}

/// Where rules could look at an entry of connection tracking.
fn nothing_is_tracked() {
    if !installed("python3") || !installed("nft") {
        return;
    }
    let moving = Move::new(1);
    let flow = moving.saved().flow();
    let tracked = || {
        let Some(mut tracking) = Tracking::open().unwrap() else {
            soccr_lab::skip("the kernel tracks no connections");
            return None;
        };
        tracking.find(flow).unwrap()
    };
    moving.lab.b.run(|| {
        let rule = "add table inet filter { chain in { type filter hook input priority 0; ct state established accept; }; }";
        assert!(Command::new("nft").arg(rule).status().unwrap().success());
    });
    let (code, _, complaint) = ask(&moving, &moving.receive());
    assert_eq!((code, complaint.as_str()), (0, ""));
    assert_eq!(moving.lab.b.run(tracked), None);
    assert_untouched(moving);
}

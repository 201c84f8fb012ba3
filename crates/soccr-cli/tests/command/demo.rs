//! `demo`: a whole run, and what it draws.

use std::process::Command;

use serde_json::Value;

use crate::programs::{SOCCR, installed, run, soccr, succeed};

crate::tests![
    a_move_is_drawn_as_the_peer_saw_it,
    an_account_that_cannot_be_written_is_no_success,
    a_picture_that_cannot_be_written_is_told_at_once,
    where_no_network_can_be_made_the_remedy_comes_last
];

/// In a user namespace without any user, nobody can make another namespace.
fn where_no_network_can_be_made_the_remedy_comes_last() {
    if !installed("unshare") {
        return;
    }
    let output = Command::new("unshare").args(["-U", SOCCR, "demo"]).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(complaint.starts_with("soccr: no private network: unshare("), "{complaint}");
    assert_eq!(complaint.matches("(os error 1)").count(), 1, "{complaint}");
    assert!(complaint.ends_with(" or be root\n"), "{complaint}");
}

fn a_picture_that_cannot_be_written_is_told_at_once() {
    let output = run(&["demo", "--picture", "/proc/nowhere/move.svg"]);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(complaint.contains("/proc/nowhere/move.svg: No such file"), "{complaint}");
    assert!(output.status.code() == Some(1) && output.stdout.is_empty(), "nothing has moved");
}

fn an_account_that_cannot_be_written_is_no_success() {
    for format in [&[][..], &["--json"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let demo = soccr(&[&["demo", "--moves", "1"], format].concat()).stdout(full).output().unwrap();
        let complaint = String::from_utf8_lossy(&demo.stderr);
        assert!(demo.status.code() == Some(1) && complaint.contains("standard output: "), "{complaint}");
    }
}

fn a_move_is_drawn_as_the_peer_saw_it() {
    let directory = tempfile::tempdir().unwrap();
    let picture = directory.path().join("move.svg");
    let output = succeed(&["demo", "--moves", "3", "--json", "--picture", picture.to_str().unwrap()]);
    let summary: Value = serde_json::from_slice(&output).unwrap();
    assert_eq!((&summary["bytes_lost"], &summary["resets"]), (&0.into(), &0.into()), "{summary}");
    let picture = std::fs::read_to_string(picture).unwrap();
    assert!(picture.contains("moves from host") && picture.contains("locked for"), "{picture}");
    let marks = |class: &str, mark: char| {
        let paths = picture.lines().filter(|line| line.contains(class));
        paths.map(|line| line.matches(mark).count()).sum::<usize>()
    };
    assert!(marks("class=\"data\"", 'V') > 10 && marks("class=\"ack\"", 'H') > 10, "{picture}");
}

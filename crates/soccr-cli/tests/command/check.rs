//! `soccr check`.

use serde_json::Value;
use soccr_lab::{Namespace, Rtnetlink};

use crate::programs::{SOCCR, assert_unlocked, json, run};

crate::tests![what_is_needed_works_here, without_lo_it_says_what_to_do, two_machines_are_compared];

fn works<'a>(findings: &'a [Value], name: &str) -> (&'a Value, &'a str) {
    let finding = findings.iter().find(|finding| finding["name"] == name).unwrap();
    (&finding["works"], finding["detail"].as_str().unwrap())
}

fn what_is_needed_works_here() {
    let findings = json(&["check", "--json"]);
    for finding in &findings {
        assert!(finding["essential"] == false || finding["works"] == true, "{finding}");
        assert!(finding["works"] == true || finding["detail"] != "", "{finding}");
    }
    assert_eq!(works(&findings, "move half-closed ones").0, true);
    let (tls, detail) = works(&findings, "kernel TLS");
    assert!(tls == true || detail.contains("modprobe tls"), "{detail}");
    assert_unlocked();
    let text = String::from_utf8(run(&["check"]).stdout).unwrap();
    assert_eq!(text.lines().count(), findings.len() + 1);
}

fn without_lo_it_says_what_to_do() {
    let bare = Namespace::new().unwrap();
    bare.run(|| Rtnetlink::here().unwrap().down("lo")).unwrap();
    let output = bare.run(|| run(&["check", "--json"]));
    assert_eq!(output.status.code(), Some(1));
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let (works, detail) = works(&findings, "move");
    assert!(works == false && detail.contains("ip link set lo up"), "{detail}");
    let text = String::from_utf8(bare.run(|| run(&["check"])).stdout).unwrap();
    assert_eq!(text.matches("ip link set lo up").count(), 1, "a cause is told once: {text}");
    assert!(text.contains("see connections over lo"), "{text}");
}

fn two_machines_are_compared() {
    let via = format!("{SOCCR} check --json");
    let same = run(&["check", "--via", &via]);
    assert_eq!(same.status.code(), Some(0), "{}", String::from_utf8_lossy(&same.stdout));
    let silent = run(&["check", "--via", "exit 7"]);
    let complaint = String::from_utf8_lossy(&silent.stderr);
    assert!(silent.status.code() == Some(1) && complaint.contains("exit status: 7"), "{complaint}");
}

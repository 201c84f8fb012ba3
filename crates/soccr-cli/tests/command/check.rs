//! `soccr check`.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;
use soccr_lab::{Lan, Namespace, Rtnetlink, sysctl};

use crate::programs::{SOCCR, assert_unlocked, installed, json, run};

crate::tests![
    what_is_needed_works_here,
    nothing_is_left_behind,
    without_lo_it_says_what_to_do,
    two_machines_are_compared,
    rules_that_let_our_segments_pass_are_no_obstacle,
    rules_that_drop_our_segments_are_named_and_the_remedy_helps,
    what_drops_unknown_connections_is_named,
    strict_reverse_paths_are_named,
    an_address_that_is_not_here_is_refused,
    where_nobody_may_trace_it_says_so,
];

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

fn nothing_is_left_behind() {
    let network = Namespace::new().unwrap();
    network.run(|| run(&["check"]));
    let left = network.run(|| run(&["list", "--json"]));
    assert_eq!(serde_json::from_slice::<Vec<Value>>(&left.stdout).unwrap(), [] as [Value; 0]);
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
    for via in ["exit 7", "echo '[]'; exit 7"] {
        let silent = run(&["check", "--via", via]);
        let complaint = String::from_utf8_lossy(&silent.stderr);
        assert!(silent.status.code() == Some(1) && complaint.contains("exit status: 7"), "{complaint}");
    }
}

/// What `soccr check` says in a network.
fn checked(network: &Namespace, name: &str) -> (bool, String) {
    let output = network.run(|| run(&["check", "--json"]));
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let (works, detail) = works(&findings, name);
    (works.as_bool().unwrap(), detail.to_owned())
}

fn load(network: &Namespace, rules: &str) {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped());
    let mut nft = network.run(|| command.spawn()).unwrap();
    write!(nft.stdin.take().unwrap(), "flush ruleset\ntable inet others {{\n{rules}\n}}\n").unwrap();
    assert!(nft.wait().unwrap().success(), "{rules}");
}

fn rules_that_let_our_segments_pass_are_no_obstacle() {
    if !installed("nft") {
        return;
    }
    let network = Namespace::new().unwrap();
    for rules in [
        "",
        "chain input { type filter hook input priority 0; policy drop; iif lo accept; }",
        "chain input { type filter hook input priority 0; policy drop; ct state established,related accept; }",
        "chain input { type filter hook input priority 0; policy drop; ct state { established, related } counter accept; }",
        "chain input { type filter hook input priority 0; ct state vmap { established : accept, invalid : drop }; reject; }",
        // Others mean other marks, and other packets.
        "chain input { type filter hook input priority 0; meta mark 0xC115 drop; meta mark { 1, 2 } drop; iifname eth0 drop; }",
        "chain input { type filter hook input priority 0; meta mark & 0xff == 0x15 drop; meta mark != 0xC114 tcp dport 1 drop; }",
        "chain forward { type filter hook forward priority 0; policy drop; meta mark 0xC114 drop; }",
        // As ufw does it.
        "chain before { iifname lo accept; }
         chain input { type filter hook input priority 0; policy drop; jump before; }",
    ] {
        load(&network, rules);
        let (works, detail) = checked(&network, "firewalls of others");
        assert!(works && detail.contains("none drops"), "{rules}: {detail}");
    }
}

fn rules_that_drop_our_segments_are_named_and_the_remedy_helps() {
    if !installed("nft") {
        return;
    }
    let network = Namespace::new().unwrap();
    for (rules, says) in [
        (
            "chain input { type filter hook input priority 0; meta mark 0xC114 drop; }",
            "inet others input drops packets with the mark 0xC114",
        ),
        (
            "chain input { type filter hook input priority 0; meta mark { 5, 0xC114 } tcp dport 80 reject; }",
            "inet others input drops packets with the mark 0xC114",
        ),
        (
            "chain out { type filter hook output priority 0; meta mark & 0xff00 == 0xC100 ip daddr 192.0.2.1 drop; }",
            "inet others out drops packets with the mark 0xC114",
        ),
        (
            "chain marks { meta mark vmap { 5 : accept, 0xC114 : drop }; }
             chain pre { type filter hook prerouting priority 0; ip saddr 192.0.2.1 jump marks; }",
            "inet others marks drops packets with the mark 0xC114",
        ),
        (
            "chain input { type filter hook input priority 0; policy drop; tcp dport 80 accept; }",
            "inet others input drops what no rule accepts",
        ),
        (
            "chain input { type filter hook input priority 0; iif lo tcp dport 80 accept; counter drop; }",
            "inet others input drops what no rule accepts",
        ),
    ] {
        load(&network, rules);
        let (works, detail) = checked(&network, "firewalls of others");
        assert!(!works && detail.starts_with(says), "{rules}: {detail}");
        let remedy = detail.split_once(": ").unwrap().1;
        let status = network.run(|| Command::new("sh").args(["-c", remedy]).status()).unwrap();
        let (works, detail) = checked(&network, "firewalls of others");
        assert!(status.success() && works, "{rules}: {remedy}: {detail}");
    }
}

fn what_drops_unknown_connections_is_named() {
    if !installed("nft") {
        return;
    }
    let network = Namespace::new().unwrap();
    for (condition, is_named) in [
        ("ct state invalid", true),
        ("ct state untracked", true),
        ("ct state { invalid, new }", true),
        ("ct state != established", true),
        ("ct state new", false),
    ] {
        let rule = format!("{condition} ip saddr 192.0.2.1 drop");
        load(&network, &format!("chain input {{ type filter hook input priority 0; {rule}; }}"));
        let (works, detail) = checked(&network, "strict firewalls");
        let named = detail.contains("inet others input drops what connection tracking does not know");
        assert!(works && named == is_named, "{rule}: {detail}");
    }
    network.run(|| sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")).unwrap();
    let (_, detail) = checked(&network, "strict firewalls");
    assert!(detail.starts_with("nf_conntrack_tcp_loose is 0"), "{detail}");
}

fn strict_reverse_paths_are_named() {
    let lan = Lan::new().unwrap();
    let (one, several) = (&lan.hosts[1].namespace, &lan.router);
    for network in [one, several] {
        let (works, detail) = checked(network, "steered packets");
        assert!(works && detail.contains("no device"), "{detail}");
        network.run(|| sysctl("net/ipv4/conf/all/rp_filter", "1")).unwrap();
    }
    let (works, detail) = checked(one, "steered packets");
    assert!(works && detail.contains("eth0 the only device"), "{detail}");
    let (works, detail) = checked(several, "steered packets");
    assert!(!works, "{detail}");
    for setting in detail.split_once("sysctl -w ").unwrap().1.split(' ') {
        let (name, value) = setting.split_once('=').unwrap();
        several.run(|| sysctl(&name.replace('.', "/"), value)).unwrap();
    }
    let (works, detail) = checked(several, "steered packets");
    assert!(works, "{detail}");
}

fn an_address_that_is_not_here_is_refused() {
    let network = Namespace::new().unwrap();
    let refused = (true, "a connection is refused where its address is missing".to_owned());
    for family in ["ipv4", "ipv6"] {
        assert_eq!(checked(&network, "missing addresses"), refused);
        network.run(|| sysctl(&format!("net/{family}/ip_nonlocal_bind"), "1")).unwrap();
    }
    assert_eq!(checked(&network, "missing addresses"), refused);
    if installed("ip") {
        let all = ["route", "add", "local", "240.0.0.0/4", "dev", "lo"];
        assert!(network.run(|| Command::new("ip").args(all).status()).unwrap().success());
        let (works, detail) = checked(&network, "missing addresses");
        assert!(!works && detail.contains("240.0.0.1"), "{detail}");
    }
}

/// `kernel.yama.ptrace_scope` cannot be lowered again, so the command sees another one.
fn where_nobody_may_trace_it_says_so() {
    if !installed("unshare") || !installed("mount") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let yama = directory.path().join("yama");
    std::fs::create_dir(&yama).unwrap();
    for (scope, is_named) in [("1", false), ("3", true)] {
        std::fs::write(yama.join("ptrace_scope"), format!("{scope}\n")).unwrap();
        let script = "mount --bind \"$0\" /proc/sys/kernel && exec \"$1\" check --json";
        let mut check = Command::new("unshare");
        let output =
            check.args(["-m", "sh", "-c", script]).arg(directory.path()).arg(SOCCR).output().unwrap();
        let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let (works, detail) = works(&findings, "other users' processes");
        assert!(detail.contains(&format!("kernel.yama.ptrace_scope is {scope}")), "{detail}");
        assert_eq!(detail.contains("nobody may"), is_named, "{detail}");
        assert!(works == false || !is_named, "{detail}");
    }
}

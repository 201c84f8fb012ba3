//! Connections whose addresses somebody translates on their way: whoever wants to move one is told.

use std::io::Write;
use std::process::{Command, Stdio};

use soccr_lab::{Call, Lab, Namespace, Side, Supervisor, sysctl};

use crate::programs::{
    HEIR, Program, ask, assert_unlocked, complaints, connect, hear, installed, json, server, soccr, succeed,
};

crate::tests![
    nat_outside_of_the_network_is_named,
    nat_in_the_network_is_named,
    where_nobody_answers_it_is_not_known,
    an_image_is_locked_as_its_packets_come
];

/// The port of a host leads to one of a container, as container engines publish it.
fn nat_outside_of_the_network_is_named() {
    let lab = Lab::new().unwrap();
    let rules =
        "type nat hook prerouting priority -100; ip daddr 198.51.100.254 tcp dport 80 dnat to 192.0.2.1:7;";
    is_named(&lab, &lab.router, rules, "198.51.100.254:80", true);
}

/// As a service mesh does it.
fn nat_in_the_network_is_named() {
    let lab = Lab::new().unwrap();
    let rules = "type nat hook prerouting priority -100; tcp dport 80 redirect to :7;";
    is_named(&lab, &lab.a.namespace, rules, "192.0.2.1:80", false);
}

fn is_named(lab: &Lab, place: &Namespace, rules: &str, wire: &str, outside: bool) {
    if !installed("python3") || !installed("nft") {
        return;
    }
    let rules = format!("table ip nat {{ chain nat {{ {rules} }}; }}");
    assert!(place.run(|| Command::new("nft").arg(rules).status()).unwrap().success());
    let server = lab.a.run(|| server("", 2));
    let mut client = lab.peer.run(|| connect(wire.parse::<std::net::SocketAddr>().unwrap()));
    let mut plain = lab.peer.run(|| connect((lab.a.v4, 7)));
    let mut both = || {
        assert_eq!(ask(&mut client, "one", ""), "one");
        assert_eq!(ask(&mut plain, "one", ""), "one");
    };
    both();
    let list = ["list", "--json", "--pid", &server.pid(), "--state", "established"];
    let rows = place.run(|| json(&list));
    let nat: Vec<_> = rows.iter().map(|row| &row["nat"]).filter(|nat| !nat.is_null()).collect();
    assert_eq!(nat.len(), 1, "{rows:?}");
    assert_eq!((&nat[0]["local"], &nat[0]["outside"]), (&wire.into(), &outside.into()));
    let table = place.run(|| succeed(&["list", "--pid", &server.pid()]));
    let text = format!("yes, but NAT {} its network", if outside { "outside of" } else { "in" });
    assert_eq!(String::from_utf8(table).unwrap().matches(&text).count(), 1);

    let send = ["send", "--pid", &server.pid(), "--all", "--via", "false"];
    let output = place.run(|| soccr(&send).stdout(Stdio::null()).output()).unwrap();
    let complaints = complaints(&output.stderr);
    assert_eq!(complaints.matches("NAT ").count(), 1, "{complaints}");
    assert!(complaints.contains(wire) && complaints.matches(": stays: ").count() == 2, "{complaints}");
    both();
}

/// Every socket by which to ask for what is tracked is refused, as where too many files are open.
fn where_nobody_answers_it_is_not_known() {
    if !installed("nft") {
        return;
    }
    // The kernel tracks connections from now on.
    let rules = "table ip nat { chain nat { type nat hook prerouting priority -100; }; }";
    assert!(Command::new("nft").arg(rules).status().unwrap().success());
    let list = |errno: Option<i32>| {
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel();
            let listing = scope.spawn(move || {
                sender.send(Supervisor::of_this_thread(&[libc::SYS_socket])).unwrap();
                soccr(&["list", "--json"]).output().unwrap()
            });
            let supervisor = receiver.recv().unwrap().expect("seccomp");
            let asks = [libc::AF_NETLINK as u64, libc::NETLINK_NETFILTER as u64];
            let decide = |call: Call| errno.filter(|_| [call.arguments[0], call.arguments[2]] == asks);
            while supervisor.decide(decide).unwrap().is_some() {}
            let output = listing.join().unwrap();
            assert!(output.status.success(), "{output:?}");
            complaints(&output.stderr)
        })
    };
    assert_eq!(list(None), "");
    assert_eq!(list(Some(libc::EPERM)), "");
    let told = list(Some(libc::EMFILE));
    assert!(told.contains("NAT") && told.contains("EMFILE") && told.lines().count() == 1, "{told}");
}

/// The host to which it goes does not know yet that they are translated.
fn an_image_is_locked_as_its_packets_come() {
    if !installed("python3") || !installed("nft") {
        return;
    }
    let lab = Lab::new().unwrap();
    let rules = "table ip nat { chain nat { type nat hook prerouting priority -100; tcp dport 80 redirect to :7; }; }";
    for host in [&lab.a, &lab.b] {
        assert!(host.run(|| Command::new("nft").arg(rules).status()).unwrap().success());
        // Or a packet that is no SYN begins a connection, and is translated.
        host.run(|| sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let image = image.to_str().unwrap();
    let old = lab.a.run(|| server("old ", 1));
    let mut client = lab.peer.run(|| connect((lab.a.v4, 80)));
    assert_eq!(ask(&mut client, "one", "old "), "old one");
    lab.a.run(|| succeed(&["save", "--pid", &old.pid(), "--all", "-o", image]));

    lab.b.run(|| succeed(&["lock", "--image", image]));
    lab.steer(Side::B).unwrap();
    client.write_all(b"two").unwrap();
    let mut restore = soccr(&["restore", image, "--", "python3", "-c", HEIR, "new "]);
    let _new = lab.b.run(|| Program::start(restore.stdout(Stdio::piped())));
    assert_eq!(hear(&mut client, 7), "new two");
    assert_eq!(ask(&mut client, "three", "new "), "new three");
    lab.b.run(assert_unlocked);
}

//! The ways that packets of steered connections take: there, back, and on.

use std::net::TcpStream;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use soccr::steer::{Foreign, Numbers, Tunnel};
use soccr_lab::{Lan, wait_until};

use crate::kill::{Boundary, End, READY, hand_over_by};
use crate::programs::{Program, installed, json, soccr, succeed};
use crate::steered::Steering;

crate::tests![
    an_address_on_a_device_of_its_own_is_steered,
    on_from_a_host_with_two_networks,
    answers_of_one_address_take_one_way,
    a_hand_over_that_fails_leaves_the_answers_as_they_were,
    answers_go_on_through_the_old_host_when_the_path_gets_shorter,
    a_tunnel_that_is_there_is_used_again,
    a_delivery_whose_table_is_gone_is_seen,
];

fn ip(lan: &Lan, host: usize, command: &str) {
    let run = || Command::new("ip").args(command.split(' ')).status().unwrap();
    assert!(lan.hosts[host].run(run).success(), "{command}");
}

/// No packet arrives by the device that has the address.
fn an_address_on_a_device_of_its_own_is_steered() {
    if !installed("python3") || !installed("ip") {
        return;
    }
    let lan = Lan::new().unwrap();
    ip(&lan, 0, "link add service type bridge");
    ip(&lan, 0, "link set service up");
    ip(&lan, 0, "address del 192.0.2.1/24 dev eth0");
    ip(&lan, 0, "address add 192.0.2.1/32 dev service");
    ip(&lan, 0, "address add 192.0.2.11/24 dev eth0");
    ip(&lan, 0, "route add default via 192.0.2.254");
    let mut steering = Steering::on(lan, 2, false);
    steering.move_to(&steering.old.pid(), 1, "second ", true);
    steering.assert_lives("second ");
    steering.move_to(&steering.holder(1), 0, "home ", false);
    steering.assert_lives("home ");
    assert!(steering.list(0)["steered"].as_array().unwrap().is_empty());
    steering.end();
}

/// The hosts have a network among themselves. Peers are reached by another.
fn on_from_a_host_with_two_networks() {
    if !installed("python3") || !installed("ip") {
        return;
    }
    let lan = Lan::new().unwrap();
    let router = |command: &str| {
        let run = || Command::new("ip").args(command.split(' ')).status().unwrap();
        assert!(lan.router.run(run).success(), "{command}");
    };
    router("link add back type bridge");
    router("link set back up");
    let place = lan.router.run(|| Program::start(Command::new("sleep").arg("1000")));
    for host in 0..3 {
        ip(&lan, host, &format!("link add eth1 type veth peer name back{host} netns {}", place.pid()));
        ip(&lan, host, "link set eth1 up");
        ip(&lan, host, &format!("address add 10.0.0.{}/24 dev eth1", host + 1));
        router(&format!("link set back{host} master back up"));
    }
    let mut steering = Steering::on(lan, 2, false);
    for (from, to) in [(0, 1), (1, 2)] {
        let pid = if from == 0 { steering.old.pid() } else { steering.holder(from) };
        let prefix = format!("{to} ");
        let hop = format!("10.0.0.{}", to + 1);
        let status = steering.send(&pid, &steering.receive(to, &prefix, ""), &["--steer", &hop]).status();
        assert!(status.unwrap().success());
        steering.assert_lives(&prefix);
    }
    // Whichever way they may come, each is listed once.
    assert_eq!(steering.list(1)["steered"].as_array().unwrap().len(), 2);
    steering.end();
}

const BACK: &str = "--return-via-source";

fn answers_of_one_address_take_one_way() {
    if !installed("python3") {
        return;
    }
    for (first, second, why) in
        [(Some(BACK), None, "answer through 192.0.2.1 dev eth0"), (None, Some(BACK), "answer directly")]
    {
        let mut steering = Steering::new(2, false);
        let sockets = json(&["list", "--json", "--netns", &steering.places[0].pid()]);
        let descriptor = |client: &TcpStream| {
            let remote = client.local_addr().unwrap().to_string();
            let socket = sockets.iter().find(|socket| socket["remote"] == remote).unwrap();
            socket["processes"][0]["fd"].to_string()
        };
        let descriptors: Vec<String> = steering.clients.iter().map(descriptor).collect();
        let send = |number: usize, back: Option<&str>| {
            let via = steering.receive(1, "new ", "");
            let pid = steering.old.pid();
            let mut send = soccr(&["send", "--pid", &pid, "--fd", &descriptors[number], "--via", &via]);
            send.args(["--steer", "192.0.2.2"]).args(back);
            send.stdout(Stdio::null()).output().unwrap()
        };
        assert!(send(0, first).status.success());
        let refused = send(1, second);
        assert_eq!(refused.status.code(), Some(1));
        let complaint = String::from_utf8_lossy(&refused.stderr);
        assert!(complaint.contains(why) && complaint.contains(BACK), "{complaint}");
        let other = steering.clients.split_off(1);
        steering.assert_lives("new ");
        steering.clients = other;
        steering.assert_lives("old ");
        steering.end();
    }
}

fn a_hand_over_that_fails_leaves_the_answers_as_they_were() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::new(1, false);
    let home = steering.lan.hosts[0].v4.into();
    steering.lan.hosts[1].run(|| Foreign::deliver(home, Numbers::default())).unwrap();
    let send = |via: &str| steering.send(&steering.old.pid(), via, &["--steer", "192.0.2.2", BACK]);
    let boundary = (Boundary(End::Target, READY), 1);
    let status = hand_over_by(send, &steering.receive(1, "new ", ""), boundary, &[End::Target], Signal::TERM);
    assert_eq!(status.code(), Some(1));
    wait_until("it is as before", || steering.list(1)["delivered"][0]["answers_table"].is_null());
    assert_eq!(steering.list(1)["delivered"].as_array().unwrap().len(), 1);
    steering.assert_lives("old ");
    // What no connection uses can change.
    for (back, place) in [(true, "second "), (false, "third ")] {
        let more: Vec<&str> = ["--steer", "192.0.2.2"].into_iter().chain(back.then_some(BACK)).collect();
        let pid = if back { steering.old.pid() } else { steering.holder(0) };
        assert!(steering.send(&pid, &steering.receive(1, place, ""), &more).status().unwrap().success());
        steering.assert_lives(place);
        assert_eq!(steering.list(1)["delivered"][0]["answers_table"].is_null(), !back);
        steering.move_to(&steering.holder(1), 0, "home ", false);
        steering.assert_lives("home ");
    }
    steering.end();
}

fn answers_go_on_through_the_old_host_when_the_path_gets_shorter() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::new(2, false);
    for (to, hop) in [(1, "192.0.2.2"), (2, "192.0.2.3")] {
        let pid = if to == 1 { steering.old.pid() } else { steering.holder(1) };
        let prefix = format!("{to} ");
        let send = steering.send(&pid, &steering.receive(to, &prefix, ""), &["--steer", hop, BACK]).status();
        assert!(send.unwrap().success());
        steering.assert_lives(&prefix);
    }
    let (list, old) = (steering.list(0), steering.places[0].pid());
    for entry in list["steered"].as_array().unwrap().iter().filter(|entry| entry["answers_back"] == false) {
        let flow = format!("{}-{}", entry["local"].as_str().unwrap(), entry["remote"].as_str().unwrap());
        // That it is named twice is no reason to fail.
        succeed(&["steer", "--to", "192.0.2.3", &flow, &flow, "--netns", &old]);
    }
    steering.assert_lives("2 ");
    let list = steering.list(0);
    let steered = list["steered"].as_array().unwrap();
    let to_third = |entry: &&serde_json::Value| entry["next_hop"] == "192.0.2.3";
    assert_eq!(steered.iter().filter(to_third).count(), 2, "{list}");
    assert_eq!(steered.iter().filter(|entry| entry["answers_back"] == true).count(), 2, "{list}");
    steering.end();
}

fn a_tunnel_that_is_there_is_used_again() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::on(Lan::routed().unwrap(), 1, false);
    let hop = format!("vxlan:{}", steering.lan.hosts[1].v4);
    for turn in 0..2 {
        let pid = if turn == 0 { steering.old.pid() } else { steering.holder(0) };
        let send =
            steering.send(&pid, &steering.receive(1, "away ", ""), &["--steer", &hop]).output().unwrap();
        assert!(send.status.success(), "{send:?}");
        steering.assert_lives("away ");
        steering.move_to(&steering.holder(1), 0, "home ", false);
        steering.assert_lives("home ");
        assert_eq!(steering.lan.hosts[0].run(Tunnel::list).unwrap().len(), 1);
    }
    steering.end();
}

fn a_delivery_whose_table_is_gone_is_seen() {
    if !installed("nft") {
        return;
    }
    let steering = Steering::new(0, false);
    let (host, place) = (&steering.lan.hosts[1], steering.places[1].pid());
    let home = steering.lan.hosts[0].v4.into();
    host.run(|| Foreign::deliver(home, Numbers::default())).unwrap();
    assert_eq!(steering.list(1)["delivered"][0]["complete"], true);
    assert!(host.run(|| Command::new("nft").args(["flush", "ruleset"]).status()).unwrap().success());
    assert_eq!(steering.list(1)["delivered"][0]["complete"], false);
    let text = String::from_utf8(succeed(&["steer", "--list", "--netns", &place])).unwrap();
    assert!(text.contains("FAILED: its nftables table is gone"), "{text}");
    host.run(|| Foreign::deliver(home, Numbers::default())).unwrap();
    assert_eq!(steering.list(1)["delivered"][0]["complete"], true);
}

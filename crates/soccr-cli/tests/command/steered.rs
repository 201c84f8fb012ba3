//! `send --steer`, `receive --steered`, `steer`: the connection goes to another host, the address stays.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use soccr::steer::{Foreign, NextHop, Numbers, Tunnel, redirect};
use soccr::{Flow, pause};
use soccr_image::stream::{Message, Reader, Writer};
use soccr_lab::{Call, Flags, LIMIT, Lan, Sniffer, TcpInfo, run_and_kill, sysctl, wait_until};

use crate::kill::{BOUNDARIES, Boundary, End, READY, hand_over_by};
use crate::programs::{
    HEIR, Program, SOCCR, ask, assert_runs, connect, fail, installed, server_at, soccr, succeed,
};

crate::tests![
    steered_connections_wander_and_come_home,
    what_is_steered_is_seen_and_removed,
    a_target_that_is_not_to_deliver_refuses,
    numbers_that_others_use_are_replaced,
    a_next_hop_that_does_not_fit_is_refused_before_anything_stops,
    a_source_killed_before_it_lets_go_steers_nothing,
    a_connection_that_does_not_come_home_is_steered_again,
    a_home_that_cannot_ask_what_it_steers_refuses,
    hosts_in_other_networks_are_reached_through_a_tunnel,
    a_hand_over_that_fails_leaves_no_tunnel,
    an_end_killed_between_two_messages_leaves_no_silence,
    a_target_that_is_the_source_refuses,
    a_host_that_has_disappeared_is_seen,
    the_demonstration_wanders_among_three_hosts,
];

/// An old server on the first of three hosts, and clients at the peer.
pub struct Steering {
    pub lan: Lan,
    pub old: Program,
    pub clients: Vec<TcpStream>,
    /// A process on each host, by which its network is named.
    pub places: Vec<Program>,
    resets: Sniffer,
}

impl Steering {
    pub fn new(connections: usize, ipv6: bool) -> Self {
        Self::on(Lan::new().unwrap(), connections, ipv6)
    }

    pub fn on(lan: Lan, connections: usize, ipv6: bool) -> Self {
        let address = if ipv6 { "::" } else { "" };
        let old = lan.hosts[0].run(|| server_at(address, "old ", connections));
        let mut clients = Vec::new();
        for _ in 0..connections {
            let home: SocketAddr =
                if ipv6 { (lan.hosts[0].v6, 7).into() } else { (lan.hosts[0].v4, 7).into() };
            let mut client = lan.peer.run(|| connect(home));
            assert_eq!(ask(&mut client, "one", "old "), "old one");
            clients.push(client);
        }
        let places =
            lan.hosts.iter().map(|host| host.run(|| Program::start(Command::new("sleep").arg("1000"))));
        let places = places.collect();
        // Until the server listened there were others.
        let resets = Sniffer::flagged(&lan.peer.namespace, "eth0", Flags::RST).unwrap();
        Self { lan, old, clients, places, resets }
    }

    pub fn receive(&self, host: usize, prefix: &str, more: &str) -> String {
        let pid = self.places[host].pid();
        format!("{SOCCR} receive --netns {pid} {more} -- python3 -c '{HEIR}' '{prefix}'")
    }

    /// What moves all connections of a process.
    pub fn send(&self, pid: &str, via: &str, more: &[&str]) -> Command {
        let mut command = soccr(&["send", "--pid", pid, "--all", "--via", via]);
        command.args(more).stdout(Stdio::null());
        command
    }

    fn hop(&self, host: usize) -> [String; 4] {
        let host = &self.lan.hosts[host];
        ["--steer".into(), host.v4.to_string(), "--steer".into(), host.v6.to_string()]
    }

    pub fn move_to(&self, pid: &str, host: usize, prefix: &str, steer: bool) {
        let hop = self.hop(host);
        let more: Vec<&str> = if steer { hop.iter().map(String::as_str).collect() } else { Vec::new() };
        let status = self.send(pid, &self.receive(host, prefix, ""), &more).status().unwrap();
        assert!(status.success(), "{status}");
    }

    pub fn assert_lives(&mut self, prefix: &str) {
        for client in &mut self.clients {
            assert_eq!(ask(client, "more", prefix), format!("{prefix}more"));
        }
        assert_eq!(self.resets.segments().unwrap().len(), 0);
    }

    pub fn list(&self, host: usize) -> Value {
        let pid = self.places[host].pid();
        serde_json::from_slice(&succeed(&["steer", "--list", "--json", "--netns", &pid])).unwrap()
    }

    /// The process that has the connections on a host.
    pub fn holder(&self, host: usize) -> String {
        let pid = self.places[host].pid();
        let sockets: Vec<Value> =
            serde_json::from_slice(&succeed(&["list", "--json", "--netns", &pid])).unwrap();
        let holder = sockets.iter().find(|socket| socket["savable"] == true).expect("it has arrived");
        holder["processes"][0]["pid"].to_string()
    }

    /// Ends the programs that have received.
    pub fn end(&mut self) {
        self.clients.clear();
        for place in &self.places {
            wait_until("the heirs have ended", || {
                let sockets = succeed(&["list", "--json", "--netns", &place.pid()]);
                let sockets: Vec<Value> = serde_json::from_slice(&sockets).unwrap();
                sockets.iter().all(|socket| socket["savable"] == false)
            });
        }
    }
}

fn steered_connections_wander_and_come_home() {
    if !installed("python3") {
        return;
    }
    for ipv6 in [false, true] {
        let mut steering = Steering::new(3, ipv6);
        steering.move_to(&steering.old.pid(), 1, "second ", true);
        steering.assert_lives("second ");
        assert_eq!(steering.list(0)["steered"].as_array().unwrap().len(), 3);
        assert_eq!(steering.list(1)["delivered"].as_array().unwrap().len(), 1);
        // Through the second to the third.
        steering.move_to(&steering.holder(1), 2, "third ", true);
        steering.assert_lives("third ");
        // Home, where the steering ends by itself.
        steering.move_to(&steering.holder(2), 0, "home ", false);
        steering.assert_lives("home ");
        assert_eq!(steering.list(0)["steered"].as_array().unwrap().len(), 0);
        steering.end();
    }
}

fn what_is_steered_is_seen_and_removed() {
    if !installed("python3") || !installed("nsenter") {
        return;
    }
    let mut steering = Steering::new(2, false);
    // As on a host of its own: the target does not know that it could have been another namespace's.
    let place = steering.places[1].pid();
    let via = format!("nsenter -t {place} -n {SOCCR} receive -- python3 -c '{HEIR}' 'new '");
    let hop = steering.hop(1);
    let output = steering.send(&steering.old.pid(), &via, &[&hop[0], &hop[1]]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !said.contains("namespace"), "{said}");
    steering.assert_lives("new ");
    let [old, new, third] = [0, 1, 2].map(|host| steering.places[host].pid());
    let list = steering.list(0);
    let entry = &list["steered"][0];
    assert_eq!((&entry["answers"], &entry["closing"]), (&true.into(), &false.into()));
    assert_eq!(entry["next_hop"], steering.lan.hosts[1].v4.to_string());
    assert!(entry["packets"].as_u64().unwrap() > 0);
    let text = String::from_utf8(succeed(&["steer", "--list", "--netns", &old])).unwrap();
    assert!(text.contains("192.0.2.2 dev eth0") && text.contains("steered"), "{text}");
    let text = String::from_utf8(succeed(&["steer", "--list", "--netns", &new])).unwrap();
    assert!(text.contains("192.0.2.1") && text.contains("delivered"), "{text}");
    // To another next hop, and back.
    let flow = format!("{}-{}", entry["local"].as_str().unwrap(), entry["remote"].as_str().unwrap());
    for hop in ["192.0.2.3", "192.0.2.2"] {
        succeed(&["steer", "--to", hop, &flow, "--netns", &old]);
        let list = steering.list(0);
        assert!(list["steered"].as_array().unwrap().iter().any(|entry| entry["next_hop"] == hop));
    }
    steering.assert_lives("new ");
    succeed(&["steer", "--remove", &flow, "--netns", &old]);
    assert!(fail(1, &["steer", "--remove", &flow, "--netns", &old]).contains("not steered"));
    succeed(&["steer", "--to", "192.0.2.2", &flow, "--netns", &old]);
    steering.end();
    for pid in [&old, &new, &third] {
        succeed(&["steer", "--remove", "--all", "--netns", pid]);
    }
    for host in [0, 1] {
        let list = steering.list(host);
        assert!(list["steered"].as_array().unwrap().is_empty(), "{list}");
        assert!(list["delivered"].as_array().unwrap().is_empty(), "{list}");
    }
}

fn a_target_that_is_not_to_deliver_refuses() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::new(1, false);
    let hop = steering.hop(1);
    let never = steering.receive(1, "new ", "--steered never");
    let unsteered = steering.receive(1, "new ", "");
    for (via, more) in [(never, hop.iter().map(String::as_str).collect()), (unsteered, Vec::new())] {
        let status = steering.send(&steering.old.pid(), &via, &more).stderr(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), Some(1));
        assert_runs(&steering.old.pid());
        steering.assert_lives("old ");
    }
    let list = steering.list(0);
    assert!(list["steered"].as_array().unwrap().is_empty(), "{list}");
    steering.end();
}

fn numbers_that_others_use_are_replaced() {
    if !installed("python3") || !installed("ip") {
        return;
    }
    let mut steering = Steering::new(1, false);
    let rule = ["rule", "add", "pref", "500", "fwmark", "0x50cc", "lookup", "77"];
    assert!(steering.lan.hosts[1].run(|| Command::new("ip").args(rule).status()).unwrap().success());
    let hop = steering.hop(1);
    let hop: Vec<&str> = hop.iter().map(String::as_str).collect();
    let refused =
        steering.send(&steering.old.pid(), &steering.receive(1, "new ", ""), &hop).output().unwrap();
    let complaint = String::from_utf8_lossy(&refused.stderr);
    assert!(complaint.contains("0x50cc") && complaint.contains("other numbers"), "{complaint}");
    steering.assert_lives("old ");
    let receive = steering.receive(1, "new ", "--steered-numbers 0x51cc,2068,900");
    assert!(steering.send(&steering.old.pid(), &receive, &hop).status().unwrap().success());
    steering.assert_lives("new ");
    let delivered = &steering.list(1)["delivered"][0];
    assert_eq!((&delivered["mark"], &delivered["table"]), (&0x51cc.into(), &2068.into()));
    assert_eq!(delivered["priority"], 900);
    for wrong in ["1,2", "0,2068,900", "0x51cc,254,900", "0x51cc,2068,32766", "x,1,1"] {
        assert!(fail(2, &["receive", "--steered-numbers", wrong, "--stdio"]).contains("MARK,TABLE,PRIORITY"));
    }
    steering.end();
}

fn a_next_hop_that_does_not_fit_is_refused_before_anything_stops() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::new(1, false);
    for (hop, why) in [
        ("2001:db8::2", "no next hop for IPv4"),
        ("192.0.2.1", "of this host"),
        ("192.0.2.99", "does not answer"),
        ("198.51.100.1", "behind a router"),
        ("192.0.2.2 dev nosuch", "device nosuch"),
    ] {
        let output = steering.send(&steering.old.pid(), "true", &["--steer", hop]).output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{complaint}");
        assert!(complaint.contains(why), "{complaint}");
        steering.assert_lives("old ");
    }
    steering.end();
}

fn a_source_killed_before_it_lets_go_steers_nothing() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::new(2, false);
    // It takes a connection from its socket by connecting that to nowhere.
    let lets_go = |call: &Call| call.number == libc::SYS_connect;
    let hop = steering.hop(1);
    let hop: Vec<&str> = hop.iter().map(String::as_str).collect();
    let mut send = steering.send(&steering.old.pid(), &steering.receive(1, "new ", ""), &hop);
    assert!(run_and_kill(send.stderr(Stdio::null()), lets_go), "it was killed");
    assert_runs(&steering.old.pid());
    wait_until("nothing is steered", || steering.list(0)["steered"].as_array().unwrap().is_empty());
    steering.assert_lives("old ");
    steering.end();
}

fn a_connection_that_does_not_come_home_is_steered_again() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::new(0, false);
    let [home, away] = [0, 1].map(|host| &steering.lan.hosts[host]);
    let listener = home.run(|| TcpListener::bind((home.v4, 80))).unwrap();
    let mut peer = steering.lan.peer.run(|| TcpStream::connect((home.v4, 80))).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let flow = Flow::of(&stream).unwrap();
    away.run(|| Foreign::deliver(home.v4.into(), Numbers::default())).unwrap();
    let paused = pause(&stream).unwrap();
    let connection = paused.save().unwrap();
    let restored = away.run(|| connection.restore()).unwrap();
    home.run(|| redirect(&[flow], &NextHop::new(away.v4.into()).unwrap())).unwrap();
    paused.detach().unwrap();
    let mut stream: TcpStream = restored.resume().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let exchange = |peer: &mut TcpStream, stream: &mut TcpStream| {
        for _ in 0..2 {
            peer.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        stream.write_all(b"y").unwrap();
        peer.read_exact(&mut [0]).unwrap();
        pause(&*stream).unwrap().save().unwrap()
    };

    let (pid, place) = (steering.places[0].pid(), None);
    // The target dies, the source takes back its offer, or goes away.
    for end in ["dies", "aborts", "leaves"] {
        let connection = exchange(&mut peer, &mut stream);
        let mut receive = Program::start(
            soccr(&["receive", "--netns", &pid, "--", "true"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null()),
        );
        let mut writer = Writer::new(receive.0.stdin.take().unwrap()).unwrap();
        let begin = Message::Begin { connections: 1, answers: true, notes: false, place, steered: None };
        writer.send(&begin).unwrap();
        writer.connection(1, "one", &connection).unwrap();
        let mut reader = Reader::new(receive.0.stdout.take().unwrap()).unwrap();
        assert_eq!(reader.receive().unwrap(), Some(Message::Ready { connection: 1 }));
        // What comes now meets the socket that waits for the COMMIT.
        let before = TcpInfo::of(&peer).unwrap().total_retrans;
        peer.write_all(b"z").unwrap();
        wait_until("it has come there", || TcpInfo::of(&peer).unwrap().total_retrans > before);
        match end {
            "dies" => drop(receive),
            "aborts" => {
                writer.send(&Message::Abort { connection: 1, reason: "changed".into() }).unwrap();
                writer.finish().unwrap();
                receive.0.wait().unwrap();
            }
            _ => {
                drop(writer);
                receive.0.wait().unwrap();
            }
        }
        stream.read_exact(&mut [0]).unwrap_or_else(|error| panic!("{end}: {error}"));
    }
    exchange(&mut peer, &mut stream);
    assert_eq!(steering.resets.segments().unwrap().len(), 0);
}

/// Restored there, it would be steered away for ever.
fn a_home_that_cannot_ask_what_it_steers_refuses() {
    if !installed("python3") || !installed("nft") {
        return;
    }
    let mut steering = Steering::new(1, false);
    steering.move_to(&steering.old.pid(), 1, "second ", true);
    let nft = |command: &str| {
        let run = || Command::new("nft").args(command.split(' ')).status().unwrap();
        assert!(steering.lan.hosts[0].run(run).success(), "{command}");
    };
    // Its name is one of ours, but not its map.
    nft("add table netdev soccr-steer-x/y");
    nft("add map netdev soccr-steer-x/y to4 { type inet_service : ipv4_addr; }");
    let home = steering.receive(0, "home ", "");
    let output = steering.send(&steering.holder(1), &home, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("nft list"), "{output:?}");
    nft("delete table netdev soccr-steer-x/y");
    steering.assert_lives("second ");
    steering.move_to(&steering.holder(1), 0, "home ", false);
    steering.assert_lives("home ");
    steering.end();
}

fn hosts_in_other_networks_are_reached_through_a_tunnel() {
    if !installed("python3") {
        return;
    }
    for (ipv6, back) in [(false, false), (true, false), (false, true), (true, true)] {
        let lan = Lan::routed().unwrap();
        if back {
            // Answers from there with the address of the first host are dropped.
            lan.be_strict().unwrap();
        }
        let mut steering = Steering::on(lan, 2, ipv6);
        let tunnel = |host: usize| format!("vxlan:{}", steering.lan.hosts[host].v4);
        let [second, third] = [tunnel(1), tunnel(2)];
        let more = |tunnel| {
            let mut more = vec!["--steer", tunnel];
            more.extend(back.then_some("--return-via-source"));
            more
        };
        let via = steering.receive(1, "second ", "");
        let status = steering.send(&steering.old.pid(), &via, &more(&second)).status().unwrap();
        assert!(status.success(), "{status}");
        steering.assert_lives("second ");
        let list = steering.list(0);
        let steered = list["steered"].as_array().unwrap();
        assert_eq!(steered.iter().filter(|entry| entry["answers_back"] == false).count(), 2, "{list}");
        assert_eq!(
            steered.iter().filter(|entry| entry["answers_back"] == true).count(),
            if back { 2 } else { 0 }
        );
        // Through the second to the third.
        let via = steering.receive(2, "third ", "");
        let status = steering.send(&steering.holder(1), &via, &more(&third)).status().unwrap();
        assert!(status.success(), "{status}");
        steering.assert_lives("third ");
        // Each once, although they may arrive at the second by its tunnels and by its network.
        let list = steering.list(1);
        let steered = list["steered"].as_array().unwrap();
        assert_eq!(steered.iter().filter(|entry| entry["answers_back"] == false).count(), 2, "{list}");
        steering.move_to(&steering.holder(2), 0, "home ", false);
        steering.assert_lives("home ");
        assert!(steering.list(0)["steered"].as_array().unwrap().is_empty());
        steering.end();
        for host in 0..3 {
            let pid = steering.places[host].pid();
            succeed(&["steer", "--remove", "--all", "--netns", &pid]);
            assert_eq!(steering.lan.hosts[host].run(Tunnel::list).unwrap(), []);
        }
    }
}

fn a_hand_over_that_fails_leaves_no_tunnel() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::on(Lan::routed().unwrap(), 1, false);
    let hop = format!("vxlan:{}", steering.lan.hosts[1].v4);
    let send = |via: &str| steering.send(&steering.old.pid(), via, &["--steer", &hop, "--return-via-source"]);
    // When it is asked to end, everything is arranged for the connection.
    let boundary = (Boundary(End::Target, READY), 1);
    let status = hand_over_by(send, &steering.receive(1, "new ", ""), boundary, &[End::Target], Signal::TERM);
    assert_eq!(status.code(), Some(1));
    for host in &steering.lan.hosts[..2] {
        wait_until("nothing is left", || {
            let left = host.run(|| (Tunnel::list(), Foreign::list(), soccr::steer::Steering::list()));
            matches!(left, (Ok(a), Ok(b), Ok(c)) if a.is_empty() && b.is_empty() && c.is_empty())
        });
    }
    steering.assert_lives("old ");
    steering.end();
}

/// Through a tunnel, with answers directly and back through the old host.
fn an_end_killed_between_two_messages_leaves_no_silence() {
    if !installed("python3") {
        return;
    }
    for (turn, boundary) in BOUNDARIES.into_iter().enumerate() {
        for victim in [End::Source, End::Target] {
            let back = (turn % 2 == 0) == (victim == End::Source);
            let lan = Lan::routed().unwrap();
            if back {
                lan.be_strict().unwrap();
            }
            let mut steering = Steering::on(lan, 1, turn % 4 < 2);
            let hop = format!("vxlan:{}", steering.lan.hosts[1].v4);
            let send = |via: &str| {
                let mut send = steering.send(&steering.old.pid(), via, &["--steer", &hop]);
                send.args(back.then_some("--return-via-source")).stderr(Stdio::null());
                send
            };
            hand_over_by(send, &steering.receive(1, "new ", ""), (boundary, 1), &[victim], Signal::KILL);
            let client = &mut steering.clients[0];
            let _ = client.write_all(b"more");
            let mut answer = [0; 8];
            match client.read_exact(&mut answer) {
                Ok(()) => assert!([b"old more", b"new more"].contains(&&answer), "{answer:?}"),
                Err(error) => assert_ne!(
                    error.kind(),
                    ErrorKind::WouldBlock,
                    "silence: {victim:?} killed at {boundary:?}, back {back}"
                ),
            }
            let heard = String::from_utf8_lossy(&answer);
            eprintln!("{victim:?} dies at {boundary:?}, back {back}: {heard:?}");
            steering.end();
        }
    }
}

fn a_target_that_is_the_source_refuses() {
    if !installed("python3") {
        return;
    }
    let mut steering = Steering::new(1, false);
    let hop = steering.hop(1);
    let more: Vec<&str> = hop.iter().map(String::as_str).collect();
    let via = steering.receive(0, "new ", "");
    let output = steering.send(&steering.old.pid(), &via, &more).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(complaint.contains("this is the same one"), "{complaint}");
    steering.assert_lives("old ");
    assert!(steering.list(0)["steered"].as_array().unwrap().is_empty());
    steering.end();
}

fn a_host_that_has_disappeared_is_seen() {
    if !installed("python3") {
        return;
    }
    let steering = Steering::new(1, false);
    // What is known of a neighbour is not doubted for half a minute, usually.
    steering.lan.hosts[0].run(|| {
        for (name, value) in
            [("base_reachable_time_ms", "200"), ("retrans_time_ms", "100"), ("delay_first_probe_time", "0")]
        {
            sysctl(&format!("net/ipv4/neigh/eth0/{name}"), value).unwrap();
        }
    });
    steering.move_to(&steering.old.pid(), 1, "new ", true);
    steering.lan.hosts[1].namespace.rtnetlink().unwrap().down("eth0").unwrap();
    let old = steering.places[0].pid();
    (&steering.clients[0]).write_all(b"anybody there?").unwrap();
    wait_until("the list tells", || {
        let text = String::from_utf8(succeed(&["steer", "--list", "--netns", &old])).unwrap();
        text.contains("FAILED")
    });
}

fn the_demonstration_wanders_among_three_hosts() {
    let summary: Value =
        serde_json::from_slice(&succeed(&["demo", "--steer", "--moves", "4", "--json"])).unwrap();
    assert_eq!(
        (&summary["moves"], &summary["bytes_lost"], &summary["resets"]),
        (&4.into(), &0.into(), &0.into())
    );
}

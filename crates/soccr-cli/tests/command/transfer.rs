//! `send` and `receive`.

use std::io::{Read, Seek, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use soccr_image::stream::{Message, Writer};
use soccr_lab::{Lab, Side, wait_until};

use crate::programs::{
    HEIR, Program, SOCCR, ask, assert_runs, assert_unlocked, complaints, connect, descriptors, hear,
    installed, json, python, server_at, soccr,
};

crate::tests![
    a_connection_moves_to_another_host,
    connections_move_to_another_program_of_the_same_host,
    a_mapped_connection_moves_to_another_program_of_the_same_host,
    what_cannot_be_restored_behind_the_commit_comes_back,
    a_connection_moves_through_a_one_way_pipe,
    what_the_target_refuses_stays,
    a_target_without_room_for_all_takes_none,
    one_that_fails_does_not_hurt_the_others,
    all_connections_of_a_port_move,
    a_target_that_is_silent_changes_nothing,
    nothing_is_stopped_before_the_target_is_there,
    the_process_goes_on_when_the_target_is_late,
    a_target_that_says_too_much_is_not_listened_to,
    a_connection_comes_back_however_it_was_bound,
    a_connection_that_is_taken_late_is_not_lost,
    nothing_is_lost_of_what_a_peer_sends_meanwhile,
    only_idle_connections_leave,
    what_is_no_longer_idle_stays,
];

/// Two hosts with one address, an old server on `a`, and clients on the peer.
pub struct Move {
    pub lab: Lab,
    pub old: Program,
    pub clients: Vec<TcpStream>,
    /// A process where the connections are to go: it shows which network that is.
    pub beside: Program,
    /// That host.
    pub goal: Side,
}

impl Move {
    pub fn new(connections: usize) -> Self {
        Self::to(Side::B, connections)
    }

    pub fn to(goal: Side, connections: usize) -> Self {
        Self::from("", goal, connections)
    }

    /// The old server listens at this address.
    fn from(address: &str, goal: Side, connections: usize) -> Self {
        let lab = Lab::new().unwrap();
        let old = lab.a.run(|| server_at(address, "old ", connections));
        let mut clients = Vec::new();
        for _ in 0..connections {
            let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
            assert_eq!(ask(&mut client, "one", "old "), "old one");
            clients.push(client);
        }
        let host = if goal == Side::A { &lab.a } else { &lab.b };
        let beside = host.run(|| Program::start(Command::new("sleep").arg("1000")));
        Self { lab, old, clients, beside, goal }
    }

    /// The shell command that receives there.
    pub fn receive(&self) -> String {
        format!("{SOCCR} receive --netns {} -- python3 -c '{HEIR}' 'new '", self.beside.pid())
    }

    pub fn send(&self, arguments: &[&str]) -> Command {
        let mut command = soccr(&["send", "--pid", &self.old.pid()]);
        command.args(arguments);
        command
    }

    /// Sends, and returns exit code and complaints.
    pub fn try_send(&self, arguments: &[&str]) -> (i32, String) {
        // No pipe: the programs that receive keep standard error open.
        let mut stderr = tempfile::tempfile().unwrap();
        let status = self.send(arguments).stderr(stderr.try_clone().unwrap()).status().unwrap();
        let mut text = Vec::new();
        stderr.rewind().unwrap();
        stderr.read_to_end(&mut text).unwrap();
        (status.code().unwrap(), complaints(&text))
    }

    /// Everything goes on at the host.
    pub fn assert_lives_at(&mut self, side: Side, prefix: &str) {
        self.lab.steer(side).unwrap();
        for client in &mut self.clients {
            assert_eq!(ask(client, "more", prefix), format!("{prefix}more"));
        }
    }

    /// Ends the programs that have received, which nobody else waits for.
    pub fn end(&mut self) {
        self.clients.clear();
        let pid = self.beside.pid();
        wait_until("the heirs have ended", || {
            json(&["list", "--json", "--netns", &pid]).iter().all(|s| s["savable"] == false)
        });
    }
}

fn a_connection_moves_to_another_host() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let fd = moving.lab.a.run(|| descriptors(&moving.old.pid())).remove(0);
    assert_eq!(moving.try_send(&["--fd", &fd, "--via", &moving.receive()]), (0, String::new()));
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn connections_move_to_another_program_of_the_same_host() {
    if !installed("python3") {
        return;
    }
    // More than are answered at a time.
    let mut moving = Move::to(Side::A, 300);
    assert_eq!(moving.try_send(&["--all", "--via", &moving.receive()]), (0, String::new()));
    moving.assert_lives_at(Side::A, "new ");
    moving.clients.clear();
}

fn a_mapped_connection_moves_to_another_program_of_the_same_host() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::from("::", Side::A, 1);
    assert_eq!(moving.try_send(&["--all", "--via", &moving.receive()]), (0, String::new()));
    moving.assert_lives_at(Side::A, "new ");
    moving.clients.clear();
}

fn what_cannot_be_restored_behind_the_commit_comes_back() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::to(Side::A, 1);
    let target = Answers::refusing_behind_the_commit();
    let (code, complaint) = moving.try_send(&["--all", "--via", &target.command()]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("stays: the target cannot restore it: no room"), "{complaint}");
    assert_runs(&moving.old.pid());
    moving.lab.a.run(assert_unlocked);
    moving.assert_lives_at(Side::A, "old ");
}

/// What a target answers, in a file.
struct Answers(tempfile::NamedTempFile);

impl Answers {
    fn new(messages: &[Message]) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut answers = Writer::new(&file).unwrap();
        messages.iter().for_each(|message| answers.send(message).unwrap());
        // Whoever is to end properly says so by the last message of a second file.
        answers.flush().unwrap();
        Self(file)
    }

    fn refusing_behind_the_commit() -> Self {
        Self::new(&[
            Message::Ready { connection: 1 },
            Message::Refused { connection: 1, reason: "no room".into() },
        ])
    }

    fn path(&self) -> String {
        self.0.path().display().to_string()
    }

    /// A target that answers so, and reads to the end.
    fn command(&self) -> String {
        format!("cat {}; cat > /dev/null", self.path())
    }
}

/// Takes a connection to a listener on each kind of address, or makes one from a socket bound in each way, and echoes.
const BOUND: &str = r#"
import socket, sys
role, family, address, port, remote = sys.argv[1:]
family = socket.AF_INET6 if family == "6" else socket.AF_INET
if role == "listens":
    connection = socket.create_server((address, 7), family=family).accept()[0]
else:
    connection = socket.socket(family)
    if address:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind((address, int(port)))
    connection.connect((remote, 7))
try:
    while data := connection.recv(65536):
        connection.sendall(data)
except OSError as error:
    print("errno", error.errno, flush=True)
"#;

fn a_connection_comes_back_however_it_was_bound() {
    if !installed("python3") {
        return;
    }
    let ends = [("4", "127.0.0.1", "0.0.0.0"), ("6", "::1", "::")];
    for (family, loopback, any) in ends {
        let connects = [("", "0"), (any, "0"), (loopback, "0"), (any, "7007"), (loopback, "7008")];
        let listens = [(any, "7"), (loopback, "7")];
        let all = listens.map(|bound| ("listens", bound)).into_iter();
        for (role, (address, port)) in all.chain(connects.map(|bound| ("connects", bound))) {
            let case = format!("{role} {address} {port}");
            let run = || Program::start(&mut python(BOUND, &[role, family, address, port, loopback]));
            let end: std::net::IpAddr = loopback.parse().unwrap();
            let (old, mut client) = if role == "listens" {
                let old = run();
                (old, connect((end, 7)))
            } else {
                let listener = std::net::TcpListener::bind((end, 7)).unwrap();
                let old = run();
                (old, listener.accept().unwrap().0)
            };
            client.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
            assert_eq!(ask(&mut client, "one", ""), "one", "{case}");
            let fd = descriptors(&old.pid()).remove(0);
            let target = Answers::refusing_behind_the_commit();
            let complaint = crate::programs::fail(
                1,
                &["send", "--pid", &old.pid(), "--fd", &fd, "--via", &target.command()],
            );
            assert!(
                complaint.contains("stays: the target cannot restore it: no room"),
                "{case}: {complaint}"
            );
            assert_eq!(ask(&mut client, "more", ""), "more", "{case}");
        }
    }
}

/// A command of the shell that waits until it is told to go on.
struct Gate(tempfile::TempDir);

impl Gate {
    fn new() -> Self {
        let gate = Self(tempfile::tempdir().unwrap());
        assert!(Command::new("mkfifo").arg(gate.path()).status().unwrap().success());
        gate
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("gate")
    }

    fn command(&self) -> String {
        format!("read go < {}", self.path().display())
    }

    fn open(&self) {
        std::fs::write(self.path(), "go\n").unwrap();
    }
}

fn nothing_is_stopped_before_the_target_is_there() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(2);
    let gate = Gate::new();
    let started = gate.0.path().join("started");
    let via = format!("touch {}; {}; {}", started.display(), gate.command(), moving.receive());
    let mut send = moving.send(&["--all", "--via", &via]).spawn().unwrap();
    wait_until("the target starts", || started.exists());
    for client in &mut moving.clients {
        assert_eq!(ask(client, "meanwhile", "old "), "old meanwhile");
    }
    moving.lab.a.run(assert_unlocked);
    gate.open();
    assert_eq!(send.wait().unwrap().code(), Some(0));
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn the_process_goes_on_when_the_target_is_late() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(2);
    let fd = moving.lab.a.run(|| descriptors(&moving.old.pid())).remove(0);
    // It says hello and nothing else, and reads what it is told until the end.
    let (hello, gate) = (Answers::new(&[]), Gate::new());
    let told = tempfile::NamedTempFile::new().unwrap();
    let via = format!("cat {}; cat > {}; {}", hello.path(), told.path().display(), gate.command());
    let limit = 8;
    let mut send =
        moving.send(&["--fd", &fd, "--timeout", &limit.to_string(), "--via", &via]).spawn().unwrap();
    // Its last words: it still waits for those of the target.
    wait_until("the source has given up", || {
        let told = std::fs::read(told.path()).unwrap();
        told.windows(4).any(|bytes| bytes == b"late")
    });
    let start = std::time::Instant::now();
    for client in &mut moving.clients {
        assert_eq!(ask(client, "more", "old "), "old more");
    }
    assert!(start.elapsed().as_secs() < limit, "they were stopped for as long again");
    gate.open();
    assert_eq!(send.wait().unwrap().code(), Some(1));
    moving.lab.a.run(assert_unlocked);
}

fn a_target_that_says_too_much_is_not_listened_to() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(2);
    let (hello, answers) = (
        Answers::new(&[]),
        Answers::new(&vec![Message::Refused { connection: 1, reason: "no".into() }; 100_000]),
    );
    let record = format!("tail -c +17 {}", answers.path());
    let via = format!("cat {}; while {record}; do :; done", hello.path());
    let (code, complaint) = moving.try_send(&["--all", "--via", &via]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("stays: the target says more than there is to say"), "{complaint}");
    moving.assert_lives_at(Side::A, "old ");
}

fn a_connection_moves_through_a_one_way_pipe() {
    for goal in [Side::B, Side::A] {
        one_way(goal);
    }
}

fn one_way(goal: Side) {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::to(goal, 2);
    let (mut send, receive) = (moving.send(&["--all"]), moving.receive());
    let mut source = send.stdout(Stdio::piped()).spawn().unwrap();
    let mut shell = Command::new("sh");
    let target =
        Program::start(shell.args(["-c", &format!("exec {receive}")]).stdin(source.stdout.take().unwrap()));
    assert!(source.wait().unwrap().success());
    // The source cannot know when they have arrived; the network must not lead there before.
    let pid = moving.beside.pid();
    wait_until("they have arrived", || {
        let sockets = json(&["list", "--json", "--netns", &pid]);
        sockets.iter().filter(|socket| socket["savable"] == true).count() == 2
    });
    moving.assert_lives_at(goal, "new ");
    drop(target);
}

fn what_the_target_refuses_stays() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    // A network where the address does not exist: that of this test.
    let receive = format!("{SOCCR} receive -- true");
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive]);
    assert_eq!(code, 1, "{complaint}");
    assert!(
        complaint.contains("stays: the target refuses it") && complaint.contains("EADDRNOTAVAIL"),
        "{complaint}"
    );
    assert_runs(&moving.old.pid());
    moving.assert_lives_at(Side::A, "old ");
}

fn a_target_without_room_for_all_takes_none() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(40);
    // Enough to have them, too few to give them away.
    let receive = format!("ulimit -n 143; {}", moving.receive());
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("144 descriptors for a program: 143 are allowed"), "{complaint}");
    assert_runs(&moving.old.pid());
    moving.assert_lives_at(Side::A, "old ");
    let receive = format!("ulimit -n 144; {}", moving.receive());
    assert_eq!(moving.try_send(&["--all", "--via", &receive]), (0, String::new()));
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn one_that_fails_does_not_hurt_the_others() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(4);
    // --stdio takes one: the others stay.
    let receive = format!("{SOCCR} receive --netns {} --stdio -- cat", moving.beside.pid());
    let (code, complaint) = moving.try_send(&["--all", "--via", &receive]);
    assert_eq!(code, 3, "{complaint}");
    assert_eq!(complaint.matches("stays: the target refuses it: ").count(), 3, "{complaint}");
    assert_runs(&moving.old.pid());
    let mut moved = 0;
    for client in &mut moving.clients {
        client.write_all(b"more").unwrap();
        // Either host answers; packets go to `a` first, which is silent about what has left it.
    }
    for (index, client) in moving.clients.iter_mut().enumerate() {
        client.set_nonblocking(true).unwrap();
        let mut bytes = [0; 8];
        moving.lab.steer(Side::A).unwrap();
        wait_until("somebody answers", || {
            let answered = client.peek(&mut bytes).is_ok();
            if !answered {
                // The one that has moved.
                moving.lab.steer(Side::B).unwrap();
            }
            answered
        });
        client.set_nonblocking(false).unwrap();
        let first = hear(client, 4);
        if first == "more" {
            moved += 1;
        } else {
            assert_eq!(first + &hear(client, 4), "old more", "connection {index}");
        }
    }
    assert_eq!(moved, 1);
    moving.lab.steer(Side::B).unwrap();
    moving.end();
}

fn all_connections_of_a_port_move() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(20);
    assert_eq!(moving.try_send(&["--port", "7", "--via", &moving.receive()]), (0, String::new()));
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn a_target_that_is_silent_changes_nothing() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let (code, complaint) = moving.try_send(&["--all", "--timeout", "1", "--via", "cat >/dev/null"]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("stays:"), "{complaint}");
    moving.assert_lives_at(Side::A, "old ");
}

fn a_connection_that_is_taken_late_is_not_lost() {
    if !installed("python3") {
        return;
    }
    let moving = Move::new(1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("answers");
    let mut answers = Writer::new(std::fs::File::create(&path).unwrap()).unwrap();
    answers.send(&Message::Ready { connection: 1 }).unwrap();
    let ready = std::fs::metadata(&path).unwrap().len();
    answers.send(&Message::Taken { connection: 1 }).unwrap();
    answers.finish().unwrap();
    let path = path.display();
    let target = format!("head -c {ready} {path}; sleep 1.5; tail -c +{} {path}; cat > /dev/null", ready + 1);
    assert_eq!(moving.try_send(&["--all", "--timeout", "1", "--via", &target]), (0, String::new()));
}

/// Reads as little as can be: what it has read would be lost with it.
const IDLE: &str = r#"
import socket, time
connection = socket.create_server(("", 7)).accept()[0]
time.sleep(1000)
"#;

const COUNTING: &str = r#"
import os, socket, sys
connection = socket.socket(fileno=3)
expected = 0
while data := connection.recv(65536):
    for byte in data:
        assert byte == expected % 251, expected
        expected += 1
os.rename(sys.argv[1], sys.argv[2] + str(expected))
"#;

fn nothing_is_lost_of_what_a_peer_sends_meanwhile() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(path("counting"), "").unwrap();
    let lab = Lab::new().unwrap();
    let old = lab.a.run(|| Program::start(&mut python(IDLE, &[])));
    let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
    let beside = lab.b.run(|| Program::start(Command::new("sleep").arg("1000")));
    let bytes: Vec<u8> = (0..20_000_000).map(|i| (i % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            client.write_all(&bytes).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let receive = format!(
            "{SOCCR} receive --netns {} -- python3 -c '{COUNTING}' {} {}",
            beside.pid(),
            path("counting"),
            path("counted-")
        );
        let mut send = soccr(&["send", "--pid", &old.pid(), "--all", "--via", &receive]);
        assert!(send.status().unwrap().success());
        lab.steer(Side::B).unwrap();
        let counted = path(&format!("counted-{}", bytes.len()));
        wait_until("all bytes have arrived", || std::fs::exists(&counted).unwrap());
    });
}

impl Move {
    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.old.pid()]).status().unwrap().success());
    }

    /// Stops the old server: from here on it reads nothing.
    fn stop(&self) {
        self.signal("-STOP");
        let threads = format!("/proc/{}/task", self.old.pid());
        wait_until("all its threads are stopped", || {
            std::fs::read_dir(&threads).unwrap().all(|thread| {
                let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
                status.contains("State:\tT")
            })
        });
    }

    /// The first client says something, which waits in the queue of the stopped server.
    fn say_unread(&mut self) {
        self.clients[0].write_all(b"unread").unwrap();
        wait_until("it has arrived", || {
            let sockets = json(&["list", "--json", "--pid", &self.old.pid(), "--state", "established"]);
            sockets.iter().any(|socket| socket["receive_queue"] == 6)
        });
    }

    /// The first connection is where it was, with everything that was said to it; the others have moved.
    fn assert_first_stays(&mut self) {
        // While it has nothing to say: at the other host its packets would draw a reset.
        let first = self.clients.remove(0);
        self.assert_lives_at(Side::B, "new ");
        self.lab.steer(Side::A).unwrap();
        self.signal("-CONT");
        self.clients = vec![first];
        assert_eq!(hear(&mut self.clients[0], 10), "old unread");
        self.assert_lives_at(Side::A, "old ");
    }
}

fn only_idle_connections_leave() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(3);
    let (code, complaint) = moving.try_send(&["--all", "--idle", "86400", "--via", &moving.receive()]);
    assert_eq!(code, 1, "{complaint}");
    assert!(complaint.contains("no connection has been idle for 86400 s"), "{complaint}");
    moving.stop();
    moving.say_unread();
    let (code, complaint) = moving.try_send(&["--all", "--idle", "0", "--via", &moving.receive()]);
    assert_eq!(code, 0, "{complaint}");
    assert!(complaint.contains("1 of 3 connections are in use, and stay"), "{complaint}");
    moving.assert_first_stays();
}

fn what_is_no_longer_idle_stays() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(3);
    moving.stop();
    let directory = tempfile::tempdir().unwrap();
    let [chosen, said] = ["chosen", "said"].map(|name| directory.path().join(name));
    let via = format!(
        "touch {}; until [ -e {} ]; do sleep 0.1; done; {}",
        chosen.display(),
        said.display(),
        moving.receive()
    );
    let mut complaints = tempfile::tempfile().unwrap();
    let mut sending = moving.send(&["--all", "--idle", "0", "--timeout", "60", "--via", &via]);
    let mut sending = sending.stderr(complaints.try_clone().unwrap()).spawn().unwrap();
    wait_until("the connections are chosen", || chosen.exists());
    moving.say_unread();
    std::fs::write(&said, "").unwrap();
    let code = sending.wait().unwrap().code();
    let mut complaint = String::new();
    complaints.rewind().unwrap();
    complaints.read_to_string(&mut complaint).unwrap();
    assert_eq!(code, Some(3), "{complaint}");
    assert!(complaint.contains("stays: it is in use again (--idle)"), "{complaint}");
    moving.assert_first_stays();
}

//! `send` and `receive`.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use soccr::Connection;
use soccr_lab::{Lab, Side, let_fail, wait_until};

use crate::programs::{
    HEIR, Program, SOCCR, Said, ask, complaints, connect, descriptors, installed, json, python,
    server_command, soccr, succeed,
};

crate::tests![
    a_connection_moves_to_another_host,
    connections_move_to_another_program_of_the_same_host,
    a_mapped_connection_moves_to_another_program_of_the_same_host,
    a_connection_moves_through_a_one_way_pipe,
    a_connection_moves_through_a_file_that_takes_nothing_at_once,
    all_connections_of_a_port_move,
    nothing_is_lost_of_what_a_peer_sends_meanwhile,
    a_source_ends_though_the_program_lives,
    a_detached_program_outlives_its_target,
    a_program_outlives_the_relay_that_kills_what_it_has_started,
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
    /// Where the source works.
    pub directory: PathBuf,
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
        Self::of(&mut server_command(address, "old ", connections), goal, connections, |_| {})
    }

    /// The old server is this one; the clients do something before they ask.
    pub fn of(server: &mut Command, goal: Side, connections: usize, begin: impl Fn(&TcpStream)) -> Self {
        let lab = Lab::new().unwrap();
        let old = lab.a.run(|| Program::start(server));
        let mut clients = Vec::new();
        for _ in 0..connections {
            let mut client = lab.peer.run(|| connect((lab.a.v4, 7)));
            begin(&client);
            assert_eq!(ask(&mut client, "one", "old "), "old one");
            clients.push(client);
        }
        let host = if goal == Side::A { &lab.a } else { &lab.b };
        let beside = host.run(|| Program::start(Command::new("sleep").arg("1000")));
        Self { lab, old, clients, beside, goal, directory: ".".into() }
    }

    /// The shell command that receives there.
    pub fn receive(&self) -> String {
        format!("{SOCCR} receive --netns {} -- python3 -c '{HEIR}' 'new '", self.beside.pid())
    }

    pub fn send(&self, arguments: &[&str]) -> Command {
        let mut command = soccr(&["send", "--pid", &self.old.pid()]);
        command.args(arguments).current_dir(&self.directory);
        command
    }

    /// Sends, and returns exit code and complaints.
    pub fn try_send(&self, arguments: &[&str]) -> (i32, String) {
        let said = Said::new();
        let status = self.send(arguments).stderr(said.output()).status().unwrap();
        (status.code().unwrap(), complaints(said.read().as_bytes()))
    }

    /// The first connection of the old server, which keeps it.
    pub fn saved(&self) -> Connection {
        let fd = self.lab.a.run(|| descriptors(&self.old.pid())).remove(0);
        let image = succeed(&["save", "--keep", "--pid", &self.old.pid(), "--fd", &fd]);
        soccr_image::read(&image[..]).unwrap()
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

fn a_source_ends_though_the_program_lives() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    // Reads standard error to its end.
    let output = moving.send(&["--all", "--via", &moving.receive()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    moving.assert_lives_at(Side::B, "new ");
    moving.end();
}

fn a_detached_program_outlives_its_target() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut moving = Move::new(1);
    let send = |moving: &Move, program: &str, code: &str, exit: i32| {
        let (log, code) = (path("log"), path(code));
        let receive = format!("{SOCCR} receive --detach --log {} --netns", log.display());
        let via = format!(
            "cd {}; {receive} {} -- {program}; echo $? > {}",
            directory.path().display(),
            moving.beside.pid(),
            code.display()
        );
        assert_eq!(moving.send(&["--all", "--via", &via]).output().unwrap().status.code(), Some(exit));
        wait_until("the target has ended", || code.metadata().is_ok_and(|file| file.len() > 1));
        std::fs::read_to_string(code).unwrap()
    };
    let server = path("server").to_str().unwrap().to_owned();
    executable(&server, &format!("echo begins >&2\nexec python3 -c '{HEIR}' 'new '"));
    assert_eq!(send(&moving, "./server", "code", 0), "0\n");
    moving.assert_lives_at(Side::B, "new ");
    assert_eq!(std::fs::read_to_string(path("log")).unwrap(), "begins\n");
    moving.end();
    let moving = Move::new(1);
    let [_, hidden] = crate::rescue::broken_programs(directory.path());
    assert_eq!(send(&moving, &hidden, "failed", 3), "126\n");
}

fn a_program_outlives_the_relay_that_kills_what_it_has_started() {
    if !installed("python3") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (server, fifo) = (path("server"), path("fifo"));
    executable(&server, &format!("exec python3 -c '{HEIR}' 'new '"));
    // A whole group when the stream has ended; and socat, which waits for half a second and kills one process.
    let group = "exec 3<&0; mkfifo FIFO; setsid RECEIVE <&3 3<&- >FIFO & cat FIFO; kill -TERM -$!";
    let socat = "socat - 'EXEC:RECEIVE,pipes'";
    for (number, relay) in [group, socat].into_iter().enumerate() {
        if relay == socat && !installed("socat") {
            continue;
        }
        let mut moving = Move::new(1);
        let killed = path(&format!("killed{number}"));
        let receive = format!("{SOCCR} receive --netns {} -- {server}", moving.beside.pid());
        let via = format!("{}; : > {killed}", relay.replace("RECEIVE", &receive).replace("FIFO", &fifo));
        assert_eq!(moving.try_send(&["--all", "--via", &via]), (0, String::new()), "{relay}");
        wait_until("the relay has killed", || Path::new(&killed).exists());
        moving.assert_lives_at(Side::B, "new ");
        moving.end();
    }
}

/// Writes a script of sh(1).
fn executable(path: &str, script: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
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
    arrive(&mut moving);
    drop(target);
}

/// The source cannot know when they have arrived; the network must not lead there before.
fn arrive(moving: &mut Move) {
    let pid = moving.beside.pid();
    wait_until("they have arrived", || {
        let sockets = json(&["list", "--json", "--netns", &pid]);
        sockets.iter().filter(|socket| socket["savable"] == true).count() == moving.clients.len()
    });
    moving.assert_lives_at(moving.goal, "new ");
}

/// Btrfs answers like this where it copies on write, and XFS where it has to change the time of a file.
fn a_connection_moves_through_a_file_that_takes_nothing_at_once() {
    if !installed("python3") {
        return;
    }
    let mut moving = Move::new(1);
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut send = moving.send(&["--all"]);
    let_fail(&mut send, libc::SYS_pwritev2, 1, libc::EAGAIN);
    assert!(send.stdout(file.reopen().unwrap()).status().unwrap().success());
    let receive = format!("exec {} < {}", moving.receive(), file.path().display());
    let target = Program::start(Command::new("sh").args(["-c", &receive]));
    arrive(&mut moving);
    drop(target);
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

/// Reads as little as can be: what it has read would be lost with it.
const IDLE: &str = r#"
import signal, socket
connection = socket.create_server(("", 7)).accept()[0]
signal.pause()
"#;

const COUNTING: &str = r#"
import os, socket, sys
connection = socket.socket(fileno=3)
pattern = bytes(range(251)) * 300 # longer than what is read at once, from each place in it
expected = 0
while data := connection.recv(65536):
    start = expected % 251
    assert data == pattern[start:start + len(data)], expected
    expected += len(data)
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
